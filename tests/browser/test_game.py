"""You are the router, played on the published page: by keyboard, mouse and touch, and judged as Python judges."""

import random

import pytest

from moe_book.game import NOBODY, RouterGame

pytestmark = pytest.mark.pages_with("RouterGame(")
BEST = "Show the balanced answer"


@pytest.fixture
def play(visit):
    """play(**context options) opens the page and returns the game, scrolled to."""

    def go(**options):
        seen = visit(**options)
        game = seen.page.locator(".moe-game")
        game.locator(".moe-board").wait_for()
        game.scroll_into_view_if_needed()
        return game

    return go


def press(game, name):
    game.get_by_role("button", name=name, exact=True).click()


def cell(game, t, e):
    return game.locator(".moe-board tbody tr").nth(t).locator("button").nth(e)


def shown(game) -> dict:
    return {
        key: float(game.get_attribute(f"data-{key}"))
        for key in ("score", "dropped", "imbalance", "open")
    }


def agrees(game, puzzle, experts):
    outcome = puzzle.play(experts)
    assert shown(game) == pytest.approx(
        {
            "score": outcome.score,
            "dropped": outcome.dropped,
            "imbalance": outcome.imbalance,
            "open": experts.count(NOBODY),
        }
    )
    states = [
        game.locator(".moe-tile").nth(t).get_attribute("data-state") for t in range(len(experts))
    ]
    assert states == [
        "open" if e == NOBODY else "kept" if k else "dropped" for e, k in zip(experts, outcome.kept)
    ]


def test_the_page_and_the_core_count_alike(play):
    game, draw = play(), random.Random(6)
    for number, puzzle in enumerate(RouterGame().puzzles):
        assert game.get_attribute("data-puzzle") == str(number)
        agrees(game, puzzle, [NOBODY] * len(puzzle.words))
        experts = [NOBODY] * len(puzzle.words)
        order = list(range(len(experts)))
        if not puzzle.one_by_one:
            draw.shuffle(order)  # who clicks first does not matter
        for t in order:
            experts[t] = draw.choice([0, 0, 1, 2, 3])
            cell(game, t, experts[t]).click()
            agrees(game, puzzle, experts)
        assert "All are sent." in game.locator(".moe-game-said").inner_text()
        press(game, "Next puzzle")
    assert game.get_attribute("data-puzzle") == "0"


def test_the_rivals_stand_beside_it_and_their_choices_can_be_seen(play):
    game = play()
    puzzle = RouterGame().puzzles[0]
    rows = [
        row.locator("th, td").all_inner_texts()
        for row in game.locator(".moe-results tbody tr").all()
    ]
    assert [(row[0], row[1], row[3], row[4]) for row in rows[1:]] == [
        (name, f"{o.score:.2f}", str(o.dropped), f"{o.imbalance:.2f}")
        for name, o in puzzle.rivals.items()
    ]
    for name, outcome in puzzle.rivals.items():
        game.locator(".moe-results").get_by_role("button", name=name, exact=True).click()
        marks = [
            [cell(game, t, e).get_attribute("data-mark") for e in range(4)]
            for t in range(len(puzzle.words))
        ]
        assert marks == [
            [("◆" if k else "◇") if e == chosen else "" for e in range(4)]
            for chosen, k in zip(outcome.experts, outcome.kept)
        ]
    press(game, "Hide the balanced answer")
    assert game.locator("[data-mark='◆'], [data-mark='◇']").count() == 0
    press(game, BEST)
    for t, e in enumerate(puzzle.balanced):
        cell(game, t, e).click()
    assert "No assignment scores more." in game.locator(".moe-game-said").inner_text()
    agrees(game, puzzle, puzzle.balanced)


