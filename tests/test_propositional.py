"""The embedded theorem proving: the environment, its theorems, the tiny prover's tokens."""

import json
import random
import re
import statistics

import pytest
from conftest import run_script
from transformers import AutoTokenizer

import common
from examples.propositional import generate
from examples.propositional.environment import (
    Dojo,
    DojoCrashError,
    DojoInitError,
    LeanError,
    ProofFinished,
    ProofGivenUp,
    TacticState,
)

FOLDER = common.EXAMPLES / "propositional"
ROWS = {split: json.loads((FOLDER / f"{split}.json").read_text()) for split in ("train", "val", "test")}
EVERY = [row for rows in ROWS.values() for row in rows]


def start(statement):
    return Dojo({"full_name": "t", "statement": f"theorem t {statement}"}).__enter__()


def walk(statement, *tactics):
    """The printed state after each tactic, or the result if it is no state."""
    dojo, state = start(statement)
    shown = [state.pp]
    for tactic in tactics:
        state = dojo.run_tac(state, tactic)
        shown.append(state.pp if isinstance(state, TacticState) else state)
    return shown


# ---- The environment -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "formula",
    [
        "A → B → C",
        "(A → B) → C",
        "A ∧ B ∧ C",
        "(A ∧ B) ∧ C",
        "A ∧ B ∨ C",
        "A ∧ (B ∨ C)",
        "A ∨ B → C",
        "A ∨ (B → C)",
        "¬A ∧ B",
        "¬(A ∧ B)",
        "¬¬A",
        "A ↔ B → C",
        "(A ↔ B) → C",
        "(A ↔ B) ↔ C",
        "A ↔ (B ↔ C)",
        "¬(A → False)",
    ],
)
def test_prints_with_leans_parentheses(formula):
    assert start(f"(A B C : Prop) : {formula}")[1].pp == f"A B C : Prop\n⊢ {formula}"
    assert start(f"(A B C : Prop) : (({formula}))")[1].pp == f"A B C : Prop\n⊢ {formula}"


def test_states_look_like_leans():
    shown = walk(
        "(A B C : Prop) (h1 : A ∨ B → C) (h2 h3 : ¬(A ∧ ¬B)) : (A ↔ C) ∧ ¬¬B → C",
        "intro h4",
        "obtain ⟨h5, h6⟩ := h4",
        "apply h1",
        "right",
        "exfalso",
        "apply h6",
        "intro h7",
        "apply h2",
        "constructor",
    )
    assert shown[0] == "A B C : Prop\nh1 : A ∨ B → C\nh2 h3 : ¬(A ∧ ¬B)\n⊢ (A ↔ C) ∧ ¬¬B → C"
    assert shown[2] == "A B C : Prop\nh1 : A ∨ B → C\nh2 h3 : ¬(A ∧ ¬B)\nh5 : A ↔ C\nh6 : ¬¬B\n⊢ C"
    hypotheses = "A B C : Prop\nh1 : A ∨ B → C\nh2 h3 : ¬(A ∧ ¬B)\nh5 : A ↔ C\nh6 : ¬¬B\nh7 : B\n"
    assert shown[8] == f"{hypotheses}⊢ A ∧ ¬B"
    assert shown[9] == f"case left\n{hypotheses}⊢ A\n\ncase right\n{hypotheses}⊢ ¬B"


def test_cases_are_named_like_leans():
    shown = walk("(A B : Prop) (h1 : A ∨ B) : A ↔ B ∨ A", "obtain h2 | h3 := h1", "constructor", "intro h4", "right")
    assert re.findall("case (.*)", shown[1]) == ["inl", "inr"]
    assert re.findall("case (.*)", shown[2]) == ["inl.mp", "inl.mpr", "inr"]
    assert re.findall("case (.*)", shown[4]) == ["inl.mp", "inl.mpr", "inr"]
    shown = walk("(A B C : Prop) (h1 : A → B → C) : A → C", "intro h2", "apply h1", "exact h2")
    assert re.findall("case (.*)", shown[2]) == ["a", "a"]
    assert walk("(A B C : Prop) (h1 : A → B → C) : B → C", "apply h1")[1].endswith("\n⊢ A")


