r"""Expected loss, by two published scaling laws, each with the range it was fitted on.

The losses are on the authors' data with the authors' tokens: they compare designs, they predict no
run of yours.

Sources: Krajewski et al. 2024 (arXiv 2402.07871), equation 9 and Table 1; Clark et al. 2022 (arXiv
2202.01169), equation 1 and the coefficients of its S-BASE router, with base-10 logarithms.
"""

from dataclasses import dataclass
from math import log10

from moe_core.validate import at_least

TOKENS_130B = 130e9


@dataclass(frozen=True)
class Prediction:
    """A loss in nats per token, and what lies outside the law's range (empty inside)."""

    law: str
    loss: float
    outside: tuple[str, ...]


def fine_grained(params: float, tokens: float, granularity: float, expansion: float) -> Prediction:
    r"""Krajewski et al.: :math:`L = c + (g / G^\gamma + a) / N^\alpha + b / D^\beta`.

    Args:
        params: N, all parameters but the embeddings. tokens: D.
        granularity: G, into how many experts the active MLP is cut. expansion: parameters of an MoE
            layer over its active ones.
    """
    at_least(1, params=params, tokens=tokens, granularity=granularity, expansion=expansion)
    loss = 0.47 + (2.1 / granularity**0.58 + 18.1) / params**0.115 + 30.8 / tokens**0.147
    outside = (
        _outside(params, "N", 129e6, 3.7e9)
        + _outside(tokens, "D", 16e9, TOKENS_130B)
        + _outside(granularity, "G", 1, 16)
    )
    if abs(expansion - 64) > 0.5:
        outside += (f"expansion {expansion:.3g} (fitted at 64 alone)",)
    return Prediction("fine-grained MoE (Krajewski et al. 2024)", loss, outside)


def fine_grained_dense(params: float, tokens: float) -> Prediction:
    r"""The dense model of the same paper: :math:`L = 0.47 + 16.3 / N^{0.126} + 26.7 / D^{0.127}`.

    No range of N is given for it.
    """
    at_least(1, params=params, tokens=tokens)
    return Prediction(
        "dense (Krajewski et al. 2024)",
        0.47 + 16.3 / params**0.126 + 26.7 / tokens**0.127,
        _outside(tokens, "D", 16e9, TOKENS_130B),
    )


def dense_params_of_equal_loss(loss: float, tokens: float) -> float:
    """Parameters of the dense model with this loss by the same paper; inf if none has it."""
    rest = loss - 0.47 - 26.7 / tokens**0.127
    return (16.3 / rest) ** (1 / 0.126) if rest > 0 else float("inf")


def routed(params: float, expansion: float, tokens: float) -> Prediction:
    r"""Clark et al., at 130B tokens whatever yours are.

    .. math:: \log L = a \log N + b \log \hat E + c \log N \log \hat E + d

    .. math:: 1 / \hat E = 1 / (E - 1 + (1/E_{start} - 1/E_{max})^{-1}) + 1 / E_{max}

    Args:
        params: N, of the dense model that one token meets. expansion: E, experts of full width of
            which a token takes one.
        tokens: of your run, to say whether the law holds for it.
    """
    at_least(1, params=params, expansion=expansion, tokens=tokens)
    start, largest = 1.85, 314
    saturating = 1 / (1 / (expansion - 1 + 1 / (1 / start - 1 / largest)) + 1 / largest)
    e, n = log10(saturating), log10(params)
    outside = (
        ()
        if abs(tokens / TOKENS_130B - 1) <= 0.1
        else (f"D = {tokens / 1e9:.4g}B (fitted at 130B alone)",)
    )
    if expansion > largest:
        outside += (f"E = {expansion:.3g} (levels off at {largest})",)
    return Prediction(
        "routed models, S-BASE (Clark et al. 2022)",
        10 ** (-0.082 * n - 0.108 * e + 0.009 * n * e + 1.104),
        (*outside, "several narrow experts a token (fitted with one)"),
    )


def _outside(value: float, name: str, low: float, high: float) -> tuple[str, ...]:
    if low <= value <= high:
        return ()
    unit, one = (1e9, "B") if high >= 1e9 else (1, "")
    return (
        (
            f"{name} = {value / unit:.3g}{one} (fitted on {low / unit:.3g}{one} to "
            f"{high / unit:.3g}{one})"
        ),
    )
