"""The grader: answers of the kinds that MATH has, texts that want to hurt it, a busy machine."""

import os
import time
from itertools import pairwise

import pytest

import common

# kind: rows of (gold answer, predictions that are right, predictions that are wrong)
KINDS = {
    "fractions and decimals": [
        (r"\frac{1}{2}", [r"\dfrac12", "1/2", ".5", r"\frac{2}{4}"], ["2/1", r"\frac{1}{0}"]),
        (r"-\frac{49}{12}", [r"\frac{-49}{12}", r"\frac{49}{-12}"], [r"\frac{49}{12}"]),
        ("0.35", [r"\frac{7}{20}", "0.350"], ["35"]),
        (r"\frac{22}{3}", [r"7\frac13", "7 1/3"], ["2 2/3", "7.33"]),
        (r"137 \frac{1}{2}", ["137 1/2", r"137\tfrac12", r"\frac{275}{2}", "137.5"], ["1371/2"]),
        ("16", ["016", "+16", "16.0"], ["160", "106", "1 6", "-16"]),
        ("8000", [r"8 \cdot 10^{3}", "8 × 10^3", "8,000"], [r"8 \cdot 10^{2}"]),
        (r"4.5 \times 10^{-3}", ["0.0045"], [r"4.5 \times 10^{3}"]),
    ],
    "dollar signs, brackets and a full stop": [
        ("73", ["$73$.", r"\[73\]", r"\[73.\]", r"\(73\).", "$$73$$", "**73**."], ["$74$."]),
        ("73", [r"\boxed{73}", r"\textbf{73}", " 73\n"], ["2$ $73", r"\boxed{74}"]),
        ("3,4", ["$3$ and $4$", r"\(4, 3\)."], ["$3$."]),
    ],
    "complex numbers": [
        ("3 + 4i", ["3 + 4 i", r"3+4\mathrm{i}", r"3+4\,i", r"3+4\cdot i"], ["3 - 4i", "7"]),
        (r"\frac{1}{5} + \frac{3}{5}i", [r"\frac{1+3i}{5}", "0.2+0.6i"], [r"\frac{3+i}{5}"]),
        (r"8 - 8 \sqrt{3} i", [r"8 - 8i\sqrt{3}"], [r"8 + 8i\sqrt{3}"]),
        ("3i,-3i", [r"\pm 3i", "-3i, 3 i"], ["3i", "3,-3"]),
    ],
    "an operation left to carry out": [
        ("12", [], ["3 × 4", "3*4", r"3 \cdot 4", "3(4)", "11+1", "24/2", "24 ÷ 2"]),
        ("-12", [], [r"-\frac{24}{2}", r"\frac{-6}{1/2}", r"\frac{-6}{0.5}", "-4 · 3"]),
        ("1", [], ["29−28", "29 – 28", "1=2=1", "3=1", r"\sin 90^\circ", "1^{10}", r"\gcd(3,4)"]),
        ("16", [], ["2^{4}", r"\sqrt{256}", "4²", r"\lceil \sqrt{20} \rceil + 11"]),
        ("6", [r"\text{6}"], ["3!", r"\log_264", "|-6|", r"\lvert -6 \rvert", r"\binom{4}{2}"]),
        (r"\frac16", [], [r"\frac12 \cdot \frac13", r"\frac12 - \frac13"]),
        (r"2\sqrt2", [r"2 \cdot \sqrt2", r"\sqrt8"], [r"\sqrt2+\sqrt2", r"4\sin 45^\circ"]),
        ("5r^5", ["5 r^{5}"], [r"\frac{(10r^3)(4r^6)}{8r^4}"]),
        ("x=5", ["5"], ["x=2+3", "x=-5"]),
        (r"1 - \frac1e", ["1 - e^{-1}"], [r"1 + \frac1e"]),
        (r"1+\sqrt2", [r"\sqrt2+1"], [r"\cot(\pi/8)"]),
        ("(x+1)(x-2)", ["x^2-x-2", "(x-2)(x+1)"], ["(x-1)(x+2)"]),
        (r"0.5+\frac{\pi}{8}", [r"\pi \div 8 + 1 \div 2"], [r"\pi \div 8"]),
        (r"\sin^2 t", [r"1-\cos^2 t"], [r"\cos^2 t"]),
    ],
    "bases": [
        ("4210_{5}", ["4210_5", "4210"], ["4210_6", "4211_5"]),
        ("-37_8", ["-37_{8}", "−37_8"], ["-37_9", "37_8"]),
        ("0.0011_{2}", ["0.0011_2"], ["0.0011_3"]),
        (r"\text{A5}_{11}", ["A5_{11}", r"\mathrm{A5}_{11}"], ["A5_{12}", "A6_{11}"]),
        ("40_9", ["40"], ["58_9 - 18_9.", "40_8"]),
        ("17", [], ["17_8"]),
    ],
    "tiny and large values": [
        (r"\frac{1}{2^{98}}", ["2^{-98}", "4^{-49}"], ["2^{-97}", r"\frac{1}{3^{98}}", "0"]),
        (r"\frac{1}{2004!}", [r"\frac{1}{2004 \cdot 2003!}"], [r"\frac{1}{2006!}"]),
        (r"\frac{\pi}{2^{98}}", [r"\pi 2^{-98}"], [r"\frac{\pi}{2^{97}}"]),
        ("1+2^{-98}", ["2^{-98}+1"], ["1+2^{-97}"]),
        ("0.0000001", [r"1 \times 10^{-7}"], ["0.0000002"]),
    ],
    "percent, degrees, money and units": [
        (r"7.2\%", ["7.2", "7.2 percent", "7.2%"], [r"7.3\%"]),
        (r"145^\circ", ["145°", "145", r"145^{\circ}", r"145\text{ degrees}"], [r"154^\circ"]),
        (r"15\mbox{ cm}^2", ["15 cm^2", "15 cm²", "15", r"15\,\text{cm}^2"], ["225", "15^2"]),
        (r"144 \mbox{ m}^3", ["144 cubic meters", r"144\text{ m}^{3}"], ["144^3"]),
        (r"70 \, \text{m/s}", ["70", "70 m/s"], ["71 m/s"]),
        ("1599", ["1599 dollars", r"1599 \text{ dollars}", r"\$1,599"], ["1598 dollars"]),
        (r"\$18.90", ["18.90 dollars", r"\text{\$18.90}", "18.9"], ["1890"]),
        (r"164 \pi \mbox{ square feet}", [r"164\pi", "164π square feet"], ["164"]),
        ("2", [], ["2 pi", "2x", "2 or 3"]),
        ("5m", ["m5"], ["5"]),
    ],
    "thousands": [
        ("58,500", ["58500", "x = 58,500", r"58\,500", "58 500", "58{,}500", r"58,\!500"], ["58"]),
        (r"11,\! 111,\! 111,\! 100", ["11111111100", "11,111,111,100"], ["11,111,111,101"]),
        (r"\frac{12}{5,\!525}", [r"\frac{12}{5525}"], [r"\frac{12}{5}"]),
        ("1234", ["1234.0"], ["(1,234)", "1,2,3,4"]),
    ],
    "Unicode": [
        (r"-\sqrt{5}", ["−√5", r"−\sqrt5"], ["√5", "−√6"]),
        (r"2\sqrt{13}", ["2√13", "2√(13)"], ["√13"]),
        (r"x^2\pi", ["x²π"], ["x³π"]),
        (r"(-\infty, 3)", ["(-∞, 3)", "(−∞,3)"], ["(3, ∞)"]),
        ("42", ["\u200b42"], ["24"]),
    ],
    "words and times": [
        (r"8\!:\!34 \text{ p.m.}", ["8:34 p.m.", "8:34 p.m"], ["8:34 a.m.", "8:43 p.m.", "8:34"]),
        (r"\text{1:03 PM}", ["1:03 PM"], ["1:03 AM"]),
        ("LQSX", [r"\text{LQSX}"], ["LQXS"]),
        (r"\text{June 20}", ["June 20", r"\text{ June  20 }"], ["July 20"]),
        (r"\text{(C)}", ["C", r"\textbf{(C)}", r"\mathrm{C}"], ["(D)"]),
        (r"\text{A,C}", ["C,A", r"\text{A and C}"], ["A,D", "A"]),
        ("xy", ["yx"], ["xz"]),
    ],
    "lists, intervals, equations and matrices": [
        (r"19, 46, \text{ and } 82", ["82, 19, 46"], ["19, 46", "19, 46, 83"]),
        (r"-12 \text{ or } -30", ["-30, -12", r"\{-12,-30\}"], ["-30"]),
        ("5, 7", ["x=5, x=7"], ["5"]),
        (r"3 \pm \sqrt{2}", [r"3+\sqrt{2}, 3-\sqrt{2}"], [r"3+\sqrt{2}"]),
        (r"\left( 3, \frac{\pi}{2} \right)", [r"(3, \pi/2)"], [r"(\frac{\pi}{2}, 3)"]),
        ("[2,4)", [r"\left[ 2, 4 \right)", r"2 \le x < 4"], ["(2,4)", "[2,4]"]),
        ("y = 2x + 3", ["y - 2x = 3", "2x+3"], ["y = 3x + 2"]),
        ("x^2+1", ["f(x) = x^2 + 1"], ["f(x) = x^2 - 1"]),
        ("2x + z = 1", ["z = 1 - 2x"], ["1"]),
        (r"\begin{pmatrix}.5 \\ 1\end{pmatrix}", [r"\begin{pmatrix}\frac12\\1\end{pmatrix}"], []),
        ("0", ["0.0"], ["", None]),
    ],
}  # fmt: skip
RIGHT = {kind: [(row[0], one) for row in rows for one in row[1]] for kind, rows in KINDS.items()}
WRONG = {kind: [(row[0], one) for row in rows for one in row[2]] for kind, rows in KINDS.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_right_in_whatever_way_it_is_written_and_another_is_wrong(grader, kind):
    """So is an operation that is left to carry out."""
    for pairs, expected in ((RIGHT[kind], True), (WRONG[kind], False)):
        verdicts = zip(pairs, grader.grade(pairs), strict=True)
        assert [pair for pair, right in verdicts if right != expected] == []


def test_a_problem_is_no_answer_to_itself(grader):
    rows = common.load_problems("examples/arithmetic", "test")
    rows = [row for row in rows if row["problem"].endswith("=")]
    assert len(rows) > 300
    assert not any(grader.grade([(row["answer"], row["problem"][:-1]) for row in rows]))


def test_an_embedded_answer_is_right_against_itself_and_not_against_the_next(grader):
    golds = [row["answer"] for row in common.load_problems("examples/arithmetic", "test")]
    assert all(grader.grade([(gold, gold) for gold in golds]))
    neighbours = list(pairwise(golds))
    assert grader.grade(neighbours) == [a == b for a, b in neighbours]


HOSTILE = [
    "10^{10^{10}}", "9**9**9**9", r"\int e^{x^2\sin x^{x}} dx",
    "{" * 300, r"\frac{1}{" * 110, "1 " + "aa " * 330 + "!", "2" + " " * 100_000,
    "\x00\ud83d", r"\boxed{", "$$$",
]  # fmt: skip


def test_hostile_texts_are_wrong_and_the_grader_lives_on(grader):
    gold = r"x^2+\sqrt{2}!"  # has an operation of each kind, so that math-verify is asked
    assert not any(grader.grade([(gold, text) for text in HOSTILE]))
    assert grader.grade([(r"\sqrt{12}", r"2\sqrt{3}"), ("5m", "m5")]) == [True, True]


@pytest.mark.parametrize("form", ["{}", r"\text{{{}}}", "$ {} $", r"\frac{{{}}}{{1}}", "x^2+{}!"])
def test_python_in_an_answer_is_not_run(grader, tmp_path, form):
    target = tmp_path / "written"
    for code in (f"__import__('pathlib').Path('{target}').touch()", f"open('{target}', 'w')"):
        text = form.format(code)
        assert grader.grade([("2", text), ("x^2+1!", text)]) == [False, False]
    assert not target.exists()


@pytest.fixture
def grader_of_one():
    """A grader with one process, and the process's id."""
    grader = common.Grader(workers=1)
    yield grader, grader.pool.schedule(os.getpid).result()
    grader.close()


ENDLESS = (r"\sqrt{7}", "7^{7^{7^{7}}}")  # one operation in C, which no signal handler interrupts


def test_a_pair_that_runs_out_of_time_is_wrong_and_counted(grader_of_one):
    grader, process = grader_of_one
    others = [(r"\sqrt{28}", r"2\sqrt{7}"), (r"\sqrt{63}", r"3\sqrt{7}")]
    assert grader.grade([ENDLESS, *others]) == [False, True, True]
    assert grader.timeouts == 1
    assert grader.pool.schedule(os.getpid).result() != process


def allocate(size):
    return len(bytearray(size))


def test_memory_of_a_grading_process_is_bounded(grader_of_one):
    future = grader_of_one[0].pool.schedule(allocate, [5 << 30])
    assert isinstance(future.exception(), MemoryError)


def sleep_before_parsing():
    normalise = common.normalise
    common.normalise = lambda answer: time.sleep(2) or normalise(answer)


def test_a_pair_has_three_seconds_of_the_processor_and_not_of_the_clock(grader_of_one):
    grader, process = grader_of_one
    grader.pool.schedule(sleep_before_parsing).result()  # twice for a pair
    assert grader.grade([(r"\sqrt{52}", r"2\sqrt{13}")]) == [True]
    assert grader.pool.schedule(os.getpid).result() == process  # it was not killed
