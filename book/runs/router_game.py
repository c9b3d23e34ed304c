"""Words for the game *You are the router*: real text, and how the routers of three small trained models score its words.

A word's logits are what a model's router gives its four experts for the mean of the word's bytes, standardised over many words, so that experts
differ in taste and not in popularity; each puzzle then adds a popularity of its own. On other text a second router learns the game itself, by
gradient descent on the scores it collects and a balance loss. It sees one word at a time. The puzzles are windows of held-out text, chosen by the rules
of PUZZLES.

Run it with `python book/runs/router_game.py` (about fifteen seconds on one quiet CPU core); chapter 6 plays router_game.json.
"""

import re
import sys
from copy import deepcopy
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).resolve().parents[i]) for i in (1, 2)
]  # moe_book and moe_core, installed or not

import torch
from tqdm import tqdm

from moe_book import corpus, runs
from moe_book.game import Puzzle
from moe_book.training import train
from moe_core import LanguageModel, LMConfig, MoEConfig, TopKRouter, losses

SEEDS = [0, 1, 2]
SIZES = {"d_model": 64, "n_layers": 2, "n_heads": 4}
TRAINING = {"seq_len": 128, "batch_size": 8, "steps": 60, "lr": 3e-3}
CONFIG = {
    **SIZES,
    **TRAINING,
    "d_ff": 128,
    "n_experts": 4,
    "top_k": 2,
    "layer": 0,
    "learned_steps": 200,
    "balance": 0.6,
    "sharpness": 1.2,
}
WORD = re.compile(rb"(?<![A-Za-z_.'-])[A-Za-z]{2,8}(?![A-Za-z_'-])")
# seed, words, places, one by one, popularity of each expert in logits, largest load there should be, title, what is new
PUZZLES = [
    (
        0,
        8,
        2,
        False,
        (0.6, 0, 0, 0),
        (3, 4),
        "Eight words, eight places",
        "Send every word to the expert that suits it. Each takes two. Who steps back?",
    ),
    (
        1,
        12,
        3,
        False,
        (0, 0.8, 0, 0),
        (5, 6),
        "A longer queue",
        "Twelve words, three places each. First come, first served is easy to beat. The best answer is not easy to find.",
    ),
    (
        2,
        12,
        3,
        False,
        (0, 0, 1.6, 0),
        (7, 9),
        "Everybody's darling",
        "Most words want the same expert. Whom does a second choice cost least?",
    ),
    (
        0,
        12,
        4,
        False,
        (0.4, 0, 0, 1.4),
        (6, 8),
        "Room to spare",
        "Sixteen places for twelve words: a capacity factor of 1.33. You need not fill every place.",
    ),
    (
        1,
        12,
        2,
        False,
        (1.0, 0, 0, 0.6),
        (5, 7),
        "Too few places",
        "Eight places for twelve words. Four are dropped whatever you do. Choose which.",
    ),
    (
        2,
        12,
        3,
        True,
        (0, 1.0, 0.4, 0),
        (5, 7),
        "One at a time",
        "You see one word at a time and a choice is final, as in a language model that writes. Do you keep a place free for a word you have not seen?",
    ),
]


def model_of(seed: int, text: corpus.Corpus) -> LanguageModel:
    """A small language model, trained without any balance loss."""
    torch.manual_seed(seed)
    moe = MoEConfig(
        CONFIG["d_model"], CONFIG["d_ff"], CONFIG["n_experts"], CONFIG["top_k"], backend="loop"
    )
    model = LanguageModel(LMConfig(**SIZES, max_seq_len=CONFIG["seq_len"], moe=moe))
    train(model, text, **TRAINING, seed=seed, progress=False)
    return model.eval()


@torch.no_grad()
def words_of(
    model: LanguageModel, windows_BN: torch.Tensor
) -> list[tuple[list[str], torch.Tensor]]:
    """For each window its words and their vectors (words, D): the mean over a word's bytes of what the router saw."""
    seen = []
    hook = model.blocks[CONFIG["layer"]].feed_forward.register_forward_pre_hook(
        lambda _module, inputs: seen.append(inputs[0])
    )
    model(windows_BN)
    hook.remove()
    found = []
    for window, x_ND in zip(windows_BN.tolist(), seen[0].double()):
        matches = [
            m for m in WORD.finditer(bytes(window)) if 0 < m.start() and m.end() < len(window)
        ]  # a word at the border may be a part of one
        vectors_WD = (
            torch.stack([x_ND[m.start() : m.end()].mean(0) for m in matches])
            if matches
            else x_ND[:0]
        )
        found.append(([m.group().decode() for m in matches], vectors_WD))
    return found


