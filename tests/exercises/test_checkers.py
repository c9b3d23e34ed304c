"""Every exercise of every chapter, and the checker itself on a toy.

What readers hand in stands beside this file, one module a chapter: RIGHT["2.1"] = [answer, answer], other right answers than the checker's own;
WRONG["2.1"] = [(answer, idea)], with the name of the idea or None; REFUSED["2.1"] = [answer].
"""

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_book import checks
from moe_book.checks import Exercise, Idea, Verdict, check, exercises, statements, which, write_test

CHAPTERS = sorted(
    int(file.stem[2:]) for file in Path(checks.__file__).parent.glob("ch[0-9][0-9].py")
)
EXERCISES = [exercise for chapter in CHAPTERS for exercise in exercises(chapter).values()]


def handed_in(chapter: int, kind: str) -> dict:
    """RIGHT, WRONG or REFUSED of tests/exercises/test_chNN.py; empty where there is none."""
    if not Path(__file__).with_name(f"test_ch{chapter:02d}.py").exists():
        return {}
    return getattr(import_module(f".test_ch{chapter:02d}", __package__), kind, {})


WRONG = [
    (number, answer, idea)
    for chapter in CHAPTERS
    for number, answers in (
        *handed_in(chapter, "WRONG").items(),
        *((n, [(one, None) for one in all_]) for n, all_ in handed_in(chapter, "REFUSED").items()),
    )
    for answer, idea in answers
]


each_exercise = pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.number)


# Every exercise of the book


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_exercises_are_numbered_within_their_chapter(chapter):
    assert list(exercises(chapter)) == [
        f"{chapter}.{i + 1}" for i in range(len(exercises(chapter)))
    ]
    assert len(exercises(chapter)) >= 4


@each_exercise
def test_a_stub_is_not_attempted(exercise):
    for stub in (..., lambda *case: ..., lambda *case: None):
        verdict = check(exercise.number, stub)
        assert verdict.status == "not attempted" and not verdict.right


def test_a_stub_that_raises_not_implemented_is_not_attempted():
    def stub(x):
        raise NotImplementedError

    assert DOUBLE.check(stub).status == "not attempted"


@each_exercise
def test_the_checkers_own_answer_is_right(exercise):
    verdict = check(exercise.number, exercise.right)
    assert verdict.right, verdict
    assert verdict.message == exercise.praise and verdict.idea is None


@each_exercise
def test_at_least_two_other_right_answers_are_accepted(exercise):
    answers = handed_in(int(exercise.number.split(".")[0]), "RIGHT").get(exercise.number, [])
    assert len(answers) >= 2 and answers[0] is not answers[1], (
        f"RIGHT[{exercise.number!r}] needs two different answers"
    )
    for answer in answers:
        assert check(exercise.number, answer).right, (answer, check(exercise.number, answer))


def in_another_style(value, style):
    """What a right answer returns, as numpy, as plain lists and numbers, or in another precision."""
    if isinstance(value, torch.Tensor):
        if style == "plain":
            return value.detach().tolist()
        if style == "numpy":
            return value.detach().numpy()
        return value.to(torch.float64 if style == "double" else torch.float32)
    if isinstance(value, (tuple, list)):
        return type(value)(in_another_style(one, style) for one in value)
    if isinstance(value, (bool, int, float)):
        return np.asarray(value)[()] if style == "numpy" else value
    return value


@pytest.mark.parametrize("style", ["plain", "numpy", "double", "single"])
@pytest.mark.parametrize(
    "exercise",
    [one for one in EXERCISES if type(one) is Exercise and callable(one.right)],
    ids=lambda exercise: exercise.number,
)
def test_a_right_answer_is_right_in_any_style(exercise, style):
    answers = handed_in(int(exercise.number.split(".")[0]), "RIGHT").get(exercise.number, [])
    for answer in [exercise.right, *answers][:2]:
        verdict = check(exercise.number, lambda *case: in_another_style(answer(*case), style))
        assert verdict.right, (answer, verdict)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_recorded_right_answers_belong_to_an_exercise(chapter):
    assert set(handed_in(chapter, "RIGHT")) <= set(exercises(chapter))


