"""Tiny Hugging Face models of every family, built from a config with random weights."""

from importlib import import_module

import torch
from torch import Tensor, nn

from .families import FAMILIES, hf_config

VOCABULARY = 40
COMMON = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "eos_token_id": None,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
FIRST_LAYER_DENSE = {"num_hidden_layers": 3, "first_k_dense_replace": 1, "intermediate_size": 24}
MODELS = {  # class, and what its config needs besides the sizes of the block
    "mixtral": ("MixtralForCausalLM", COMMON),
    "olmoe": ("OlmoeForCausalLM", COMMON),
    "qwen2_moe": ("Qwen2MoeForCausalLM", COMMON),
    "qwen3_moe": ("Qwen3MoeForCausalLM", COMMON),
    "granite": ("GraniteMoeForCausalLM", COMMON),
    "gpt_oss": ("GptOssForCausalLM", {**COMMON, "swiglu_limit": 0.5}),
    "llama4": ("Llama4ForCausalLM", {**COMMON, "intermediate_size_mlp": 24}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", {**COMMON, **LATENT, **FIRST_LAYER_DENSE}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**COMMON, **LATENT, **FIRST_LAYER_DENSE}),
    "deepseek_v4": (
        "DeepseekV4ForCausalLM",
        {  # three layers route by a table, two by a router
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "q_lora_rank": 8,
            "o_lora_rank": 8,
            "o_groups": 2,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 4,
            "hc_mult": 2,
            "swiglu_limit": 0.5,
        },
    ),
    "switch": (
        "SwitchTransformersForConditionalGeneration",
        {
            "num_layers": 4,
            "num_decoder_layers": 4,
            "num_sparse_encoder_layers": 2,
            "num_sparse_decoder_layers": 2,
            "num_heads": 4,
            "d_kv": 8,
            "expert_capacity": 3,
            "router_jitter_noise": 0.0,
        },
    ),
}
LAYERS = {"switch": 4, "deepseek_v4": 5}  # MoE layers; 2 in the others
SHAPE = (2, 9, 32, 16, 8, 2, 4, 2)  # D = 2F: gate_up_proj is square


def hf_model(name: str, seed: int = 0) -> nn.Module:
    """A model with every weight drawn at random, in eval mode."""
    cls, sizes = MODELS[name]
    config = hf_config(name, SHAPE, vocab_size=VOCABULARY, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        models = import_module(
            f"transformers.models.{FAMILIES[name].module}.modeling_{FAMILIES[name].module}"
        )
        model = getattr(models, cls)(config)
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "tid2eid" in key:
                tensor.copy_(torch.rand(VOCABULARY, SHAPE[4]).topk(SHAPE[5]).indices)
            elif tensor.requires_grad and tensor.ndim > 1 or "bias" in key:
                tensor.data.normal_(0, 0.2)
    return model.eval()


def run(model: nn.Module, **arguments):
    """The model on some tokens, with its router logits."""
    tokens = (torch.arange(22) * 7 % (VOCABULARY - 1) + 1).view(2, 11)
    if model.config.is_encoder_decoder:
        arguments["decoder_input_ids"] = tokens[:, :7]
    return model(tokens, output_router_logits=True, **arguments)


def router_logits(output) -> list[Tensor]:
    """One tensor for each router that transformers keeps track of."""
    keys = [key for key in output if key.endswith("router_logits")]
    return [logits for key in keys for logits in output[key]]
