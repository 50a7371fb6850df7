"""Intuitionistic propositional logic in Lean 4's clothes: a proof environment that needs no Lean.

`Dojo` and its results have the names and the behaviour of LeanDojo's, so that a proof search runs on either:

    with Dojo(theorem) as (dojo, state):        # theorem: a row of train.json; state.pp is what the model sees
        result = dojo.run_tac(state, "intro h1")

Tactics, one a request, on the first goal (h, a, b: new names; t: a hypothesis or an application `h1 h2`):
    intro h …      exact t         apply t          constructor     left     right     exfalso     assumption
    have h := t    cases t (a proof of False)       obtain ⟨a, b⟩ := t       obtain a | b := t
They do what Lean's do, or refuse: anything else that Lean would take is an error here, among it a new name that is in
use already (Lean would shadow it and print h✝) and `constructor` for ∨.

A formula is an atom's name, "False", or (connective, left, right); ¬A is ("¬", A, "False"), the same to Lean as
A → False. An atom is a hypothesis of type Prop.
"""

import re
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple


class DojoInitError(Exception):
    """The theorem has no statement, or one that makes no sense."""


class DojoCrashError(Exception):
    """The environment cannot go on."""


class DojoTacticTimeoutError(Exception):
    """There for the interface: no tactic takes long here."""


@dataclass(frozen=True)
class TacticState:
    pp: str
    id: int = field(compare=False)
    message: str | None = field(default=None, compare=False)


@dataclass(frozen=True)
class ProofFinished:
    tactic_state_id: int
    message: str | None = None


@dataclass(frozen=True)
class LeanError:
    error: str


@dataclass(frozen=True)
class ProofGivenUp:
    pass


class Refused(Exception):
    """What makes no sense; becomes a LeanError or a DojoInitError."""


class Goal(NamedTuple):
    case: str  # Lean's tag, as in `case inl.left`; "" where there is none
    hypotheses: dict  # {name: formula}, never changed in place
    target: object  # a formula


PRECEDENCE = {"↔": 20, "→": 25, "∨": 30, "∧": 35, "¬": 1024}
TACTICS = (
    "intro",
    "exact",
    "apply",
    "constructor",
    "left",
    "right",
    "exfalso",
    "assumption",
    "have",
    "cases",
    "obtain",
)
TOKEN = re.compile(r"[A-Za-z][A-Za-z0-9_']*|:=|\S")


@cache
def show(formula, at_least=0):
    if isinstance(formula, str):
        return formula
    connective, left, right = formula
    strength = PRECEDENCE[connective]
    text = f"{show(left, strength + 1)} {connective} {show(right, strength + (connective == '↔'))}"
    text = f"¬{show(left, 40)}" if connective == "¬" else text
    return f"({text})" if strength < at_least else text


def show_goal(goal):
    lines = []
    for name, formula in goal.hypotheses.items():  # those of one type that follow each other share a line
        if lines and lines[-1][1] == formula:
            lines[-1][0].append(name)
        else:
            lines.append(([name], formula))
    text = "".join(f"{' '.join(names)} : {show(formula)}\n" for names, formula in lines)
    return (f"case {goal.case}\n" if goal.case else "") + f"{text}⊢ {show(goal.target)}"


@cache
def unfold(formula):
    """¬A becomes A → False: two propositions are the same to Lean if these are equal."""
    if isinstance(formula, str):
        return formula
    return ("→" if formula[0] == "¬" else formula[0], unfold(formula[1]), unfold(formula[2]))


def premises(formula):
    """A → B → C -> [A, B]"""
    return [formula[1], *premises(formula[2])] if formula[0] in ("→", "¬") else []


def parts(formula):
    """-> (connective, left, right), ↔ as the ∧ of its directions; an atom has no parts."""
    connective, left, right = formula if isinstance(formula, tuple) else (formula, None, None)
    return ("∧", ("→", left, right), ("→", right, left)) if connective == "↔" else (connective, left, right)


def add(hypotheses, *new):
    for name, formula in new:
        if name in hypotheses:
            raise Refused(f"the name '{name}' is in use")
        hypotheses = hypotheses | {name: formula}
    return hypotheses


class Reader:
    """A text's tokens, read from left to right, and the names that it may use."""

    def __init__(self, text, hypotheses):
        self.tokens, self.hypotheses = [*TOKEN.findall(text), ""], hypotheses

    def is_name(self):
        return self.tokens[0][:1].isalpha() and self.tokens[0] not in {*TACTICS, "theorem", "False", "Prop"}

    def take(self, *expected):
        """The next token, which is one of `expected`, or a name if nothing is."""
        if self.tokens[0] not in expected if expected else not self.is_name():
            found, wanted = self.tokens[0] or "end of input", " or ".join(expected) if expected else "identifier"
            raise Refused(f"unexpected {found}; expected {wanted or 'end of input'}")
        return self.tokens.pop(0)

    def known(self):
        if (name := self.take()) not in self.hypotheses:
            raise Refused(f"unknown identifier '{name}'")
        return self.hypotheses[name]

    def formula(self, at_least=0):
        token = self.tokens[0]
        if token in ("(", "¬", "False"):
            self.take(token)
            left = token if token == "False" else self.formula(40 if token == "¬" else 0)
            left = ("¬", left, "False") if token == "¬" else left
            token == "(" and self.take(")")
        elif self.known() == "Prop":
            left = token
        else:
            raise Refused(f"type expected, got '{token}'")
        while PRECEDENCE.get(self.tokens[0], -1) >= at_least and self.tokens[0] != "¬":
            connective = self.tokens.pop(0)
            strength = PRECEDENCE[connective] + (connective == "↔")  # ↔ does not associate, the others to the right
            left = (connective, left, self.formula(strength))
            at_least = strength if connective == "↔" else at_least
        return left

    def proof(self, of=None, one=False):
        """A term (one: no application without parentheses) -> what it proves, which is `of` where that is given."""
        if self.tokens[0] == "(":
            self.take("(")
            found = self.proof()
            self.take(")")
        else:
            found = self.known()
        while not one and (self.tokens[0] == "(" or self.is_name()):
            if found[0] not in ("→", "¬"):
                raise Refused(f"function expected, the term has type\n  {show(found)}")
            self.proof(found[1], one=True)
            found = found[2]
        if of is not None and unfold(found) != unfold(of):
            raise Refused(f"type mismatch, the term has type\n  {show(found)}\nbut is expected to have\n  {show(of)}")
        return found


