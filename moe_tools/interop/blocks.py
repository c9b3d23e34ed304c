"""One Hugging Face block into a MixtureOfExperts, and back."""

import torch
from torch import Tensor, nn

from moe_core.config import MoEConfig
from moe_core.layer import MixtureOfExperts

from .families import config_of, family_of


def from_block(hf_block: nn.Module, hf_config) -> MixtureOfExperts:
    """A ``MixtureOfExperts`` with a copy of the block's weights, that does what the block does.

    Outputs and gradients are equal up to rounding, in eval and in training, except for what is
    random: the jitter of Switch's router is seen by the router alone here. (In bfloat16 our router
    still computes in float32.) Losses are not carried over: add ``aux_loss_weight`` yourself, in
    our scale (``losses.convert_loss``).

    Args:
        hf_block: an MoE block of transformers, one of ``FAMILIES``.
        hf_config: the config it was built from; of a model of several parts, the text model's or
            the whole.

    Returns:
        On the block's device, in its dtype, its mode (training or eval) and with its requires_grad.

    Raises:
        ValueError: the family is unknown, an option has no counterpart, or a weight is missing,
            unexpected, of another shape than the family's layout says, or on the meta device.
    """
    moe = check(hf_block, hf_config)
    moe.load_state_dict(read(hf_block, moe, hf_block.state_dict()), assign=True)
    copy_flags(hf_block, moe, reverse=False)
    return moe.train(hf_block.training)


@torch.no_grad()
def to_block(moe: MixtureOfExperts, hf_block: nn.Module, hf_config=None) -> nn.Module:
    """Write the weights back into a block of their family; undoes ``from_block``.

    Args:
        moe: what ``from_block`` made, trained further perhaps.
        hf_block: its tensors are overwritten; they keep their dtype and device.
        hf_config: if given, the block's options are compared with ours as well. Weights alone
            cannot tell, say, whether the block renormalises.

    Returns:
        hf_block.

    Raises:
        ValueError: the family is unknown, the block and ours have not the same weights, or they do
            not do the same.
    """
    if hf_config is not None:
        _same_options(moe.config, config_of(hf_block, hf_config))
    theirs = hf_block.state_dict()
    read(hf_block, moe, _without_memory(theirs))  # all that can be wrong is wrong here
    for name, tensor in write(hf_block, moe).items():
        theirs[name].copy_(tensor)
    return hf_block


def check(hf_block: nn.Module, hf_config) -> MixtureOfExperts:
    """What ``from_block`` raises and returns, but without memory (on the meta device)."""
    config = config_of(hf_block, hf_config)
    away = [name for name, tensor in hf_block.state_dict().items() if tensor.is_meta]
    if away:
        raise ValueError(
            f"{type(hf_block).__name__} holds no weights: {', '.join(away)} on the meta device. A "
            "model that is offloaded or not loaded yet has to be brought into memory first"
        )
    with torch.device("meta"):  # draws no random number either
        moe = MixtureOfExperts(config)
    read(hf_block, moe, _without_memory(hf_block.state_dict()))
    return moe


def _without_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def _layouts(hf_block: nn.Module, moe: MixtureOfExperts) -> dict:
    """Name of ours -> layout and names of theirs, for the weights that this variant has."""
    layouts, ours = family_of(hf_block).layouts, moe.state_dict()
    foreign = sorted(set(ours) - set(layouts))
    if foreign:
        raise ValueError(f"{type(hf_block).__name__} has no place for {', '.join(foreign)}")
    E = moe.config.n_experts
    return {name: (layouts[name], layouts[name].names_for(E), ours[name]) for name in ours}


def read(
    hf_block: nn.Module, moe: MixtureOfExperts, theirs: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Their tensors (a state dict) under our names, in our layout, each in memory of its own."""
    where, theirs, ours = type(hf_block).__name__, dict(theirs), {}
    for name, (layout, sources, example) in _layouts(hf_block, moe).items():
        expected = layout.write(torch.empty(example.shape, device="meta"))
        missing = [source for source in sources if source not in theirs]
        if missing:
            raise ValueError(f"{where} lacks the weight {', '.join(missing)}")
        tensors = [theirs.pop(source) for source in sources]
        for source, tensor, right in zip(sources, tensors, expected):
            if tensor.shape != right.shape:
                raise ValueError(
                    f"{where}.{source} has shape {tuple(tensor.shape)}, must be "
                    f"{tuple(right.shape)}"
                )
        tensor = layout.read(tensors).clone(memory_format=torch.contiguous_format)
        ours[name] = (
            tensor.to(torch.promote_types(tensor.dtype, torch.float32))
            if name == "router.expert_bias"
            else tensor
        )
    if theirs:
        raise ValueError(f"{where} has unexpected weights: {', '.join(theirs)}")
    return ours


def write(hf_block: nn.Module, moe: MixtureOfExperts) -> dict[str, Tensor]:
    """Our tensors under their names, in their layout."""
    return {
        source: tensor
        for layout, sources, ours in _layouts(hf_block, moe).values()
        for source, tensor in zip(sources, layout.write(ours))
    }


def copy_flags(hf_block: nn.Module, moe: MixtureOfExperts, *, reverse: bool) -> None:
    """What is frozen on one side is frozen on the other."""
    theirs, ours = dict(hf_block.named_parameters()), dict(moe.named_parameters())
    for name, (_, sources, _) in _layouts(hf_block, moe).items():
        if name not in ours:
            continue  # a buffer
        if reverse:
            for source in sources:
                theirs[source].requires_grad_(ours[name].requires_grad)
        else:
            ours[name].requires_grad_(any(theirs[source].requires_grad for source in sources))


def _same_options(ours: MoEConfig, theirs: MoEConfig) -> None:
    free = "capacity_factor", "aux_loss_weight", "z_loss_weight", "drop_path", "dropout", "backend"
    ours, theirs = ours.to_dict(), theirs.to_dict()
    for name in ours:
        if name not in free and ours[name] != theirs[name]:
            raise ValueError(f"{name}={ours[name]!r} of the layer is {theirs[name]!r} in the block")
