"""Stored experiments: the one way to make and to read them.

A stored run is a script in ``book/runs/`` and the JSON it wrote: what was asked for, with which seeds, on which machine and
versions, and the curves. Chapters load the JSON and say so.
"""

import json
import os
import platform
import re
from datetime import date
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent.parent / "runs"


def save(name: str, *, config: dict, seeds: list[int], results: dict) -> Path:
    """Write ``book/runs/NAME.json`` with the circumstances of the run. Floats are rounded to 5 significant digits.

    Raises:
        ValueError: fewer than three seeds, too few to show a band.
    """
    if len(seeds) < 3:
        raise ValueError(f"seeds={seeds} must hold at least 3 seeds")
    record = {
        "name": name,
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__.split("+")[0]},
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
                    "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None},
        "config": config,
        "seeds": seeds,
        "results": _rounded(results),
    }
    path = FOLDER / f"{name}.json"
    text = json.dumps(record, indent=1, sort_keys=True, separators=(",", ": "))
    text = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda found: "[" + re.sub(r",\n\s*", ",", found[1]) + "]", text)  # a list of numbers, a line
    path.write_text(text + "\n")
    return path


def load(name: str) -> dict:
    """Read ``book/runs/NAME.json``.

    Raises:
        FileNotFoundError: there is no such run; the message lists those there are. (An installed copy of the package has no
            runs folder beside it: on Colab ``load`` then reads the copy that was installed with the package.)
    """
    for folder in (FOLDER, Path(__file__).resolve().parent / "stored_runs"):
        if (folder / f"{name}.json").is_file():
            return json.loads((folder / f"{name}.json").read_text())
    raise FileNotFoundError(f"no stored run {name!r}; there are {sorted(p.stem for p in FOLDER.glob('*.json'))}")


def reproductions() -> list[dict]:
    """Every claim that a stored run tested: its run, id, claim, source (a key of references.bib), verdict and because."""
    folder = FOLDER if FOLDER.is_dir() else Path(__file__).resolve().parent / "stored_runs"
    found = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        for key, claim in record["config"].get("claims", {}).items():
            found.append({"run": path.stem, "id": key, **claim, **record["results"]["verdicts"][key]})
    return found


def _rounded(value):
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value