def apply_tactic(goal, tactic):
    """-> the goals that take this goal's place, or Refused."""
    case, hypotheses, target = goal
    read = Reader(tactic, hypotheses)
    word = read.take(*TACTICS)
    connective, left, right = parts(target)
    new, tags = [], []  # the new goals' (hypotheses, target); Lean's names for them

    def wants(condition, otherwise):
        if not condition:
            raise Refused(f"tactic '{word}' failed, {otherwise}\n{show_goal(goal)}")

    if word == "intro":
        while read.tokens[0] or not new:
            wants(target[0] in ("→", "¬"), "there are no additional binders to introduce")
            hypotheses, target = add(hypotheses, (read.take(), target[1])), target[2]
            new = [(hypotheses, target)]
    elif word == "exact":
        read.proof(of=target)
    elif word == "assumption":
        wants(unfold(target) in map(unfold, hypotheses.values()), "no hypothesis is the goal")
    elif word == "cases":
        read.proof(of="False")
    elif word == "exfalso":
        new = [(hypotheses, "False")]
    elif word == "have":
        name, _ = read.take(), read.take(":=")
        new = [(add(hypotheses, (name, read.proof())), target)]
    elif word == "apply":
        found = read.proof()
        wanted = premises(found)[: max(len(premises(found)) - len(premises(target)), 0)]
        for _ in wanted:
            found = found[2]
        wants(unfold(found) == unfold(target), f"could not unify the goal with the conclusion\n  {show(found)}")
        new, tags = [(hypotheses, premise) for premise in wanted], ["a"] * len(wanted)
    elif word == "constructor":
        wants(connective == "∧", "target is not ∧ or ↔")
        new, tags = [(hypotheses, left), (hypotheses, right)], ["mp", "mpr"] if target[0] == "↔" else ["left", "right"]
    elif word in ("left", "right"):
        wants(connective == "∨", "target is not ∨")
        new = [(hypotheses, left if word == "left" else right)]
    else:
        opening, between, closing = ("⟨", ",", "⟩") if read.tokens[0] == "⟨" else ("", "|", "")
        a, b = (opening and read.take(opening), read.take(), read.take(between), read.take())[1::2]
        closing and read.take(closing), read.take(":=")
        term = read.tokens[:]
        connective, left, right = parts(read.proof())
        wants(connective == ("∧" if closing else "∨"), "the term's type does not fit the pattern")
        if len(term) - len(read.tokens) == 1:  # a hypothesis that is taken apart goes
            hypotheses = {name: formula for name, formula in hypotheses.items() if name != term[0]}
        if closing:
            new = [(add(hypotheses, (a, left), (b, right)), target)]
        else:
            new, tags = [(add(hypotheses, side), target) for side in ((a, left), (b, right))], ["inl", "inr"]
    read.take("")
    cases = [f"{case}.{tag}".strip(".") for tag in tags] if len(new) > 1 else [case] * len(new)  # alone: the old tag
    return [Goal(case, *both) for case, both in zip(cases, new, strict=True)]


class Dojo:
    """theorem: {"statement": "theorem name (A B : Prop) (h1 : A → B) … : goal", …}"""

    def __init__(self, theorem: dict, timeout: float = 30):
        self.theorem, self.goals = theorem, []  # of each state, by its id

    def __enter__(self):
        try:
            read = Reader(self.theorem["statement"], {})
            read.take("theorem"), read.take()
            while read.take("(", ":") == "(":
                names = [read.take()]
                while read.tokens[0] != ":":
                    names.append(read.take())
                read.take(":")
                formula = read.take("Prop") if read.tokens[0] == "Prop" else read.formula()
                read.hypotheses = add(read.hypotheses, *((name, formula) for name in names))
                read.take(")")
            goal = Goal("", read.hypotheses, read.formula())
            read.take("")
        except (KeyError, TypeError, RecursionError, Refused) as error:
            raise DojoInitError(f"{self.theorem.get('full_name')}: {error!r}") from error
        return self, self.keep([goal])

    def __exit__(self, *_):
        self.goals.clear()

    def keep(self, goals):
        self.goals.append(goals)
        number = len(self.goals) - 1
        return TacticState("\n\n".join(map(show_goal, goals)), number) if goals else ProofFinished(number)

    def run_tac(self, state: TacticState, tactic: str):
        if not isinstance(state, TacticState) or not 0 <= state.id < len(self.goals):
            raise DojoCrashError(f"there is no such state to go on from: {state}")
        if re.search(r"\bsorry\b", tactic):
            return ProofGivenUp()
        first, *others = self.goals[state.id]
        try:
            return self.keep(apply_tactic(first, tactic) + others)
        except (Refused, RecursionError) as error:
            return LeanError(str(error))
