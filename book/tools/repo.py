"""The repository's URL, in one place: `python repo.py https://github.com/you/moe-book [branch]` stamps it everywhere.

Its source is `repository:` in _config.yml. From there it goes into the first cell of the notebooks (which installs the book's packages on
Colab) and into the links of the prose. The placeholder resolves to nobody's repository. Standard library only: `make repo` needs no
environment.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PLACEHOLDER = "https://github.com/--your-account--/moe-book"
FIRST_CELL = """\
try:
    import moe_book
except ModuleNotFoundError:  # on Colab: bring the book's own packages, once
    %pip install -q \\
    "moe-book[book] @ git+{url}@{branch}"
    import moe_book
book = moe_book.setup()"""


@dataclass(frozen=True)
class Repository:
    """Where the book lives: url without a trailing slash or .git, and the branch from which notebooks open and install."""

    url: str
    branch: str = "main"

    def __post_init__(self):
        if not re.fullmatch(r"https://[\w.~/-]+[\w~]", self.url) or self.url.endswith(".git"):
            raise ValueError(f"URL={self.url!r} must look like https://github.com/you/moe-book")
        if not re.fullmatch(r"[\w./-]+", self.branch):
            raise ValueError(f"BRANCH={self.branch!r} must be the name of a branch or tag")

    @property
    def first_cell(self) -> str:
        """The first code cell of every chapter, to the letter."""
        return FIRST_CELL.format(url=self.url, branch=self.branch)

    @property
    def colab(self) -> str:
        """What the address of a notebook on Colab begins with."""
        return "https://colab.research.google.com/github/" + self.url.removeprefix(
            "https://github.com/"
        )


def read(root: Path = ROOT) -> Repository:
    """The repository that _config.yml names; ValueError when it names none."""
    block = re.search(
        r"^repository:\n((?:[ \t].*\n|\n|#.*\n)+)",
        (root / "_config.yml").read_text(encoding="utf-8") + "\n",
        re.M,
    )
    found = (
        dict(re.findall(r"^[ \t]+(url|branch):[ \t]*[\"']?([^\s\"'#]+)", block.group(1), re.M))
        if block
        else {}
    )
    if "url" not in found:
        raise ValueError("_config.yml names no repository: url:")
    return Repository(**found)


def texts(root: Path = ROOT) -> list[Path]:
    """The files that may name the repository."""
    notebooks = [*root.glob("book/chapters/*.ipynb"), *root.glob("book/solutions/*.ipynb")]
    return [
        path
        for path in [
            root / "_config.yml",
            root / "README.md",
            *sorted(root.glob("book/**/*.md")),
            *sorted(notebooks),
        ]
        if path.exists()
    ]


def stamp(new: Repository, root: Path = ROOT) -> list[Path]:
    """Replace the repository that _config.yml names by another, everywhere; return the files that changed."""
    old, changed = read(root), []
    whole = r"(?![\w-]|\.\w)"  # .../moe-book, not .../moe-book-2
    for path in texts(root):
        before = path.read_bytes().decode("utf-8")
        text = before
        for a, b in ((old.url, new.url), (old.colab, new.colab)):
            text = re.sub(re.escape(a) + whole, lambda _: b, text)
            for link in ("@", "/blob/", "/tree/"):
                text = re.sub(
                    re.escape(b + link + old.branch) + whole, lambda _: b + link + new.branch, text
                )
        if path.name == "_config.yml":
            text = re.sub(
                r"(^repository:\n(?:[ \t].*\n|\n|#.*\n)*?[ \t]+branch:[ \t]*)[^\s#]+",
                lambda m: m.group(1) + new.branch,
                text,
                flags=re.M,
            )
        if text != before:
            path.write_bytes(text.encode("utf-8"))
            changed.append(path)
    return changed


def first_code_cell(notebook: Path) -> str:
    """Source of the first code cell; empty when there is none."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return next(("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"), "")


def problems(root: Path = ROOT) -> list[str]:
    """What contradicts _config.yml, one line each; empty when all agree."""
    here, found = read(root), []
    for path in texts(root):
        name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        if name.startswith("book/chapters/") and first_code_cell(path) != here.first_cell:
            found.append(
                f"{name}: the first code cell is not the one that installs from {here.url}@{here.branch}"
            )
        for url in re.findall(r"moe-book\[book\] @ git\+([^\s\"\\]+)", text):
            if url != f"{here.url}@{here.branch}":
                found.append(f"{name}: installs from {url}, not from {here.url}@{here.branch}")
        if here.url != PLACEHOLDER and PLACEHOLDER in text:
            found.append(f"{name}: still names {PLACEHOLDER}")
    return found


def main(url: str = "", branch: str = "") -> None:
    if not url:
        sys.exit("Say which: make repo URL=https://github.com/you/moe-book")
    try:
        new = Repository(url.rstrip("/").removesuffix(".git"), branch or read().branch)
    except ValueError as error:
        sys.exit(str(error))
    print(f"{len(stamp(new))} files now name {new.url}@{new.branch}")
    if wrong := problems():
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main(*sys.argv[1:])