def learned_router(board: TopKRouter, words_TD: torch.Tensor, seed: int) -> TopKRouter:
    """A router that learns to play: from the board's own, by gradient descent on the scores it collects and a balance loss."""
    scores_TE = board(words_TD.unsqueeze(0)).scores[0].detach()
    router, generator = deepcopy(board), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(router.parameters(), lr=0.01)
    for _ in range(CONFIG["learned_steps"]):
        batch = torch.randint(len(words_TD), (240,), generator=generator)
        routing = router(words_TD[batch].unsqueeze(0))
        loss = -(routing.scores[0] * scores_TE[batch]).sum(-1).mean() + CONFIG[
            "balance"
        ] * losses.load_balance(routing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return router


def board_router(weight_ED: torch.Tensor, words_TD: torch.Tensor, popularity) -> TopKRouter:
    """The router whose scores stand on the board: the model's logits, standardised over words, sharpened, plus a popularity."""
    logits_TE = words_TD @ weight_ED.T
    scale_E = CONFIG["sharpness"] / logits_TE.std(0)
    router = TopKRouter(
        CONFIG["d_model"], CONFIG["n_experts"], top_k=1, norm_topk_prob=False, bias=True
    ).double()
    router.weight.data = scale_E.unsqueeze(-1) * weight_ED
    router.bias.data = torch.tensor(popularity, dtype=torch.float64) - scale_E * logits_TE.mean(0)
    return router


def in_hundredths(scores_TE: torch.Tensor) -> list[list[float]]:
    """Rows of whole hundredths that sum to 1, none below 0.01: the largest remainders are rounded up."""
    rows = []
    for row in (1 + (100 - scores_TE.shape[-1]) * scores_TE).tolist():
        whole = [int(v) for v in row]
        for e in sorted(range(len(row)), key=lambda e: whole[e] - row[e])[: 100 - sum(whole)]:
            whole[e] += 1
        rows.append([n / 100 for n in whole])
    return rows


def candidates(words, vectors_WD, board, learned, rule):
    """Every run of consecutive words in a window that fits the rule, with how much there is to be won in it."""
    _, T, C, one_by_one, _, (low, high), title, says = rule
    scores = in_hundredths(board(vectors_WD.unsqueeze(0)).scores[0].detach())
    choice = learned(vectors_WD.unsqueeze(0)).expert_indices[0, :, 0].tolist()
    for at in range(len(words) - T + 1):
        part = slice(at, at + T)
        puzzle = Puzzle(title, says, words[part], scores[part], C, choice[part], one_by_one)
        load_E = puzzle.wishes().slots_per_expert()
        clear = bool((puzzle.scores_TE.topk(2).values.diff() < -0.015).all())
        if (
            clear
            and low <= load_E.max() <= high
            and int((load_E > 0).sum()) >= 3
            and len(set(map(str.lower, words[part]))) >= T - 2
        ):
            first, by_score, trained, best = (rival.score for rival in puzzle.rivals.values())
            yield (
                best
                - max(first, by_score, trained)
                + 0.3 * (best - first)
                + 0.2 * (trained > first),
                puzzle,
            )


def main() -> None:
    torch.set_num_threads(1)  # matrices this small do not gain from a second thread
    text, N = corpus.load(), CONFIG["seq_len"]
    blocks = text.valid["English"].long()
    windows = blocks[:, : blocks.shape[1] // N * N].reshape(-1, N)[:150]
    chosen: list = [None] * len(PUZZLES)
    taken: set[int] = set()  # no window stands in two puzzles
    for seed in tqdm(SEEDS, unit="seed"):
        model = model_of(seed, text)
        weight_ED = model.blocks[CONFIG["layer"]].feed_forward.router.weight.detach().double()
        practice, _ = text.batch(
            200, N, generator=torch.Generator().manual_seed(seed), domain="English"
        )
        practice_TD = torch.cat([vectors for _, vectors in words_of(model, practice)])
        found = words_of(model, windows)
        for number, rule in enumerate(PUZZLES):
            if rule[0] == seed:
                board = board_router(weight_ED, practice_TD, rule[4])
                learned = learned_router(board, practice_TD, seed)
                every = [
                    (*one, at)
                    for at, (words, vectors) in enumerate(found)
                    if at not in taken
                    for one in candidates(words, vectors, board, learned, rule)
                ]
                _, chosen[number], at = max(every, key=lambda one: one[0])
                taken.add(at)
    puzzles = [
        {
            "title": p.title,
            "says": p.says,
            "words": p.words,
            "scores": p.scores,
            "capacity": p.capacity,
            "learned": p.learned,
            "one_by_one": p.one_by_one,
        }
        for p in chosen
    ]
    print(
        runs.save(
            "router_game",
            text=text,
            config={**CONFIG, "puzzle_seeds": [rule[0] for rule in PUZZLES]},
            seeds=SEEDS,
            results={"puzzles": puzzles},
        )
    )


if __name__ == "__main__":
    main()
