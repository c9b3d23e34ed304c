"""A name says what it means in both packages together: a file picker, or a search, finds one of each."""

import ast
from collections import defaultdict
from pathlib import Path

import moe_core
import moe_tools

FILES = [
    path
    for package in (moe_core, moe_tools)
    for path in sorted(Path(package.__file__).parent.rglob("*.py"))
    if path.stem not in ("__init__", "__main__")
]
FACES = {"hf", "published"}  # moe_core's are the public names of moe_tools'
PAIRS = {"zero_computation"}  # a router, and the experts it routes to


def several(found: dict[str, list]) -> set[str]:
    return {name for name, places in found.items() if len(places) > 1}


def test_a_module_has_a_name_of_its_own():
    found = defaultdict(list)
    for path in FILES:
        found[path.stem].append(path)
    assert several(found) <= FACES | PAIRS


def defined(node: ast.stmt) -> list[str]:
    """The class or the constants that a statement defines."""
    if isinstance(node, ast.ClassDef):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in names if name.isupper()]


def test_a_public_class_or_constant_has_a_name_of_its_own():
    found = defaultdict(list)
    for path in FILES:
        for node in ast.parse(path.read_text("utf8")).body:
            for name in defined(node):
                if not name.startswith("_"):
                    found[name].append(path)
    assert several(found) <= {"BACKENDS"}  # by name with what runs them, and the names with "auto"
    assert {"Routing", "MODELS", "PRECISIONS", "HF_MODEL_TYPES"} <= set(found)
