"""A training run from start to end: progress, log, checkpoints, and a clean end."""

import fcntl
import json
import signal
import threading
import time
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from .. import diagnosis
from ..diagnosis.routing_log import RoutingLog
from . import checkpoint
from .heartbeat import Heartbeat
from .pretrain_config import PretrainConfig
from .sharded_optimizer import local
from .trainer import Diverged, Trainer

ENOUGH = 5  # logged steps, one in twenty: fewer say more about the start than about the run


class RankLost(RuntimeError):
    """The ranks cannot go on together.

    The message names those that are missing or have ended, the step and the last checkpoint.
    """


def pretrain(
    config: PretrainConfig, *, resume: bool = False, heartbeat: Heartbeat | None = None
) -> Path:
    """Train, log and save. Under torch.distributed every rank calls it.

    Writes to ``config.out``: config.json, log.jsonl (one line a step: loss and aux_loss in nats per
    byte, lr, grad_norm, max_violation and drop_rate by layer, tokens, seconds; valid_loss where it
    was measured), checkpoints/, and after a hundred steps routing_log.json, from which it says at
    the end what looks ill (``diagnosis.diagnose``).

    Args:
        resume: go on from the last whole checkpoint; a new run where there is none.
        heartbeat: by which ranks find out who is missing; None where nobody asks.

    Returns:
        The last checkpoint.

    Raises:
        FileExistsError: the folder holds a run, and resume is False; or a run is going on there.
        ValueError: the config does not fit the processes, or the checkpoint holds another model.
        RankLost: another rank died or did not answer within ``config.timeout`` seconds.
        Diverged: a loss, a gradient or a weight is not finite. Nothing of that step is saved.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or threads)
    out, trainer = Path(config.out), None
    try:
        trainer = Trainer(config)
        with _told_to_stop() as told, closing(_Log(out, trainer, resume)) as log:
            return _steps(trainer, log, out / "checkpoints", told)
    except RuntimeError as error:  # what a broken connection or a timeout raises
        if heartbeat is None or isinstance(error, checkpoint.BrokenCheckpoint):
            raise
        raise _rank_lost(error, heartbeat, config, trainer.step if trainer else 0) from error
    finally:
        torch.set_num_threads(threads)
        if heartbeat is not None:
            heartbeat.leave()


def _steps(trainer: Trainer, log: "_Log", folder: Path, told: list) -> Path:
    config, saved = trainer.config, None
    while trainer.step < config.steps:
        try:
            record = trainer.train_step()
            last = trainer.step == config.steps
            if last or (config.eval_every and trainer.step % config.eval_every == 0):
                record["valid_loss"] = trainer.evaluate()
            log.write(record)
            stop = trainer.any_rank(bool(told))
            save = last or stop or trainer.step % config.save_every == 0
            if save:
                trainer.require_finite_weights()
        except Diverged as error:
            log.diagnose(trainer.routing_log)
            raise Diverged(
                f"{error}: the run has diverged and stops here; {_last_checkpoint(folder)}. Try a "
                f"lower lr than {config.lr:g}, or look at the batch of this step"
            ) from error
        if save:
            saved = checkpoint.save(
                folder, trainer.step, trainer.model, trainer.optimizer, config=config.to_dict()
            )
            if trainer.rank == 0:
                checkpoint.remove_old(folder, config.keep)
        if stop and not last:
            log.say(f"stopped after step {trainer.step} as asked; --resume goes on from {saved}")
            break
    log.diagnose(trainer.routing_log)
    return saved or checkpoint.newest(folder)


class _Log:
    """Rank 0's config.json, log.jsonl and progress bar; and where a run is resumed."""

    def __init__(self, out: Path, trainer: Trainer, resume: bool):
        self.out, config, folder = out, trainer.config, out / "checkpoints"
        self.file = self.bar = self.lock = None
        if trainer.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            self.lock = _lock(out / "lock")
        if trainer.any_rank(trainer.rank == 0 and self.lock is None):
            raise FileExistsError(f"a run is going on in {out}: give another --out, or end it")
        found = trainer.any_rank(trainer.rank == 0 and (out / "log.jsonl").exists())
        if found and not resume:
            raise FileExistsError(
                f"{out} holds a run already: add --resume to go on with it, or give another --out"
            )
        last = checkpoint.newest(folder)
        if last is not None:
            before = PretrainConfig.from_dict(checkpoint.check(last)["notes"]["config"])
            _same_model(before, config)
            trainer.step = checkpoint.load(last, trainer.model, trainer.optimizer)["step"]
        if trainer.rank != 0:
            return
        from tqdm.auto import tqdm  # only who trains needs it

        (out / "config.json").write_text(json.dumps(config.to_dict(), indent=1) + "\n")
        kept = (out / "log.jsonl").read_text().splitlines() if found else []
        kept = [
            line for line in kept if line.endswith("}") and json.loads(line)["step"] <= trainer.step
        ]
        (out / "log.jsonl").write_text(
            "".join(line + "\n" for line in kept)
        )  # steps after the checkpoint are done again
        self.file = open(out / "log.jsonl", "a", buffering=1)
        self.bar = tqdm(total=config.steps, initial=trainer.step, unit="step", mininterval=0.5)
        parameters = sum(local(p).numel() for p in trainer.model.parameters())
        self.say(
            f"{trainer.world} process{'es' * (trainer.world > 1)}, ep_size {config.ep_size}, "
            f"{trainer.device.type}, {parameters:,} parameters on this rank"
            + (f", resumed from {last}" if last else "")
        )
        if last is not None and (changed := _differences(before.to_dict(), config.to_dict())):
            self.say(f"other options than before: {changed}")

    def write(self, record: dict) -> None:
        """A step's line and the bar's next tick."""
        if self.file is not None:
            short = {name: _short(value) for name, value in record.items()}
            self.file.write(json.dumps(short, allow_nan=False) + "\n")
            shown = {
                name: f"{record[name]:.3f}" for name in ("loss", "valid_loss") if name in record
            }
            self.bar.update(1)
            self.bar.set_postfix(
                shown | {"MaxVio": f"{max(record['max_violation']):.2f}"}, refresh=False
            )

    def say(self, text: str) -> None:
        """A line of text above the bar."""
        if self.bar is not None:
            self.bar.write(text)

    def diagnose(self, routing_log: RoutingLog) -> None:
        """Say what looks ill, once enough was logged to tell, and keep the log."""
        if self.file is not None and len(routing_log.training) >= ENOUGH:
            (self.out / "routing_log.json").write_text(json.dumps(routing_log.to_dict()) + "\n")
            self.say(str(diagnosis.diagnose(routing_log)))

    def close(self) -> None:
        """End the file and the bar."""
        if self.file is not None:
            self.file.close()
            self.bar.close()
        if self.lock is not None:
            self.lock.close()


