"""A passage: running text in which each token has a tile, as an Explorer shows it beside or instead of a plotly figure.

It is HTML rather than a drawing: it wraps where the page wraps, can be selected and copied, and hundreds of tokens change colour in a few
milliseconds. explorer.js draws its frames; html() is one of them, readable before any script.
"""

import html
from dataclasses import dataclass

MAX_LEGEND = 16


@dataclass(frozen=True, eq=False)
class Passage:
    """What a frame of text holds; figures.text_in_color makes it.

    Args:
        words: T tokens, as they are shown.
        groups: how many neighbouring tokens make up each word of the text; lines break between words.
        experts: T experts, or None.
        colors: the colour of each expert.
        kept: T bools, or None where nothing can be dropped.
        amount: T numbers, 0 or more, or None.
        amount_label: what the amount counts.
        amount_max: the amount with the strongest tint.
    """

    words: list[str]
    groups: list[int]
    experts: list[int] | None
    colors: list[str]
    kept: list[bool] | None = None
    amount: list[float] | None = None
    amount_label: str = ""
    amount_max: float = 1.0

    def tree(self) -> dict:
        """The passage as plain JSON values, its legend as HTML."""
        fields = (
            "words",
            "groups",
            "experts",
            "colors",
            "kept",
            "amount",
            "amount_label",
            "amount_max",
        )
        return {name: getattr(self, name) for name in fields if getattr(self, name) is not None} | {
            "legend": self._legend()
        }

    def html(self) -> str:
        """The passage without its tooltips and its table, which are the script's."""
        words, t = [], 0
        for size in self.groups:
            tiles = "".join(self._tile(i) for i in range(t, t + size))
            t += size
            words.append(
                f'<span class="moe-word">{tiles}</span>{"<br>" if self.words[t - 1].endswith("⏎") else ""}'
            )
        return f'<div class="moe-text"><p class="moe-words">{"".join(words)}</p><p class="moe-legend">{self._legend()}</p></div>'

    def _tile(self, t: int) -> str:
        kinds, style = ["moe-token"], []
        if self.experts is not None:
            style.append(f"--c:{self.colors[self.experts[t]]}")
        if self.amount is not None:
            kinds.append("moe-tinted")
            style.append(f"--a:{tint(self.amount[t], self.amount_max)}%")
        if self.kept is not None and not self.kept[t]:
            kinds.append("moe-hollow")
        return f'<span class="{" ".join(kinds)}" style="{";".join(style)}">{html.escape(self.words[t])}</span>'

    def _legend(self) -> str:
        parts = []
        if self.amount is not None:
            parts.append(
                f'<span class="moe-key">{html.escape(self.amount_label)} 0<i class="moe-ramp"></i>{self.amount_max:.4g}</span>'
            )
        if self.experts is not None and len(self.colors) <= MAX_LEGEND:
            parts += [
                f'<span class="moe-key"><i class="moe-token" style="--c:{c}"></i>{"expert " * (e == 0)}{e}</span>'
                for e, c in enumerate(self.colors)
            ]
        if self.kept is not None:
            parts.append('<span class="moe-key"><i class="moe-token moe-hollow"></i>dropped</span>')
        return "".join(parts)


def tint(amount: float, largest: float) -> int:
    """Percent of the hue in a tile's ground: 0 to 70, so that words stay readable on it."""
    return round(70 * min(max(amount / largest, 0), 1))
