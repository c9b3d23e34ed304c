"""Every MoE block of a Hugging Face model, swapped in place, and back."""

import torch
from torch import Tensor, nn

from moe_core.layer import MixtureOfExperts
from moe_core.routing import Routing

from .blocks import check, copy_flags, from_block, read, write
from .families import FAMILIES, Family, family_of


class ConvertedBlock(nn.Module):
    """Stands where a Hugging Face block stood: takes and gives what the model around it expects.

    Its child ``router_output`` (under the name that the block's router had) stands where that
    router stood. Transformers hooks itself onto routers to collect ``router_logits``, and so gets
    ours, with their gradient: ``output_router_logits=True`` and the model's own auxiliary loss work
    as before. Padding is routed like any token, as in transformers.

    Its state dict has the names and layouts of the block it stands for, so what saves the model
    writes a file that transformers reads, and it loads from one. (Not where parameters were added
    to ``moe``, say by an adapter: then it has all of ours, under our names.)

    Attributes:
        moe: the ``MixtureOfExperts``. ``moe.register_forward_hook`` sees every Routing.
    """

    def __init__(self, hf_block: nn.Module, moe: MixtureOfExperts):
        super().__init__()
        self.moe, gate = moe, family_of(hf_block).gate
        self.add_module(gate, _router_output(getattr(hf_block, gate)))
        self._shell = (
            hf_block.to("meta"),
        )  # its structure without its memory, out of sight of parameters() and to()
        self._names = set(moe.state_dict())
        self.train(moe.training)

    def forward(self, hidden_states: Tensor, input_ids: Tensor | None = None):
        """What the block returned for (B, N, D): see ``Family.returns``."""
        y, routing = self.moe(hidden_states, token_ids=input_ids)
        getattr(self, self._family.gate)(self._at_their_place(routing))
        return self._family.returns(y, routing)

    @property
    def _family(self) -> Family:
        return family_of(self._shell[0])

    def _at_their_place(self, routing: Routing) -> tuple:
        logits = routing.logits.flatten(0, 1) if self._family.flat_logits else routing.logits
        return (None,) * self._family.logits_at + (logits,)

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False) -> dict[str, Tensor]:
        """The block's, under the block's names; each tensor in memory of its own."""
        if set(self.moe.state_dict()) != self._names:
            return super().state_dict(
                *args, destination=destination, prefix=prefix, keep_vars=keep_vars
            )
        destination = {} if destination is None else destination
        destination.update({prefix + name: tensor for name, tensor in self._theirs().items()})
        return destination

    def _load_from_state_dict(
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        theirs = {
            key: state_dict[key]
            for key in state_dict
            if key.startswith(prefix) and not key.startswith(prefix + "moe.")
        }
        if theirs:
            for key in theirs:
                del state_dict[key]
            theirs = {key.removeprefix(prefix): tensor for key, tensor in theirs.items()}
            try:
                ours = read(self._shell[0], self.moe, theirs)
                state_dict.update({f"{prefix}moe.{name}": ours[name] for name in ours})
            except ValueError as error:
                errors.append(f"{prefix.removesuffix('.')}: {error}")
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )

    def _theirs(self) -> dict[str, Tensor]:
        # write gives views, which cannot be saved
        weights = write(self._shell[0], self.moe)
        return {
            name: weight.clone(memory_format=torch.contiguous_format)
            for name, weight in weights.items()
        }

    def hf_block(self) -> nn.Module:
        """The Hugging Face block again, with the weights as they are now."""
        block = self._shell[0]
        block.load_state_dict(self._theirs(), assign=True)
        copy_flags(block, self.moe, reverse=True)
        return block.train(self.training)


def convert(hf_model: nn.Module) -> nn.Module:
    """Swap every MoE block of the model for ours, in place; the logits stay equal up to rounding.

    Do it before an optimiser is made: the parameters are new ones. Only one block at a time has its
    weights twice. A converted model generates, trains, and is saved as the model it was.

    Args:
        hf_model: a model of transformers with its ``config``, in one piece (not spread over
            devices, not offloaded, not quantised).

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

    def __reduce_ex__(self, protocol):
        # Its class was made on the fly: nobody who unpickles it finds it by name.
        return _empty_router_output, (type(self).__mro__[2],), self.__dict__


def _empty_router_output(router_class: type) -> nn.Module:
    cls = type("RouterOutput", (_RouterOutput, router_class), {})
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    return module


def _router_output(hf_router: nn.Module) -> nn.Module:
    """A module without weights, of their router's class and with its hooks."""
    module = _empty_router_output(type(hf_router))
    module._forward_hooks = hf_router._forward_hooks
    return module
