"""Intuitionistic propositional logic in Lean 4's clothes: a proof environment that needs no Lean.

`Dojo` and its results have the names and the behaviour of LeanDojo's, so that a proof search runs on either:

    with Dojo(theorem) as (dojo, state):        # theorem: a row of train.json; state.pp is what the model sees
        result = dojo.run_tac(state, "intro h1")

Tactics, one a request, on the first goal (h, a, b: new names; t: a hypothesis or an application `h1 h2`):
    intro h …      exact t         apply t          constructor     left     right     exfalso     assumption
    have h := t    cases t (a proof of False)       obtain ⟨a, b⟩ := t       obtain a | b := t
They do what Lean's do. Whatever else Lean takes is refused, even `constructor` for ∨, names in use and names unlike h1.

A formula is an atom's name, "False", or (connective, left, right); ¬A is ("¬", A, "False"), the same to Lean as
A → False. An atom is a hypothesis of type Prop. What makes no sense is a ValueError, until `Dojo` catches it.
"""

import re
from collections import namedtuple
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby

TOKEN = re.compile(r"[A-Za-z][A-Za-z0-9_']*|:=|\S")
NAME = re.compile(r"[A-Za-z][0-9]*")
PRECEDENCE = {"↔": 20, "→": 25, "∨": 30, "∧": 35}

LeanError = namedtuple("LeanError", "error")
ProofFinished = namedtuple("ProofFinished", "tactic_state_id message", defaults=[None])
ProofGivenUp = namedtuple("ProofGivenUp", "")  # what `sorry` gives
DojoInitError = type("DojoInitError", (Exception,), {})  # the theorem makes no sense
DojoCrashError = type("DojoCrashError", (Exception,), {})  # the state does not exist
DojoTacticTimeoutError = type("DojoTacticTimeoutError", (Exception,), {})  # for the interface: nothing takes long here


@dataclass(frozen=True)
class TacticState:
    pp: str
    id: int = field(compare=False)
    message: str | None = field(default=None, compare=False)


@cache
def show(formula, at_least=0):
    """As Lean prints it where a precedence of `at_least` is needed to do without parentheses."""
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
    """¬A becomes A → False: two propositions are the same to Lean if these are equal."""
    if isinstance(formula, str):
        return "→" if formula == "¬" else formula
    return tuple(map(unfold, formula))


def sides(formula, connectives):
    """The two sides of a formula with one of the connectives; A ↔ B is the ∧ of its directions."""
    if formula[0] not in connectives:
        raise ValueError(f"{' or '.join(connectives)} expected, not {show(formula)}")
    connective, left, right = formula
    return [("→", left, right), ("→", right, left)] if connective == "↔" else [left, right]


def nested(tokens, end=None):
    """Parentheses become lists: exact h1 (h2 h3) -> ["exact", "h1", ["h2", "h3"]]. tokens: an iterator."""
    items = []
    while (token := next(tokens, None)) != end:
        if token in (None, ")"):
            raise ValueError(f"unexpected {token or 'end of input'}")
        items.append(nested(tokens, ")") if token == "(" else token)
    return items