@each_exercise
def test_there_are_at_least_two_wrong_ideas_with_a_name_of_their_own(exercise):
    names = [idea.name for idea in exercise.ideas]
    assert len(names) >= 2 and len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("exercise", "idea"),
    [(e, idea) for e in EXERCISES for idea in e.ideas],
    ids=[f"{e.number}-{idea.name}" for e in EXERCISES for idea in e.ideas],
)
def test_a_wrong_idea_is_called_by_its_name(exercise, idea):
    verdict = check(exercise.number, idea.answer)
    assert (verdict.status, verdict.idea, verdict.message) == ("wrong", idea.name, idea.says)
    assert len(idea.says) >= 40  # an explanation, not a number


@pytest.mark.parametrize(
    ("number", "answer", "idea"), WRONG, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(WRONG)]
)
def test_what_a_class_hands_in_is_refused_and_the_common_mistakes_named(number, answer, idea):
    torch.manual_seed(0)
    verdict = check(number, answer)
    assert not verdict.right, verdict
    assert idea is None or verdict.idea == idea, verdict


@each_exercise
def test_an_answer_of_the_wrong_kind_is_wrong_and_raises_nothing(exercise):
    for answer in (
        "no idea",
        object(),
        {},
        [],
        torch.zeros(3, 1, 4, 1),
        float("nan"),
        lambda *case: {1, 2},
        lambda: 0,
    ):
        assert check(exercise.number, answer).status == "wrong"


@each_exercise
def test_no_message_holds_the_solution_of_an_exercise_that_asks_for_a_value(exercise):
    if callable(exercise.right) or not isinstance(exercise.right, str):
        return
    for answer in ("", "yes", 5, "TTTTTT", "FFFFFF", "TFTFTF", list("FTFTFT"), ["A", "B"], None):
        verdict = check(exercise.number, answer)
        assert verdict.right or exercise.right not in verdict.message


@each_exercise
def test_a_result_in_place_of_the_function_is_told_apart(exercise):
    if callable(exercise.right):
        verdict = check(exercise.number, 157)
        assert verdict.status == "wrong" and "without brackets" in verdict.message


@each_exercise
def test_an_answer_that_leaves_the_program_is_only_wrong(exercise):
    def leave(*case):
        raise SystemExit

    if callable(exercise.right):
        assert check(exercise.number, leave).status == "wrong"


@each_exercise
def test_checking_twice_says_the_same(exercise):
    assert check(exercise.number, exercise.right) == check(exercise.number, exercise.right)


# The checker on a toy


def doubled(x):
    return 2 * x


def squared(x):
    return x * x


def spoil(x):
    x.zero_()
    return 2 * x


def empty(items):
    items.clear()
    return 0


ADDED = Idea("added", lambda x: x + 2, "You added 2; the exercise multiplies.")
SQUARED = Idea("squared", squared, "You squared; at 2 that looks the same.")
DOUBLE = Exercise(
    "1.1",
    doubled,
    (ADDED, SQUARED),
    "Twice, indeed.",
    cases=((torch.tensor([1.0, 2.0]),), (torch.tensor([3.0]),)),
)
VALUE = Exercise("1.2", 0.25, (Idea("half", 0.5, "That is one half."),), "A quarter.")
CHOICE = Exercise("1.3", ("a", "b"), (), "Both.")
ANY_EVEN = Exercise(
    "1.4", 2, (Idea("odd", 3, "3 is odd."),), "Even.", accepts=lambda output: output % 2 == 0
)


def test_a_right_function_is_right_and_a_known_wrong_one_is_named():
    assert DOUBLE.check(doubled) == Verdict("1.1", "right", "Twice, indeed.")
    assert DOUBLE.check(squared) == Verdict("1.1", "wrong", SQUARED.says, "squared")


def test_an_idea_must_fit_every_case():
    verdict = DOUBLE.check(lambda x: x + 2 if len(x) == 2 else x)
    assert verdict.idea is None and verdict.status == "wrong"


