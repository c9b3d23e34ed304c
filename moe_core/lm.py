"""A small decoder-only transformer whose feed-forward layer is dense or a Mixture-of-Experts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial

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
    """A language model in numbers; give exactly one of ``d_ff`` and ``moe``, else ValueError.

    Attributes:
        vocab_size: 256 when tokens are bytes.
        d_model, n_layers, n_heads, max_seq_len: D, layers, attention heads, longest sequence.
        d_ff, activation, glu: of the dense feed-forward layer, see ``FeedForward``.
        moe: config of the MoE layers (their d_model must be this one), or None for a dense model.
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
        for size in ("vocab_size", "d_model", "n_layers", "n_heads", "max_seq_len"):
            whole(1, **{size: getattr(self, size)})
        twice = 2 * self.n_heads  # rotary positions turn the numbers of a head in pairs
        if self.d_model % twice:
            raise ValueError(f"d_model={self.d_model} must be a multiple of 2 * n_heads={twice}")
        one_of(ACTIVATIONS, activation=self.activation)
        boolean(glu=self.glu)
        if (self.d_ff is None) == (self.moe is None):
            raise ValueError("give exactly one of d_ff (a dense model) and moe (an MoE model)")
        if self.d_ff is not None:
            whole(1, d_ff=self.d_ff)
        elif self.moe.d_model != self.d_model:
            raise ValueError(f"moe.d_model={self.moe.d_model} must equal d_model={self.d_model}")

    def dense_twin(self) -> "LMConfig":
        """The dense model that multiplies what a token's experts do: F_dense = (K + shared) * F.

        An MoE layer multiplies besides, per token, D*E in the router, and K*D to weight and add the
        outputs. Raises ValueError where the model is dense, or its experts have what a dense layer
        here has not (biases, clamps, dropout).
        """
        if self.moe is None:
            raise ValueError("moe=None: the model is dense already")
        moe = self.moe
        if (moe.bias, moe.glu_limit, moe.up_offset, moe.dropout) != (False, None, 0.0, 0.0):
            raise ValueError(
                "bias, glu_limit, up_offset and dropout of moe must be off: "
                "the dense layer of an LMConfig has none of them"
            )
        # Experts without computation count like the others: K is then the most a token may cost.
        routed, shared = moe.top_k * moe.d_ff, moe.n_shared_experts * (moe.shared_d_ff or moe.d_ff)
        d_ff = round(routed + shared)  # a mean K may be a fraction
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
        if isinstance(values.get("moe"), dict):
            values = {**values, "moe": MoEConfig.from_dict(values["moe"])}
        return cls(**values)


