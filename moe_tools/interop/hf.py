"""Hugging Face blocks in and out: the same numbers, in a MixtureOfExperts.

    block = moe_core.interop.hf.from_block(hf_block, hf_config)   # outputs equal
    moe_core.interop.hf.to_block(block, hf_block)                 # the weights back
    moe_core.interop.hf.convert(hf_model)       # all of a model, in place; restore() undoes it

Nothing here imports transformers: blocks are known by the name of their class, see
``families.FAMILIES``.

To load a released model use transformers' own loader, safetensors only (a pickled checkpoint may
run code), not quantised, then ``convert`` it:

    model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, dtype=torch.float32)
    moe_core.interop.hf.convert(model)
"""

from .blocks import from_block, to_block
from .families import FAMILIES
from .models import ConvertedBlock, convert, restore

__all__ = ["FAMILIES", "ConvertedBlock", "convert", "from_block", "restore", "to_block"]