@pytest.mark.parametrize(
    "statement, tactics",
    [
        ("(A B : Prop) (h1 : A → B) (h2 : A) : B", ["exact h1 h2"]),
        ("(A B : Prop) (h1 : A → ¬B) (h2 : A) : B → False", ["exact (h1 (h2))"]),
        ("(A B : Prop) (h1 : A) (h2 : ¬A) : B", ["cases h2 h1"]),
        ("(A B : Prop) (h1 : A ↔ B) (h2 : B) : A", ["obtain ⟨h3, h4⟩ := h1", "have h5 := h4 h2", "assumption"]),
        ("(A B : Prop) (h1 : A → B ∨ B) (h2 : A) : B", ["obtain h3 | h3 := h1 h2", "exact h3", "exact h3"]),
        ("(A B : Prop) (h1 : A ∧ B) : B", ["obtain ⟨h1, h2⟩ := h1", "exact h2"]),
        ("(A B : Prop) : ¬A → A → B", ["intro h1 h2", "exfalso", "apply h1", "exact h2"]),
    ],
)
def test_finishes(statement, tactics):
    assert isinstance(walk(statement, *tactics)[-1], ProofFinished)


@pytest.mark.parametrize(
    "tactic, message",
    [
        ("", "not a tactic"),
        ("simp", "not a tactic"),
        ("exact h9", "unknown identifier 'h9'"),
        ("exact h1", "type mismatch"),
        ("exact h2 h1", "→ or ¬ expected"),
        ("exact h1 h1", "type mismatch"),
        ("exact h1 h2 h2", "→ or ¬ expected"),
        ("exact h1 h2)", "unexpected )"),
        ("exact h1 h2\nexact h1 h2", "→ or ¬ expected"),
        ("exact", "unknown identifier"),
        ("exact A", "type mismatch"),
        ("intro h3", "→ or ¬ expected"),
        ("have h2 := h1", "in use"),
        ("have A := h1", "in use"),
        ("obtain ⟨h4, h4⟩ := h3", "in use"),
        ("obtain h4 | h5 := h3", "∨ expected"),
        ("obtain ⟨h4, h5⟩ := h2", "∧ or ↔ expected"),
        ("obtain ⟨h4, h5 := h3", "not a tactic"),
        ("constructor", "∧ or ↔ expected"),
        ("left", "∨ expected"),
        ("apply h3", "→ or ¬ expected"),
        ("cases h1", "type mismatch"),
        ("assumption", "not a tactic that can be used"),
        ("exact " + "(" * 100_000 + "h1", "recursion"),
    ],
)
def test_errors(tactic, message):
    dojo, state = start("(A B : Prop) (h1 : A → B) (h2 : A) (h3 : A ∧ A) : B")
    result = dojo.run_tac(state, tactic)
    assert isinstance(result, LeanError) and message in result.error
    assert isinstance(dojo.run_tac(state, "exact h1 h2"), ProofFinished)  # the state is as it was


def test_any_earlier_state_can_be_continued_from():
    dojo, state = start("(A B : Prop) (h1 : A) : B ∨ A")
    wrong, right = dojo.run_tac(state, "left"), dojo.run_tac(state, "right")
    assert isinstance(dojo.run_tac(wrong, "exact h1"), LeanError)
    assert isinstance(dojo.run_tac(right, "exact h1"), ProofFinished)
    assert dojo.run_tac(right, "sorry") == dojo.run_tac(state, "exact sorry") == ProofGivenUp()
    assert right == TacticState(right.pp, id=99)  # ids do not count
    with pytest.raises(DojoCrashError):
        dojo.run_tac(TacticState(right.pp, id=99), "exact h1")
    with pytest.raises(DojoCrashError):
        dojo.run_tac(dojo.run_tac(right, "exact h1"), "exact h1")


@pytest.mark.parametrize("statement", ["(A : Prop) : A ∧", "(A : Prop) : B", "(A A : Prop) : A", ": A", None])
def test_no_such_theorem(statement):
    with pytest.raises(DojoInitError):
        Dojo({"full_name": "t", "statement": statement and f"theorem t {statement}"}).__enter__()
    with pytest.raises(DojoInitError):
        Dojo({"full_name": "t"}).__enter__()


