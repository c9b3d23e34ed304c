"""Frames of an Explorer as compact JSON: plain rounded values, and only what differs from frame to frame.

A frame is a tree of dicts, lists and leaves. pack() keeps the first one whole; wherever frames differ it stores the path, the different
values that occur there, and which of them each frame has. Two controls that each change another trace so cost a sum, not a product.
"""

import base64
import hashlib
import json
import math

import numpy as np


def decode(tree):
    """A plotly tree as plain JSON values: arrays as lists, floats with 4 significant digits (whole ones as int), NaN as None."""
    if isinstance(tree, dict):
        if set(tree) >= {"dtype", "bdata"}:  # plotly's own packing of arrays
            flat = np.frombuffer(base64.b64decode(tree["bdata"]), tree["dtype"])
            shape = [int(n) for n in str(tree.get("shape", flat.size)).split(",")]
            return decode(flat.reshape(shape))
        return {str(key): decode(value) for key, value in tree.items() if value is not None}
    if hasattr(tree, "detach"):
        tree = tree.detach().cpu().numpy()
    if isinstance(tree, (np.ndarray, np.generic)):
        tree = tree.tolist()
    if isinstance(tree, (list, tuple)):
        return [decode(value) for value in tree]
    if isinstance(tree, float):
        return _short(tree)
    if tree is None or isinstance(tree, (bool, int, str)):
        return tree
    raise TypeError(f"a figure may hold numbers, words, lists and dicts, not {type(tree).__name__}")


def pack(trees: list[dict]) -> dict:
    """Frames as {"base": the first one, "varying": [{"path", "values", "at"}]}; frame i has values[at[i]] at path."""
    varying = []
    for path in _differences(trees, ()):
        found = [json.dumps(_look(tree, path)) for tree in trees]
        distinct = list(dict.fromkeys(found))
        number = {text: i for i, text in enumerate(distinct)}
        varying.append(
            {
                "path": list(path),
                "values": [json.loads(text) for text in distinct],
                "at": [number[text] for text in found],
            }
        )
    return {"base": trees[0], "varying": varying}


def digest(tree) -> str:
    """Eight hex digits that depend on what the tree shows: on its words, and on its numbers to about 3 significant digits.

    The numbers of one list are measured against the largest of them, so that rounding noise around zero does not count. Whatever is
    rounded, some values lie on the border and can fall either way; the borders here are odd numbers (.3819) that round fractions like
    1/8, frequent in this book, stay clear of.
    """
    return hashlib.sha256(json.dumps(_coarse(tree), sort_keys=True).encode()).hexdigest()[:8]


def _short(v: float):
    if not math.isfinite(v):
        return None
    v = v if v == int(v) else float(f"{v:.4g}")
    return int(v) if v == int(v) and abs(v) < 1e15 else v


def _coarse(tree):
    if isinstance(tree, dict):
        return {key: _coarse(value) for key, value in tree.items()}
    if isinstance(tree, list):
        numbers = [abs(v) for v in tree if _numeric(v)]
        unit = _unit(max(numbers, default=0))
        return [math.floor(v / unit + 0.3819) if _numeric(v) else _coarse(v) for v in tree] + [unit]
    return _coarse([tree]) if _numeric(tree) else tree


def _numeric(v) -> bool:
    return isinstance(v, (int, float)) and not isinstance(v, bool)


def _unit(largest: float) -> float:
    """A power of ten, 1/400 to 1/4000 of the largest magnitude."""
    return 10.0 ** (math.floor(math.log10(largest) + 0.3819) - 3) if largest > 0 else 1.0


def _differences(trees: list, path: tuple) -> list[tuple]:
    """The paths at which the trees differ, as deep as they have the same form."""
    first = trees[0]
    if all(tree == first for tree in trees[1:]):
        return []
    if all(isinstance(tree, dict) for tree in trees):
        keys = dict.fromkeys(key for tree in trees for key in tree)
        return [
            p for key in keys for p in _differences([tree.get(key) for tree in trees], (*path, key))
        ]
    if all(
        isinstance(tree, list)
        and len(tree) == len(first)
        and all(isinstance(v, dict) for v in tree)
        for tree in trees
    ):
        return [
            p
            for i in range(len(first))
            for p in _differences([tree[i] for tree in trees], (*path, i))
        ]
    return [path]


def _look(tree, path: tuple):
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else tree[key]
    return tree
