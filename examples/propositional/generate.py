"""Make the embedded theorems: train.json, val.json and test.json, in the format of LeanDojo
Benchmark 4.

    python examples/propositional/generate.py                  # the committed files
    python examples/propositional/generate.py --seed 1 --out DIR   # another draw

A theorem is a random sequent that intuitionistic logic proves: 3 or 4 atoms, up to 3 hypotheses, a
goal. Its proof is one of the shortest, drawn at random, in the tactics of environment.py. The
lengths of the proofs are given: in training as in LeanDojo Benchmark (mean about 4, median 2 or 3);
for validation, test and the part of the training set that has no proof (for expert iteration),
longer ones. No two theorems of all files are the same up to the names of the atoms.
"""

import argparse
import json
import random
import re
from functools import cache
from pathlib import Path

try:
    from environment import Goal, show, unfold
except ImportError:
    from examples.propositional.environment import Goal, show, unfold

TRACED, UNTRACED, VAL, TEST = 1000, 300, 100, 250
SHORT = {
    1: 20,
    2: 26,
    3: 14,
    4: 10,
    5: 8,
    6: 7,
    7: 5,
    8: 4,
    9: 2,
    10: 1,
    11: 1,
    12: 0.5,
    13: 0.5,
    14: 0.5,
    15: 0.5,
}
LONG = dict.fromkeys(range(3, 9), 1)
NAMES = 12  # hypotheses are h1 to h12
NODES = 400  # of the search for a shortest proof


# ---- Is it provable? -----------------------------------------------------------------------------
@cache
def plain(formula):
    """In → ∧ ∨ alone."""
    if isinstance(formula, str):
        return formula
    connective, left, right = formula[0], plain(formula[1]), plain(formula[2])
    if connective == "↔":
        return ("∧", ("→", left, right), ("→", right, left))
    return ("→" if connective == "¬" else connective, left, right)


@cache
def provable(hypotheses, goal):
    """Dyckhoff's contraction-free calculus LJT (G4ip): decides intuitionistic logic, always ends.
    hypotheses: a frozenset of plain formulas."""
    if goal in hypotheses or "False" in hypotheses:
        return True
    if goal[0] == "→":
        return provable(hypotheses | {goal[1]}, goal[2])
    if goal[0] == "∧":
        return provable(hypotheses, goal[1]) and provable(hypotheses, goal[2])
    for formula in hypotheses:  # what loses nothing
        if isinstance(formula, str):
            continue
        connective, left, right = formula
        rest = hypotheses - {formula}
        if connective == "∧":
            return provable(rest | {left, right}, goal)
        if connective == "∨":
            return provable(rest | {left}, goal) and provable(rest | {right}, goal)
        if left == "False":
            return provable(rest, goal)
        if left in rest:
            return provable(rest | {right}, goal)
        if left[0] == "∧":
            return provable(rest | {("→", left[1], ("→", left[2], right))}, goal)
        if left[0] == "∨":
            return provable(rest | {("→", left[1], right), ("→", left[2], right)}, goal)
    if goal[0] == "∨" and (provable(hypotheses, goal[1]) or provable(hypotheses, goal[2])):
        return True
    for formula in hypotheses:  # (A → B) → C
        if formula[0] == "→" and formula[1][0] == "→":
            _, (_, a, b), c = formula
            rest = hypotheses - {formula}
            if provable(rest | {("→", b, c), a}, b) and provable(rest | {c}, goal):
                return True
    return False


@cache
def truth_table(formula):
    """One bit for each of the 64 valuations of A to F."""
    if isinstance(formula, str):
        return (
            0
            if formula == "False"
            else sum(1 << row for row in range(64) if row >> "ABCDEF".index(formula) & 1)
        )
    connective, left, right = formula[0], truth_table(formula[1]), truth_table(formula[2])
    every = (1 << 64) - 1
    return {"∧": left & right, "∨": left | right, "↔": every ^ left ^ right}.get(
        connective, every ^ left | right
    )


# ---- The shortest proofs -------------------------------------------------------------------------
def premises(formula):
    """A → B → C -> [A, B]"""
    return [formula[1], *premises(formula[2])] if formula[0] in ("→", "¬") else []


