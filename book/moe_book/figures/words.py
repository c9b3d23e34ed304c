"""What a figure shows, in words, for the sentence below it."""

from ._arrays import array


def in_words(experts, weights, joint: str = ", ") -> str:
    """`expert 2 with weight 0.71, expert 1 with weight 0.29`.

    Args:
        experts, weights: (K,) of one token.
        joint: what stands between two experts.
    """
    pairs = zip(array(experts, 1, "experts"), array(weights, 1, "weights"))
    return joint.join(f"expert {int(e)} with weight {w:.2f}" for e, w in pairs)
