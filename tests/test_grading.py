"""The grader on answers of the kinds that MATH has, and on texts that want to hurt it."""

import random
import time
from collections import Counter
from itertools import pairwise

import pytest

import common

RIGHT = [
    (r"\frac{1}{2}", r"\dfrac12"),
    (r"\frac{1}{2}", r"\tfrac{1}{2}"),
    (r"\frac{1}{2}", "1/2"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", ".5"),
    (r"\frac13", r"\frac{1}{3}"),
    (r"\frac 79", "7/9"),
    (r"-\frac{49}{12}", r"\frac{-49}{12}"),
    (r"\frac{3}{4}", "3/4."),
    (r"1\frac{1}{2}", "1.5"),
    (r"\frac{1}{2^{98}}", "2^{-98}"),
    ("(2,4)", "(2, 4)"),
    (r"\left( 1, \frac{1}{2}, -4 \right)", "(1,0.5,-4)"),
    ("[2,4)", r"\left[2,4\right)"),
    (r"(-\infty,1)\cup(3,\infty)", r"(-\infty, 1) \cup (3, \infty)"),
    ("1,2", "2,1"),
    ("1,2", r"\{1,2\}"),
    (r"10^\circ, 50^\circ, 54^\circ", "10,50,54"),
    (r"\begin{pmatrix} 11 \\ -1 \end{pmatrix}", r"\begin{pmatrix}11\\-1\end{pmatrix}"),
    (r"\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}", r"\begin{bmatrix} 1 & 0 \\ 0 & 1 \end{bmatrix}"),
    (r"\begin{pmatrix} 1/3 \\ 2 \end{pmatrix}", r"\begin{pmatrix} \frac13 \\ 2 \end{pmatrix}"),
    (r"25\%", "25"),
    (r"25\%", "25%"),
    (r"90^\circ", "90"),
    ("90", r"90^{\circ}"),
    (r"45\text{ mph}", "45"),
    ("45", r"45\text{ mph}"),
    (r"428\text{ square centimeters}", "428"),
    (r"\$50", "50"),
    ("50", r"\$50"),
    (r"\$16,\!386.16", "16386.16"),
    ("1,000", "1000"),
    ("1000", "1,000"),
    ("5", "x=5"),
    ("x=5", "5"),
    ("y=2x+3", "y = 3+2x"),
    ("5", "5."),
    ("5", "5.0"),
    ("5", "$5$"),
    ("5", " 5\n"),
    ("(2, 4)", "( 2 ,4 )"),
    (r"\text{June  20}", r"\text{ June 20 }"),
    ("7", "007"),
    (r"\text{Dana}", "Dana"),
    (r"\text{June 20}", "June 20"),
    (r"\text{(D)}", "D"),
    ("5:6", "5:6"),
    ("7p+4e", "4e+7p"),
    (r"\sqrt{6} + 3\sqrt{2}", r"3\sqrt2+\sqrt6"),
    (r"7z^{96}(4z+1)", r"28z^{97}+7z^{96}"),
    (r"\pi a^2", r"a^2\pi"),
    (r"\frac{2ab}{a^2+b^2}", r"\frac{2ba}{b^2+a^2}"),
    ("10001_2", "10001_{2}"),
    ("10001_2", "10001"),
    ("320000", r"3.2 \times 10^5"),
    ("1024", "2^{10}"),
    ("6", "x = 6"),
    ("-4", "-4"),
    (r"\emptyset", r"\emptyset"),
]
WRONG = [
    ("1,2", "12"),
    ("12", "1 2"),
    ("-1", "28-29"),
    ("3591", "63*57"),
    ("56", r"7 \times 8"),
    ("5", "1=2=5"),
    ("5", "3=5"),
    ("3", "2$ $3"),
    ("10001_2", "10001_3"),
    ("17", "17_8"),
    (r"\frac{22}{3}", "2 2/3"),
    ("22/3", "2 2/3"),
    ("11/2", "1 1/2"),
    ("12", "1,2"),
    ("(2,4)", "(4,2)"),
    ("[2,4)", "(2,4)"),
    (r"(-\infty,4)", r"(-\infty,4]"),
    ("-4", "4"),
    ("5", "6"),
    ("1/2", "2/1"),
    (r"\frac13", ".33"),
    (r"3\pi", "9.42"),
    (r"\begin{pmatrix} 11 \\ -1 \end{pmatrix}", r"\begin{pmatrix}11\\1\end{pmatrix}"),
    (r"\text{Dana}", r"\text{Evelyn}"),
    (r"\text{even}", "odd"),
    ("5:6", "6:5"),
    ("385_9", "386_9"),
    ("x^2+2x+9", "x^2+2x+8"),
    ("1000000", "1000001"),
    ("6", "six"),
    ("0", ""),
    ("0", None),
    ("2", "2 or 3"),
]


@pytest.fixture(scope="module")
def grader():
    grader = common.Grader()
    yield grader
    grader.close()


def test_answers_of_the_kinds_that_math_has(grader):
    assert len(RIGHT + WRONG) >= 60
    verdicts = grader.grade(RIGHT + WRONG)
    wanted = [True] * len(RIGHT) + [False] * len(WRONG)
    wrong = [pair for pair, *both in zip(RIGHT + WRONG, verdicts, wanted, strict=True) if both[0] != both[1]]
    assert not wrong


def test_a_problem_is_no_answer_to_itself(grader):
    """Copying the problem must not be rewarded, although math-verify evaluates it."""
    rows = common.load_problems("examples/arithmetic", "test")
    asked = [row for row in rows if row["problem"].endswith("=")]
    assert len(asked) > 300
    verdicts = grader.grade([(row["answer"], row["problem"].removesuffix("=")) for row in asked])
    assert sum(verdicts) <= 0.02 * len(asked)  # a few powers, such as 2^8


def test_every_answer_of_the_embedded_set_is_right_against_itself_and_not_against_the_next(grader):
    rows = common.load_problems("examples/arithmetic", "test")
    golds = [row["answer"] for row in rows]
    assert all(grader.grade([(gold, gold) for gold in golds]))
    neighbours = list(pairwise(golds))
    assert grader.grade(neighbours) == [a == b for a, b in neighbours]


HOSTILE = [
    "10^10^10",
    "10^{10^{10}}",
    "9**9**9**9",
    "9^{9^{9^{9}}}",
    "100000000!",
    "{" * 100_000,
    "{" * 1_900,
    "(" * 150,
    r"\frac{1}{" * 200,
    "x^{1000000}*(x+1)^{100000}",
    r"\int e^{x^2\sin x^{x}} dx",
    "1" * 1_900,
    "\x00\ud83d",
    r"\boxed{",
    "$$$",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:20]))
