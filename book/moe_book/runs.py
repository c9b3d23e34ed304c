"""Stored experiments: the one way to make and to read them.

A stored run is a script in ``book/runs/`` and the JSON it wrote: what was asked for, with which seeds, on which machine and
versions, and the curves. Chapters load the JSON and say so.
"""

import json
import math
import platform
import re
from datetime import date
from pathlib import Path

import torch
from tqdm import tqdm

from moe_tools.corpus import Corpus
from moe_tools.machine import machine

FOLDER = Path(__file__).resolve().parent.parent / "runs"


def sweep(run, arms, seeds: list[int], *args) -> dict[str, list]:
    """arm -> [run(arm, seed, *args) for each seed], for every one of the arms; all arms of a seed before the next seed.

    On one thread: models as small as these do not gain from a second, and a run's numbers then do not depend on how many there are.
    """
    torch.set_num_threads(1)
    results = {arm: [] for arm in arms}
    for seed in tqdm(seeds, unit="seed"):
        for arm in results:
            results[arm].append(run(arm, seed, *args))
    return results


def save(
    name: str, *, config: dict, seeds: list[int], results: dict, text: Corpus | None = None
) -> Path:
    """Write ``book/runs/NAME.json`` with the circumstances of the run; the results as ``rounded`` gives them.

    Args:
        text: what was trained or measured on, if anything: the record keeps its hash and size.

    Raises:
        ValueError: fewer than three seeds, too few to show a band; or a number is not finite.
    """
    if len(seeds) < 3:
        raise ValueError(f"seeds={seeds} must hold at least 3 seeds")
    record = {
        "name": name,
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__.split("+")[0]},
        "machine": machine(),
        "text": text and text_of(text),
        "config": config,
        "seeds": seeds,
        "results": rounded(results),
    }
    path = FOLDER / f"{name}.json"
    text = json.dumps(record, indent=1, sort_keys=True, separators=(",", ": "), allow_nan=False)
    text = re.sub(
        r"\[\s+([^][{}]*?)\s+\]", lambda found: "[" + re.sub(r",\n\s*", ",", found[1]) + "]", text
    )  # a list of numbers, a line
    path.write_text(text + "\n")
    return path


def text_of(text: Corpus) -> dict:
    """What a stored run keeps of its text: the first 16 digits of its hash, and each domain's bytes for training."""
    return {
        "sha256": text.sha256[:16],
        "bytes": {name: pieces.numel() for name, pieces in text.train.items()},
    }


def same_text(text: Corpus, name: str = "first_run") -> bool:
    """Whether this is the text a stored run had. Another release of Python holds another: what is trained on it ends elsewhere."""
    return load(name)["text"] == text_of(text)


def load(name: str) -> dict:
    """Read ``book/runs/NAME.json``.

    Raises:
        FileNotFoundError: there is no such run; the message lists those there are. (An installed copy of the package has no
            runs folder beside it: on Colab ``load`` then reads the copy that was installed with the package.)
    """
    for folder in (FOLDER, Path(__file__).resolve().parent / "stored_runs"):
        if (folder / f"{name}.json").is_file():
            return json.loads((folder / f"{name}.json").read_text())
    raise FileNotFoundError(
        f"no stored run {name!r}; there are {sorted(p.stem for p in FOLDER.glob('*.json'))}"
    )


def reproductions() -> list[dict]:
    """Every claim that a stored run tested: its run, id, claim, source (a key of references.bib), verdict and because."""
    folder = FOLDER if FOLDER.is_dir() else Path(__file__).resolve().parent / "stored_runs"
    found = []
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        for key, claim in record["config"].get("claims", {}).items():
            found.append(
                {"run": path.stem, "id": key, **claim, **record["results"]["verdicts"][key]}
            )
    return found


def rounded(value, where: str = "results"):
    """The value as it is stored: floats with 5 significant digits, tuples as lists.

    Raises:
        ValueError: a float is not finite; the message says where it stands.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}={value} must be finite")
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item, f"{where}[{i}]") for i, item in enumerate(value)]
    return value
