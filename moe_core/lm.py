"""A small decoder-only transformer whose feed-forward layer is dense or a Mixture-of-Experts; nothing else differs."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MoEConfig
from .experts import ACTIVATIONS, Experts, FeedForward
from .layer import MixtureOfExperts
from .parallel.expert_parallel import ExpertShard
from .routers import Router
from .routing import Routing
from .validate import boolean, one_of, whole


@dataclass(frozen=True)
class LMConfig:
    """A language model in numbers.

    Attributes:
        vocab_size: 256 when tokens are bytes.
        d_model, n_layers, n_heads, max_seq_len: D, layers, attention heads, and the longest sequence.
        d_ff: width of the dense feed-forward layer; ignored by layers that are MoE, so give one of ``d_ff`` and ``moe``.
        activation, glu: of the dense layer, see ``FeedForward``.
        moe: config of the MoE layers (their d_model must be this one), or None for a dense model.

    Raises:
        ValueError: a value is out of range, or not exactly one of d_ff and moe is given.
    """

    vocab_size: int = 256
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    max_seq_len: int = 256
    d_ff: int | None = None
    activation: str = "silu"
    glu: bool = True
    moe: MoEConfig | None = None

    def __post_init__(self):
        whole(
            1,
            vocab_size=self.vocab_size,
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            max_seq_len=self.max_seq_len,
        )
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"d_model={self.d_model} must be a multiple of 2 * n_heads={2 * self.n_heads}"
            )
        one_of(ACTIVATIONS, activation=self.activation)
        boolean(glu=self.glu)
        if (self.d_ff is None) == (self.moe is None):
            raise ValueError("give exactly one of d_ff (a dense model) and moe (an MoE model)")
        if self.d_ff is not None:
            whole(1, d_ff=self.d_ff)
        elif self.moe.d_model != self.d_model:
            raise ValueError(f"moe.d_model={self.moe.d_model} must equal d_model={self.d_model}")

    def dense_twin(self) -> "LMConfig":
        """The dense model whose feed-forward layer costs what a token's experts cost: F_dense = (K + shared) * F.

        What an MoE layer multiplies beyond that, per token: D*E in the router, and K*D to weight and add the experts' outputs.
        Experts without computation count like the others: K is then the most that a token may cost.

        Raises:
            ValueError: the model is dense already, or its experts have what the dense layer has not (biases, clamps, dropout).
        """
        if self.moe is None:
            raise ValueError("moe=None: the model is dense already")
        moe = self.moe
        if (moe.bias, moe.glu_limit, moe.up_offset, moe.dropout) != (False, None, 0.0, 0.0):
            raise ValueError(
                "bias, glu_limit, up_offset and dropout of moe must be off: the dense layer of an LMConfig has none of them"
            )
        d_ff = round(
            moe.top_k * moe.d_ff + moe.n_shared_experts * (moe.shared_d_ff or moe.d_ff)
        )  # a mean K may be a fraction
        return replace(self, moe=None, d_ff=d_ff, activation=moe.activation, glu=moe.glu)

    def to_dict(self) -> dict:
        """Plain values only, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "LMConfig":
        """The inverse of ``to_dict``. Raises ValueError for a key that is not a field."""
        unknown = sorted(set(values) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"unknown keys in LMConfig: {', '.join(unknown)}")
        moe = values.get("moe")
        return cls(**{**values, "moe": MoEConfig.from_dict(moe) if isinstance(moe, dict) else moe})


