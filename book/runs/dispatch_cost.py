"""What it costs to run sorted rows through experts, in each way there is, and to bring the rows there and back.

Run it with `python book/runs/dispatch_cost.py` (about two minutes on one quiet CPU core); chapter 3 shows dispatch_cost.json.
Everything is processor time of one thread, measured in turns, as a ratio to one dense MLP over the same rows in the same turn.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[i]) for i in (1, 2)
]  # moe_book and moe_core, installed or not

import torch
import torch.nn.functional as F
from tqdm import tqdm

from moe_book import runs
from moe_core import DispatchPlan, Experts, FeedForward, Routing

SEEDS = [0, 1, 2]
CONFIG = {
    "d_model": 128,
    "d_ff": 256,
    "n_rows": 2048,
    "n_experts": [4, 8, 16, 32, 64],
    "skews": {"even": 0.0, "skewed": 1.0},
    "rounds": 9,
    "dispatch": {"n_tokens": [128, 256, 512, 1024, 2048], "n_experts": 8, "top_k": 2, "rounds": 7},
}
WAYS = ("naive loop", "loop", "padded", "grouped", "fused")


def naive_loop(experts: Experts, rows_AD: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """The loop one writes first: it indexes the bank inside the loop."""
    out = []
    for e, rows in enumerate(rows_AD.split(counts_E.tolist())):
        gate, up = F.linear(rows, experts.gate_up_proj[e]).chunk(2, -1)
        out.append(F.linear(F.silu(gate) * up, experts.down_proj[e]))
    return torch.cat(out)


def sorted_counts(E: int, skew: float, seed: int) -> torch.Tensor:
    """(E,) rows per expert: each row draws its expert, expert e with a chance like 1 / (e + 1)^skew."""
    chance_E = (torch.arange(E) + 1.0) ** -skew
    drawn = torch.multinomial(
        chance_E, CONFIG["n_rows"], replacement=True, generator=torch.Generator().manual_seed(seed)
    )
    return drawn.bincount(minlength=E)


def timed(run, inputs: list[torch.Tensor]) -> tuple[float, float]:
    """Processor seconds of forward, and of backward to all inputs."""
    start = time.process_time()
    y = run()
    middle = time.process_time()
    torch.autograd.grad(y, inputs, torch.ones_like(y))
    return middle - start, time.process_time() - middle


def in_turns(candidates: dict, rounds: int) -> dict:
    """name -> [forward, backward, both], the median over the rounds of the ratio to "dense" in the same round."""
    ratios = {name: [] for name in candidates}
    for turn in range(rounds + 2):  # the first two warm up
        took = {name: timed(*candidate) for name, candidate in candidates.items()}
        base = took["dense"]
        if turn >= 2:
            for name, (forward, backward) in took.items():
                ratios[name].append(
                    (forward / base[0], backward / base[1], (forward + backward) / sum(base))
                )
    return {
        name: [statistics.median(column) for column in zip(*rows)]
        for name, rows in ratios.items()
        if name != "dense"
    }


def banks(E: int, skew: float, seed: int) -> dict:
    """All ways through a bank of E experts."""
    torch.manual_seed(seed)
    D, A = CONFIG["d_model"], CONFIG["n_rows"]
    experts, dense = Experts(D, CONFIG["d_ff"], E), FeedForward(D, CONFIG["d_ff"])
    rows, counts = torch.randn(A, D, requires_grad=True), sorted_counts(E, skew, seed)
    into = [rows, *experts.parameters()]

    def way(name):
        def run():
            experts.backend = name
            return experts.run_rows(rows, counts)

        return (lambda: naive_loop(experts, rows, counts)) if name == "naive loop" else run

    expected = naive_loop(experts, rows, counts)
    for name in WAYS:  # all give the same numbers
        assert torch.allclose(way(name)(), expected, atol=1e-5), name
    candidates = {"dense": (lambda: dense(rows), [rows, *dense.parameters()])} | {
        name: (way(name), into) for name in WAYS
    }
    return in_turns(candidates, CONFIG["rounds"])


def random_routing(T: int, E: int, K: int, seed: int) -> Routing:
    """T tokens that choose K of E experts by chance."""
    scores = torch.rand(1, T, E, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    weights, indices = scores.topk(K, -1)
    kept = torch.ones_like(indices, dtype=torch.bool)
    return Routing(
        expert_indices=indices,
        expert_weights=weights / weights.sum(-1, keepdim=True),
        capacity_mask=kept,
        logits=scores.log(),
        scores=scores,
        drop_reason=torch.zeros_like(indices, dtype=torch.int8),
        dropless=True,
    )


def there_and_back(T: int, seed: int) -> dict:
    """Dispatch and combine with nothing between, by sorting and by one-hot products, against the dense MLP over the T*K rows."""
    torch.manual_seed(seed)
    sizes = CONFIG["dispatch"]
    D, E, K = CONFIG["d_model"], sizes["n_experts"], sizes["top_k"]
    routing, dense = random_routing(T, E, K, seed), FeedForward(D, CONFIG["d_ff"])
    x, rows = torch.randn(1, T, D, requires_grad=True), torch.randn(T * K, D, requires_grad=True)
    e_TK, w_TK = routing.expert_indices[0], routing.expert_weights[0].requires_grad_()
    C = int(routing.tokens_per_expert.max())

    def by_sorting():
        plan = DispatchPlan(routing)
        return plan.combine(plan.gather(x), w_TK.unsqueeze(0))

    def by_one_hot():
        chosen_SE = F.one_hot(e_TK.flatten(), E)
        place_S = (chosen_SE.cumsum(0) * chosen_SE).sum(-1) - 1
        place_TKC = F.one_hot(place_S, C).float().view(T, K, C)
        chosen_TKE = chosen_SE.float().view(T, K, E)
        mask_TEC = torch.einsum("tke,tkc->tec", chosen_TKE, place_TKC)
        weight_TEC = torch.einsum("tk,tke,tkc->tec", w_TK, chosen_TKE, place_TKC)
        table_ECD = torch.einsum("tec,td->ecd", mask_TEC, x[0])
        return torch.einsum("tec,ecd->td", weight_TEC, table_ECD).unsqueeze(0)

    assert torch.allclose(by_sorting(), by_one_hot(), atol=1e-5)
    return in_turns(
        {
            "dense": (lambda: dense(rows), [rows, *dense.parameters()]),
            "sorting": (by_sorting, [x, w_TK]),
            "one-hot": (by_one_hot, [x, w_TK]),
        },
        sizes["rounds"],
    )


def main() -> None:
    torch.set_num_threads(1)
    results = {
        "banks": {name: {way: [] for way in WAYS} for name in CONFIG["skews"]},
        "there_and_back": {"sorting": [], "one-hot": []},
    }
    for seed in tqdm(SEEDS, unit="seed"):
        for name, skew in CONFIG["skews"].items():
            found = [banks(E, skew, seed) for E in CONFIG["n_experts"]]
            for way in WAYS:  # [seed][number of experts][forward, backward, both]
                results["banks"][name][way].append([one[way] for one in found])
        found = [there_and_back(T, seed) for T in CONFIG["dispatch"]["n_tokens"]]
        for way in results["there_and_back"]:  # [seed][number of tokens][forward, backward, both]
            results["there_and_back"][way].append([one[way] for one in found])
    print(runs.save("dispatch_cost", config=CONFIG, seeds=SEEDS, results=results))


if __name__ == "__main__":
    main()
