"""The command line: alone, under torchrun, told to stop, and with a rank that dies or hangs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from moe_tools import diagnosis
from moe_tools.diagnosis.routing_log import RoutingLog
from moe_tools.pretrain import checkpoint
from moe_tools.pretrain.__main__ import main

ROOT = Path(__file__).parents[2]
TINY = [
    "--d-model",
    "32",
    "--d-ff",
    "32",
    "--n-heads",
    "2",
    "--n-experts",
    "4",
    "--seq-len",
    "32",
    "--batch-size",
    "8",
    "--save-every",
    "5",
]
ENDLESS = ["--steps", "1000000", "--eval-every", "0"]
# Seconds. Limits for what hangs, not measures of speed: on a busy machine a rank may take a minute to start.
PATIENCE = 600
WITHIN = 300  # in which the others must have ended; less than the time-out of a collective, which they must not have waited for
TIMEOUT = ["--timeout", "900"]

pytestmark = pytest.mark.processes


def environment(**more):
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        **more,
    }


def run(command, out, *flags, timeout=PATIENCE):
    return subprocess.run(
        [*command, *TINY, *flags, "--out", str(out)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


ALONE = [sys.executable, "-m", "moe_tools.pretrain"]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "moe_tools.pretrain",
    "--ep-size",
    "2",
]


def log(out):
    file = Path(out) / "log.jsonl"
    return (
        [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
        if file.exists()
        else []
    )


class Ranks:
    """Processes as torchrun starts them, which keeps the store by which they meet; each has its own standard error. All are ended when
    the block is left."""

    def __init__(self, n_ranks, out, *flags, own_folders=False):
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.errors = [open(f"{out}.{rank}.txt", "w+") for rank in range(n_ranks)]
        self.processes = [
            subprocess.Popen(
                [*ALONE, *TINY, *flags, "--out", f"{out}-{rank}" if own_folders else str(out)],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=self.errors[rank],
                env=environment(
                    RANK=str(rank),
                    WORLD_SIZE=str(n_ranks),
                    LOCAL_RANK=str(rank),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(self.store.port),
                    TORCHELASTIC_USE_AGENT_STORE="True",
                ),
            )
            for rank in range(n_ranks)
        ]
        self.out = out

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()
        for file in self.errors:
            file.close()

    def wait_for(self, ready):
        end = time.monotonic() + PATIENCE
        while not ready():
            assert time.monotonic() < end and all(
                process.poll() is None for process in self.processes
            ), self.said(0)
            try:
                self.processes[0].wait(0.05)
            except subprocess.TimeoutExpired:
                pass

    def said(self, rank):
        return Path(self.errors[rank].name).read_text()

    def after_a_checkpoint(self):
        """In the middle of a step some time after the first checkpoint."""
        self.wait_for(lambda: len(log(self.out)) >= 8)

    def ends_of(self, ranks):
        """Exit codes and messages of these ranks, which must end in time."""
        end = time.monotonic() + WITHIN
        codes = [self.processes[rank].wait(max(0.1, end - time.monotonic())) for rank in ranks]
        return codes, [re.findall(r"^error: .*", self.said(rank), re.MULTILINE) for rank in ranks]


def test_one_process_trains_and_logs_and_saves(tmp_path):
    done = run(ALONE, tmp_path / "first", "--steps", "20")
    assert done.returncode == 0, done.stderr
    records = log(tmp_path / "first")
    assert [record["step"] for record in records] == list(range(1, 21)) and records[-1][
        "loss"
    ] < records[0]["loss"] - 1
    assert records[-1]["valid_loss"] < 5 and {
        "lr",
        "grad_norm",
        "load",
        "max_violation",
        "drop_rate",
        "tokens",
        "seconds",
    } <= set(records[0])
    saved = sorted(path.name for path in (tmp_path / "first" / "checkpoints").iterdir())
    assert saved == [f"step-{step:08d}" for step in (5, 10, 15, 20)]
    assert json.loads((tmp_path / "first" / "config.json").read_text())["steps"] == 20
    assert "20/20" in done.stderr  # the progress bar


def test_after_a_hundred_steps_the_run_says_what_looks_ill_and_keeps_what_that_rests_on(tmp_path):
    done = run(
        ALONE,
        tmp_path / "ill",
        "--steps",
        "100",
        "--eval-every",
        "0",
        "--save-every",
        "100",
        "--aux-loss-weight",
        "0",
        "--lr",
        "0.02",
    )
    assert done.returncode == 0, done.stderr
    routing_log = RoutingLog.from_dict(
        json.loads((tmp_path / "ill" / "routing_log.json").read_text())
    )
    for records in (routing_log.training, routing_log.evaluation):
        assert [step.step for step in records] == [20, 40, 60, 80, 100]
    assert all(step.costs.step_seconds > 0 for step in routing_log.training)
    assert not {"padding counted", "train-eval gap"} & set(diagnosis.diagnose(routing_log).unasked)
    assert (
        str(diagnosis.diagnose(routing_log)) in done.stdout
        and "5 logged steps (20 to 100), 2 MoE layers" in done.stdout
    )


def test_with_two_ranks_it_can_be_asked_for_stragglers_and_slow_exchanges_too(tmp_path):
    done = run(TORCHRUN, tmp_path / "spread", "--steps", "100", "--save-every", "100")
    assert done.returncode == 0, done.stderr
    routing_log = RoutingLog.from_dict(
        json.loads((tmp_path / "spread" / "routing_log.json").read_text())
    )
    for step, record in zip(routing_log.training, log(tmp_path / "spread")[19::20]):
        assert 0 < step.costs.all_to_all_seconds < step.costs.step_seconds
        kept = [
            load * (1 - rate)
            for loads, rate in zip(record["load"], record["drop_rate"])
            for load in loads
        ]
        assert sum(step.costs.rank_rows) == pytest.approx(sum(kept))
    unasked = diagnosis.diagnose(routing_log).unasked
    assert not {"straggler rank", "slow all-to-all", "train-eval gap"} & set(unasked)


def test_torchrun_with_two_ranks_gives_the_same_losses_and_resumes_in_one_process(tmp_path):
    alone = run(ALONE, tmp_path / "first", "--steps", "6", "--micro-batch-size", "4")
    spread = run(TORCHRUN, tmp_path / "second", "--steps", "6")
    assert spread.returncode == 0, spread.stderr
    losses = [[record["loss"] for record in log(tmp_path / name)] for name in ("first", "second")]
    assert alone.returncode == 0 and losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert "2 processes, ep_size 2" in spread.stderr + spread.stdout
    more = run(ALONE, tmp_path / "second", "--steps", "8", "--resume")
    assert more.returncode == 0 and [record["step"] for record in log(tmp_path / "second")] == list(
        range(1, 9)
    )


def test_a_file_of_options_and_a_key_that_is_none(tmp_path):
    (tmp_path / "run.toml").write_text("steps = 2\nlearning_rate = 0.1\n")
    done = run(ALONE, tmp_path / "out", "--config", str(tmp_path / "run.toml"))
    assert (
        done.returncode == 2
        and "unknown keys in PretrainConfig: learning_rate; known are steps, out" in done.stderr
    )
    assert not (tmp_path / "out").exists()


def test_spread_experts_without_torchrun_is_an_error_of_one_line(tmp_path):
    done = run(ALONE, tmp_path / "out", "--ep-size", "2")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        "error: ep_size=2 needs 2 processes: torchrun --standalone --nproc-per-node 2 -m moe_tools.pretrain"
        in done.stderr
    )


@pytest.mark.parametrize("told", [0, 1])
def test_when_one_rank_is_told_to_stop_all_finish_the_step_save_and_end_well(tmp_path, told):
    with Ranks(
        2, tmp_path / "run", *ENDLESS, *TIMEOUT, "--save-every", "1000000", "--ep-size", "2"
    ) as ranks:
        ranks.wait_for(lambda: len(log(ranks.out)) >= 3)
        ranks.processes[told].send_signal(signal.SIGTERM)
        codes, _ = ranks.ends_of([0, 1])
    assert codes == [0, 0], ranks.said(1)
    last = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert checkpoint.check(last)["step"] == log(tmp_path / "run")[-1]["step"] >= 3


@pytest.mark.parametrize("victim", [3, 0])
def test_when_a_rank_is_killed_in_a_step_the_others_end_and_name_it_and_the_checkpoint_is_whole(
    tmp_path, victim
):
    with Ranks(4, tmp_path / "run", *ENDLESS, *TIMEOUT, "--ep-size", "4") as ranks:
        ranks.after_a_checkpoint()
        ranks.processes[victim].kill()
        others = [rank for rank in range(4) if rank != victim]
        codes, messages = ranks.ends_of(others)
        said = "\n".join(ranks.said(rank) for rank in others)
    assert codes == [1, 1, 1], said
    for rank, [message] in zip(others, messages, strict=True):
        assert (
            message.startswith(f"error: rank {rank}: rank {victim} of 4 gone or silent in step ")
            and "timeout 900 s" in message
        ), said
        assert re.search(r"the last checkpoint is .*step-0000", message)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is not None


def test_when_a_rank_hangs_the_others_give_it_up_after_the_timeout(tmp_path):
    with Ranks(2, tmp_path / "run", *ENDLESS, "--ep-size", "2", "--timeout", "10") as ranks:
        ranks.after_a_checkpoint()
        ranks.processes[1].send_signal(signal.SIGSTOP)
        codes, [[message]] = ranks.ends_of([0])
    assert codes == [1] and "rank 1 of 2 gone or silent" in message and "timeout 10 s" in message


def test_a_run_that_diverges_stops_saves_nothing_of_it_and_says_what_to_do(tmp_path):
    done = run(ALONE, tmp_path / "hot", "--steps", "200", "--lr", "1e20")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    [message] = re.findall(r"^error: .*", done.stderr, re.MULTILINE)
    assert re.search(r"step \d+: .*(nan|inf|NaN|infinite)", message) and "lower lr" in message
    text = (tmp_path / "hot" / "log.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    for path in (tmp_path / "hot" / "checkpoints").glob("step-*"):
        assert checkpoint.check(path)["step"] <= len(log(tmp_path / "hot"))


def test_what_is_resumed_keeps_its_options_says_what_changed_and_refuses_another_model(tmp_path):
    out = tmp_path / "run"
    options = ["--lr", "0.01", "--seed", "3", "--router", "loss_free"]
    assert run(ALONE, out, "--steps", "5", *options).returncode == 0
    bare = [*ALONE, "--resume", "--out", str(out)]
    more = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True}
    done = subprocess.run([*bare, "--steps", "8"], timeout=PATIENCE, **more)
    assert done.returncode == 0 and "other options" not in done.stdout + done.stderr, done.stderr
    stored = json.loads((out / "config.json").read_text())
    kept = {name: stored[name] for name in ("lr", "seed", "router", "batch_size", "steps")}
    assert kept == {"lr": 0.01, "seed": 3, "router": "loss_free", "batch_size": 8, "steps": 8}
    done = subprocess.run([*bare, "--steps", "9", "--lr", "0.02"], timeout=PATIENCE, **more)
    assert "other options than before: lr=0.02 (was 0.01)" in done.stdout + done.stderr
    done = subprocess.run([*bare, "--n-experts", "8"], timeout=PATIENCE, **more)
    assert done.returncode == 1
    assert done.stderr.count("error:") == 1 and done.stderr.rstrip().endswith(
        "the checkpoint holds another model than was asked for: n_experts=8 (was 4)"
    )


def test_ctrl_c_finishes_the_step_and_saves(tmp_path):
    with Ranks(1, tmp_path / "run", *ENDLESS, "--save-every", "1000000") as ranks:
        ranks.wait_for(lambda: len(log(ranks.out)) >= 3)
        ranks.processes[0].send_signal(signal.SIGINT)
        codes, _ = ranks.ends_of([0])
    assert codes == [0] and "Traceback" not in ranks.said(0)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints") is not None


def test_a_folder_in_which_a_run_is_going_on_is_not_taken_twice_and_only_the_newest_are_kept(
    tmp_path,
):
    with Ranks(1, tmp_path / "run", *ENDLESS, "--keep", "2") as ranks:
        ranks.wait_for(lambda: len(log(ranks.out)) >= 12)
        again = run(ALONE, tmp_path / "run", "--resume", *ENDLESS)
        assert again.returncode == 1 and "a run is going on in" in again.stderr
        ranks.processes[0].send_signal(signal.SIGTERM)
        assert ranks.ends_of([0])[0] == [0]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


def test_ranks_that_do_not_share_the_folder_are_told_at_the_first_checkpoint(tmp_path):
    with Ranks(2, tmp_path / "run", "--steps", "9", "--ep-size", "2", own_folders=True) as ranks:
        codes, messages = ranks.ends_of([0, 1])
    assert codes == [1, 1], ranks.said(0)
    for [message] in messages:
        assert "rank 0 sees 1 of 2 ranks in" in message and "share" in message
    assert not list(tmp_path.glob("run*/checkpoints/step-*[0-9]"))


@pytest.mark.parametrize(
    "flags, status, said",
    [
        (["--out", ""], 2, "out='' must name a folder"),
        (["--text", "hf:none"], 1, "needs the package datasets"),
        (["--text", "/nowhere.txt"], 1, "must be 'builtin'"),
        (["--out", __file__ + "/below"], 1, "Not a directory"),
        (["--config", __file__], 2, "is not JSON"),
    ],
)
def test_what_is_wrong_around_a_run_is_an_error_of_one_line(
    tmp_path, monkeypatch, capfd, flags, status, said
):
    assert in_this_process(monkeypatch, ["--out", str(tmp_path / "out"), *flags]) == status
    errors = capfd.readouterr().err
    assert said in errors and "Traceback" not in errors


def test_a_rank_without_torchrun_is_told_so(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "0")
    assert in_this_process(monkeypatch, ["--out", str(tmp_path / "out")]) == 1
    assert "start the run with torchrun, or unset RANK" in capfd.readouterr().err


def in_this_process(monkeypatch, flags) -> int:
    """The exit status of the command line."""
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["pretrain", *TINY, "--steps", "1", *flags])
    try:
        return main()
    except SystemExit as ended:
        return ended.code