def _short(value):
    if isinstance(value, float):
        return float(f"{value:.9g}")
    return [_short(item) for item in value] if isinstance(value, list) else value


def _lock(path: Path):
    """The open file whose lock this process holds until it ends; None where another holds it."""
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:  # a file system without locks: nobody is kept out
        pass
    return file


def _differences(before: dict, now: dict) -> str:
    """name=now (was before), for each value that differs; tables are compared by their keys."""
    found = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += [_differences(old, new)] if old != new else []
        elif old != new and name not in ("out", "steps", "threads"):
            found.append(f"{name}={new!r} (was {old!r})")
    return ", ".join(found)


def _same_model(before: PretrainConfig, config: PretrainConfig) -> None:
    if before.model() != config.model():
        differ = _differences(before.model().to_dict(), config.model().to_dict())
        raise ValueError(f"the checkpoint holds another model than was asked for: {differ}")


@contextmanager
def _told_to_stop():
    """A list that is no longer empty once SIGTERM or Ctrl-C came: the step is finished and saved.

    A second Ctrl-C, a second later or more, interrupts. (torchrun hands the first one on again.)
    """
    told, first = [], None

    def tell(signum, frame):
        nonlocal first
        told.append(signum)
        first = first or time.monotonic()
        if signum == signal.SIGINT and time.monotonic() > first + 1:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield told  # only the main thread may ask for signals
        return
    before = {signum: signal.signal(signum, tell) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _last_checkpoint(folder: Path) -> str:
    last = sorted(folder.glob("step-*[0-9]"))
    return f"the last checkpoint is {last[-1]}" if last else "there is no checkpoint yet"


def _rank_lost(
    error: RuntimeError, heartbeat: Heartbeat, config: PretrainConfig, step: int
) -> RankLost:
    where = _last_checkpoint(Path(config.out) / "checkpoints")
    try:
        missing, left = heartbeat.missing(), heartbeat.left()
        ranks = missing or left
        who = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of {heartbeat.n_ranks} "
        who += "gone or silent" if missing else "ended before"
        if not ranks:
            who = "failed while all other ranks are there"
    except RuntimeError:  # the store went with the rank that held it
        who = f"another of the {heartbeat.n_ranks} ranks is gone"
    return RankLost(
        f"rank {heartbeat.rank}: {who} in step {step} (timeout {config.timeout:g} s); {where}. "
        f"Cause: {str(error).splitlines()[0]}"
    )


def init_process_group(config: PretrainConfig) -> Heartbeat:
    """Join the processes that torchrun started; gloo on a CPU, NCCL on GPUs."""
    timeout = timedelta(
        seconds=max(config.timeout, 120)
    )  # to come together; Topology then sets the shorter one
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=dist.PrefixStore("pretrain", store),
        rank=rank,
        world_size=world,
        timeout=timeout,
    )
    return Heartbeat(store, rank, world)
