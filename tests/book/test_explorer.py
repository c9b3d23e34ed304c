"""Explorer: what it accepts, what it sends to the page, and the digest by which a stale figure is noticed."""

import html
import json
import os
import re
import subprocess
import sys

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
import traitlets

from moe_book import figures, theme
from moe_book.explorer import Control, Explorer, Step

WORDS = {"title": "Bars", "alt": "Three bars."}


def bars(scale=1.0, order="up", line=False):
    heights = [scale * h for h in (1, 2, 3)]
    traces = [go.Bar(x=["a", "b", "c"], y=heights if order == "up" else heights[::-1])]
    return go.Figure(traces, {"title": {"text": "with a line"}} if line else {"height": 300})


def frame(payload, i):
    """Frame i as the page's script puts it together."""
    tree = json.loads(json.dumps(payload["base"]))
    for change in payload["varying"]:
        *path, last = change["path"]
        node = tree
        for key in path:
            node = node[key] if isinstance(node, list) else node.setdefault(key, {})
        node[last] = change["values"][change["at"][i]]
    return tree


def test_every_point_of_the_grid_has_its_frame():
    payload = Explorer(bars, scale=[1.0, 2.5], order=["up", "down"], **WORDS).payload
    assert [frame(payload, i)["data"][0]["y"] for i in range(4)] == [
        [1, 2, 3],
        [3, 2, 1],
        [2.5, 5, 7.5],
        [7.5, 5, 2.5],
    ]


def test_what_all_frames_share_is_stored_once():
    payload = Explorer(bars, scale=[1.0, 2.0, 3.0], order=["up", "down"], **WORDS).payload
    assert [change["path"] for change in payload["varying"]] == [["data", 0, "y"]]
    assert payload["base"]["layout"] == {"height": 300}, (
        "no plotly template, and no layout but the figure's own"
    )


def test_frames_may_differ_in_layout_and_in_number_of_traces():
    def figure(traces):
        return go.Figure([go.Bar(y=[1])] * traces, {"xaxis": {"title": {"text": f"{traces}"}}})

    payload = Explorer(figure, traces=[1, 2], **WORDS).payload
    assert [len(frame(payload, i)["data"]) for i in (0, 1)] == [1, 2]
    assert frame(payload, 1)["layout"]["xaxis"]["title"]["text"] == "2"


def test_numbers_are_short_and_arrays_of_any_kind_are_lists():
    def figure(k):
        x = {0: np.array([0.123456789, np.nan, 123456.0]), 1: torch.tensor([1 / 3, 2.0]).numpy()}[k]
        return go.Figure(go.Scatter(y=x))

    payload = Explorer(figure, k=[0, 1], **WORDS).payload
    assert frame(payload, 0)["data"][0]["y"] == [0.1235, None, 123456]
    assert frame(payload, 1)["data"][0]["y"] == [0.3333, 2]


def test_the_bundle_has_a_widget_a_page_and_a_digest():
    explorer = Explorer(
        bars,
        scale=[1.0, 2.0],
        order=Control(["up", "down"], label="Order <b>", start="down"),
        **WORDS,
    )
    bundle, _ = explorer._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"}
    assert re.fullmatch(r"Explorer\(2 controls, 4 frames, [0-9a-f]{8}\)", bundle["text/plain"])
    assert (
        json.loads(
            re.search(r'<script type="application/json">(.*)</script>', bundle["text/html"])[1]
        )
        == explorer.payload
    )
    assert "function render" not in bundle["text/html"], (
        "the script is loaded once a page, not stored in every output"
    )


def test_no_string_can_leave_its_place_in_the_page():
    evil = '</script><img src=x onerror="alert(1)">&<!--'
    explorer = Explorer(
        lambda k: go.Figure(go.Bar(x=[evil], y=[k])),
        k=Control([1, 2], label=evil),
        title=evil,
        alt=evil,
        describe=lambda k: evil,
    )
    page = explorer._repr_mimebundle_()[0]["text/html"]
    assert page.count("</script>") == 1 and "<img" not in page and "<!--" not in page
    assert html.escape(evil) in page


def test_the_page_can_be_read_before_any_script():
    page = Explorer(bars, scale=[1, 2], height=333, **WORDS)._repr_mimebundle_()[0]["text/html"]
    readable = re.sub(r"<script.*</script>", "", page)
    assert "Bars" in readable and "Three bars." in readable and "This figure moves" in readable
    assert "min-height:333px" in page, "the page must not jump when the figure is drawn"