def test_where_two_ideas_look_alike_the_first_is_named():
    twins = Exercise("1.1", 1, (Idea("first", 2, "first"), Idea("second", 2, "second")), "One.")
    assert twins.check(2).idea == "first"


def test_an_unknown_wrong_answer_shows_the_first_case_that_fails():
    verdict = DOUBLE.check(lambda x: 2 * x if len(x) == 2 else -x)
    assert "Case 2 of 2: answer(x=[3]) gave [-3], expected [6]." in verdict.message
    assert verdict.idea is None


def test_an_error_in_the_answer_is_told_to_the_reader():
    verdict = DOUBLE.check(lambda x: x.no_such_thing)
    assert verdict.status == "wrong" and "raised AttributeError" in verdict.message
    assert "raised TypeError" in DOUBLE.check(lambda: 1).message
    assert (
        "raised RecursionError"
        in Exercise("1.1", 1, (), "").check(lambda: (f := lambda: f())()).message
    )


@pytest.mark.parametrize(
    "output",
    [
        0.25,
        1 / 4,
        torch.tensor(0.25),
        torch.tensor(0.25, dtype=torch.float64, requires_grad=True),
        0.250001,
    ],
)
def test_a_number_may_come_in_any_type(output):
    assert VALUE.check(output).right and VALUE.check(lambda: output).right


@pytest.mark.parametrize(
    "output",
    [
        0.2503,
        [0.25],
        torch.tensor([0.25]),
        "0.25",
        float("inf"),
        (0.25,),
        {0: 0.25},
        {0.25},
        10**400,
    ],
)
def test_another_value_or_shape_is_wrong(output):
    assert VALUE.check(output).status == "wrong"


def test_texts_compare_without_case_and_tuples_item_by_item():
    assert CHOICE.check(["A ", "b"]).right and CHOICE.check(("a", "b")).right
    assert (
        not CHOICE.check(("b", "a")).right
        and not CHOICE.check("ab").right
        and not CHOICE.check(("a",)).right
    )


def test_several_numbers_may_come_as_tuple_list_or_tensor():
    pair = Exercise("1.1", (1, 2.5), (), "")
    assert all(pair.check(output).right for output in ((1, 2.5), [1, 2.5], torch.tensor([1, 2.5])))
    assert not pair.check(torch.tensor(1.0)).right and not pair.check(torch.tensor([1.0])).right


def test_dictionaries_compare_key_by_key():
    exercise = Exercise("1.1", {"a": 1.0, "b": torch.ones(2)}, (), "")
    assert exercise.check({"b": [1, 1], "a": 1}).right
    assert not exercise.check({"a": 1}).right and not exercise.check([1, 1]).right


def test_accepts_decides_where_many_answers_are_right():
    assert ANY_EVEN.check(4).right and ANY_EVEN.check(2).right
    assert ANY_EVEN.check(3).idea == "odd"
    assert ANY_EVEN.check("four").status == "wrong"  # accepts raised: not an answer of this kind
    assert "expected" not in ANY_EVEN.check(5).message  # there is no one number to show


def test_an_answer_that_writes_into_its_input_harms_nobody():
    assert DOUBLE.check(spoil).status == "wrong"
    assert DOUBLE.check(doubled).right
    assert DOUBLE.cases[1][0].tolist() == [3.0]
    total = Exercise(
        "1.1", sum, (Idea("length", len, "That is how many there are."),), "", cases=(([1, 2, 3],),)
    )
    assert (
        total.check(empty).status == "wrong"
        and total.check(sum).right
        and total.check(len).idea == "length"
    )


def test_two_numbers_that_look_alike_are_shown_with_more_digits():
    places = Exercise("1.1", lambda T, f: 138.0, (), "", cases=((1000, 1.1),))
    message = places.check(lambda T, f: 137.5).message
    assert "answer(T=1000, f=1.1) gave 137.5, expected 138." in message