class CausalAttention(nn.Module):
    """Multi-head causal self-attention with rotary positions (Su et al. 2021, arXiv 2104.09864)."""

    def __init__(self, d_model: int, n_heads: int, max_seq_len: int):
        super().__init__()
        self.n_heads = n_heads
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        half = d_model // n_heads // 2
        angle = torch.outer(
            torch.arange(max_seq_len).float(), 10000.0 ** (-torch.arange(half).float() / half)
        )
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def _rotate(self, heads_BHNd: Tensor) -> Tensor:
        N = heads_BHNd.shape[-2]
        a, b = heads_BHNd.chunk(2, dim=-1)
        cos, sin = self.cos[:N].to(a.dtype), self.sin[:N].to(a.dtype)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D); position n sees positions 0..n."""
        B, N, D = x.shape
        q, k, v = (
            self.qkv_proj(x).view(B, N, 3, self.n_heads, D // self.n_heads).permute(2, 0, 3, 1, 4)
        )
        y = F.scaled_dot_product_attention(self._rotate(q), self._rotate(k), v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: LMConfig, shard: ExpertShard | None = None):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model)
        self.attention = CausalAttention(config.d_model, config.n_heads, config.max_seq_len)
        self.feed_forward_norm = nn.RMSNorm(config.d_model)
        if config.moe is None:
            self.feed_forward = FeedForward(
                config.d_model, config.d_ff, activation=config.activation, glu=config.glu
            )
        else:
            self.feed_forward = MixtureOfExperts(config.moe, shard)

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """(B, N, D) -> (B, N, D), and the routing of this layer (None when it is dense)."""
        x = x + self.attention(self.attention_norm(x))
        h = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, FeedForward):
            return x + self.feed_forward(h), None
        y, routing = self.feed_forward(h, padding_mask, token_ids)
        return x + y, routing


class LanguageModel(nn.Module):
    """Decoder-only transformer with tied embeddings.

    Args:
        config: an ``LMConfig``; ``config.dense_twin()`` is the dense model to compare an MoE with.
        shards: for each layer which of its experts live here, see ``Experts``; None for all of them.
    """

    def __init__(self, config: LMConfig, shards: Sequence[ExpertShard] | None = None):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(
            Block(config, shard) for shard in shards or [None] * config.n_layers
        )
        self.norm = nn.RMSNorm(config.d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with std 0.02; what writes to the residual stream is scaled by 1/sqrt(2 * n_layers) (GPT-2).

        A router that prescribes its own start (noisy top-k: zeros) keeps it.
        """
        prescribed = {
            id(weight)
            for router in self.modules()
            if isinstance(router, Router) and router.prescribes_start
            for weight in router.parameters()
        }
        banks = {
            id(parameter): bank
            for bank in self.modules()
            if isinstance(bank, Experts)
            for parameter in bank.parameters()
        }
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and id(parameter) not in prescribed:
                writes = name.endswith(("out_proj.weight", "down_proj", "down_proj.weight"))
                std = 0.02 / ((2 * self.config.n_layers) ** 0.5 if writes else 1)
                if id(parameter) in banks:
                    banks[id(parameter)].draw(
                        parameter, lambda expert: nn.init.normal_(expert, std=std)
                    )
                else:
                    nn.init.normal_(parameter, std=std)

    def forward(
        self, tokens_BN: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """Predict the next token at every position.

        Args:
            tokens_BN: (B, N) int64, N <= max_seq_len.
            padding_mask: (B, N) bool, True for real tokens, handed to the routers.

        Returns:
            logits (B, N, vocab_size), and one Routing for each MoE layer (an empty list for a dense model).

        Raises:
            ValueError: the sequence is longer than max_seq_len.
        """
        if tokens_BN.shape[-1] > self.config.max_seq_len:
            raise ValueError(
                f"sequence length {tokens_BN.shape[-1]} must be at most max_seq_len={self.config.max_seq_len}"
            )
        x, routings = self.embedding(tokens_BN), []
        for block in self.blocks:
            x, routing = block(x, padding_mask, tokens_BN)
            if routing is not None:
                routings.append(routing)
        return F.linear(self.norm(x), self.embedding.weight), routings

    def update_routers(self, routings: Sequence[Sequence[Routing]]) -> None:
        """Let every router learn what it learns outside the gradient; once after each optimiser step.

        Args:
            routings: what ``forward`` returned, for each micro-batch of the step: ``routings[micro_batch][layer]``.
        """
        layers = [
            block.feed_forward
            for block in self.blocks
            if isinstance(block.feed_forward, MixtureOfExperts)
        ]
        for layer, of_layer in zip(layers, zip(*routings)):
            layer.router.update(of_layer)


def next_token_loss(logits_BNV: Tensor, tokens_BN: Tensor) -> Tensor:
    """Mean cross-entropy in nats of predicting token n+1 from the logits at position n.

    The shift by one happens here: give the tokens that went into the model. Scalar, float32; needs N >= 2.
    """
    return F.cross_entropy(logits_BNV[:, :-1].flatten(0, 1).float(), tokens_BN[:, 1:].flatten())


def train_step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    tokens_BN: Tensor,
    padding_mask: Tensor | None = None,
    *,
    max_grad_norm: float = 1.0,
) -> tuple[Tensor, list[Routing]]:
    """One optimiser step on one batch: loss plus auxiliary losses, backward, clip, step, and the routers' own update.

    Args:
        tokens_BN, padding_mask: as ``LanguageModel.forward`` takes them.
        max_grad_norm: the gradients are scaled down to this norm over the whole model.

    Returns:
        The cross-entropy of the batch, without auxiliary losses and without graph, and one Routing for each MoE layer.
    """
    logits_BNV, routings = model(tokens_BN, padding_mask)
    loss = next_token_loss(logits_BNV, tokens_BN)
    optimizer.zero_grad(set_to_none=True)
    (loss + sum(routing.aux_loss for routing in routings)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    model.update_routers([routings])
    return loss.detach(), routings