def test_digest_notices_a_change_and_overlooks_rounding():
    digest = repr(Explorer(bars, scale=[1.0, 2.0], **WORDS))
    assert repr(Explorer(bars, scale=[1.0, 2.0], **WORDS)) == digest
    assert (
        repr(Explorer(lambda scale: bars(scale * (1 + 1e-6)), scale=[1.0, 2.0], **WORDS)) == digest
    )
    assert repr(Explorer(lambda scale: bars(scale * 1.02), scale=[1.0, 2.0], **WORDS)) != digest
    assert (
        repr(Explorer(lambda scale: bars(scale, order="down"), scale=[1.0, 2.0], **WORDS)) != digest
    )
    assert (
        repr(
            Explorer(bars, scale=[1.0, 2.0], title="Bars", alt="Three bars.", order=["up", "down"])
        )
        != digest
    )


@pytest.mark.parametrize("value", [k / 16 for k in range(17)] + [0.1, 0.2, 0.3, 2 / 3, 1e-3])
def test_digest_of_a_round_fraction_survives_noise(value):
    def digest(noise):
        return repr(Explorer(go.Figure(go.Bar(y=[1.0 + noise, value + noise, noise])), **WORDS))

    assert len({digest(noise) for noise in (0.0, 3e-8, -3e-8)}) == 1


def test_digest_does_not_depend_on_the_process():
    code = """
from moe_book.explorer import Explorer
import plotly.graph_objects as go
print(Explorer(lambda k: go.Figure(go.Bar(y=[k / 3], text=sorted({"a", "b"}))), k=[1, 2], policy=None or ["x", "y"], title="t", alt="a"))
""".replace("lambda k:", "lambda k, policy:")
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(said) == 1 and "Explorer(2 controls, 4 frames," in said.pop()


def test_state_starts_where_the_author_said_and_stays_on_the_grid():
    explorer = Explorer(bars, scale=Control([1.0, 2.0], start=2.0), line=True, **WORDS)
    assert explorer.state == {"scale": 2.0, "line": True}
    seen = []
    explorer.observe(lambda change: seen.append(change["new"]), "state")
    explorer.state = {"scale": 1, "line": False}  # a browser sends 1 for 1.0
    assert seen == [{"scale": 1.0, "line": False}] and type(explorer.state["scale"]) is float
    with pytest.raises(ValueError, match=r"scale=3 must be one of \[1.0, 2.0\]"):
        explorer.state = {"scale": 3, "line": False}
    with pytest.raises(traitlets.TraitError, match="must have exactly the controls"):
        explorer.state = {"scale": 1.0}


def test_controls_follow_from_their_values():
    explorer = Explorer(
        lambda a, b, c, d: bars(),
        a=range(3),
        b=("x", "y"),
        c=False,
        d=Step([1, 2], label="Time", seconds=0.5),
        **WORDS,
    )
    kinds = {c["name"]: (c["kind"], c["label"], c["start"]) for c in explorer.payload["controls"]}
    assert kinds == {
        "a": ("range", "A", 0),
        "b": ("select", "B", 0),
        "c": ("switch", "C", 0),
        "d": ("step", "Time", 0),
    }


def test_a_description_travels_with_each_frame():
    payload = Explorer(
        bars, scale=[1, 2], describe=lambda scale: f"scale is {scale}", **WORDS
    ).payload
    assert [frame(payload, i)["said"] for i in (0, 1)] == ["scale is 1", "scale is 2"]


def test_a_figure_without_controls_is_an_explorer_too():
    assert repr(Explorer(bars(), **WORDS)).startswith("Explorer(0 controls, 1 frame, ")


def test_live_recomputes_between_the_values_of_the_grid():
    box = Explorer(
        bars,
        scale=[1.0, 3.0],
        order=["up", "down"],
        describe=lambda scale, order: f"{scale:.2f}",
        **WORDS,
    ).live()
    slider, menu, shown = box.children
    slider.value, menu.value = 1.5, "down"
    assert shown.payload["base"]["data"][0]["y"] == [4.5, 3, 1.5]
    assert shown.payload["base"]["said"] == "1.50"


def test_plotly_comes_from_the_installed_package():
    explorer, sent = Explorer(bars(), **WORDS), []
    explorer.send = lambda content, buffers=None: sent.append((content, buffers))
    explorer._answer(explorer, {"get": "plotly"}, [])
    assert sent[0][0] == {"plotly": "gzip"} and len(sent[0][1][0]) < 2_500_000


