"""The controls of an Explorer: what values each takes, where it starts, what it is called."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import ipywidgets


@dataclass(frozen=True)
class Control:
    """Values a reader may choose from: numbers (a slider), words (a menu), or False and True (a switch).

    Args:
        values: at least 2, all different, all of one kind.
        label: shown next to the control; by default the control's name with spaces for underscores.
        start: the value shown first, by default values[0]. Choose the most telling one.
        unit: written after the value, such as "%" or "tokens".
    """

    values: Iterable
    label: str | None = None
    start: object = None
    unit: str = ""
    kind_of_numbers = "range"

    def __post_init__(self):
        values = [v.item() if hasattr(v, "item") else v for v in self.values]
        object.__setattr__(self, "values", values)
        kinds = {
            bool
            if isinstance(v, bool)
            else str
            if isinstance(v, str)
            else float
            if _is_number(v)
            else None
            for v in values
        }
        if len(kinds) > 1 or not kinds <= {bool, str, float}:
            raise ValueError(
                f"values={values!r} must be all finite numbers, all words, or False and True"
            )
        if len(values) < 2 or len(set(values)) < len(values):
            raise ValueError(f"values={values!r} must have at least 2 entries, all different")
        object.__setattr__(
            self, "start", values[0] if self.start is None else self.on_grid("start", self.start)
        )

    def on_grid(self, name: str, value):
        """The entry of values that equals value, else ValueError."""
        for v in self.values:
            if v == value and isinstance(v, bool) == isinstance(value, bool):
                return v
        raise ValueError(f"{name}={value!r} must be one of {self.values}")

    @property
    def kind(self) -> str:
        """ "switch", "select", or how numbers are chosen: "range", "step" for a Step."""
        first = self.values[0]
        return (
            "switch"
            if isinstance(first, bool)
            else "select"
            if isinstance(first, str)
            else self.kind_of_numbers
        )

    def spec(self, name: str) -> dict:
        """What explorer.js needs to draw the control."""
        label = self.label or name.replace("_", " ").capitalize()
        return {
            "kind": self.kind,
            "label": label,
            "unit": self.unit,
            "values": self.values,
            "start": self.values.index(self.start),
        }

    def widget(self, name: str, value) -> ipywidgets.Widget:
        """An ipywidgets control over the whole range between the smallest and the largest value."""
        common = {
            "description": self.spec(name)["label"],
            "value": value,
            "style": {"description_width": "initial"},
        }
        if self.kind == "switch":
            return ipywidgets.Checkbox(**common)
        if self.kind == "select":
            return ipywidgets.Dropdown(options=self.values, **common)
        low, high = min(self.values), max(self.values)
        whole = all(isinstance(v, int) for v in self.values)
        slider = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
        return slider(
            min=low,
            max=high,
            step=1 if whole else (high - low) / 100,
            continuous_update=False,
            **common,
        )


@dataclass(frozen=True)
class Step(Control):
    """Numbers in order of time, with a button that plays them; for watching something happen.

    Args:
        seconds: how long each value is shown while playing, > 0.
    """

    seconds: float = 0.8
    kind_of_numbers = "step"

    def __post_init__(self):
        super().__post_init__()
        if self.kind != "step":
            raise ValueError(f"values={self.values!r} of a Step must be numbers")
        if not self.seconds > 0:
            raise ValueError(f"seconds={self.seconds} must be greater than 0")

    def spec(self, name: str) -> dict:
        return {**super().spec(name), "seconds": self.seconds}


def as_control(name: str, given) -> Control:
    """Turn what an author wrote for a control into a Control."""
    try:
        if isinstance(given, Control):
            return given
        if isinstance(given, bool):
            return Control([False, True], start=given)
        if isinstance(given, Iterable) and not isinstance(given, (str, dict)):
            return Control(given)
    except ValueError as error:
        raise ValueError(f"control {name}: {error}") from None
    raise TypeError(
        f"control {name}={given!r} must be a list of values, a bool, Control(...) or Step(...)"
    )


def _is_number(v) -> bool:
    return isinstance(v, (int, float)) and math.isfinite(v)
