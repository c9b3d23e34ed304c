"""Explorer: a figure with controls that moves with a kernel and without one.

    Explorer(figure, capacity_factor=Control([0.5, 1.0, 1.25, 2.0], start=1.25), policy=["position", "score"],
             title="Who gets in", alt="Tokens in rows, experts in columns; dropped tokens are hollow.")

figure(**controls) is a pure function that returns a plotly figure, a passage of text (figures.text_in_color), or both as (passage, figure),
the text above. It is called once for every combination of the controls' values when the cell runs; the page then only swaps what differs
between these frames. The same explorer.js draws them in a notebook, as an anywidget, and on a published page, which needs neither a kernel
nor a network.
"""

import gzip
import html
import inspect
import itertools
import json
from functools import cache
from pathlib import Path

import anywidget
import ipywidgets
import plotly
import plotly.graph_objects as go
import traitlets

from . import theme
from .controls import Control, Step, as_control
from .frames import decode, digest, pack
from .passage import Passage

__all__ = ["Control", "Explorer", "Step"]

HERE = Path(__file__).parent
MAX_FRAMES, MAX_BYTES = 400, 300_000
FALLBACK = "This figure moves in the published book, or when you run the cell."
STATIC = """<figure class="moe-explorer" data-digest="{digest}"><figcaption>{title}</figcaption>
{passage}<div class="moe-still" style="min-height:{height}px"><p>{alt}</p><p><em>{fallback}</em></p></div>
<script type="application/json">{payload}</script></figure>"""