def test_hostile_texts_are_wrong_within_5_seconds(grader, text):
    started = time.monotonic()
    assert grader.grade([("2", text)]) == [False]
    assert time.monotonic() - started < 5
    assert grader.grade([("2", "2.0"), ("2", "3")]) == [True, False]  # and the grader lives on


@pytest.mark.parametrize("form", ["{}", "\\text{{{}}}", "$ {} $", "\\frac{{{}}}{{1}}"])
def test_python_in_an_answer_is_not_run(grader, tmp_path, form):
    target = tmp_path / "pwned"
    for code in (
        f"__import__('pathlib').Path('{target}').touch()",
        f"open('{target}', 'w')",
        f"exec(open('{target}','w'))",
    ):
        assert grader.grade([("2", form.format(code))]) == [False]
    assert not target.exists()


def test_memory_of_a_grading_process_is_bounded(grader):
    """What a child may allocate is bounded: the bound is set in the child, and ends an allocation beyond it."""
    future = grader.pool.schedule(allocate, [3 << 30])
    assert isinstance(future.exception(), MemoryError)


def allocate(size):
    return len(bytearray(size))


def test_a_broken_pool_is_an_error_not_wrong_answers():
    grader = common.Grader(workers=1)
    grader.pool.stop()
    with pytest.raises(RuntimeError):
        grader.grade([("2", "\\frac{4}{2}")])
    grader.close()


def test_a_pair_is_graded_once(grader, monkeypatch):
    grader.grade([("31", "31.0")])
    monkeypatch.setattr(grader.pool, "schedule", lambda *a, **k: pytest.fail("graded again"))
    assert grader.grade([("31", "31.0")] * 3) == [True] * 3


def test_quotients_at_sight_are_what_math_verify_says():
    """The shortcut for integers and fractions, equal in value and not, however they are written."""
    rng, forms = random.Random(0), ["{}", "{}/{}", "-{}/{}"]
    forms += [r"\frac{{{}}}{{{}}}", r"-\dfrac{{{}}}{{{}}}", r"\tfrac{{{}}}{{{}}}"]
    judged = Counter()
    for _ in range(600):
        above, below, times = rng.randint(-40, 40), rng.choice([1, rng.randint(1, 30), -7]), rng.randint(1, 4)
        other = (above * times, below * times) if rng.random() < 0.6 else (rng.randint(-9, 9), rng.randint(1, 12))
        gold, prediction = rng.choice(forms).format(above, below), rng.choice(forms).format(*other)
        if common.rational(gold) is not None and common.rational(prediction) is not None:
            verdict = common.verdict_at_sight(gold, prediction)
            assert verdict == common.is_right(gold, prediction), (gold, prediction)
            judged[verdict] += 1
    assert min(judged[True], judged[False]) > 100
    assert [common.rational(one) for one in ("1/0", "\\frac{1}{0}", "--1/2", "1/-2", "0.5", "1/2/3", "\\frac12")] == [
        None
    ] * 7
