"""Intuitionistic propositional logic with Lean 4's syntax: a proof environment without Lean.

`Dojo` and its results have LeanDojo's names and behaviour, so a proof search runs on either:

    with Dojo(theorem) as (dojo, state):  # a row of train.json; state.pp is the model's input
        result = dojo.run_tac(state, "intro h1")

Tactics, one per request, on the first goal (h, a, b: new names; t: a hypothesis, an application
`h1 h2`, or sorry):
    intro h …     exact t     apply t     have h := t     cases t (of type False)     assumption
    constructor   left   right   exfalso  sorry   obtain ⟨a, b⟩ := t   obtain a | b := t
They do what Lean's do. What else Lean accepts is an error here: other tactics, names in use, and
names unlike h1.

A formula is an atom's name, "False", or (connective, left, right); ¬A is ("¬", A, "False"), which
equals A → False in Lean. An atom is a hypothesis of type Prop. Errors are ValueErrors until `Dojo`
returns them as LeanError.
"""

import re
from collections import namedtuple
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby

TOKEN = re.compile(r"[A-Za-z][A-Za-z0-9_']*|:=|\S")
NAME = re.compile(r"[A-Za-z][0-9]*")
# An application needs a space: `exact h1(h2)` is an error, though `exact(h1)` is not.
NO_SPACE = re.compile(r"(\)|\b[A-Za-z][0-9]*)\(|\)[A-Za-z]")
PRECEDENCE = {"↔": 20, "→": 25, "∨": 30, "∧": 35}

LeanError = namedtuple("LeanError", "error")
ProofFinished = namedtuple("ProofFinished", "tactic_state_id message", defaults=[None])
ProofGivenUp = namedtuple("ProofGivenUp", "")  # no goal is left, but a `sorry` was used
DojoInitError = type("DojoInitError", (Exception,), {})  # the theorem makes no sense
DojoCrashError = type("DojoCrashError", (Exception,), {})  # the state does not exist


@dataclass(frozen=True)
class TacticState:
    pp: str
    id: int = field(compare=False)


@cache
def show(formula, at_least=0):
    """Print as Lean does, in parentheses where the precedence is below `at_least`."""
    if isinstance(formula, str):
        return formula
    connective, left, right = formula
    if connective == "¬":
        return f"¬{show(left, 40)}"
    own = PRECEDENCE[connective]  # ↔ does not associate, the others do to the right
    text = f"{show(left, own + 1)} {connective} {show(right, own + (connective == '↔'))}"
    return f"({text})" if own < at_least else text


@cache
def unfold(formula):
    """Replace ¬A by A → False. If the results are equal, two propositions are the same to Lean."""
    if isinstance(formula, str):
        return "→" if formula == "¬" else formula
    return tuple(map(unfold, formula))


def sides(formula, connectives):
    """Return both sides of a formula with one of the connectives; A ↔ B is A → B and B → A."""
    if formula[0] not in connectives:
        raise ValueError(f"{' or '.join(connectives)} expected, not {show(formula)}")
    connective, left, right = formula
    return [("→", left, right), ("→", right, left)] if connective == "↔" else [left, right]


def nested(tokens, end=None):  # tokens: an iterator
    """Parentheses become lists: exact h1 (h2 h3) -> ["exact", "h1", ["h2", "h3"]]."""
    items = []
    while (token := next(tokens, None)) != end:
        if token in (None, ")"):
            raise ValueError(f"unexpected {token or 'end of input'}")
        items.append(nested(tokens, ")") if token == "(" else token)
    return items


def unwrap(term):  # ((h1)) is h1
    while len(term) == 1 and isinstance(term[0], list):
        term = term[0]
    return term