@pytest.mark.parametrize(
    ("controls", "error", "message"),
    [
        (
            {"scale": [1.0]},
            ValueError,
            r"control scale: values=\[1.0\] must have at least 2 entries",
        ),
        ({"scale": [1, 1]}, ValueError, "all different"),
        ({"scale": [1, "a"]}, ValueError, "must be all finite numbers, all words"),
        ({"scale": [1, float("nan")]}, ValueError, "must be all finite numbers"),
        ({"scale": 3}, TypeError, "control scale=3 must be a list of values"),
        ({"scale": "up"}, TypeError, "must be a list of values"),
        ({"scala": [1, 2]}, TypeError, r"figure does not take the controls \['scala'\]"),
        (
            {"scale": range(500)},
            ValueError,
            r"500 combinations \(scale: 500\); it must have at most 400",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(controls, error, message):
    with pytest.raises(error, match=message):
        Explorer(bars, **controls, **WORDS)


def test_start_and_seconds_are_checked():
    with pytest.raises(ValueError, match=r"start=5 must be one of \[1, 2\]"):
        Control([1, 2], start=5)
    with pytest.raises(ValueError, match="seconds=0 must be greater than 0"):
        Step([1, 2], seconds=0)
    with pytest.raises(ValueError, match="of a Step must be numbers"):
        Step(["a", "b"])


def test_words_for_readers_who_see_nothing_are_required():
    with pytest.raises(ValueError, match="alt=' ' must be a sentence"):
        Explorer(bars, scale=[1, 2], title="Bars", alt=" ")


def words(tokens=("a ", "b"), experts=(0, 1)):
    return figures.text_in_color(list(tokens), list(experts), n_experts=2)


def test_text_is_a_frame_of_its_own_kind():
    explorer = Explorer(
        lambda flip: words(experts=[flip, 1 - flip]), flip=Control([0, 1], start=1), **WORDS
    )
    assert [frame(explorer.payload, i)["text"]["experts"] for i in (0, 1)] == [[0, 1], [1, 0]]
    assert [change["path"] for change in explorer.payload["varying"]] == [["text", "experts"]]
    assert explorer.payload["height"] == 0, "no room is reserved for a plot that never comes"
    readable = re.sub(r"<script.*</script>", "", explorer._repr_mimebundle_()[0]["text/html"])
    first = readable.index(f"--c:{theme.expert_color(1)}")
    assert first < readable.index(f"--c:{theme.expert_color(0)}"), (
        "before any script the text stands there as it starts"
    )


def test_text_may_stand_above_a_plot():
    payload = Explorer(lambda k: (words(), bars(k)), k=[1, 2], **WORDS).payload
    assert (
        payload["height"] == 300
        and frame(payload, 1)["data"][0]["y"] == [2, 4, 6]
        and frame(payload, 1)["text"]["words"] == ["a·", "b"]
    )


def test_a_figure_is_of_one_kind():
    with pytest.raises(TypeError, match="the same kind for every setting"):
        Explorer(lambda k: words() if k else bars(), k=[0, 1], **WORDS)
    with pytest.raises(TypeError, match="returned tuple"):
        Explorer(lambda k: (bars(), words()), k=[0, 1], **WORDS)


def test_no_word_of_a_passage_can_leave_its_place():
    page = Explorer(words([*"a ", "</script><img src=x>"], [0, 0, 1]), **WORDS)._repr_mimebundle_()[
        0
    ]["text/html"]
    assert page.count("</script>") == 1 and "<img" not in page


def test_a_figure_that_is_too_heavy_or_no_figure_is_refused():
    with pytest.raises(ValueError, match=r"take \d+ KB; they must take at most 300 KB"):
        Explorer(
            lambda k: go.Figure(go.Scatter(y=np.random.default_rng(k).random(9000))),
            k=range(10),
            **WORDS,
        )
    with pytest.raises(TypeError, match="returned dict; it must return a plotly Figure"):
        Explorer(lambda k: {}, k=[1, 2], **WORDS)


def test_colours_of_the_reader_stand_for_ink():
    payload = Explorer(bars(), **WORDS).payload
    assert payload["template"]["layout"]["font"]["color"] in payload["colors"]
    assert theme.INK in payload["colors"] and not set(payload["colors"]) & set(theme.OKABE_ITO)