# ---- It proves nothing that does not hold ----------------------------------------------------------------------------
UNPROVABLE = ["A ∨ ¬A", "¬¬A → A", "((A → B) → A) → A", "(A → B) ∨ (B → A)", "¬(A ∧ B) → ¬A ∨ ¬B", "¬A ∨ ¬¬A", "A → B"]
PROVABLE = ["¬¬(A ∨ ¬A)", "¬¬¬A → ¬A", "¬¬(((A → B) → A) → A)", "(¬A ∨ B) → A → B", "¬(A ↔ ¬A)", "(A → B) → ¬B → ¬A"]


def is_provable(goal):
    return generate.provable(frozenset(map(generate.plain, goal.hypotheses.values())), generate.plain(goal.target))


def goal_of(statement):
    dojo, state = start(statement)
    return dojo.goals[state.id][0]


def test_the_decision_procedure():
    assert [is_provable(goal_of(f"(A B : Prop) : {formula}")) for formula in UNPROVABLE] == [False] * len(UNPROVABLE)
    assert [is_provable(goal_of(f"(A B : Prop) : {formula}")) for formula in PROVABLE] == [True] * len(PROVABLE)
    rng, decided = random.Random(0), []
    for _ in range(
        2000
    ):  # what intuitionistic logic proves holds classically, and ¬¬ of what holds classically (Glivenko)
        _, hypotheses, target = generate.random_sequent(rng)
        holds = (1 << 64) - 1
        for formula in hypotheses:
            holds &= generate.truth_table(formula)
        classical = not holds & ~generate.truth_table(target)
        hypotheses = frozenset(map(generate.plain, hypotheses))
        decided.append((classical, generate.provable(hypotheses, generate.plain(target))))
        assert classical == generate.provable(hypotheses, generate.plain(("¬", ("¬", target, "False"), "False")))
    assert {*decided} == {(True, True), (True, False), (False, False)}


def random_tactic(rng, goal):
    """One that makes sense, or any that could be one."""
    if rng.random() < 0.3 and (sensible := generate.tactics(goal)):
        return rng.choice(sensible)
    names = [*goal.hypotheses]
    old, new = rng.choice(names), f"h{rng.randint(1, 12)}"
    term = rng.choice([old, old, f"{old} {rng.choice(names)}", f"{old} ({rng.choice(names)} {rng.choice(names)})"])
    forms = [f"exact {term}", f"apply {term}", f"have {new} := {term}", f"cases {term}", f"intro {new}", "constructor"]
    forms += [f"obtain ⟨{new}, {new}1⟩ := {term}", f"obtain {new} | {new} := {term}", "left", "right", "exfalso"]
    return rng.choice([*forms, "assumption", f"intro {new} {new}2"])


def test_soundness():
    rng, finished, unprovable, kept, lost = random.Random(0), 0, 0, 0, 0
    for _ in range(2000):
        atoms, hypotheses, target = generate.random_sequent(rng)
        named = "".join(f" (h{i} : {generate.show(f)})" for i, f in enumerate(hypotheses, start=1))
        dojo, state = start(f"({' '.join(atoms)} : Prop){named} : {generate.show(target)}")
        possible = is_provable(dojo.goals[0][0])
        unprovable += not possible
        for _ in range(40):
            goals = dojo.goals[state.id]
            result = dojo.run_tac(state, random_tactic(rng, goals[0]))
            if isinstance(result, ProofFinished):
                assert possible
                finished += 1
                break
            if isinstance(result, TacticState):  # step by step: no tactic makes a goal provable that was not
                after = dojo.goals[result.id]
                new = after[: len(after) - len(goals) + 1]
                assert after[len(new) :] == goals[1:]
                assert is_provable(goals[0]) or not all(map(is_provable, new))
                kept += 1
                lost += is_provable(goals[0]) and not all(map(is_provable, new))
                state = result
    assert finished > 300 and unprovable > 500 and kept > 5000 and lost > 200, (finished, unprovable, kept, lost)