def test_the_inputs_are_shown_and_large_ones_by_their_shape():
    exercise = Exercise(
        "1.1", lambda h_TE, mode: 0.0, (), "", cases=((torch.zeros(8, 4), "switch"),)
    )

    def mine(h, how):
        return 1.0

    assert (
        "Case 1 of 1: mine(h_TE=(8, 4) numbers, mode='switch') gave 1, expected 0"
        in exercise.check(mine).message
    )


def test_right_numbers_of_another_shape_are_told_apart():
    row = Exercise("1.1", lambda x: x, (), "", cases=((torch.arange(3.0),),))
    assert "their shape is (1, 3) instead of (3,)" in row.check(lambda x: x[None]).message
    assert "The shape is (2,), and should be (3,)." in row.check(lambda x: x[:2]).message


def test_a_constant_factor_and_the_first_difference_are_named():
    row = Exercise("1.1", lambda x: x, (), "", cases=((torch.arange(1.0, 9.0),),))
    assert "yours is 4 times what it should be" in row.check(lambda x: 4 * x).message
    off = row.check(lambda x: x + 0.001 * (x == 5)).message
    assert "first difference is at [4]: 5.001 instead of 5" in off


def test_a_number_as_text_and_a_complex_number_are_no_numbers():
    assert "That is a text" in DOUBLE.check(lambda x: "2").message
    assert VALUE.check(0.25 + 0j).status == "wrong"


def test_the_line_that_raised_is_shown_and_a_long_message_is_cut():
    def answer(x):
        raise ValueError("a\nb " * 200)

    message = DOUBLE.check(answer).message
    assert "raised ValueError: a b a b" in message and len(message) < 500
    assert "`raise ValueError(" in message and "Case 1 of 2: answer(x=[1, 2])" in message


def test_an_array_of_two_numbers_is_a_pair():
    pair = Exercise("1.1", lambda: (1.0, 0.25), (), "", cases=((),))
    assert pair.check(lambda: np.array([1.0, 0.25])).right


def test_order_may_not_count_for_right_and_wrong_ideas_alike():
    largest = Idea("largest", lambda x: x.topk(2).indices, "You took the largest.")
    smallest = Exercise(
        "1.1",
        lambda x: (-x).topk(2).indices,
        (largest,),
        "",
        cases=((torch.tensor([3.0, 1.0, 2.0, 5.0]),),),
        unordered=True,
    )
    assert smallest.check(lambda x: [2, 1]).right and smallest.check(lambda x: [1, 2]).right
    assert smallest.check(lambda x: [0, 3]).idea == smallest.check(lambda x: [3, 0]).idea
    assert smallest.check(lambda x: [0, 3]).idea == "largest"


SQUARE_SUM = Exercise(
    "1.1",
    lambda h: (h * h).sum(),
    (),
    "Right.",
    cases=((torch.tensor([1.0, 2.0]),),),
    differentiable="h",
)


@pytest.mark.parametrize(
    "answer",
    [
        lambda h: (h * h).sum().item(),
        lambda h: (h.detach() ** 2).sum(),
        lambda h: float((h.numpy() ** 2).sum()),
        lambda h: torch.no_grad()(lambda: (h * h).sum())(),
    ],
)
def test_a_right_value_without_a_gradient_is_right_with_a_remark(answer):
    verdict = SQUARE_SUM.check(answer)
    assert verdict.right and "no gradient flows back to h" in verdict.message


def test_a_right_value_with_another_gradient_is_right_with_a_remark():
    assert SQUARE_SUM.check(lambda h: h.dot(h)).message == "Right."
    verdict = SQUARE_SUM.check(lambda h: (h.detach() * h).sum())
    assert verdict.right and "another one than the formula's to h" in verdict.message


def test_accepts_may_say_what_is_wrong():
    small = Exercise("1.1", lambda n: 1, (), "", ((9,),), accepts=lambda out, n: out < n or "Big.")
    assert small.check(lambda n: 3).right
    assert small.check(lambda n: 10).message == "Big. Case 1 of 1: answer(n=9) gave 10."


TRUTHS = statements(
    "1.1", "TFF", says=("(a) is true.", "(b) is false.", "(c) is false."), praise="Yes."
)


