"""Sphinx glue: pages that ask the network for nothing.

The scripts they need go into book/_static/vendor, from installed packages; the theme's scripts that would ask elsewhere are left out.

vendor/ is never committed: plotly.min.js comes out of the plotly wheel, MathJax out of django-static-mathjax (of which only the one
component in use and its fonts are taken), the scripts and styles of the figures from moe_book.
"""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

from markupsafe import Markup

MATHJAX = "mathjax/es5/tex-mml-chtml.js"
OURS = ("explorer.js", "explorer.css", "game.js", "game.css")


def package(name: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        RuntimeError: it is not installed.
    """
    spec = find_spec(name)
    if spec is None:
        raise RuntimeError(
            f"the book's pages need the package {name!r}, which is not installed: pip install -r requirements.txt"
        )
    return Path(spec.origin).parent


def sources() -> dict[str, Path]:
    """Path under vendor/ -> the file to copy."""
    es5 = package("mathjax") / "static/mathjax/es5"
    fonts = (es5 / "output/chtml/fonts/woff-v2").glob("*.woff")
    here = Path(__file__).parents[1] / "moe_book"
    return {
        "plotly.min.js": package("plotly") / "package_data/plotly.min.js",
        **{file: here / file for file in OURS},
        MATHJAX: es5 / "tex-mml-chtml.js",
        **{f"mathjax/es5/output/chtml/fonts/woff-v2/{font.name}": font for font in fonts},
    }


def outdated(app, _env, _added, _changed, _removed) -> list[str]:
    """A page to write again when a static file is newer than its copy: Sphinx copies these files only when it writes a page."""
    source, built = Path(app.srcdir) / "book/_static", Path(app.outdir) / "_static"
    copies = [
        (file, built / file.relative_to(source)) for file in source.rglob("*") if file.is_file()
    ]
    stale = any(
        not copy.exists() or copy.stat().st_mtime < file.stat().st_mtime for file, copy in copies
    )
    return [app.config.root_doc] if stale else []


def vendor(app, _config) -> None:
    """Copy what is missing or changed."""
    folder = Path(app.srcdir) / "book/_static/vendor"
    for name, source in sources().items():
        target = folder / name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


# What the theme and docutils write, and what it must be: each with its reason.
REPAIRS = [
    (
        r'<link rel="preload" as="font"[^>]*>',
        "",
    ),  # with `crossorigin`, which a page opened as a file may not use; the CSS loads the fonts
    (
        r'<div class="bd-sidebar-primary',
        r'<div role="complementary" aria-label="Book" class="bd-sidebar-primary',
    ),  # its logo is in no landmark
    (
        r'role="list" (class="citation-list")',
        r"\1",
    ),  # a list without list items is worse than none to a screen reader
    (r' role="doc-biblioentry"', ""),  # deprecated
]


def repaired(html: str) -> str:
    """A page's HTML with the accessibility and offline defects of its generators mended."""
    for pattern, replacement in REPAIRS:
        html = re.sub(pattern, replacement, html)
    return html


def page(_app, _pagename, _templatename, context, _doctree) -> None:
    """Leave out thebe, which runs code on a public server: jupyter-book loads its script, which throws, even when it is switched off."""
    context["script_files"] = [
        js
        for js in context["script_files"]
        if "thebe" not in f"{js.filename} {js.attributes}".lower()
    ]
    context["css_files"] = [css for css in context["css_files"] if "thebe" not in str(css.filename)]
    context["repaired"] = lambda html: Markup(repaired(html))
    context["body"] = repaired(context.get("body", ""))


def setup(app):
    app.connect("config-inited", vendor)
    app.connect("env-get-outdated", outdated)
    app.connect("html-page-context", page, priority=900)  # after those who add scripts
    for file in OURS:
        if file.endswith(".css"):
            app.add_css_file(f"vendor/{file}")
        else:
            app.add_js_file(f"vendor/{file}", loading_method="defer")
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
