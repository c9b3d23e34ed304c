"""Chapter 4: dense against MoE at equal active FLOPs. `python book/runs/dense_vs_moe.py` writes dense_vs_moe.json (15 to 30 minutes, 2 cores).

Five models and three controls, three seeds, the same batches in the same order. Every run has one core to itself; its clock is processor time, so that
other programs on the machine do not count.
"""

import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from moe_book import corpus, runs, training
from moe_core import LanguageModel, LMConfig, MoEConfig

SIZE = {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}
D_FF, TOP_K, EXPERTS, WIDE = 96, 2, (4, 8, 16), 8
TRAIN = {"steps": 800, "batch_size": 16, "seq_len": 128, "lr": 3e-3}
EVAL_AT = (50, 100, 200, 300, 400, 500, 600, 700, 800)
AUX, SEEDS, PASSAGE = 0.01, [0, 1, 2], 168
NAMES = ("dense", *(f"E{E}" for E in EXPERTS), "wide")
# Why does an MoE start behind its twin? Each control takes away one thing that could be the reason.
CONTROLS = {
    "E2": "both experts see every token: nothing is sparse, nothing is selected",
    "E8 frozen": "the router's weights stay as they were drawn: its choices shift less",
    "E8 times 2": "the two weights sum to 2, as in the twin, instead of 1",
}
STOP = {"E2": 300, "E8 frozen": 300}  # same schedule, cut off: the start is asked for


def config(name: str, backend: str = "auto") -> LMConfig:
    """dense: the twin. wide: dense, with as many FFN parameters as E8. E4, E8, E16 and the controls: MoE with K = 2."""
    if name in ("dense", "wide"):
        return LMConfig(**SIZE, d_ff=(TOP_K if name == "dense" else WIDE) * D_FF)
    moe = MoEConfig(
        d_model=SIZE["d_model"],
        d_ff=D_FF,
        n_experts=int(name.split()[0][1:]),
        top_k=TOP_K,
        aux_loss_weight=AUX,
        backend=backend,
        router_options={"routed_scaling_factor": 2.0} if name.endswith("times 2") else {},
    )
    return LMConfig(**SIZE, moe=moe)


class Stop(Exception):
    """The run has reached its last step of interest."""


def run(name: str, seed: int) -> dict:
    """Train one model; its held-out loss per domain along the way, and what its routers do at the end."""
    torch.set_num_threads(1)
    text = corpus.load()
    torch.manual_seed(seed)
    model = LanguageModel(config(name))
    if name.endswith("frozen"):
        for block in model.blocks:
            block.feed_forward.router.weight.requires_grad_(False)
    valid, dropped = {domain: [] for domain in text.domains}, []

    def on_step(step, model, routings):
        dropped.extend(float(r.drop_rate) for r in routings)
        if step in EVAL_AT:
            for domain in text.domains:
                valid[domain].append(training.evaluate(model, text, domain=domain))
        if step == STOP.get(name):
            raise Stop

    try:
        history = training.train(model, text, **TRAIN, seed=seed, progress=False, on_step=on_step)
    except Stop:
        return {"name": name, "seed": seed, "valid": valid}
    shifted = {d: training.evaluate(model, text, domain=d, split="shifted") for d in text.domains}
    found = {"name": name, "seed": seed, "valid": valid, "shifted": shifted}
    if name in CONTROLS:
        return found
    found["first_loss"] = history.loss[0]
    if model.config.moe is not None:
        late = torch.tensor(history.load[-100:])
        found.update(
            load=late.mean(0).tolist(), drop_rate=max(dropped), **routes(model, text, seed)
        )
        if seed == SEEDS[0] and name == f"E{WIDE}":
            found["passages"] = passages(model, text)
    return found


@torch.no_grad()
def routes(model: LanguageModel, text: corpus.Corpus, seed: int) -> dict:
    """Share of each domain's slots per expert, [layer][domain][expert]: as it is, as the byte alone would give it, and as it was at this model's own start.

    by_byte answers: if every byte were sent by its own habit, whatever stands around it, how would the domains differ? predictable is
    the share of tokens whose first expert is the usual one of their byte.
    """
    model.eval()
    torch.manual_seed(seed)
    fresh = LanguageModel(model.config)  # the model this one was before training
    batches = [
        text.batch(64, 128, generator=torch.Generator().manual_seed(7), split="valid", domain=d)[0]
        for d in text.domains
    ]
    n_layers, E = model.config.n_layers, model.config.moe.n_experts
    found = {"share": [], "by_byte": [], "untrained": [], "predictable": []}
    trained_routings, fresh_routings = (
        [m(tokens)[1] for tokens in batches] for m in (model, fresh)
    )
    for layer in range(n_layers):
        counts = []
        for tokens, routings in zip(
            batches, trained_routings
        ):  # per domain: how often byte b goes to expert e
            table = torch.zeros(256, E)
            pairs = tokens.unsqueeze(-1).expand_as(routings[layer].expert_indices).flatten() * E
            table.view(-1).scatter_add_(
                0, pairs + routings[layer].expert_indices.flatten(), torch.ones(len(pairs))
            )
            counts.append(table)
        habit = sum(counts) / sum(counts).sum(1, keepdim=True).clamp(min=1)
        found["share"].append([(c.sum(0) / c.sum()).tolist() for c in counts])
        found["by_byte"].append(
            [((c.sum(1, keepdim=True) * habit).sum(0) / c.sum()).tolist() for c in counts]
        )
        found["untrained"].append([r[layer].slot_share().tolist() for r in fresh_routings])
        first = torch.cat([r[layer].expert_indices[..., 0].flatten() for r in trained_routings])
        table = torch.zeros(256, E).view(-1)
        table.scatter_add_(
            0, torch.cat([t.flatten() for t in batches]) * E + first, torch.ones(len(first))
        )
        found["predictable"].append(float(table.view(256, E).max(1).values.sum() / len(first)))
    return found