def tactics(goal):
    """Return the tactics that may be a step of a shortest proof."""
    hypotheses = [(name, formula) for name, formula in goal.hypotheses.items() if formula != "Prop"]
    new = 1 + max((int(name[1:]) for name, _ in hypotheses), default=0)
    known = {unfold(formula): name for name, formula in hypotheses}
    target, found = goal.target, []
    for name, formula in hypotheses:
        needed = premises(formula)
        for count in range(len(needed) + 1):
            conclusion = formula
            for _ in range(count):
                conclusion = conclusion[2]
            missing = [premise for premise in needed[:count] if unfold(premise) not in known]
            term = " ".join(
                [name, *(known[unfold(premise)] for premise in needed[:count] if not missing)]
            )
            if unfold(conclusion) == unfold(target):
                if not missing:
                    return [f"exact {term}"]
                found.append(f"apply {name}")
            elif conclusion == "False":
                if not missing:
                    return [f"cases {term}"]
                found.append("exfalso")
            elif not missing and conclusion[0] in ("∨", "∧", "↔"):
                found.append(
                    f"obtain h{new} | h{new + 1} := {term}"
                    if conclusion[0] == "∨"
                    else f"obtain ⟨h{new}, h{new + 1}⟩ := {term}"
                )
            elif not missing and count and unfold(conclusion) not in known:
                found.append(f"have h{new} := {term}")
    if target[0] in ("→", "¬"):
        found.append(f"intro h{new}")
    elif target[0] in ("∧", "↔"):
        found.append("constructor")
    elif target[0] == "∨":
        found += ["left", "right"]
    return list(dict.fromkeys(found))


class TooLong(Exception):
    pass


class Prover:
    """Shortest proofs of the goals of one theorem, by iterative deepening."""

    def __init__(self, rng):
        self.rng, self.least, self.steps, self.nodes = rng, {}, {}, 0

    def moves(self, key, goal):
        """-> [(tactic, subgoals that are all provable)]"""
        if key not in self.steps:
            self.nodes += 1
            if self.nodes > NODES:
                raise TooLong
            self.steps[key] = []
            for tactic in tactics(goal):
                goals = goal.apply(tactic)
                if all(
                    provable(frozenset(map(plain, g.hypotheses.values())), plain(g.target))
                    for g in goals
                ):
                    self.steps[key].append((tactic, [(self.key(g), g) for g in goals]))
            self.rng.shuffle(self.steps[key])
        return self.steps[key]

    @staticmethod
    def key(goal):
        return tuple(goal.hypotheses.items()), goal.target

    def length(self, key, goal, most):
        """Of the shortest proof if it is at most `most`, else most + 1 or more."""
        low, exact = self.least.get(key, (1, False))
        if exact or low > most:
            return low
        for bound in range(low, most + 1):
            for _, goals in self.moves(key, goal):
                left = bound - 1 - len(goals)
                for pair in goals:
                    if left < 0:
                        break
                    left -= self.length(*pair, left + 1) - 1
                if left >= 0:
                    self.least[key] = bound, True
                    return bound
        self.least[key] = most + 1, False
        return most + 1

    def proof(self, goal, most):
        key = self.key(goal)
        length = self.length(key, goal, most)
        if length > most:
            raise TooLong
        for tactic, goals in self.moves(key, goal):
            if 1 + sum(self.length(*pair, length) for pair in goals) == length:
                return [tactic, *(step for _, g in goals for step in self.proof(g, length))]
        raise AssertionError("no proof of the length found")


# ---- Theorems ------------------------------------------------------------------------------------
def random_formula(rng, atoms, size):
    if size == 0:
        return rng.choice(atoms)
    connective = rng.choices("→∧∨¬↔", (9, 5, 6, 4, 1))[0]
    if connective == "¬":
        return ("¬", random_formula(rng, atoms, size - 1), "False")
    left = rng.randint(0, size - 1)
    return (
        connective,
        random_formula(rng, atoms, left),
        random_formula(rng, atoms, size - 1 - left),
    )