class CausalAttention(nn.Module):
    """Multi-head causal self-attention with rotary positions (Su et al. 2021, arXiv 2104.09864)."""

    def __init__(self, d_model: int, n_heads: int, max_seq_len: int):
        super().__init__()
        self.n_heads = n_heads
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        # Not persistent: a checkpoint then fits a model with another max_seq_len.
        for name in ("cos", "sin"):
            table = torch.empty(max_seq_len, d_model // n_heads // 2, dtype=torch.float32)
            self.register_buffer(name, table, persistent=False)
        self.reset_tables()

    @torch.no_grad()
    def reset_tables(self) -> None:
        """Compute the rotary tables again."""
        N, half = self.cos.shape
        place = partial(torch.arange, dtype=torch.float32, device=self.cos.device)
        angle = torch.outer(place(N), 10000.0 ** (-place(half) / half))
        self.cos.copy_(angle.cos())
        self.sin.copy_(angle.sin())

    def _load_from_state_dict(self, *args):
        # No state dict holds the tables: after to_empty they would be whatever memory held.
        super()._load_from_state_dict(*args)
        self.reset_tables()

    def _rotate(self, heads_BHNd: Tensor) -> Tensor:
        N = heads_BHNd.shape[-2]
        a, b = heads_BHNd.chunk(2, dim=-1)
        cos, sin = self.cos[:N].to(a.dtype), self.sin[:N].to(a.dtype)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D); position n sees the real ones of 0..n, and itself."""
        B, N, D = x.shape
        heads = self.qkv_proj(x).view(B, N, 3, self.n_heads, D // self.n_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
        q, k, sees_B1NN = self._rotate(q), self._rotate(k), None
        if padding_mask is not None:
            # Itself, so that padding too has something to see: a softmax over nothing is NaN.
            itself_NN = torch.eye(N, dtype=torch.bool, device=x.device)
            sees_B1NN = padding_mask[:, None, None, :].expand(B, 1, N, N).tril() | itself_NN
        y = F.scaled_dot_product_attention(q, k, v, sees_B1NN, is_causal=sees_B1NN is None)
        return self.out_proj(y.transpose(1, 2).reshape(B, N, D))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: LMConfig, shard: ExpertShard | None = None):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model)
        self.attention = CausalAttention(config.d_model, config.n_heads, config.max_seq_len)
        self.feed_forward_norm = nn.RMSNorm(config.d_model)
        if config.moe is None:
            act = {"activation": config.activation, "glu": config.glu}
            self.feed_forward = FeedForward(config.d_model, config.d_ff, **act)
        else:
            self.feed_forward = MixtureOfExperts(config.moe, shard)

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, token_ids: Tensor | None = None
    ) -> tuple[Tensor, Routing | None]:
        """(B, N, D) -> (B, N, D), and the routing of this layer (None when it is dense)."""
        x = x + self.attention(self.attention_norm(x), padding_mask)
        h = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, FeedForward):
            return x + self.feed_forward(h), None
        y, routing = self.feed_forward(h, padding_mask, token_ids)
        return x + y, routing


class LanguageModel(nn.Module):
    """Decoder-only transformer with tied embeddings.

    ``shards`` says for each layer which of its experts live here, see ``Experts``; None: all.
    """

    def __init__(self, config: LMConfig, shards: Sequence[ExpertShard] | None = None):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        shards = shards or [None] * config.n_layers
        self.blocks = nn.ModuleList(Block(config, shard) for shard in shards)
        self.norm = nn.RMSNorm(config.d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with std 0.02, gains of 1; a router that prescribes its own start keeps it."""
        prescribed, banks = set(), {}
        for module in self.modules():
            if isinstance(module, CausalAttention):
                module.reset_tables()
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()
            elif isinstance(module, Router) and module.prescribes_start:
                prescribed.update(map(id, module.parameters()))
            elif isinstance(module, Experts):
                banks.update((id(parameter), module) for parameter in module.parameters())
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2 or id(parameter) in prescribed:
                continue
            # GPT-2: 2 * n_layers outputs add up in the residual stream, which should not grow.
            writes = name.endswith(("out_proj.weight", "down_proj", "down_proj.weight"))
            normal = partial(nn.init.normal_, std=0.02)
            if writes:
                normal = partial(nn.init.normal_, std=0.02 / (2 * self.config.n_layers) ** 0.5)
            if id(parameter) in banks:  # the bank draws other ranks' experts, too
                banks[id(parameter)].draw(parameter, normal)
            else:
                normal(parameter)

    def forward(
        self, tokens_BN: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, list[Routing]]:
        """Logits (B, N, vocab_size) of the next token, and one Routing for each MoE layer.

        padding_mask (B, N) is True for real tokens: no real token attends to the others, and no
        router gives them room. So a text gets the same logits alone and padded, on either side.
        Raises ValueError where the sequence is longer than max_seq_len.
        """
        length, longest = tokens_BN.shape[-1], self.config.max_seq_len
        if length > longest:
            raise ValueError(f"sequence length {length} must be at most max_seq_len={longest}")
        x, routings = self.embedding(tokens_BN), []
        for block in self.blocks:
            x, routing = block(x, padding_mask, tokens_BN)
            if routing is not None:
                routings.append(routing)
        return F.linear(self.norm(x), self.embedding.weight), routings

    def update_routers(self, routings: Sequence[Sequence[Routing]]) -> None:
        """``Router.update`` of each layer, once per optimiser step, of routings[batch][layer]."""
        layers = [block.feed_forward for block in self.blocks]
        routers = [layer.router for layer in layers if isinstance(layer, MixtureOfExperts)]
        for router, of_layer in zip(routers, zip(*routings)):
            router.update(of_layer)


def next_token_loss(
    logits_BNV: Tensor, tokens_BN: Tensor, padding_mask: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy in nats, float32, of predicting token n+1 from the logits at n.

    Only from real tokens (padding_mask (B, N) True) to real ones, and not of tokens that are -100;
    0 where there is none. Raises ValueError where N < 2.
    """
    if tokens_BN.shape[1] < 2:
        raise ValueError(f"tokens of shape {tuple(tokens_BN.shape)} hold no next token: N < 2")
    # The shift by one happens here: the caller gives the tokens that went into the model.
    next_BN = tokens_BN[:, 1:]
    if padding_mask is not None:
        next_BN = next_BN.masked_fill(~(padding_mask[:, :-1] & padding_mask[:, 1:]), -100)
    logits = logits_BNV[:, :-1].flatten(0, 1).float()
    total = F.cross_entropy(logits, next_BN.flatten(), ignore_index=-100, reduction="sum")
    return total / (next_BN != -100).sum().clamp(min=1)


def train_step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    tokens_BN: Tensor,
    padding_mask: Tensor | None = None,
    *,
    max_grad_norm: float = 1.0,
) -> tuple[Tensor, list[Routing]]:
    """One optimiser step on one batch; gradients are scaled down to max_grad_norm over the model.

    The batch's cross-entropy, without auxiliary losses and without graph, and the routings.
    """
    logits_BNV, routings = model(tokens_BN, padding_mask)
    loss = next_token_loss(logits_BNV, tokens_BN, padding_mask)
    optimizer.zero_grad(set_to_none=True)
    (loss + sum(routing.aux_loss for routing in routings)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    model.update_routers([routings])  # what a router learns outside the gradient, once a step
    return loss.detach(), routings
