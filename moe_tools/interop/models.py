"""Every MoE block of a Hugging Face model, swapped in place, and back."""

import torch
from torch import Tensor, nn

from moe_core.layer import MixtureOfExperts
from moe_core.routing import Routing

from .blocks import check, copy_flags, from_block, write
from .families import FAMILIES, family_of


class ConvertedBlock(nn.Module):
    """Stands where a Hugging Face block stood: takes and gives what the model around it expects.

    Its child ``router_output`` (under the name that the block's router had) stands where that
    router stood. Transformers hooks itself onto routers to collect ``router_logits``, and so gets
    ours, with their gradient: ``output_router_logits=True`` and the model's own auxiliary loss work
    as before. Padding is routed like any token, as in transformers.

    Attributes:
        moe: the ``MixtureOfExperts``. ``moe.register_forward_hook`` sees every Routing.
    """

    def __init__(self, hf_block: nn.Module, moe: MixtureOfExperts):
        super().__init__()
        self.moe, self._family = moe, family_of(hf_block)
        self.add_module(self._family.gate, _router_output(getattr(hf_block, self._family.gate)))
        self._shell = (
            hf_block.to("meta"),
        )  # its structure without its memory, out of sight of parameters() and to()
        self.train(moe.training)

    def forward(self, hidden_states: Tensor, input_ids: Tensor | None = None):
        """What the block returned for (B, N, D): see ``Family.returns``."""
        y, routing = self.moe(hidden_states, token_ids=input_ids)
        getattr(self, self._family.gate)(self._at_their_place(routing))
        return self._family.returns(y, routing)

    def _at_their_place(self, routing: Routing) -> tuple:
        logits = routing.logits.flatten(0, 1) if self._family.flat_logits else routing.logits
        return (None,) * self._family.logits_at + (logits,)

    def hf_block(self) -> nn.Module:
        """The Hugging Face block again, with the weights as they are now."""
        block = self._shell[0]
        weights = {
            name: weight.clone(
                memory_format=torch.contiguous_format
            )  # write gives views, which cannot be saved
            for name, weight in write(block, self.moe).items()
        }
        block.load_state_dict(weights, assign=True)
        copy_flags(block, self.moe, reverse=True)
        return block.train(self.training)


def convert(hf_model: nn.Module) -> nn.Module:
    """Swap every MoE block of the model for ours, in place; the logits stay equal up to rounding.

    Do it before an optimiser is made: the parameters are new ones. Only one block at a time has its
    weights twice. A converted model generates and trains; ``restore`` it before save_pretrained,
    which would write our names.

    Args:
        hf_model: a model of transformers with its ``config``, in one piece (not spread over
            devices, not quantised).

    Returns:
        hf_model, with a ``ConvertedBlock`` where a block was.

    Raises:
        ValueError: the model has no MoE block, has one of an unknown family, or ``from_block``
            refuses one. The model is then as it was.
    """
    blocks = {
        name: module
        for name, module in hf_model.named_modules()
        if type(module).__name__ in FAMILIES
    }
    unknown = {
        type(module).__name__ for module in hf_model.modules() if hasattr(module, "experts")
    } - set(FAMILIES)
    unknown -= {MixtureOfExperts.__name__}
    if unknown or not blocks:
        found = f"has {', '.join(sorted(unknown))}, no block" if unknown else "has no MoE block"
        raise ValueError(
            f"{type(hf_model).__name__} {found} that can be read; those known are "
            f"{', '.join(FAMILIES)}"
        )
    for block in blocks.values():
        check(block, hf_model.config)  # raises before anything is changed
    for name, block in blocks.items():
        _put(hf_model, name, ConvertedBlock(block, from_block(block, hf_model.config)))
    return hf_model


def restore(hf_model: nn.Module) -> nn.Module:
    """Undo ``convert``: the Hugging Face blocks again, in place, with the weights as they are now.

    Raises:
        ValueError: the model holds no ``ConvertedBlock``.
    """
    blocks = {
        name: module
        for name, module in hf_model.named_modules()
        if isinstance(module, ConvertedBlock)
    }
    if not blocks:
        raise ValueError(f"{type(hf_model).__name__} has no converted block")
    for name, block in blocks.items():
        _put(hf_model, name, block.hf_block())
    return hf_model


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


class _RouterOutput(nn.Module):
    """Passes on what it is given."""

    def forward(self, output: tuple) -> tuple:
        """Exactly what came in."""
        return output

    def extra_repr(self) -> str:
        """Nothing: it has none of the router's sizes."""
        return ""


def _router_output(hf_router: nn.Module) -> nn.Module:
    """A module without weights, of their router's class and with its hooks."""
    cls = type("RouterOutput", (_RouterOutput, type(hf_router)), {})
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    module._forward_hooks = hf_router._forward_hooks
    return module