@pytest.mark.parametrize(
    "answer",
    [
        "TFF",
        "tff",
        "T F F",
        "T,F,F",
        "true, false, false",
        ["T", "F", "F"],
        [True, False, False],
        ("True", "False", "False"),
        torch.tensor([True, False, False]),
        lambda: "TFF",
    ],
)
def test_true_or_false_may_be_written_in_many_ways(answer):
    assert TRUTHS.check(answer).right


def test_the_first_wrong_statement_is_named_and_the_word_never_shown():
    assert TRUTHS.check("TTF").message == "(b) is false."
    assert TRUTHS.check("TTT").message.startswith("(b) is false. (2 of the 3 are not right yet")
    for answer in ("", "TF", "TFFF", "yes", 5, ["F"], object()):
        verdict = TRUTHS.check(answer)
        assert verdict.status == "wrong" and "3 letters" in verdict.message
        assert "TFF" not in verdict.message


FAULTY = which(
    "1.1", options="ABCDE", right="BD", says={k: f"{k} is right." for k in "ACE"}, praise="Both."
)


@pytest.mark.parametrize(
    "answer", ["BD", "DB", "b d", "B and D", "B, D", {"B", "D"}, ["d", "b"], ("B", "D")]
)
def test_letters_may_come_in_any_order_and_form(answer):
    assert FAULTY.check(answer).right


def test_a_letter_too_many_is_named_and_one_too_few_is_counted():
    assert FAULTY.check("BE").message == "E is right." == FAULTY.check("BDE").message
    assert "looking for 2 in all" in FAULTY.check("B").message
    for answer in ("", "XY", 7, object(), []):
        assert FAULTY.check(answer).status == "wrong" and "BD" not in FAULTY.check(answer).message


def thrice(x):
    return x + x + x


TESTS = write_test(
    "1.1",
    good=(lambda x: 3 * x, thrice),
    broken={
        "square": (lambda x: x * x + 2, "At 1 and 2 the square plus 2 looks the same."),
        "absolute": (lambda x: 3 * abs(x), "It forgets the sign."),
    },
    praise="It finds both.",
)


def test_a_test_must_find_the_faulty_and_pass_the_right():
    def finds(f):
        assert f(-5) == -15

    assert TESTS.check(finds).right and TESTS.check(lambda f: f(-5) == -15).right
    assert TESTS.check(lambda f: f(5) == 15).idea == "absolute"
    assert TESTS.check(lambda f: f(1) == 3).idea == "square"
    strict = TESTS.check(lambda f: f(2) == 7)
    assert strict.status == "wrong" and "fails an implementation that is right" in strict.message
    assert "raised AttributeError" in TESTS.check(lambda f: f.nothing).message
    assert TESTS.check(lambda f: None).status == "not attempted" == TESTS.check(...).status
    assert TESTS.check(True).status == "wrong"


def test_a_verdict_shows_itself_as_text_and_as_escaped_html():
    verdict = Verdict("1.1", "not attempted", "a < b")
    assert repr(verdict) == "Exercise 1.1: not attempted. a < b"
    html = verdict._repr_html_()
    assert (
        'class="moe-check not-attempted"' in html and 'role="status"' in html and "a &lt; b" in html
    )


def test_a_missing_package_is_not_taken_for_a_missing_chapter(monkeypatch):
    def import_module(name):
        raise ModuleNotFoundError("No module named 'plotly'", name="plotly")

    monkeypatch.setattr(checks, "import_module", import_module)
    with pytest.raises(ModuleNotFoundError, match="plotly"):
        exercises(1)


def test_a_number_without_quotes_is_told_apart():
    with pytest.raises(ValueError, match="in quotes"):
        check(5.1, doubled)


@pytest.mark.parametrize("number", ["1.99", "99.1", "one", "", "1"])
def test_an_exercise_that_does_not_exist_is_refused(number):
    with pytest.raises(ValueError, match="exercise=|chapter=99 has no exercises"):
        check(number, 1)
