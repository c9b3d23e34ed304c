"""You are the router: a game. The reader sends words to experts under a capacity, next to four routers that had the same words.

    RouterGame()                       # the stored puzzles
    game.state = {"puzzle": 1, ...}    # observable in a live notebook; game.outcome() is the reader's score by the real core

Puzzles and the four routers' results are computed here, by ``moe_core``, when the cell runs. The page's script, game.js, only plays; it needs
neither a kernel nor a network.
"""

import html
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import anywidget
import torch
import traitlets

import moe_core
from moe_core import Routing, TopKRouter, metrics
from moe_core.routers.balanced_assignment import balanced_assignment
from moe_core.routing import DropReason

from . import runs, theme
from .frames import digest

HERE = Path(__file__).parent
NOBODY = -1  # in a list of choices: this word is sent to no expert
STATIC = """<figure class="moe-game" data-digest="{digest}"><figcaption>{title}</figcaption>
<div class="moe-game-still"><p>{alt}</p>{table}<p><em>This game is played in the published book, or when you run the cell.</em></p></div>
<script type="application/json">{payload}</script></figure>"""
ALT = (
    "A board with a word in each row and an expert in each column. A number says how well the expert suits the word. You choose one expert for each "
    "word; an expert has only so many places, and words beyond them are dropped."
)


@dataclass(frozen=True)
class Outcome:
    """What an assignment is worth.

    Attributes:
        experts: (T,) the expert each word was sent to, or NOBODY.
        kept: (T,) whether it got in. score: sum of the scores of the kept.
        dropped: words that have no expert. imbalance: MaxVio of the wishes, before capacity.
    """

    experts: list[int]
    kept: list[bool]
    score: float
    dropped: int
    imbalance: float

    @classmethod
    def of(cls, routing: Routing, left_out: int = 0) -> "Outcome":
        """Read off one routing of (1, T) words; ``left_out`` words without a choice are not counted as dropped."""
        index_T, kept_T = routing.expert_indices[0, :, 0], routing.capacity_mask[0, :, 0]
        wished_T = routing.selected_mask[0, :, 0]
        return cls(
            experts=torch.where(wished_T, index_T, NOBODY).tolist(),
            kept=kept_T.tolist(),
            score=float(routing.expert_weights.detach()[0, :, 0][kept_T].sum()),
            dropped=int((~kept_T).sum()) - left_out,
            imbalance=float(metrics.max_violation(routing)),
        )


