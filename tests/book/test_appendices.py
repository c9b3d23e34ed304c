"""The appendices: names that exist, sources that resolve, pages that belong to the book, and the museum as it is."""

import importlib
import inspect
import re

import pytest

import moe_core
from moe_core import MixtureOfExperts, MoEConfig, losses, metrics
from moe_core.routers import ROUTERS
from tests.museum import page
from tools import repo

BOOK = repo.ROOT / "book"
PAGES = ["names", "glossary", "timeline", "mistakes", "notation"]
KEYS = set(re.findall(r"^@\w+\{([^,\s]+)", (BOOK / "references.bib").read_text("utf8"), re.M))
NAMES = (BOOK / "names.md").read_text("utf8")
OURS = sorted(
    {
        name
        for row in re.findall(r"^\| (`[^|]*) \|", NAMES, re.M)
        for name in re.findall(r"`([^`]+)`", row)
    }
)
THEIRS = sorted(
    set(re.findall(r"`([A-Z]\w+)\.(\w+)`", NAMES))
    - {tuple(name.split(".")) for name in OURS if "." in name}
)
MODULES = {
    "Mixtral": "mixtral",
    "Olmoe": "olmoe",
    "Qwen3Moe": "qwen3_moe",
    "DeepseekV3": "deepseek_v3",
    "DeepseekV4": "deepseek_v4",
    "SwitchTransformers": "switch_transformers",
    "GptOss": "gpt_oss",
    "Llama4": "llama4",
}


@pytest.mark.parametrize("name", PAGES)
def test_every_citation_of_an_appendix_resolves(name):
    cited = {
        key
        for group in re.findall(r"\{cite\}`([^`]+)`", (BOOK / f"{name}.md").read_text("utf8"))
        for key in group.split(",")
    }
    assert cited <= KEYS, cited - KEYS


@pytest.mark.parametrize("name", PAGES)
def test_an_appendix_links_to_files_with_the_names_of_the_book(name):
    for target in re.findall(
        r"\]\((chapters/[^)#]+|[a-z]+\.md)\)", (BOOK / f"{name}.md").read_text("utf8")
    ):
        assert re.fullmatch(r"chapters/\d\d-[a-z0-9-]+\.ipynb|[a-z]+\.md", target), target
        assert target.startswith("chapters/") or (BOOK / target).exists(), target


@pytest.mark.parametrize("name", OURS)
def test_our_names_exist(name):
    options = {
        option for router in ROUTERS.values() for option in inspect.signature(router).parameters
    }
    layer = MixtureOfExperts(MoEConfig(4, 4, 2, 1, n_shared_experts=1))
    if name.startswith("moe_core."):
        _, module, function = name.split(".")
        assert callable(getattr({"losses": losses, "metrics": metrics}[module], function))
    elif "." in name:
        owner, attribute = name.split(".")
        assert hasattr(getattr(moe_core, owner), attribute) or attribute in inspect.getsource(
            getattr(moe_core, owner)
        )
    else:
        assert (
            name in moe_core.__all__
            or name in options
            or hasattr(layer.config, name)
            or hasattr(layer, name)
        )


@pytest.mark.parametrize(("owner", "attribute"), THEIRS, ids=[".".join(pair) for pair in THEIRS])
def test_their_names_exist_in_the_installed_transformers(owner, attribute):
    pytest.importorskip("transformers")
    model = next(module for prefix, module in MODULES.items() if owner.startswith(prefix))
    kind = "configuration" if owner.endswith("Config") else "modeling"
    found = getattr(importlib.import_module(f"transformers.models.{model}.{kind}_{model}"), owner)
    if owner.endswith("Config"):
        assert hasattr(found(), attribute)
    else:
        assert f"self.{attribute} = " in inspect.getsource(found)


def test_there_is_something_to_check():
    assert len(OURS) > 20 and len(THEIRS) > 15


def test_the_timeline_is_in_order_and_every_entry_is_cited():
    rows = re.findall(r"^\| (\d{4}) \| (.*)$", (BOOK / "timeline.md").read_text("utf8"), re.M)
    years = [int(year) for year, _ in rows]
    assert years == sorted(years) and years[0] == 1991 and years[-1] >= 2026
    assert all("{cite}`" in rest for _, rest in rows)


def test_the_glossary_is_in_order():
    words = re.findall(r"^\*\*(.+?)\*\*", (BOOK / "glossary.md").read_text("utf8"), re.M)
    assert [word.casefold() for word in words] == sorted(word.casefold() for word in words)


def test_the_page_of_mistakes_is_the_museum():
    text = page.PAGE.read_text("utf8")
    assert page.page(text) == text, "run `python -m tests.museum.page`"


def test_an_issue_becomes_a_link():
    assert page.linked("vllm #12002, #14027; makeMoE") == (
        "vllm [#12002](https://github.com/vllm-project/vllm/issues/12002), [#14027](https://github.com/vllm-project/vllm/issues/14027); makeMoE"
    )
