"""Sphinx glue: put the scripts that pages need into book/_static/vendor, from installed packages, so that no page asks the network.

vendor/ is never committed: plotly.min.js comes out of the plotly wheel, MathJax out of django-static-mathjax (of which only the one
component in use and its fonts are taken), explorer.js and explorer.css from moe_book.
"""
import shutil
from importlib.util import find_spec
from pathlib import Path

MATHJAX = "mathjax/es5/tex-mml-chtml.js"


def package(name: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        RuntimeError: it is not installed.
    """
    spec = find_spec(name)
    if spec is None:
        raise RuntimeError(f"the book's pages need the package {name!r}, which is not installed: pip install -r requirements.txt")
    return Path(spec.origin).parent


def sources() -> dict[str, Path]:
    """Path under vendor/ -> the file to copy."""
    es5 = package("mathjax") / "static/mathjax/es5"
    fonts = (es5 / "output/chtml/fonts/woff-v2").glob("*.woff")
    here = Path(__file__).parents[1] / "moe_book"
    return {
        "plotly.min.js": package("plotly") / "package_data/plotly.min.js",
        "explorer.js": here / "explorer.js",
        "explorer.css": here / "explorer.css",
        MATHJAX: es5 / "tex-mml-chtml.js",
        **{f"mathjax/es5/output/chtml/fonts/woff-v2/{font.name}": font for font in fonts},
    }


def vendor(app, _config) -> None:
    """Copy what is missing or changed."""
    folder = Path(app.srcdir) / "book/_static/vendor"
    for name, source in sources().items():
        target = folder / name
        if not target.exists() or target.read_bytes() != source.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def setup(app):
    app.connect("config-inited", vendor)
    app.add_css_file("vendor/explorer.css")
    app.add_js_file("vendor/explorer.js", loading_method="defer")
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