class Goal(namedtuple("Goal", "case hypotheses target")):
    """case: Lean's name, "inl.left" for instance, or ""; hypotheses: {name: formula}, never changed in place."""

    def __str__(self):  # as Lean prints it: neighbours of one type share a line
        lines = [f"case {self.case}"] if self.case else []
        lines += [f"{' '.join(names)} : {show(its)}" for its, names in groupby(self.hypotheses, self.hypotheses.get)]
        return "\n".join([*lines, f"⊢ {show(self.target)}"])

    def read(self, items):  # nested tokens -> the formula
        for connective in PRECEDENCE:  # the weakest is the outermost, its leftmost first: A → B → C is A → (B → C)
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
        """What the term, its first item applied to the others, proves; that has to be `of`, if it is given."""
        head, *arguments = term or [""]
        found = self.proof(head) if isinstance(head, list) else self.hypotheses.get(head)
        if not found:
            raise ValueError(f"unknown identifier '{head}'")
        for argument in arguments:
            premise, found = sides(found, "→¬")
            self.proof([argument], of=premise)
        if of and unfold(found) != unfold(of):
            raise ValueError(f"type mismatch: {show(of)} expected, not {show(found)}")
        return found

    def add(self, name, formula, without=None):
        """The goal with a new hypothesis, and without the term that is taken apart for it, if that is a hypothesis."""
        rest = {old: its for old, its in self.hypotheses.items() if [old] != without}
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in rest:
            raise ValueError(f"'{name}' is not a name as h1, or is in use")
        return self._replace(hypotheses={**rest, name: formula})

    def apply(self, tactic):
        """-> the goals that take this goal's place, or ValueError."""
        goal, target, new, tags = self, self.target, [], []  # tags: what Lean calls the new goals if they are several
        match nested(iter(TOKEN.findall(tactic))):
            case ["intro", *names] if names:
                for name in names:
                    premise, target = sides(target, "→¬")
                    goal = goal.add(name, premise)
                new = [goal._replace(target=target)]
            case ["exact" | "cases" as word, *term]:
                self.proof(term, of=target if word == "exact" else "False")
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
            case ["constructor"]:
                new = [self._replace(target=side) for side in sides(target, "∧↔")]
                tags = ["mp", "mpr"] if target[0] == "↔" else ["left", "right"]
            case ["left" | "right" as side]:
                new = [self._replace(target=sides(target, "∨")[side == "right"])]
            case ["obtain", "⟨", a, ",", b, "⟩", ":=", *term]:
                left, right = sides(self.proof(term), "∧↔")
                new = [self.add(a, left, without=term).add(b, right)]
            case ["obtain", a, "|", b, ":=", *term]:
                left, right = sides(self.proof(term), "∨")
                new, tags = [self.add(a, left, without=term), self.add(b, right, without=term)], ["inl", "inr"]
            case _:
                raise ValueError(f"not a tactic that can be used here: {tactic}")
        cases = [f"{self.case}.{tag}".strip(".") for tag in tags] if len(new) > 1 else [self.case] * len(new)
        return [goal._replace(case=case) for goal, case in zip(new, cases, strict=True)]


class Dojo:
    """theorem: {"statement": "theorem name (A B : Prop) (h1 : A → B) … : goal", …}"""

    def __init__(self, theorem, timeout=30):
        self.theorem, self.goals = theorem, []  # of each state, by its id

    def __enter__(self):
        goal = Goal("", {}, None)
        try:
            _, _, *binders = nested(iter(TOKEN.findall(self.theorem["statement"])))
            while (binder := binders.pop(0)) != ":":
                at = binder.index(":")
                formula = "Prop" if binder[at + 1 :] == ["Prop"] else goal.read(binder[at + 1 :])
                for name in binder[:at]:
                    goal = goal.add(name, formula)
            return self, self.keep([goal._replace(target=goal.read(binders))])
        except (LookupError, TypeError, ValueError, RecursionError) as error:
            raise DojoInitError(f"{self.theorem.get('full_name')}: {error!r}") from error

    def __exit__(self, *_):
        self.goals.clear()

    def keep(self, goals):
        self.goals.append(goals)
        number = len(self.goals) - 1
        return TacticState("\n\n".join(map(str, goals)), number) if goals else ProofFinished(number)

    def run_tac(self, state, tactic):
        if not isinstance(state, TacticState) or not 0 <= state.id < len(self.goals):
            raise DojoCrashError(f"there is no such state to go on from: {state}")
        if re.search(r"\bsorry\b", tactic):
            return ProofGivenUp()
        first, *others = self.goals[state.id]
        try:
            return self.keep(first.apply(tactic) + others)
        except (ValueError, RecursionError) as error:
            return LeanError(str(error))
