"""The table behind a figure lists the tiles of a treemap: on a page of its own, without the book."""

import shutil
from pathlib import Path

import plotly

import moe_book
from moe_book import figures
from moe_book.explorer import Explorer
from moe_tools.accounting.published import MODELS

from .conftest import PATIENCE

PAGE = '<!doctype html><meta charset="utf-8"><script src="explorer.js"></script>{}'


def test_the_table_has_a_row_for_each_tile(browser, tmp_path):
    names = ["mixtral-8x7b", "deepseek-v3"]
    explorer = Explorer(
        lambda model: figures.parameter_treemap(MODELS[model], name=model),
        model=names,
        title="Parameters",
        alt="Tiles.",
    )
    shutil.copy(Path(moe_book.__file__).parent / "explorer.js", tmp_path)
    shutil.copy(Path(plotly.__file__).parent / "package_data/plotly.min.js", tmp_path)
    (tmp_path / "page.html").write_text(
        PAGE.format(explorer._repr_mimebundle_()[0]["text/html"]), "utf8"
    )
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    try:
        page.goto((tmp_path / "page.html").as_uri())
        page.locator(".moe-drawn[data-frame]").wait_for()
        page.locator("summary").click()
        for model in names:
            page.locator("select").select_option(model)
            head, *rows = [
                row.split("\t") for row in page.locator(".moe-table").inner_text().splitlines()
            ]
            assert head == ["belongs to", "part", "parameters"]
            shown = [
                [*map(str, row)]
                for trace in explorer.at(model=model).data
                for row in zip(trace.parents, trace.labels, trace.values)
            ]
            assert rows == shown
    finally:
        page.close()
