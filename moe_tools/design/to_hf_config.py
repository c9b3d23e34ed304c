"""The design as a Hugging Face config: the family whose block does what the router does."""

from .plan import Plan

# Router -> model_type, class.
HF_MODEL_TYPES = {
    "topk": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "loss_free": ("glm4_moe", "Glm4MoeForCausalLM"),
}


def hf_config(plan: Plan) -> dict:
    """What stands in a config.json: ``transformers.AutoConfig.for_model(**config)`` reads it.

    Top-k: Qwen3-MoE. Loss-free: GLM-4.5's layout (DeepSeek-V3's router, key heads shared among
    query heads); its bias is moved by whoever trains.

    Raises:
        ValueError: no family has the router.
    """
    shape, budget = plan.shape, plan.budget
    if budget.router_name not in HF_MODEL_TYPES:
        raise ValueError(
            f"router={budget.router_name!r} has no Hugging Face family; those with one: "
            f"{', '.join(HF_MODEL_TYPES)}"
        )
    model_type, architecture = HF_MODEL_TYPES[budget.router_name]
    common = {
        "model_type": model_type,
        "architectures": [architecture],
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.d_model,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": budget.seq_len,
        "attention_bias": False,
        "tie_word_embeddings": shape.tied,
        "intermediate_size": shape.granularity * shape.d_ff,
        "moe_intermediate_size": shape.d_ff,
        "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": shape.top_k > 1,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if budget.router_name == "topk":
        # Their loss is top_k at perfect balance and ours 1 (transformers #28255), and it counts
        # only with output_router_logits (#44242).
        return {
            **common,
            "num_experts": shape.n_experts,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "output_router_logits": True,
            "router_aux_loss_coef": 0.01 / shape.top_k,
        }
    groups = (plan.exchange.nodes, plan.max_nodes) if plan.max_nodes else (1, 1)
    return {
        **common,
        "n_routed_experts": shape.n_experts,
        "n_shared_experts": shape.n_shared_experts,
        "first_k_dense_replace": 0,
        "routed_scaling_factor": 1.0,
        "n_group": groups[0],
        "topk_group": groups[1],
        "use_qk_norm": True,
        "num_mtp_layers": 0,
    }
