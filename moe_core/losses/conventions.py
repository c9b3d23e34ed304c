"""The same balance loss on other libraries' scales.

A coefficient copied from one library to another changes its strength by K or by E^2. What is
counted differs, too: fairscale, GShard, Tutel, and DeepSpeed for top-2, count first choices.
"""

from ..validate import one_of, top_k_fits

# E sum_e f_e P_e with f a share of slots; "switch" is the paper without its alpha.
_AS_HERE = ("moe_core", "switch", "megatron", "olmo", "deepspeed", "tutel")
# convention -> its value at perfect balance, from E and K
CONVENTIONS = dict.fromkeys(_AS_HERE, lambda E, K: 1.0) | {
    # load_balancing_loss_func of Mixtral and its family: f is a share of tokens, not of slots.
    "huggingface": lambda E, K: float(K),
    "fairscale": lambda E, K: 1 / E**2,  # the mean over experts of me * ce
    "gshard": lambda E, K: 1 / E**2,  # as the paper writes it; lingvo multiplies by E^2
}


def balanced_value(convention: str, n_experts: int, top_k: int) -> float:
    """The balance loss of this convention at perfect balance: 1, K or 1 / E^2.

    Raises ValueError where the convention is unknown, or top_k is not between 1 and n_experts.
    Source: the libraries' loss functions; huggingface/transformers#28255 for K, Lepikhin et al.
    2020 (arXiv 2006.16668), algorithm 1, for 1 / E^2.
    """
    one_of(CONVENTIONS, convention=convention)
    top_k_fits(top_k, n_experts)
    return CONVENTIONS[convention](n_experts, top_k)


def convert_loss(value, source: str, target: str, *, n_experts: int, top_k: int):
    """A balance loss without coefficient, measured in one convention, on the scale of another.

    >>> convert_loss(1.0, "moe_core", "huggingface", n_experts=8, top_k=2)
    2.0
    """
    there = balanced_value(target, n_experts, top_k)
    return value * (there / balanced_value(source, n_experts, top_k))


def convert_coefficient(
    coefficient: float, source: str, target: str, *, n_experts: int, top_k: int
) -> float:
    """The coefficient that pulls as hard under ``target`` as this one does under ``source``.

    >>> convert_coefficient(0.01, "huggingface", "moe_core", n_experts=8, top_k=2)
    0.02
    """
    # A larger loss needs a smaller coefficient: the scales stand the other way round.
    return convert_loss(coefficient, target, source, n_experts=n_experts, top_k=top_k)
