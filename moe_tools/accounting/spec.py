"""ModelSpec: a language model in numbers, and how many parameters it has."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from moe_core.validate import boolean, one_of, whole

from .attention import Mixer
from .feed_forward import DenseSpec, MoESpec

# Numbers in one norm, in multiples of D: gain, gain and bias, nothing.
NORMS = {"rms": 1, "layer": 2, "none": 0}
PARTS = ("embedding", "attention", "router", "experts", "shared", "dense", "norms", "head")
ACTIVE_CONVENTIONS = ("all", "head", "nonemb")


@dataclass(frozen=True)
class LayerSpec:
    """One layer: most have one mixer, one feed-forward network and two norms.

    Attributes:
        mixers: what mixes the tokens: ``AttentionSpec`` and its like. Two in a decoder that also
            looks at an encoder.
        feed_forwards: ``DenseSpec`` or ``MoESpec``.
        n_norms: norms of width D outside the mixers.
    """

    mixers: tuple[Mixer, ...]
    feed_forwards: tuple[DenseSpec | MoESpec, ...]
    n_norms: int = 2

    def __post_init__(self):
        for name, allowed in (("mixers", Mixer), ("feed_forwards", (DenseSpec, MoESpec))):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not all(
                isinstance(value, allowed) for value in values
            ):
                raise ValueError(f"{name}={values!r} must be a tuple of specs")
        whole(0, n_norms=self.n_norms)

    @property
    def moes(self) -> tuple[MoESpec, ...]:
        """The feed-forward networks that are MoE."""
        return tuple(f for f in self.feed_forwards if isinstance(f, MoESpec))


@dataclass(frozen=True)
class ModelSpec:
    r"""A language model in numbers. ``ModelSpec.decoder`` builds the usual ones.

    Three conventions for "active parameters" are in use; a published figure may mean any of them:

    .. math:: A_{all} = \text{total} - \text{routed}\,(1 - k/E), \quad A_{head} = A_{all} -
        \text{input embedding (if untied)}, \quad A_{nonemb} = A_{all} - \text{embedding and head}

    ``active_params`` is A_all: it needs no say about embeddings, and of the three it is the one
    that announced figures match most often.

    Attributes:
        d_model, vocab_size: D and V.
        layers: one ``LayerSpec`` a layer, in order; those of an encoder first.
        tied: embedding and head are one matrix.
        head_bias: the head adds a bias, V numbers.
        norm: "rms" (D numbers), "layer" (2D) or "none" (no parameters); of the norms outside the
            mixers.
        n_final_norms: 1; 2 where an encoder ends in one of its own.
        n_encoder_layers: how many of the layers are an encoder's, which sees other tokens: 0 in a
            decoder-only model.
        source: where the numbers stand; no part of the comparison of two specs.

    Raises:
        ValueError: a value is out of its range; the message names it.
    """

    d_model: int
    vocab_size: int
    layers: tuple[LayerSpec, ...]
    tied: bool = False
    head_bias: bool = False
    norm: str = "rms"
    n_final_norms: int = 1
    n_encoder_layers: int = 0
    source: str = field(default="", compare=False)

    def __post_init__(self):
        whole(1, d_model=self.d_model, vocab_size=self.vocab_size)
        if (
            not isinstance(self.layers, tuple)
            or not self.layers
            or not all(isinstance(layer, LayerSpec) for layer in self.layers)
        ):
            raise ValueError(f"layers={self.layers!r} must be a tuple of at least one LayerSpec")
        boolean(tied=self.tied, head_bias=self.head_bias)
        one_of(NORMS, norm=self.norm)
        whole(0, n_final_norms=self.n_final_norms, n_encoder_layers=self.n_encoder_layers)
        if self.n_encoder_layers > len(self.layers):
            raise ValueError(
                f"n_encoder_layers={self.n_encoder_layers} must be at most the number of "
                f"layers={len(self.layers)}"
            )

    @classmethod
    def decoder(
        cls,
        *,
        d_model: int,
        vocab_size: int,
        n_layers: int,
        attention: Mixer | Sequence[Mixer],
        moe: MoESpec | None = None,
        dense: DenseSpec | None = None,
        n_dense_layers: int = 0,
        moe_every: int = 1,
        n_norms: int = 2,
        **model,
    ) -> "ModelSpec":
        """A decoder-only model of equal layers, some of them MoE.

        Layer i (from 0) is MoE when i >= n_dense_layers and i + 1 is a multiple of moe_every; the
        others are dense.

        Args:
            attention: of every layer, or one for each of the n_layers.
            moe, dense: the feed-forward networks; each must be given if a layer needs it.
            n_dense_layers: leading layers that are dense.
            moe_every: distance between MoE layers among the others; 1 if all of them are MoE.
            n_norms: norms of a layer.
            model: ``tied``, ``head_bias``, ``norm`` and the other fields of ModelSpec.

        Raises:
            ValueError: a value is out of range, or moe or dense is missing, or given and not used.
        """
        whole(1, n_layers=n_layers, moe_every=moe_every)
        whole(0, n_dense_layers=n_dense_layers)
        mixers = [attention] * n_layers if isinstance(attention, Mixer) else list(attention)
        if len(mixers) != n_layers:
            raise ValueError(
                f"attention has {len(mixers)} entries, must be one or n_layers={n_layers}"
            )
        is_moe = [
            moe is not None and i >= n_dense_layers and (i + 1) % moe_every == 0
            for i in range(n_layers)
        ]
        for name, value, used in (("moe", moe, any(is_moe)), ("dense", dense, not all(is_moe))):
            if (value is not None) != used:
                raise ValueError(
                    f"{name}={value!r} must be {'given' if used else 'None'}: "
                    f"{sum(is_moe)} of n_layers={n_layers} are MoE"
                )
        layers = tuple(
            LayerSpec((mixer,), (moe if sparse else dense,), n_norms)
            for mixer, sparse in zip(mixers, is_moe)
        )
        return cls(d_model, vocab_size, layers, **model)

    @cached_property
    def numbers(self) -> dict[str, tuple[int, int]]:
        """Part -> numbers in its matrices (multiplied with tokens), numbers in its vectors."""
        D, sums = self.d_model, {part: [0, 0] for part in PARTS}
        sums["embedding"][0] = D * self.vocab_size
        sums["head"][:] = 0 if self.tied else D * self.vocab_size, self.head_bias * self.vocab_size
        n_norms = self.n_final_norms
        for layer in self.layers:
            n_norms += layer.n_norms
            counted = [
                ("attention", (mixer.matrices(D), mixer.vectors(D))) for mixer in layer.mixers
            ]
            for part, numbers in counted + [
                item for f in layer.feed_forwards for item in f.parts(D).items()
            ]:
                for i in (0, 1):
                    sums[part][i] += numbers[i]
        sums["norms"][1] = n_norms * NORMS[self.norm] * D
        return {part: tuple(numbers) for part, numbers in sums.items()}

    def check_decoder_only(self) -> None:
        """Raise ValueError for a model with an encoder.

        Its tokens are others than the decoder's, so nothing is "per token".
        """
        if self.n_encoder_layers:
            raise ValueError(
                f"n_encoder_layers={self.n_encoder_layers} must be 0: encoder and decoder see "
                "different tokens, and this is counted per token"
            )

    @property
    def n_layers(self) -> int:
        """Number of layers, those of an encoder included."""
        return len(self.layers)

    @property
    def moe_layers(self) -> tuple[MoESpec, ...]:
        """Every MoE of the model, layer by layer."""
        return tuple(moe for layer in self.layers for moe in layer.moes)

    @property
    def parts(self) -> dict[str, int]:
        """Parameters of each of ``PARTS``; their sum is ``total_params``.

        A tied head has none of its own.
        """
        return {part: matrices + vectors for part, (matrices, vectors) in self.numbers.items()}

    @property
    def active_parts(self) -> dict[str, int]:
        """The same with the experts of one token (on average); the sum is ``active_params``."""
        routed = sum(
            moe.experts_per_token * moe.expert_params(self.d_model) for moe in self.moe_layers
        )
        return {**self.parts, "experts": round(routed)}

    @property
    def total_params(self) -> int:
        """All parameters."""
        return sum(self.parts.values())

    @property
    def active_params(self) -> int:
        """A_all: parameters that one token uses, embedding and head included."""
        return sum(self.active_parts.values())

    @property
    def active_params_head(self) -> int:
        """A_head: without the input embedding, unless it is tied and so the head."""
        return self.active_params - (0 if self.tied else self.parts["embedding"])

    @property
    def active_params_nonemb(self) -> int:
        """A_nonemb: without embedding and head."""
        return self.active_params - self.parts["embedding"] - self.parts["head"]

    def active(self, convention: str = "all") -> int:
        """Active parameters by a convention: "all", "head" or "nonemb".

        Raises ValueError for another.
        """
        one_of(ACTIVE_CONVENTIONS, convention=convention)
        return {
            "all": self.active_params,
            "head": self.active_params_head,
            "nonemb": self.active_params_nonemb,
        }[convention]