def random_sequent(rng, length=6):
    """For a proof of about this length."""
    atoms = "ABCD"[: rng.choice((3, 4))]
    hypotheses = [
        random_formula(rng, atoms, rng.choice((0, 1, 1, 2)))
        for _ in range(rng.choice((0, 1, 2, 2, 3)))
    ]
    return atoms, hypotheses, random_formula(rng, atoms, rng.randint(length // 3, length // 2 + 1))


def canonical(hypotheses, goal):
    """The sequent with its atoms renamed in the order of their appearance."""
    text, order = "; ".join(map(show, [*hypotheses, goal])), {}
    return re.sub(r"\b[A-F]\b", lambda atom: order.setdefault(atom[0], "ABCDEF"[len(order)]), text)


def theorems(split, lengths, seed, taken):
    """Yield a theorem for each length wanted, in random order. taken grows."""
    rng = random.Random(f"{seed} {split}")
    wanted, number = [length for length, count in lengths.items() for _ in range(count)], 0
    rng.shuffle(wanted)
    waiting = {length: [] for length in wanted}  # found before they were wanted
    for number, length in enumerate(wanted):
        while not waiting[length]:
            atoms, hypotheses, target = random_sequent(rng, length)
            holds = (1 << 64) - 1
            for formula in hypotheses:
                holds &= truth_table(formula)
            if holds & ~truth_table(target) or (form := canonical(hypotheses, target)) in taken:
                continue
            if not provable(frozenset(map(plain, hypotheses)), plain(target)):
                continue
            named = {f"h{i}": formula for i, formula in enumerate(hypotheses, start=1)}
            goal = Goal("", {**dict.fromkeys(atoms, "Prop"), **named}, target)
            try:
                proof = Prover(rng).proof(goal, max(waiting))
            except TooLong:
                continue
            if (
                len(proof) in waiting
                and len(waiting[len(proof)]) < 20
                and f"h{NAMES + 1}" not in " ".join(proof)
            ):
                taken.add(form)
                waiting[len(proof)].append((goal, proof))
        goal, proof = waiting[length].pop(0)
        atoms = " ".join(name for name, formula in goal.hypotheses.items() if formula == "Prop")
        binders = "".join(
            f" ({name} : {show(f)})" for name, f in goal.hypotheses.items() if f != "Prop"
        )
        name = f"{split}_{number:04}"
        statement = f"theorem {name} ({atoms} : Prop){binders} : {show(goal.target)}"
        yield name, statement, goal, proof


def trace(goal, proof):
    goals, steps = [goal], []
    for tactic in proof:
        before, goals = goals, goals[0].apply(tactic) + goals[1:]
        states = ["\n\n".join(map(str, state)) or "no goals" for state in (before, goals)]
        steps.append(
            {
                "tactic": tactic,
                "annotated_tactic": [tactic, []],
                "state_before": states[0],
                "state_after": states[1],
            }
        )
    return steps


def shares(weights, total):
    """{length: how many}, in proportion to the weights, `total` in all."""
    whole, counts, before = sum(weights.values()), {}, 0
    for length, weight in weights.items():
        before += weight
        counts[length] = round(total * before / whole) - sum(counts.values())
    return counts


SPLITS = {
    "test": (LONG, TEST),
    "val": (LONG, VAL),
    "train": (SHORT, TRACED),
    "untraced": (LONG, UNTRACED),
}


def rows_of(split, seed, taken):
    weights, count = SPLITS[split]
    for number, (name, statement, goal, proof) in enumerate(
        theorems(split, shares(weights, count), seed, taken)
    ):
        line = 20 * (number + 2000 * list(SPLITS).index(split)) + 1
        yield {
            "url": "examples/propositional",
            "commit": "0" * 40,
            "file_path": "Propositional.lean",
            "full_name": name,
            "start": [line, 1],
            "end": [line + len(proof), len(proof[-1]) + 3],
            "statement": statement,
            "traced_tactics": [] if split == "untraced" else trace(goal, proof),
        }


def generate(seed):
    taken = set()
    files = {split: list(rows_of(split, seed, taken)) for split in SPLITS}
    files["train"] += files.pop("untraced")
    return files


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in generate(args.seed).items():
        text = json.dumps(rows, ensure_ascii=False, indent=0)
        (args.out / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