def test_the_keyboard_is_enough(play):
    game = play()
    page, puzzle = game.page, RouterGame().puzzles[0]
    T = len(puzzle.words)
    assert game.locator(".moe-board button[tabindex='0']").count() == 1, "one stop of the tab key"
    game.locator(".moe-board button[tabindex='0']").focus()
    focused = "() => document.activeElement.getAttribute('aria-label')"
    for key, (t, e) in {
        "ArrowRight": (0, 1),
        "ArrowDown": (1, 1),
        "ArrowLeft": (1, 0),
        "ArrowUp": (0, 0),
        "End": (T - 1, 0),
        "Home": (0, 0),
    }.items():
        page.keyboard.press(key)
        assert page.evaluate(focused).startswith(f"{puzzle.words[t]}, expert {e}, ")
    width = page.evaluate("() => getComputedStyle(document.activeElement).outlineWidth")
    assert float(width.removesuffix("px")) >= 2, "focus can be seen"
    experts = [NOBODY] * T
    for t in range(T):
        page.keyboard.press(str(t % 4))
        experts[t] = t % 4
        agrees(game, puzzle, experts)
        assert puzzle.words[t] in game.locator(".moe-game-said").inner_text() or t == T - 1
    page.keyboard.press("Delete")
    experts[-1] = NOBODY
    agrees(game, puzzle, experts)
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")  # on the expert it has: takes it back, or sends it
    e = int(page.evaluate(focused).split("expert ")[1][0])
    experts[-2] = NOBODY if experts[-2] == e else e
    agrees(game, puzzle, experts)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    agrees(game, puzzle, [NOBODY] * T)
    assert "empty" in game.locator(".moe-game-said").inner_text()


def test_what_happens_is_announced(play):
    game = play()
    said = game.locator(".moe-game-said[role=status]")
    puzzle = RouterGame().puzzles[0]
    for t in range(puzzle.capacity + 1):
        cell(game, t, 0).click()
        assert ("is dropped" if t == puzzle.capacity else "goes to expert 0") in said.inner_text()
        assert cell(game, t, 0).get_attribute("aria-pressed") == "true"
    assert "dropped" in cell(game, puzzle.capacity, 0).get_attribute("aria-label")
    cell(game, 0, 0).click()  # taken back: the one who was dropped moves up
    agrees(
        game,
        puzzle,
        [NOBODY] + [0] * puzzle.capacity + [NOBODY] * (len(puzzle.words) - puzzle.capacity - 1),
    )


def test_one_at_a_time_hides_what_is_to_come_and_keeps_what_was_chosen(play):
    game = play()
    puzzles = RouterGame().puzzles
    number = [puzzle.one_by_one for puzzle in puzzles].index(True)
    for _ in range(number):
        press(game, "Next puzzle")
    words, puzzle = game.locator(".moe-label"), puzzles[number]
    assert words.all_inner_texts() == [puzzle.words[0]] + ["?"] * (len(puzzle.words) - 1)
    cell(game, 3, 0).click(force=True)  # it says that it is disabled
    assert "has not come yet" in game.locator(".moe-game-said").inner_text()
    cell(game, 0, 2).click()
    cell(game, 0, 1).click(force=True)
    assert "final" in game.locator(".moe-game-said").inner_text()
    agrees(game, puzzle, [2] + [NOBODY] * (len(puzzle.words) - 1))
    assert words.all_inner_texts()[:3] == [*puzzle.words[:2], "?"]


def test_it_is_played_with_a_thumb(play):
    game = play(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page, puzzle = game.page, RouterGame().puzzles[0]
    cell(game, 1, 2).tap()
    agrees(game, puzzle, [NOBODY, 2] + [NOBODY] * (len(puzzle.words) - 2))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for button in game.locator("button").all():
        box = button.bounding_box()
        assert min(box["width"], box["height"]) >= 24
    cut = game.evaluate(
        "(root) => [...root.querySelectorAll('button, th')].filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent)"
    )
    assert cut == []


def test_it_follows_the_theme(play):
    game = play(color_scheme="light")
    color = "(e) => getComputedStyle(e.querySelector('.moe-label')).color"
    light = game.evaluate(color)
    game.page.evaluate("document.documentElement.dataset.theme = 'dark'")
    assert game.evaluate(color) != light


def test_the_board_can_be_read_without_scripts(visit):
    still = visit(java_script_enabled=False).page.locator(".moe-game")
    assert "You are the router" in still.inner_text() and still.locator("table").is_visible()