@dataclass(frozen=True)
class Puzzle:
    """Some words, what each expert is worth to each, and how many each may take.

    Attributes:
        title: short. says: one or two sentences: what is new here.
        words: T words. scores: (T, E) positive, each row sums to 1.
        capacity: places per expert.
        learned: (T,) the expert that a trained router chooses for each word.
        one_by_one: the words come one at a time, and a choice is final.

    Raises:
        ValueError: lengths differ, or a row of scores does not sum to 1.
    """

    title: str
    says: str
    words: list[str]
    scores: list[list[float]]
    capacity: int
    learned: list[int]
    one_by_one: bool = False

    def __post_init__(self):
        if not len(self.words) == len(self.scores) == len(self.learned):
            raise ValueError(
                f"{len(self.words)} words, {len(self.scores)} rows of scores, {len(self.learned)} learned choices: must be as many"
            )
        off = (self.scores_TE.sum(-1) - 1).abs().max()
        if off > 1e-9 or bool((self.scores_TE <= 0).any()):
            raise ValueError("scores of a word must be positive and sum to 1")

    @cached_property
    def scores_TE(self) -> torch.Tensor:
        """The scores as a float64 tensor."""
        return torch.tensor(self.scores, dtype=torch.float64)

    def wishes(self, experts=None) -> Routing:
        """Each word to one expert, before capacity: to its best one, or as given (NOBODY: to none)."""
        E = self.scores_TE.shape[-1]
        router = TopKRouter(E, E, top_k=1, norm_topk_prob=False).double()
        router.weight.data = torch.eye(
            E
        ).double()  # the logits are then the logarithms of the scores
        routing = router(self.scores_TE.log().unsqueeze(0))
        if experts is None:
            return routing
        index_BNK = torch.tensor(experts).view(1, -1, 1)
        chosen_BNK, index_BNK = index_BNK != NOBODY, index_BNK.clamp(min=0)
        reason_BNK = torch.where(chosen_BNK, DropReason.KEPT, DropReason.NOT_SELECTED).to(
            torch.int8
        )
        return replace(
            routing,
            expert_indices=index_BNK,
            expert_weights=routing.scores.gather(-1, index_BNK),
            capacity_mask=chosen_BNK,
            drop_reason=reason_BNK,
            dropless=False,
        )

    def play(self, experts=None, drop_policy: str = "position") -> Outcome:
        """What becomes of these choices (None: each word's best expert) when the experts are full. A word not sent yet is not dropped.

        Raises:
            ValueError: drop_policy is unknown.
        """
        left_out = 0 if experts is None else list(experts).count(NOBODY)
        routing = moe_core.capacity.apply(
            self.wishes(experts), expert_capacity=self.capacity, drop_policy=drop_policy
        )
        return Outcome.of(routing.check(), left_out)

    @cached_property
    def balanced(self) -> list[int]:
        """The assignment with the largest score that fits; words that nobody has room for are sent to NOBODY.

        Rows of zeros take the places left over, and experts that score 0 take the words there is no room for: then every expert has
        exactly ``capacity`` rows, which is the problem ``balanced_assignment`` solves.
        """
        (T, E), C = self.scores_TE.shape, self.capacity
        n_experts = max(E, -(-T // C))
        padded = torch.zeros(n_experts * C, n_experts, dtype=torch.float64)
        padded[:T, :E] = self.scores_TE
        return [e if e < E else NOBODY for e in balanced_assignment(padded)[:T].tolist()]

    @cached_property
    def rivals(self) -> dict[str, Outcome]:
        """The four others' results by name."""
        best = self.play(self.balanced)
        return {
            "first come, first served": self.play(),
            "highest score first": self.play(drop_policy="score"),
            "a learned router": self.play(self.learned),
            "the balanced answer": replace(best, dropped=best.kept.count(False)),
        }

    def to_dict(self) -> dict:
        """What game.js needs, as plain values; sums are rounded to 4 digits."""
        rivals = [
            {
                "name": name,
                "experts": o.experts,
                "kept": o.kept,
                "score": round(o.score, 4),
                "dropped": o.dropped,
                "imbalance": round(o.imbalance, 4),
            }
            for name, o in self.rivals.items()
        ]
        return {
            "title": self.title,
            "says": self.says,
            "words": self.words,
            "scores": self.scores,
            "capacity": self.capacity,
            "oneByOne": self.one_by_one,
            "rivals": rivals,
        }


def stored_puzzles() -> list[Puzzle]:
    """The book's puzzles: words and scores of three small trained models, from the stored run ``router_game``."""
    return [Puzzle(**one) for one in runs.load("router_game")["results"]["puzzles"]]


class RouterGame(anywidget.AnyWidget):
    """The game as a widget, and as HTML for a page without a kernel.

    Args:
        puzzles: by default the stored ones.
        title: one short line above the board.

    Attributes:
        state: dict with "puzzle" (its number, from 0) and "experts" (the reader's choices in it, NOBODY where there is none yet);
            observable and assignable.

    Raises:
        ValueError: there is no puzzle, or title is empty.
    """

    _esm = (HERE / "game.js").read_text("utf8") + "\nexport default { render: MoeGame.render };\n"
    _css = (HERE / "game.css").read_text("utf8")
    payload = traitlets.Dict().tag(sync=True)
    state = traitlets.Dict().tag(sync=True)

    def __init__(self, puzzles: list[Puzzle] | None = None, *, title: str = "You are the router"):
        self.puzzles = stored_puzzles() if puzzles is None else list(puzzles)
        if not self.puzzles:
            raise ValueError("puzzles=[] must hold at least one Puzzle")
        if not title.strip():
            raise ValueError(f"title={title!r} must be a sentence")
        super().__init__()
        n_experts = max(puzzle.scores_TE.shape[-1] for puzzle in self.puzzles)
        self.payload = {
            "title": title,
            "alt": ALT,
            "colors": theme.expert_colors(n_experts),
            "puzzles": [puzzle.to_dict() for puzzle in self.puzzles],
        }
        self.state = {"puzzle": 0, "experts": [NOBODY] * len(self.puzzles[0].words)}

    def outcome(self) -> Outcome:
        """The reader's score so far, by the core."""
        return self.puzzles[self.state["puzzle"]].play(self.state["experts"])

    def __repr__(self) -> str:
        """`RouterGame(6 puzzles, 7f3a90c1)`: stable between machines, different when a word or a result is another."""
        n = len(self.puzzles)
        return f"RouterGame({n} puzzle{'' if n == 1 else 's'}, {digest(self.payload)})"

    def _repr_mimebundle_(self, **kwargs):
        bundle, metadata = super()._repr_mimebundle_(**kwargs)
        payload = json.dumps(self.payload, separators=(",", ":"), ensure_ascii=False).replace(
            "<", "\\u003c"
        )
        bundle["text/html"] = STATIC.format(
            digest=digest(self.payload),
            title=html.escape(self.payload["title"]),
            alt=ALT,
            payload=payload,
            table=_still(self.puzzles[0]),
        )
        return bundle, metadata

    @traitlets.validate("state")
    def _in_range(self, proposal):
        state = dict(proposal["value"])
        if set(state) != {"puzzle", "experts"}:
            raise traitlets.TraitError(f"state={state} must have exactly 'puzzle' and 'experts'")
        number, experts = state["puzzle"], list(state["experts"])
        if number not in range(len(self.puzzles)):
            raise traitlets.TraitError(
                f"puzzle={number!r} must be between 0 and {len(self.puzzles) - 1}"
            )
        T, E = self.puzzles[number].scores_TE.shape
        if len(experts) != T or not all(e in range(NOBODY, E) for e in experts):
            raise traitlets.TraitError(
                f"experts={experts} must be {T} numbers between {NOBODY} and {E - 1}"
            )
        return {"puzzle": int(number), "experts": [int(e) for e in experts]}


def _still(puzzle: Puzzle) -> str:
    """The first board as a table, for a page whose scripts do not run."""
    head = "".join(f'<th scope="col">expert {e}</th>' for e in range(puzzle.scores_TE.shape[-1]))
    rows = "".join(
        f'<tr><th scope="row">{html.escape(word)}</th>'
        + "".join(f"<td>{s:.2f}</td>" for s in row)
        + "</tr>"
        for word, row in zip(puzzle.words, puzzle.scores)
    )
    return f'<table><thead><tr><th scope="col">word</th>{head}</tr></thead><tbody>{rows}</tbody></table>'