class Explorer(anywidget.AnyWidget):
    """A figure as a function of a few controls.

    Args:
        figure: a pure function of the controls that returns a plotly Figure, a Passage or (Passage, Figure), or one of these, for a figure
            that has no controls.
        title: one short line above the figure.
        alt: what the figure shows, in a sentence or two, for readers who cannot see it.
        height: pixels of the plotly figure; by default that of its layout, or 400. Text takes the room it needs.
        describe: a function of the controls that returns one sentence on what this setting shows; it stands below the figure and is read
            aloud when the setting changes. Without it the settings themselves are.
        controls: name=values. A list of numbers becomes a slider, of words a menu, a bool (its start) a switch; Control sets label and
            start, Step adds a play button.

    Attributes:
        state: dict, name -> value of each control; observable, linkable, and assignable to any point of the grid.

    Raises:
        TypeError: figure does not take these controls, returns something else, or not the same kind for every setting.
        ValueError: a control has fewer than 2 values or starts off its values; title or alt is empty; the grid has more than 400
            combinations or its frames take more than 300 KB.
    """

    _esm = (HERE / "explorer.js").read_text(
        "utf8"
    ) + "\nexport default { render: MoeExplorer.render };\n"
    _css = (HERE / "explorer.css").read_text("utf8")
    payload = traitlets.Dict().tag(sync=True)
    state = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        figure,
        /,
        *,
        title: str,
        alt: str,
        height: int | None = None,
        describe=None,
        **controls,
    ):
        for name, text in (("title", title), ("alt", alt)):
            if not (isinstance(text, str) and text.strip()):
                raise ValueError(f"{name}={text!r} must be a sentence")
        self._figure = figure if callable(figure) else lambda: figure
        self._describe, self._title, self._alt, self._height = describe, title, alt, height
        self._controls = {name: as_control(name, given) for name, given in controls.items()}
        self._check_signature()
        super().__init__()
        self._set_frames()
        self.state = self._starts()
        self.on_msg(self._answer)

    def at(self, **controls):
        """The figure at the current state, with the given controls changed; they need not lie on the grid."""
        return self._figure(**{**self.state, **controls})

    def live(self) -> ipywidgets.VBox:
        """The same figure with ipywidgets controls, recomputed by the kernel between the grid's values. Needs a kernel."""
        shown = Explorer(self.at(), title=self._title, alt=self._alt, height=self._height)
        widgets = {
            name: control.widget(name, self.state[name]) for name, control in self._controls.items()
        }

        def redraw(_change):
            values = {name: widget.value for name, widget in widgets.items()}
            shown._figure = lambda: self._figure(**values)
            shown._describe = (lambda: self._describe(**values)) if self._describe else None
            shown._set_frames()

        for widget in widgets.values():
            widget.observe(redraw, "value")
        return ipywidgets.VBox([*widgets.values(), shown])

    def __repr__(self) -> str:
        """`Explorer(3 controls, 36 frames, 7f3a90c1)`: stable between machines, different when a figure shows something else."""
        counted = [
            f"{n} {word}{'' if n == 1 else 's'}"
            for n, word in ((len(self._controls), "control"), (self._n_frames, "frame"))
        ]
        return f"Explorer({', '.join(counted)}, {self._digest})"

    def _repr_mimebundle_(self, **kwargs):
        bundle, metadata = super()._repr_mimebundle_(**kwargs)
        # "<" could close the script element (or open a comment in it); as \u003c it is the same JSON and plain text to a browser.
        payload = json.dumps(self.payload, separators=(",", ":"), ensure_ascii=False).replace(
            "<", "\\u003c"
        )
        bundle["text/html"] = STATIC.format(
            digest=self._digest,
            title=html.escape(self._title),
            height=self.payload["height"],
            alt=html.escape(self._alt),
            fallback=FALLBACK,
            payload=payload,
            passage=self._still,
        )
        return bundle, metadata

    def _starts(self) -> dict:
        return {name: control.start for name, control in self._controls.items()}

    def _set_frames(self):
        """Evaluate the grid and put what the script needs into the payload trait."""
        grid = [control.values for control in self._controls.values()]
        settings = [dict(zip(self._controls, point)) for point in itertools.product(*grid)]
        self._n_frames = len(settings)
        if len(settings) > MAX_FRAMES:
            sizes = " x ".join(f"{name}: {len(c.values)}" for name, c in self._controls.items())
            raise ValueError(
                f"the grid has {len(settings)} combinations ({sizes}); it must have at most {MAX_FRAMES}"
            )
        shown = [_parts(self._figure(**setting), setting) for setting in settings]
        if len({(passage is None, figure is None) for passage, figure in shown}) > 1:
            raise TypeError(
                "figure must return the same kind for every setting: a plotly Figure, a Passage, or both"
            )
        trees = [self._tree(*parts, setting) for parts, setting in zip(shown, settings)]
        controls = [
            {"name": name, **control.spec(name)} for name, control in self._controls.items()
        ]
        self._digest = digest([controls, trees])
        start = next(
            (
                passage
                for (passage, _), setting in zip(shown, settings)
                if setting == self._starts()
            ),
            None,
        )
        self._still = start.html() if start else ""
        height = 0 if shown[0][1] is None else self._height or trees[0]["layout"].get("height", 400)
        payload = {
            "title": self._title,
            "alt": self._alt,
            "height": height,
            "controls": controls,
            "template": theme.TEMPLATE,
            "colors": theme.TOKENS,
            **pack(trees),
        }
        size = len(json.dumps(payload, separators=(",", ":"), ensure_ascii=False).encode())
        if size > MAX_BYTES:
            raise ValueError(
                f"the {len(settings)} frames take {size // 1000} KB; they must take at most {MAX_BYTES // 1000} KB: "
                "use fewer values for a control, or fewer points in the figure"
            )
        self.payload = payload

    def _tree(self, passage, figure, setting: dict) -> dict:
        """One frame: its traces, layout and text as plain JSON values, and the sentence that describes it."""
        plain = {"data": [], "layout": {}} if figure is None else decode(figure.to_plotly_json())
        layout = {key: value for key, value in plain["layout"].items() if key != "template"}
        said = self._describe(**setting) if self._describe else ""
        text = {} if passage is None else {"text": decode(passage.tree())}
        return {"data": plain["data"], "layout": layout, "said": str(said), **text}

    def _check_signature(self):
        for role, function in (("figure", self._figure), ("describe", self._describe)):
            try:
                if function is not None:
                    inspect.signature(function).bind(**dict.fromkeys(self._controls))
            except TypeError as error:
                raise TypeError(
                    f"{role} does not take the controls {list(self._controls)}: {error}"
                ) from None

    @traitlets.validate("state")
    def _on_grid(self, proposal):
        state = dict(proposal["value"])
        if set(state) != set(self._controls):
            raise traitlets.TraitError(
                f"state={state} must have exactly the controls {list(self._controls)}"
            )
        return {
            name: control.on_grid(name, state[name]) for name, control in self._controls.items()
        }

    def _answer(self, _widget, content, _buffers):
        """A notebook's page that has no plotly yet asks for it here: it comes from the installed package, not from the network."""
        if content == {"get": "plotly"}:
            self.send({"plotly": "gzip"}, buffers=[_plotly_js()])


def _parts(drawn, setting: dict) -> tuple:
    """What a figure returned, as (Passage or None, plotly Figure or None)."""
    if isinstance(drawn, tuple) and [type(part) for part in drawn] == [Passage, go.Figure]:
        return drawn
    if isinstance(drawn, (Passage, go.Figure)):
        return (drawn, None) if isinstance(drawn, Passage) else (None, drawn)
    raise TypeError(
        f"figure(**{setting}) returned {type(drawn).__name__}; it must return a plotly Figure, a Passage, or (Passage, Figure)"
    )


@cache
def _plotly_js() -> bytes:
    # Compressed, 1.5 MB instead of 4.8: Jupyter drops output that arrives faster than 1 MB a second.
    return gzip.compress(
        (Path(plotly.__file__).parent / "package_data" / "plotly.min.js").read_bytes(), mtime=0
    )
