"""Text whose tokens carry the colour of their expert."""

from .. import theme
from ..passage import Passage
from ._arrays import array

SHOWN = str.maketrans({"\n": "⏎", " ": "·", "\t": "⇥"})


def text_in_color(
    tokens: list[str],
    experts=None,
    *,
    n_experts: int | None = None,
    kept=None,
    amount=None,
    amount_label: str = "experts per token",
    amount_max: float | None = None,
) -> Passage:
    """Running text, each token on a tile of its expert's colour, dropped tokens on a hollow one; or each tinted by an amount.

    An Explorer shows it alone, or above a plotly figure: `return figures.text_in_color(...), figures.load_bars(...)`.

    Args:
        tokens: T words or characters. A line may break before one that begins with white space, or after one that ends with it; if
            none does, anywhere.
        experts: (T,) the (first) expert of each; may be left out where amount is given.
        n_experts: how many experts there are.
        kept: (T,) bool, False where the token was dropped.
        amount: (T,) how much compute each token got, 0 or more; it sets the tint, and the expert only the outline.
        amount_label: what is counted, for the legend and the table.
        amount_max: the amount with the strongest tint, by default the largest; give it where frames are compared.

    Raises:
        ValueError: lengths differ, an expert is not in 0 .. n_experts - 1, an amount is negative, or there is nothing to show.
    """
    if experts is None and amount is None:
        raise ValueError("text_in_color needs experts or amount")
    if experts is not None and n_experts is None:
        raise ValueError("n_experts must be given with experts")
    expert_T = None if experts is None else array(experts, 1, "experts").astype(int)
    amount_T = None if amount is None else array(amount, 1, "amount").astype(float)
    kept_T = None if kept is None else array(kept, 1, "kept").astype(bool)
    for name, values in (("experts", expert_T), ("amount", amount_T), ("kept", kept_T)):
        if values is not None and len(tokens) != len(values):
            raise ValueError(f"tokens has {len(tokens)} entries; {name} has {len(values)}")
    if expert_T is not None and not ((expert_T >= 0) & (expert_T < n_experts)).all():
        raise ValueError(
            f"experts must be between 0 and n_experts-1={n_experts - 1}, found {expert_T.min()} to {expert_T.max()}"
        )
    if amount_T is not None and not (amount_T >= 0).all():
        raise ValueError("amount must be 0 or more")
    largest = 1.0 if amount_T is None else float(amount_max or amount_T.max(initial=0) or 1)
    return Passage(
        words=[token.translate(SHOWN) or "·" for token in tokens],
        groups=_groups(tokens),
        experts=_list(expert_T),
        kept=_list(kept_T),
        colors=[] if expert_T is None else theme.expert_colors(n_experts),
        amount=_list(amount_T),
        amount_label=amount_label if amount_T is not None else "",
        amount_max=largest,
    )


def _list(values):
    return None if values is None else values.tolist()


def _groups(tokens: list[str]) -> list[int]:
    """How many tokens make up each word: characters stay together up to the next space, a line's end with what it ends, words stand alone."""
    if not any(token[:1].isspace() or token[-1:].isspace() for token in tokens):
        return [1] * len(tokens)
    sizes = []
    for t, token in enumerate(tokens):
        if t and not tokens[t - 1][-1:].isspace() and (token == "\n" or not token[:1].isspace()):
            sizes[-1] += 1
        else:
            sizes.append(1)
    return sizes
