"""Make the embedded arithmetic set: train.jsonl and test.jsonl, five levels of difficulty.

    python examples/arithmetic/generate.py                  # the committed files
    python examples/arithmetic/generate.py --seed 1 --out DIR   # another draw
    python examples/arithmetic/generate.py --wide --out DIR     # out of distribution: a test set

Each line is {"problem", "answer", "solution", "level"}: plain decimal numbers, no spaces in a
problem, and a worked solution that ends in \\boxed{answer}. All problems are different, so none of
the test split is in the training split.

| level | problems (ranges inclusive and uniform) |
|---|-------------------------------------------------------------------------------------------------------|
| 1 | {a}x+{b}={ax+b}: find x;   a 2..9, x 0..9, b 1..9 |
| 2 | {a}+{b}= or {a}-{b}=;      a, b 0..29 |
| 3 | {a}*{b}=;   a 2..9, b 11..99    or the remainder {a}%{m}=;     a 100..999, m 3..19 |
| 4 | {a}^{n}%{m}=;   a 2..30, n 5..40, m 30..99    or the digit sum s{a}^{n}=;   a 2..30, n 5..20 |
| 5 | {a}*{b}=;   a, b 11..99    or {a}x^3-{b}x^2:{x}= (value at x);   a, b 1..9, x -9..9 |

With --wide, one operand of every problem is larger than any in these sets: x 10..19; a, b 30..99;
b 100..199 or a 1000..1999; n 41..63 or n 21..25; b 100..199 or x 10..15.
"""

import argparse
import json
import random
from pathlib import Path

TRAIN_PER_LEVEL, TEST_PER_LEVEL = 300, 100


def linear(rng, wide):
    xs = (10, 19) if wide else (0, 9)
    a, x, b = rng.randint(2, 9), rng.randint(*xs), rng.randint(1, 9)
    c = a * x + b
    return f"{a}x+{b}={c}", x, f"{a}x={c}-{b}={c - b}, x={c - b}/{a}"


def sum_or_difference(rng, wide):
    terms = (30, 99) if wide else (0, 29)
    a, b, sign = rng.randint(*terms), rng.randint(*terms), rng.choice((1, -1))
    operator = "+" if sign > 0 else "-"
    tens, units = a // 10 * 10 + sign * (b // 10 * 10), a % 10 + sign * (b % 10)
    steps = f"{a // 10 * 10}{operator}{b // 10 * 10}={tens}, {a % 10}{operator}{b % 10}={units}"
    steps += f", {tens}{units:+d}"
    return f"{a}{operator}{b}=", a + sign * b, steps


def product_steps(a, b):
    tens, units = b // 10 * 10, b % 10
    return f"{a}*{b}={a}*{tens}+{a}*{units}={a * tens}+{a * units}"


def short_product_or_remainder(rng, wide):
    if rng.random() < 0.5:
        a, b = rng.randint(2, 9), rng.randint(*((100, 199) if wide else (11, 99)))
        return f"{a}*{b}=", a * b, product_steps(a, b)
    a, m = rng.randint(*((1000, 1999) if wide else (100, 999))), rng.randint(3, 19)
    return f"{a}%{m}=", a % m, f"{a}/{m} is {a // m}, {a // m}*{m}={a // m * m}, {a}-{a // m * m}"


def power_remainder_or_digit_sum(rng, wide):
    if rng.random() < 0.5:
        exponents = (41, 63) if wide else (5, 40)
        a, n, m = rng.randint(2, 30), rng.randint(*exponents), rng.randint(30, 99)
        steps, factors, power, square = [], [], 1, a % m
        while power <= n:  # square and multiply
            steps.append(f"{a}^{power}:{square}")
            if n & power:
                factors.append(str(square))
            power, square = 2 * power, square * square % m
        return f"{a}^{n}%{m}=", pow(a, n, m), f"{', '.join(steps)}, {'*'.join(factors)}%{m}"
    a, n = rng.randint(2, 30), rng.randint(*((21, 25) if wide else (5, 20)))
    digits = str(a**n)
    return f"s{a}^{n}=", sum(map(int, digits)), f"{a}^{n}={digits}, {'+'.join(digits)}"


def long_product_or_polynomial(rng, wide):
    if rng.random() < 0.5:
        a, b = rng.randint(11, 99), rng.randint(*((100, 199) if wide else (11, 99)))
        return f"{a}*{b}=", a * b, product_steps(a, b)
    a, b, x = rng.randint(1, 9), rng.randint(1, 9), rng.randint(*((10, 15) if wide else (-9, 9)))
    cube, square = a * x**3, b * x**2
    steps = f"x^2={x**2}, x^3={x**3}, {a}*{x**3}={cube}, {b}*{x**2}={square}, {cube}-{square}"
    return f"{a}x^3-{b}x^2:{x}=", cube - square, steps


LEVELS = [
    linear,
    sum_or_difference,
    short_product_or_remainder,
    power_remainder_or_digit_sum,
    long_product_or_polynomial,
]


def generate(seed, train_per_level=TRAIN_PER_LEVEL, test_per_level=TEST_PER_LEVEL, wide=False):
    """-> (train rows, test rows), each level in equal shares, levels in turn."""
    rng = random.Random(seed)
    seen, by_level = set(), []
    for level, make in enumerate(LEVELS, start=1):
        rows = []
        while len(rows) < train_per_level + test_per_level:
            problem, answer, steps = make(rng, wide)
            if problem in seen:
                continue
            seen.add(problem)
            solution = f"{steps}=\\boxed{{{answer}}}"
            rows.append(
                {"problem": problem, "answer": str(answer), "solution": solution, "level": level}
            )
        by_level.append(rows)
    train = [row for rows in zip(*by_level, strict=True) for row in rows]
    return train[: train_per_level * len(LEVELS)], train[train_per_level * len(LEVELS) :]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-per-level", type=int, default=TRAIN_PER_LEVEL)
    parser.add_argument("--test-per-level", type=int, default=TEST_PER_LEVEL)
    parser.add_argument("--wide", action="store_true", help="operands unseen in the other sets")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    if args.train_per_level + args.test_per_level > 720:
        parser.error("level 1 has 720 different problems")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in zip(
        ("train", "test"),
        generate(args.seed, args.train_per_level, args.test_per_level, args.wide),
        strict=True,
    ):
        (args.out / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="ascii"
        )


if __name__ == "__main__":
    main()
