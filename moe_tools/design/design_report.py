"""The design in words: Markdown in four parts, and the rules."""

from dataclasses import fields

from moe_core.config import MoEConfig

from ..accounting import forward_flops, kv_cache_bytes
from ..markdown import prose_table
from ..units import count, duration, gigabytes
from .exchange_cost import cuts
from .model_shape import SPARSITY, shape_choices
from .plan import SHARE_LIMIT, plan_choices
from .rules import RULES, Choice
from .scaling_laws import dense_params_of_equal_loss
from .to_hf_config import HF_MODEL_TYPES


def report(design) -> str:
    """Markdown; see ``Design.markdown``."""
    b, spec = design.budget, design.spec
    shape, router, plan = (
        shape_choices(design.shape, b),
        design.router_choices,
        plan_choices(design.plan),
    )
    parts = [
        (
            f"# MoE design: {count(spec.active_params)} active of {count(spec.total_params)}, "
            f"{count(b.tokens)} tokens on {b.gpus} x {b.accelerator.name}"
        ),
        _notes(design),
        "## 1. Model",
        _model(design),
        _choices(shape),
        "## 2. Router",
        _choices(router),
        _moe_config(design.moe),
        "## 3. Compute",
        _compute(design),
        _losses(design),
        "## 4. Distribution",
        _choices(plan),
        _exchange(design),
        "## Rules",
        _rules(design, [*shape, *router, *plan]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _notes(design) -> str:
    """What the reader must not overlook."""
    b, plan, spec, shape = design.budget, design.plan, design.spec, design.shape
    off = {"active": (spec.active_params, b.active), "total": (spec.total_params, b.total)}
    notes = [
        f"{name} is {got / asked - 1:+.1%} from what was asked: sizes come in steps"
        for name, (got, asked) in off.items()
        if asked is not None and abs(got / asked - 1) > 0.02
    ]
    if b.total is None and shape.n_experts < SPARSITY * shape.top_k:
        notes.append(
            f"memory holds {shape.n_experts} experts, not the {SPARSITY * shape.top_k} of the rule"
            ' "sparsity"'
        )
    if b.steps < 1000:
        notes.append(
            f"{b.steps} optimiser steps are few: give fewer batch_tokens, more tokens or fewer GPUs"
        )
    if plan.replica_seconds > plan.compute_seconds:
        notes.append(
            "summing gradients and gathering weights takes longer than computing: more "
            "batch_tokens would hide it"
        )
    if plan.exchange_share > SHARE_LIMIT:
        notes.append(
            f"the exchange takes {plan.exchange_share:.0%} of the step, above {SHARE_LIMIT:.0%}: "
            "see the cuts in part 4"
        )
    if plan.roofline["share_of_peak"] < 0.9:
        notes.append(
            f"expert products reach {plan.roofline['share_of_peak']:.0%} of the roofline's peak: "
            "few tokens, or narrow experts"
        )
    return "\n".join(f"> Note: {note}." for note in notes)


def _choices(choices: list[Choice]) -> str:
    rows = [
        (c.what, c.value, c.why, f"{c.rule.name} ({c.rule.kind})" if c.rule else "")
        for c in choices
    ]
    return prose_table(("choice", "value", "why", "rule"), rows)


def _rules(design, choices: list[Choice]) -> str:
    """The rules of all choices, and those that the text names."""
    named = [
        "sparser is better",
        "4 x total",
        *(["backward repeats", "30 % exchange"] if design.plan.ep > 1 else []),
    ]
    rules = dict.fromkeys([*(c.rule for c in choices if c.rule), *(RULES[name] for name in named)])
    return "\n".join(f"- **{r.name}** ({r.kind}): {r.text}. Source: {r.source}." for r in rules)


def _model(design) -> str:
    spec, b = design.spec, design.budget
    family = HF_MODEL_TYPES.get(b.router_name)
    parts = ", ".join(f"{name} {count(value)}" for name, value in spec.parts.items() if value)
    return (
        f"Total {spec.total_params:,} parameters ({parts}). Active {spec.active_params:,} with "
        f"embedding and head, {spec.active_params_nonemb:,} without. Vocabulary {b.vocab_size}, "
        f"sequences of {b.seq_len}; RMS norm, gated experts (SiLU), no biases. "
        + (f"Hugging Face: {family[1]}." if family else "No Hugging Face family has this router.")
    )


def _moe_config(moe: MoEConfig) -> str:
    """What must be said of the layer's config to have it again."""
    plain = MoEConfig(moe.d_model, moe.d_ff, moe.n_experts, moe.top_k, router=moe.router)
    needed = ("d_model", "d_ff", "n_experts", "top_k", "router")
    said = {
        f.name: getattr(moe, f.name)
        for f in fields(moe)
        if f.name in needed or getattr(moe, f.name) != getattr(plain, f.name)
    }
    return "    MoEConfig(" + ", ".join(f"{name}={value!r}" for name, value in said.items()) + ")"


def _compute(design) -> str:
    b, plan, spec, m = design.budget, design.plan, design.spec, design.plan.memory
    again = ", and a third more for layers computed again" if plan.recompute == "layer" else ""
    gathered = f", gathered layers {gigabytes(m.gathered)}" if m.gathered else ""
    flops = forward_flops(spec, b.seq_len).total
    rows = [
        ("forward FLOPs a token", f"{flops:.4g}"),
        ("training FLOPs", f"{design.training_flops:.4g}{again}"),
        (
            "steps",
            (
                f"{b.steps} of {count(b.tokens_per_step)} tokens, {b.sequences_per_step} sequences "
                "a GPU"
            ),
        ),
        (
            "time",
            (
                f"{duration(plan.training_seconds)} ({duration(plan.step_seconds)} a step), if "
                f"computing reaches {b.utilisation:.0%} of the peak (assumed)"
            ),
        ),
        (
            "replicas",
            (
                f"gradients summed and weights gathered in {duration(plan.replica_seconds)} a "
                f"step, beside {duration(plan.compute_seconds)} of computing"
            ),
        ),
        (
            "memory of a GPU",
            (
                f"{gigabytes(m.total)} of {gigabytes(b.usable_memory)} usable: weights "
                f"{gigabytes(m.weights)}, gradients {gigabytes(m.gradients)}, AdamW "
                f"{gigabytes(m.optimizer)}, activations {gigabytes(m.activations)}{gathered}"
            ),
        ),
        ("cache of one sequence", gigabytes(kv_cache_bytes(spec, b.seq_len))),
    ]
    for name, dense in design.dense.items():
        rows.append(
            (
                f"dense model of {name}",
                (
                    f"{count(dense.total_params)} parameters, MLP "
                    f"{dense.layers[0].feed_forwards[0].d_ff} wide, "
                    f"{forward_flops(dense, b.seq_len).total / flops:.3g} x the FLOPs"
                ),
            )
        )
    return prose_table(("what", "how much"), rows)


def _losses(design) -> str:
    losses = design.losses
    rows = [
        (
            name if name.startswith("dense") else "this model",
            p.law,
            f"{p.loss:.3f}",
            "; ".join(p.outside) or "inside",
        )
        for name, p in losses.items()
    ]
    text = prose_table(("expected loss (nats)", "law", "value", "outside the fitted range"), rows)
    if any(p.outside for p in losses.values()):
        text += (
            "\n\n**Outside the range a law was fitted on, its number is an extrapolation.** The "
            "losses are on the authors' data and tokens: compare designs, predict no run."
        )
    equal = dense_params_of_equal_loss(losses["fine-grained"].loss, design.budget.tokens)
    params = design.spec.total_params - design.spec.parts["embedding"] - design.spec.parts["head"]
    found = (
        "no dense model reaches this model's loss with these tokens"
        if equal == float("inf")
        else (
            f"a dense model of {count(equal)} reaches this model's loss: a factor of "
            f"{params / equal:.2g}"
        )
    )
    return (
        text
        + '\n\nThe rule "4 x total" against the first law and its dense twin (embeddings apart):'
        f" {found}."
    )


def _exchange(design) -> str:
    plan, x, gpu, roofline = (
        design.plan,
        design.plan.exchange,
        design.budget.accelerator,
        design.plan.roofline,
    )
    tokens = (
        f"An expert gets {roofline['tokens_per_expert']:.4g} tokens of a micro-batch; its products "
        f"meet the ridge at {roofline['tokens_per_expert_at_ridge']:.4g}."
    )
    if plan.ep == 1:
        return tokens + " All experts are on every GPU: nothing is exchanged."
    way = "once to each node, then on inside it" if x.once_per_node else "straight to each rank"
    rows = [
        (
            name,
            f"{gigabytes(y.volume.dispatch)} + {gigabytes(y.volume.combine)}",
            duration(y.forward_seconds),
            duration(plan.micro_batches * y.seconds),
            f"{plan.share_with(y):.1%}",
        )
        for name, y in {
            "as designed": x,
            **{f"with {name}": cut for name, cut in cuts(x).items()},
        }.items()
    ]
    head = (
        "exchange",
        "a rank sends: dispatch + combine of a layer",
        "time of both",
        "time a step",
        "share of the step",
    )
    return (
        f"{tokens} Rows go {way}; a layer does so {x.passes} times a step, there and back (rule"
        f' "backward repeats").\n\n{prose_table(head, rows)}\n\nModelled: peak links'
        f" ({gpu.link_bandwidth / 1e9:.0f} GB/s inside a node of {x.network.ranks_per_node}, "
        f"{gpu.network_bandwidth / 1e9:.0f} GB/s between nodes), perfect balance, no latency,"
        f' nothing overlapped. Cut the exchange above {SHARE_LIMIT:.0%} of the step (rule "30 %'
        ' exchange").'
    )