@torch.no_grad()
def passages(model: LanguageModel, text: corpus.Corpus) -> dict:
    """A few held-out lines of each domain, and the expert (slot 0) of each byte, [layer][byte]."""
    model.eval()
    found = {}
    for domain, blocks in text.valid.items():
        block = blocks[len(blocks) // 2]
        start = block.tolist().index(ord("\n")) + 1
        tokens = block[start : start + PASSAGE].long()
        routings = model(tokens.unsqueeze(0))[1]
        found[domain] = {
            "text": corpus.decode(tokens),
            "experts": [r.expert_indices[0, :, 0].tolist() for r in routings],
        }
    return found


def flops_per_token(name: str) -> int:
    """Forward FLOPs per token: what torch counts, with loop and math attention, which it sees, and the combine, which it does not."""
    lm = config(name, backend="loop")
    model, tokens = LanguageModel(lm), torch.zeros(1, TRAIN["seq_len"], dtype=torch.int64)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens)
    combine = 0 if lm.moe is None else lm.n_layers * 2 * lm.moe.top_k * lm.d_model
    return counter.get_total_flops() // tokens.numel() + combine


def clock(rounds: int = 40) -> dict:
    """Processor milliseconds of one training step, and of the optimiser in it: the models take turns, and the median over the rounds counts.

    E2 is there for the reasons: its experts have all 2048 rows, as the dense FFN has; what it takes more is the way there and back.
    """
    torch.set_num_threads(1)
    text = corpus.load()
    tokens = text.batch(
        TRAIN["batch_size"], TRAIN["seq_len"], generator=torch.Generator().manual_seed(0)
    )[0]
    timed = (*NAMES, "E2")
    models = {name: LanguageModel(config(name)) for name in timed}
    optimizers = {
        name: torch.optim.AdamW(model.parameters(), lr=1e-4) for name, model in models.items()
    }
    times, updates = ({name: [] for name in timed} for _ in range(2))
    for _ in tqdm(range(rounds + 3), desc="clock"):
        for name, model in models.items():
            start = time.process_time()
            logits, routings = model(tokens)
            loss = training.next_token_loss(logits, tokens) + sum(r.aux_loss for r in routings)
            optimizers[name].zero_grad()
            loss.backward()
            update = time.process_time()
            optimizers[name].step()
            end = time.process_time()
            times[name].append(1000 * (end - start))
            updates[name].append(1000 * (end - update))
    return {
        name: {
            "median": statistics.median(times[name][3:]),
            "quartiles": statistics.quantiles(times[name][3:])[::2],
            "optimizer": statistics.median(updates[name][3:]),
        }
        for name in timed
    }


if __name__ == "__main__":
    jobs = [(name, seed) for seed in SEEDS for name in (*reversed(NAMES), *CONTROLS)]
    with ProcessPoolExecutor(max_workers=2) as pool:
        futures = [pool.submit(run, *job) for job in jobs]
        done = [
            future.result()
            for future in tqdm(as_completed(futures), total=len(jobs), desc="runs", unit="run")
        ]
    results = {name: {} for name in (*NAMES, *CONTROLS)}
    for found in sorted(done, key=lambda found: found["seed"]):
        for key, value in found.items():
            if key not in ("name", "seed"):
                results[found["name"]].setdefault(key, []).append(value)
    steps_ms = clock()
    for name in (*NAMES, *CONTROLS):
        results[name]["step_ms"] = steps_ms.get(name)
    for name in NAMES:
        model = LanguageModel(config(name))
        results[name].update(
            flops_per_token=flops_per_token(name),
            config=config(name).to_dict(),
            total_params=sum(p.numel() for p in model.parameters()),
        )
    print(
        runs.save(
            "dense_vs_moe",
            text=corpus.load(),
            config={
                **TRAIN,
                "aux_loss_weight": AUX,
                "eval_at": list(EVAL_AT),
                "eval_bytes_per_domain": 8 * 16 * 128,
                "controls": CONTROLS,
                "stop": STOP,
                "threads_per_run": 1,
            },
            seeds=SEEDS,
            results=results,
        )
    )
