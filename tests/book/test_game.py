"""You are the router: the rules, the four rivals, and what is sent to the page. The browser's half is in tests/browser/test_game.py."""

import html
import itertools
import json
import re

import pytest
import torch
import traitlets

from moe_book import game
from moe_book.game import NOBODY, Puzzle, RouterGame

SCORES = [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.7, 0.1, 0.2], [0.8, 0.15, 0.05], [0.2, 0.2, 0.6]]
WORDS = ["a", "b", "c", "d", "e"]


def puzzle(capacity=2, scores=SCORES, learned=None, **options):
    return Puzzle(
        "Five",
        "Five words.",
        WORDS[: len(scores)],
        scores,
        capacity,
        learned or [0, 1, 2, 0, 2][: len(scores)],
        **options,
    )


def drawn(T, E, capacity, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.softmax(2 * torch.randn(T, E, generator=generator, dtype=torch.float64), -1)
    return Puzzle(
        "Drawn", "By chance.", [str(t) for t in range(T)], scores.tolist(), capacity, [0] * T
    )


def best_by_trying(puzzle):
    """The largest score over all assignments, nobody included: states are the places taken, one word after the other."""
    states = {(0,) * puzzle.scores_TE.shape[1]: 0.0}
    for row in puzzle.scores:
        after = dict(states)
        for taken, total in states.items():
            for e, score in enumerate(row):
                if taken[e] < puzzle.capacity:
                    more = taken[:e] + (taken[e] + 1,) + taken[e + 1 :]
                    after[more] = max(after.get(more, 0.0), total + score)
        states = after
    return max(states.values())


def test_by_hand():
    first = puzzle().rivals["first come, first served"]
    assert first.experts == [0, 0, 0, 0, 2] and first.kept == [True, True, False, False, True]
    assert (first.score, first.dropped) == (pytest.approx(0.5 + 0.6 + 0.6), 2)
    assert first.imbalance == pytest.approx(4 * 3 / 5 - 1)


def test_score_keeps_as_many_as_position_but_others():
    first, score = (
        puzzle().rivals[name] for name in ("first come, first served", "highest score first")
    )
    assert sum(first.kept) == sum(score.kept) and first.imbalance == score.imbalance
    assert score.kept == [False, False, True, True, True] and score.score > first.score


@pytest.mark.parametrize(
    ("T", "E", "capacity"),
    [
        (5, 3, 2),
        (8, 4, 2),
        (8, 4, 3),
        (9, 3, 3),
        (9, 4, 2),
        (12, 4, 2),
        (12, 4, 4),
        (6, 2, 1),
        (3, 4, 5),
    ],
)
def test_the_balanced_answer_is_the_best_there_is(T, E, capacity):
    for seed in range(5):
        one = drawn(T, E, capacity, seed)
        best = one.rivals["the balanced answer"]
        assert best.score == pytest.approx(best_by_trying(one), abs=1e-9)
        assert best.dropped == max(0, T - E * capacity) == best.experts.count(NOBODY)
        assert all(best.score >= rival.score - 1e-9 for rival in one.rivals.values())


def test_the_balanced_answer_agrees_with_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    for seed in range(5):
        one = drawn(12, 4, 3, seed)
        places = one.scores_TE.repeat_interleave(3, dim=1).numpy()
        rows, columns = optimize.linear_sum_assignment(places, maximize=True)
        assert one.rivals["the balanced answer"].score == pytest.approx(
            places[rows, columns].sum(), abs=1e-9
        )


def test_an_unfinished_board_has_dropped_nobody_yet():
    half = puzzle().play([0, 0, NOBODY, NOBODY, NOBODY])
    assert (half.score, half.dropped, half.imbalance) == (pytest.approx(1.1), 0, pytest.approx(2.0))
    empty = puzzle().play([NOBODY] * 5)
    assert (empty.score, empty.dropped, empty.imbalance) == (0, 0, 0)


def test_who_comes_first_gets_in_whatever_the_order_of_the_clicks():
    for experts in itertools.product(range(3), repeat=5):
        outcome = puzzle().play(list(experts))
        for e in range(3):
            queue = [t for t in range(5) if experts[t] == e]
            assert [t for t in queue if outcome.kept[t]] == queue[:2]


def test_a_puzzle_that_cannot_be_played_is_refused():
    with pytest.raises(ValueError, match="must be positive and sum to 1"):
        puzzle(scores=[[0.5, 0.4, 0.2]])
    with pytest.raises(ValueError, match="2 rows of scores"):
        Puzzle("", "", ["a"], SCORES[:2], 1, [0])
    with pytest.raises(ValueError, match=r"puzzles=\[\] must hold at least one"):
        RouterGame([])
    with pytest.raises(ValueError, match="title=' ' must be a sentence"):
        RouterGame([puzzle()], title=" ")


def test_the_state_is_the_readers_board():
    one = RouterGame([puzzle(), puzzle(3)])
    assert one.state == {"puzzle": 0, "experts": [NOBODY] * 5} and one.outcome().score == 0
    seen = []
    one.observe(lambda change: seen.append(change["new"]["puzzle"]), "state")
    one.state = {"puzzle": 1, "experts": [0, 0, 0, 0, 2]}
    assert seen == [1] and one.outcome() == one.puzzles[1].rivals["first come, first served"]
    for state in (
        {"puzzle": 2, "experts": [0] * 5},
        {"puzzle": 0, "experts": [0] * 4},
        {"puzzle": 0, "experts": [3] * 5},
        {"puzzle": 0},
    ):
        with pytest.raises(traitlets.TraitError):
            one.state = state


def test_the_bundle_has_a_widget_a_page_and_a_digest():
    bundle, _ = RouterGame([puzzle()])._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"}
    assert re.fullmatch(r"RouterGame\(1 puzzle, [0-9a-f]{8}\)", bundle["text/plain"])
    payload = json.loads(
        re.search(r'<script type="application/json">(.*)</script>', bundle["text/html"])[1]
    )
    assert payload["puzzles"] == [puzzle().to_dict()]
    readable = re.sub(r"<script.*</script>", "", bundle["text/html"])
    assert "You are the router" in readable and "0.15" in readable and "expert 2" in readable, (
        "to be read before any script"
    )


def test_the_digest_notices_a_change():
    digest = repr(RouterGame([puzzle()]))
    assert repr(RouterGame([puzzle()])) == digest
    assert repr(RouterGame([puzzle(3)])) != digest
    assert repr(RouterGame([puzzle(learned=[1, 1, 1, 1, 1])])) != digest


def test_no_string_can_leave_its_place_in_the_page():
    evil = '</script><img src=x onerror="alert(1)">&<!--'
    one = Puzzle(evil, evil, [evil] * 5, SCORES, 2, [0] * 5)
    page = RouterGame([one], title=evil)._repr_mimebundle_()[0]["text/html"]
    assert page.count("</script>") == 1 and "<img" not in page and "<!--" not in page
    assert html.escape(evil) in page


def test_the_stored_puzzles_grow_harder_and_fit_the_page():
    puzzles = game.stored_puzzles()
    assert 4 <= len(puzzles) <= 6 and len({one.title for one in puzzles}) == len(puzzles)
    assert len(json.dumps(RouterGame().payload)) < 30_000
    for one in puzzles:
        assert len(one.words) in (8, 12) and all(len(word) <= 9 for word in one.words)
        assert all(round(score, 2) == score for row in one.scores for score in row), (
            "a reader adds them up"
        )
        best, greedy = one.rivals["the balanced answer"], one.rivals["first come, first served"]
        assert best.score > greedy.score + 0.1 and greedy.dropped > 0, (
            "there is something to be won"
        )
        assert one.rivals["a learned router"].experts == one.learned
    assert [one.one_by_one for one in puzzles].count(True) == 1
