"""Text whose tokens carry the colour of their expert."""
import plotly.graph_objects as go

from .. import theme
from ._arrays import array

CHAR, ROW = 8.5, 30  # pixels of a monospaced character at 14 px, and of a line


def text_in_color(tokens: list[str], experts, *, n_experts: int, kept=None, columns: int = 36, height: int | None = None) -> go.Figure:
    """Running text, each token on a tile of its expert's colour; dropped tokens on a hollow one.

    Args:
        tokens: T words or characters.
        experts: (T,) the (first) expert of each.
        kept: (T,) bool, False where the token was dropped.
        columns: characters a line; 36 fit a phone.

    Raises:
        ValueError: tokens and experts differ in length.
    """
    expert_T = array(experts, 1, "experts").astype(int)
    if len(tokens) != len(expert_T):
        raise ValueError(f"tokens has {len(tokens)} entries; experts has {len(expert_T)}")
    kept_T = [True] * len(tokens) if kept is None else [bool(k) for k in array(kept, 1, "kept")]
    x_T, y_T, words, column, line = [], [], [], 0, 0
    for token in tokens:
        word = token.replace("\n", "⏎").replace(" ", "·") or "·"
        if column and column + len(word) + 1 > columns:
            column, line = 0, line + 1
        x_T.append(column + (len(word) + 1) / 2)
        y_T.append(line)
        words.append(word)
        column += len(word) + 1
    colors = [theme.expert_color(int(e), n_experts) for e in expert_T]
    tiles = go.Bar(
        orientation="h", base=[x - (len(w) + 0.7) / 2 for x, w in zip(x_T, words)], x=[len(w) + 0.7 for w in words], y=y_T, width=0.78,
        hoverinfo="skip", marker={"color": [theme.fade(c, 0.35) if k else theme.CLEAR for c, k in zip(colors, kept_T)],
                                  "line": {"color": colors, "width": 1.5}})
    text = go.Scatter(x=x_T, y=y_T, mode="text", text=words, name="tokens", customdata=[f"{w}: expert {e}" for w, e in zip(words, expert_T)],
                      meta="token and expert", textfont={"family": "monospace", "size": 13}, cliponaxis=False)
    bare = {"visible": False, "showgrid": False}
    return theme.figure([tiles, text], height=height or 16 + ROW * (line + 1), barmode="overlay", margin={"l": 0, "r": 0, "t": 8, "b": 8},
                        xaxis={**bare, "range": [0, columns + 1]}, yaxis={**bare, "range": [line + 0.5, -0.5]})