# ---- The theorems ----------------------------------------------------------------------------------------------------
def test_traces_replay():
    for row in EVERY:
        assert is_provable(goal_of(row["statement"].split(" ", 2)[2]))
        with Dojo(row) as (dojo, state):
            for step in row["traced_tactics"]:
                assert state.pp == step["state_before"] and step["annotated_tactic"] == [step["tactic"], []]
                state = dojo.run_tac(state, step["tactic"])
                assert getattr(state, "pp", "no goals") == step["state_after"]
            assert isinstance(state, ProofFinished if row["traced_tactics"] else TacticState)


def test_no_theorem_is_there_twice():
    forms = []
    for row in EVERY:
        goal = goal_of(row["statement"].split(" ", 2)[2])
        hypotheses = [formula for formula in goal.hypotheses.values() if formula != "Prop"]
        forms.append(generate.canonical(hypotheses, goal.target))
    assert len({*forms}) == len(forms) == len(EVERY)
    assert len({row["full_name"] for row in EVERY}) == len({(*row["start"],) for row in EVERY}) == len(EVERY)
    swapped = [("→", "A", "C"), "C"], ("∧", "A", "B"), [("→", "B", "A"), "A"], ("∧", "B", "C")
    assert generate.canonical(*swapped[:2]) == generate.canonical(*swapped[2:])


def test_proofs_are_as_long_as_leandojos():
    lengths = [len(row["traced_tactics"]) for row in ROWS["train"] if row["traced_tactics"]]
    assert 3.5 < statistics.mean(lengths) < 4.5 and statistics.median(lengths) in (2, 3) and max(lengths) == 15
    assert len(ROWS["train"]) - len(lengths) == generate.UNTRACED and len(lengths) == generate.TRACED
    assert [len(ROWS["val"]), len(ROWS["test"])] == [generate.VAL, generate.TEST]


def test_the_files_are_what_the_generator_makes(tmp_path):
    run_script(FOLDER / "generate.py", "--out", tmp_path)
    for split in ROWS:
        assert (tmp_path / f"{split}.json").read_bytes() == (FOLDER / f"{split}.json").read_bytes()
    assert sum((FOLDER / f"{split}.json").stat().st_size for split in ROWS) < 4e6


# ---- The tokens of the tiny prover -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def words():
    return AutoTokenizer.from_pretrained(common.EXAMPLES / "tiny_prover")


def test_states_and_tactics_survive_the_tokenizer(words):
    longest = json.loads((common.EXAMPLES / "tiny_prover" / "config.json").read_text())["max_position_embeddings"]
    texts = {f"{step['state_before']}\n---\n" for row in EVERY for step in row["traced_tactics"]}
    texts |= {step["tactic"] for row in EVERY for step in row["traced_tactics"]}
    texts |= {start(row["statement"].split(" ", 2)[2])[1].pp for row in EVERY}
    for text, ids in zip(texts, words([*texts]).input_ids, strict=True):
        assert ids[0] == words.bos_token_id and words.unk_token_id not in ids and len(ids) < longest / 2
        assert words.decode(ids[1:]) == text


def test_every_token_that_can_be_sampled_is_text(words):
    special = {words.pad_token_id, words.bos_token_id, words.eos_token_id, words.unk_token_id}
    pieces = [words.decode([i]) for i in range(len(words)) if i not in special]
    assert all(pieces) and len({*pieces}) == len(pieces)
    config = json.loads((common.EXAMPLES / "tiny_prover" / "config.json").read_text())
    assert config["vocab_size"] == len(words) and config["head_dim"] == 32
    rng = random.Random(0)
    for _ in range(200):  # joining: what is sampled is what the environment reads
        ids = [words.convert_tokens_to_ids(rng.choice(pieces)) for _ in range(8)]
        assert words.decode(ids) == "".join(words.convert_ids_to_tokens(ids))


def test_the_tiny_prover_is_what_its_generator_makes(tmp_path):
    (tmp_path / "generate.py").write_text((common.EXAMPLES / "tiny_prover" / "generate.py").read_text())
    run_script(tmp_path / "generate.py")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (common.EXAMPLES / "tiny_prover" / name).read_bytes()