class Goal(namedtuple("Goal", "case hypotheses target")):
    """case: Lean's name, such as "inl.left", or "". hypotheses: {name: formula}, not mutated."""

    def __str__(self):  # as Lean prints it: neighbours of one type share a line
        lines = [f"case {self.case}"] if self.case else []
        for formula, names in groupby(self.hypotheses, self.hypotheses.get):
            lines.append(f"{' '.join(names)} : {show(formula)}")
        return "\n".join([*lines, f"⊢ {show(self.target)}"])

    def read(self, items):  # nested tokens -> the formula
        for connective in PRECEDENCE:  # the weakest is the outermost; A → B → C is A → (B → C)
            if connective in items:
                at = items.index(connective)
                return connective, self.read(items[:at]), self.read(items[at + 1 :])
        match items:
            case ["¬", *negated]:
                return "¬", self.read(negated), "False"
            case [list(inside)]:
                return self.read(inside)
            case [atom] if atom == "False" or self.hypotheses.get(atom) == "Prop":
                return atom
        raise ValueError(f"not a formula: {items}")

    def proof(self, term, of=None):
        """Return what the term, its first item applied to the others, proves. of: what it must."""
        head, *arguments = unwrap(term) or [""]
        if head == "sorry" and not arguments and of:
            return of
        found = self.proof(head) if isinstance(head, list) else self.hypotheses.get(head)
        if not found:
            raise ValueError(f"unknown identifier '{head}'")
        for argument in arguments:
            premise, found = sides(found, "→¬")
            self.proof([argument], of=premise)
        if of and unfold(found) != unfold(of):
            raise ValueError(f"type mismatch: {show(of)} expected, not {show(found)}")
        return found

    def add(self, name, formula, without=()):
        """Return the goal with a new hypothesis, and without the one that the term `without` is."""
        rest = {old: its for old, its in self.hypotheses.items() if [old] != unwrap(without)}
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in rest:
            raise ValueError(f"'{name}' is not a name as h1, or is in use")
        return self._replace(hypotheses={**rest, name: formula})

    def apply(self, tactic):
        """Return the goals that replace this one; ValueError if the tactic fails."""
        if NO_SPACE.search(tactic) or not set(re.findall(r"\s", tactic)) <= {" ", "\n"}:
            raise ValueError("expected a space")  # Lean takes no tab
        goal, target, new, tags = self, self.target, [], []  # tags: names of several new goals
        match nested(iter(TOKEN.findall(tactic))):
            case ["intro", *names] if names:
                for name in names:
                    premise, target = sides(target, "→¬")
                    goal = goal.add(name, premise)
                new = [goal._replace(target=target)]
            case ["exact" | "cases" as word, *term]:
                self.proof(term, of=target if word == "exact" else "False")
            case ["sorry"]:
                pass
            case ["assumption"] if unfold(target) in map(unfold, self.hypotheses.values()):
                pass
            case ["exfalso"]:
                new = [self._replace(target="False")]
            case ["have", name, ":=", *term]:
                new = [self.add(name, self.proof(term))]
            case ["apply", *term]:
                found = self.proof(term)
                while unfold(found) != unfold(target):
                    premise, found = sides(found, "→¬")
                    new.append(self._replace(target=premise))
                tags = "a" * len(new)
            case ["constructor"] if target[0] != "∨":
                new = [self._replace(target=side) for side in sides(target, "∧↔")]
                tags = ["mp", "mpr"] if target[0] == "↔" else ["left", "right"]
            case ["left" | "right" | "constructor" as side]:  # `constructor` tries the first one
                new = [self._replace(target=sides(target, "∨")[side == "right"])]
            case ["obtain", "⟨", a, ",", b, "⟩", ":=", *term]:
                left, right = sides(self.proof(term), "∧↔")
                new = [self.add(a, left, term).add(b, right)]
            case ["obtain", a, "|", b, ":=", *term]:
                left, right = sides(self.proof(term), "∨")
                new, tags = [self.add(a, left, term), self.add(b, right, term)], ["inl", "inr"]
            case _:
                raise ValueError(f"not a tactic that can be used here: {tactic}")
        tags = tags if len(new) > 1 else [""] * len(new)
        cases = [f"{self.case}.{tag}".strip(".") for tag in tags]
        return [goal._replace(case=case) for goal, case in zip(new, cases, strict=True)]


class Dojo:
    """theorem: {"statement": "theorem name (A B : Prop) (h1 : A → B) … : goal", …}"""

    def __init__(self, theorem, timeout=30):
        self.theorem = theorem
        self.goals, self.given_up = [], []  # of each state, by its id; given_up: `sorry` was used

    def __enter__(self):
        goal = Goal("", {}, None)
        try:
            _, _, *binders = nested(iter(TOKEN.findall(self.theorem["statement"])))
            while (binder := binders.pop(0)) != ":":
                at = binder.index(":")
                formula = "Prop" if binder[at + 1 :] == ["Prop"] else goal.read(binder[at + 1 :])
                for name in binder[:at]:
                    goal = goal.add(name, formula)
            return self, self.keep([goal._replace(target=goal.read(binders))], given_up=False)
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise DojoInitError(f"{self.theorem.get('full_name')}: {error!r}") from error

    def __exit__(self, *_):
        self.goals.clear()

    def keep(self, goals, given_up):
        self.goals.append(goals)
        self.given_up.append(given_up)
        number = len(self.goals) - 1
        if goals:
            return TacticState("\n\n".join(map(str, goals)), number)
        return ProofGivenUp() if given_up else ProofFinished(number)

    def run_tac(self, state, tactic):
        if not isinstance(state, TacticState) or not 0 <= state.id < len(self.goals):
            raise DojoCrashError(f"there is no such state to go on from: {state}")
        given_up = self.given_up[state.id] or "sorry" in TOKEN.findall(tactic)
        first, *others = self.goals[state.id]
        try:
            return self.keep(first.apply(tactic) + others, given_up)
        except (ValueError, RecursionError) as error:
            return LeanError(str(error))
