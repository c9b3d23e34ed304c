"""Save at one world size, go on at another: the same run. A broken checkpoint is refused, and the one before it used."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from moe_tools.pretrain import PretrainConfig, Trainer, checkpoint, pretrain

from .programs import loaded_state, run_pretrain
from .test_training import SMALL


def config_for(folder, **options):
    """A run in which the loss-free bias has to survive as well as AdamW's moments."""
    router = {"router": "loss_free", "moe": {"router_options": {"bias_update_rate": 0.05}}}
    return PretrainConfig(
        **{
            **SMALL,
            **router,
            "steps": 6,
            "save_every": 3,
            "eval_every": 0,
            "out": str(folder),
            **options,
        }
    )


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(gangs, tmp_path_factory):
    """Six steps on four ranks, EP=4, with checkpoints after 3 and 6. Not to be changed: copy it."""
    folder = tmp_path_factory.mktemp("run") / "run"
    gangs(4).run(run_pretrain, (config_for(folder, ep_size=4), False))
    return folder


@pytest.fixture
def halfway(run, tmp_path):
    """A copy of it as it was after three steps, but with the log of all six."""
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    return tmp_path / "run"


def go_on(gangs, folder, n_ranks, **options):
    config = config_for(folder, **options)
    gangs(n_ranks).run(run_pretrain, (config, True)) if n_ranks > 1 else pretrain(
        config, resume=True
    )


@pytest.mark.parametrize(
    ("n_ranks", "options"),
    [
        (1, {}),
        (2, {"ep_size": 2}),
        (2, {"ep_size": 1}),
        (4, {"ep_size": 2}),
        (4, {"ep_size": 4}),
        (2, {"ep_size": 2, "placement": "round_robin"}),
        (2, {"ep_size": 2, "placement": "by_load"}),
        (4, {"ep_size": 4, "placement": "by_load", "replicas": 4}),
        (4, {"ep_size": 2, "placement": "by_load", "replicas": 2}),
    ],
    ids=str,
)
def test_saved_at_ep_4_the_run_goes_on_at_any_world_size_and_placement(
    gangs, run, halfway, n_ranks, options
):
    before = log(halfway)
    go_on(gangs, halfway, n_ranks, **options)
    after = log(halfway)
    assert [record["step"] for record in after] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]  # what came after the checkpoint is done again
    for found, wanted in zip(after[3:], before[3:], strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-5)
        assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
        assert found["load"] == wanted["load"]


@pytest.mark.parametrize(
    ("n_ranks", "options"),
    [(2, {"ep_size": 2}), (4, {"ep_size": 2, "placement": "round_robin"}), (4, {"ep_size": 4})],
    ids=str,
)
def test_weights_optimiser_state_and_bias_come_back_bit_for_bit(gangs, run, n_ranks, options):
    wanted = loaded_state(0, config_for(run))
    assert {name.split(".")[0] for name in wanted} == {
        "model",
        "exp_avg",
        "exp_avg_sq",
        "step",
    } and wanted["step"] == 6
    assert wanted["model.blocks.0.feed_forward.router.expert_bias"].abs().max() > 0.04
    assert all(
        tensor.abs().sum() > 0 for name, tensor in wanted.items() if name.startswith("exp_avg")
    )
    seen = set()
    for state in gangs(n_ranks).run(loaded_state, config_for(run, **options)):
        seen |= set(state)
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in state.items())
    assert seen == set(wanted)


def test_at_the_same_world_size_noise_is_drawn_as_if_nothing_had_happened(gangs, tmp_path):
    options = {"router": "noisy_topk", "moe": {"dropout": 0.1}, "ep_size": 2}
    gangs(2).run(run_pretrain, (config_for(tmp_path / "run", **options), False))
    wanted = log(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    go_on(gangs, tmp_path / "run", 2, **options)
    assert [record["loss"] for record in log(tmp_path / "run")] == [
        record["loss"] for record in wanted
    ]


def test_every_expert_is_one_entry_and_nothing_is_pickled(run):
    files = {path.suffix for path in (run / "checkpoints").rglob("*") if path.is_file()}
    assert files == {".safetensors", ".json"}
    names = loaded_state(0, config_for(run))
    assert {
        f"model.blocks.1.feed_forward.experts.down_proj.{expert}" for expert in range(8)
    } <= set(names)


def spoil_cut(path):
    file = max(path.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-100])
    return "bytes, was written with"


def spoil_missing(path):
    next(path.glob("shard-00002*")).unlink()
    return "No such file"


def spoil_bit(path):
    file = next(path.glob("shard-00003*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    return "does not hold the bytes that were written"


def spoil_record(path):
    (path / "checkpoint.json").write_text('{"step": 6')
    return "is broken"


def spoil_no_record(path):
    (path / "checkpoint.json").unlink()
    return "is broken"


@pytest.mark.parametrize(
    "spoil", [spoil_cut, spoil_missing, spoil_bit, spoil_record, spoil_no_record]
)
def test_a_broken_checkpoint_is_refused_with_the_reason_and_the_one_before_is_used(
    run, tmp_path, spoil
):
    shutil.copytree(run, tmp_path / "run")
    config = config_for(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000006"
    reason = spoil(newest)
    trainer = Trainer(config)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    with pytest.raises(checkpoint.BrokenCheckpoint, match=reason):
        checkpoint.load(newest, trainer.model, trainer.optimizer)
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items()
    )
    with pytest.warns(UserWarning, match="trying the one before it"):
        assert checkpoint.newest(newest.parent).name == "step-00000003"


def test_a_checkpoint_that_was_never_finished_is_no_checkpoint(halfway):
    """What a crash while saving leaves: a folder with another name."""
    (halfway / "checkpoints" / "step-00000003").rename(
        halfway / "checkpoints" / "step-00000003.part"
    )
    assert checkpoint.newest(halfway / "checkpoints") is None


def test_the_checkpoint_after_which_a_save_broke_off_stays(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    trainer = Trainer(config_for(tmp_path / "run"))
    monkeypatch.setattr(
        checkpoint.dcp,
        "save",
        lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no space left")),
    )
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(tmp_path / "run" / "checkpoints", 9, trainer.model, trainer.optimizer)
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").name == "step-00000006"


def test_a_folder_that_holds_a_run_is_not_written_over(run):
    with pytest.raises(
        FileExistsError, match="add --resume to go on with it, or give another --out"
    ):
        pretrain(config_for(run))


def test_another_model_is_refused(halfway):
    with pytest.raises(
        ValueError,
        match=r"the checkpoint holds another model than was asked for: n_layers=3 \(was 2\)",
    ):
        pretrain(replace(config_for(halfway), n_layers=3), resume=True)


def test_resuming_a_finished_run_does_nothing(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    assert pretrain(config_for(tmp_path / "run"), resume=True).name == "step-00000006"
    assert log(tmp_path / "run") == log(run)
