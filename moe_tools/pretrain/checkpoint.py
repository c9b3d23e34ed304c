"""Checkpoints that know experts and not ranks: a run goes on at another world size.

torch.distributed.checkpoint writes them, as safetensors. What FSDP2 shards is stored as slices of
whole tensors; of a bank every expert is an entry of its own, written by a rank that holds it. A
checkpoint is written beside its place and moved there when it is whole.
"""

import json
import os
import shutil
import warnings
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import FSDPModule

from moe_core.experts import Experts

_MOMENTS = ("exp_avg", "exp_avg_sq")


class BrokenCheckpoint(RuntimeError):
    """A folder that is no whole checkpoint; the message says what is wrong with it."""


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Name -> tensor: parameters, persistent buffers, and AdamW's moments.

    The tensors are those in use or views of them, so loading writes into the model. Moments that do
    not exist yet are made, as zeros.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # after a forward without backward, gathered parameters still stand in for the sharded
            # ones
            module.reshard()
    owned = {
        id(parameter): bank.owned
        for bank in model.modules()
        if isinstance(bank, Experts)
        for parameter in bank.parameters()
    }
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state.update({moment: torch.zeros_like(parameter) for moment in _MOMENTS})
        for kind, tensor in [
            ("model", parameter.detach()),
            *((moment, state[moment]) for moment in _MOMENTS),
        ]:
            if id(parameter) in owned:
                found |= {
                    f"{kind}.{name}.{expert}": tensor[place]
                    for place, expert in enumerate(owned[id(parameter)])
                }
            else:
                found[f"{kind}.{name}"] = tensor
    persistent = model.state_dict().keys()
    return found | {
        f"model.{name}": buffer for name, buffer in model.named_buffers() if name in persistent
    }


def save(
    folder: str | Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, **notes
) -> Path:
    """Write ``folder/step-00000020``; every rank calls it. All ranks must see the same folder.

    Args:
        step: optimiser steps done.
        notes: plain values to be kept with it, found again by ``load``.

    Returns:
        The path of the checkpoint. Until it is whole nothing stands there.

    Raises:
        FileNotFoundError: a rank does not see rank 0's folder.
    """
    final = Path(folder) / f"step-{step:08d}"
    part = final.with_suffix(".part")
    if _rank() == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    _wait()
    _require_shared(part)
    with _quiet():
        dcp.save(
            tensors(model, optimizer),
            storage_writer=HuggingFaceStorageWriter(str(part), save_distributed=True),
        )
    _wait()
    if _rank() == 0:
        files = {
            path.name: [path.stat().st_size, _checksum(path)] for path in sorted(part.iterdir())
        }
        with open(part / "checkpoint.json", "w") as file:
            json.dump({"step": step, "notes": notes, "files": files}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
    _wait()
    return final


def _require_shared(part: Path) -> None:
    """Raise FileNotFoundError, on every rank, where one of them writes to another folder."""
    if not dist.is_initialized():
        return
    part.mkdir(parents=True, exist_ok=True)  # where a rank has a disk of its own
    mine = part / f"rank-{_rank()}"
    mine.touch()
    _wait()
    here = sum((part / f"rank-{rank}").exists() for rank in range(dist.get_world_size()))
    seen = _from_rank_0(here)
    _wait()
    mine.unlink()
    if seen != dist.get_world_size():
        raise FileNotFoundError(
            f"rank 0 sees {seen} of {dist.get_world_size()} ranks in {part}: all must write to one "
            "folder, on a file system that the machines share"
        )
    _wait()


def remove_old(folder: str | Path, keep: int) -> None:
    """Remove all checkpoints but the ``keep`` newest; 0 keeps all. One rank calls it."""
    saved = sorted(Path(folder).glob("step-*[0-9]"))
    for path in saved[: len(saved) - keep] if keep else []:
        shutil.rmtree(path)


def load(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Fill model and optimiser from a checkpoint of any world size; every rank calls it.

    Returns:
        {"step": ..., "notes": {...}} as saved.

    Raises:
        BrokenCheckpoint: it is not whole; nothing has been changed then.
    """
    record = check(path)
    with _quiet():
        dcp.load(tensors(model, optimizer), storage_reader=HuggingFaceStorageReader(str(path)))
    for state in optimizer.state.values():
        state["step"].fill_(float(record["step"]))
    return {"step": record["step"], "notes": record["notes"]}


def check(path: str | Path) -> dict:
    """The record of a whole checkpoint.

    Raises:
        BrokenCheckpoint: the record or a file is missing, shorter than it was, or holds other
            bytes.
    """
    path = Path(path)
    try:
        record = json.loads((path / "checkpoint.json").read_text())
        for name, (size, checksum) in record["files"].items():
            found = (path / name).stat().st_size
            if found != size:
                raise BrokenCheckpoint(
                    f"checkpoint {path} is broken: {name} has {found} bytes, was written with "
                    f"{size}"
                )
            if _checksum(path / name) != checksum:
                raise BrokenCheckpoint(
                    f"checkpoint {path} is broken: {name} does not hold the bytes that were written"
                )
    except (OSError, ValueError, KeyError) as error:
        raise BrokenCheckpoint(f"checkpoint {path} is broken: {error}") from error
    return record


def newest(folder: str | Path) -> Path | None:
    """The last whole checkpoint in a folder, or None; broken ones warn and are skipped.

    Rank 0 decides for all.
    """
    step = -1
    if _rank() == 0:
        for path in sorted(Path(folder).glob("step-*[0-9]"), reverse=True):
            try:
                step = check(path)["step"]
                break
            except BrokenCheckpoint as error:
                warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    step = _from_rank_0(step)
    return None if step < 0 else Path(folder) / f"step-{step:08d}"


def _checksum(path: Path) -> int:
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _from_rank_0(number: int) -> int:
    if not dist.is_initialized():
        return number
    chosen = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.broadcast(chosen, 0)
    return int(chosen)


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def _quiet():
    """torch warns in one process that it will not use torch.distributed; that is what is wanted."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*torch.distributed is disabled, unavailable or uninitialized.*"
        )
        yield
