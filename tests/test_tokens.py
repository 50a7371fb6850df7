"""Templates, token boundaries and the collator, sampling from p̂ itself, and loading problems."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import common


def row(problem="1+1=", answer="2", **more):
    return {"id": 0, "source": "data.jsonl:1", "problem": problem, "answer": answer} | more


def test_boundaries_bos_once_eos_in_and_no_token_across(tokenizer):
    (example,), dropped = common.encode([row()], tokenizer, "direct", 2048)
    assert dropped == {}
    assert tokenizer.convert_ids_to_tokens(example.prompt_ids) == ["<s>", "1", "+", "1", "=", "\n"]
    assert tokenizer.convert_ids_to_tokens(example.completion_ids) == ["2", "</s>"]
    batch = common.collate([example], 0)
    assert batch["input_ids"].tolist() == [example.prompt_ids + example.completion_ids]


def merging_tokenizer(pad):
    """A BPE tokenizer that would merge a prompt's last character with a completion's first one: "=2" is a token."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "1", "+", "=", "2", "=2", "\n"])}
    backend = Tokenizer(models.BPE(vocabulary, [("=", "2")]))
    backend.pre_tokenizer = pre_tokenizers.Split("\n", behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token=pad)


def test_prompt_and_completion_are_tokenised_apart(monkeypatch):
    tokenizer = merging_tokenizer("</s>")
    monkeypatch.setitem(common.TEMPLATES, "direct", common.Template("{problem}", "{answer}", str))
    assert tokenizer("1=2").input_ids == [0, 2, 6]  # one string would merge across the boundary
    (example,), _ = common.encode([row("1=", "2")], tokenizer, "direct", 99)
    assert (example.prompt_ids, example.completion_ids) == ([0, 2, 4], [5, 1])


def test_layout_and_masks_where_pad_is_eos():
    a = common.Example(0, [0, 2, 3], [5, 1])
    b = common.Example(1, [0], [2, 2, 2, 1])
    batch = common.collate([a, b], pad_id=1)  # pad is the same id as EOS
    assert batch["input_ids"].tolist() == [[0, 2, 3, 5, 1, 1, 1], [1, 1, 0, 2, 2, 2, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]]
    assert batch["position_ids"].tolist()[0][:5] == [0, 1, 2, 3, 4]
    assert batch["position_ids"].tolist()[1][2:] == [0, 1, 2, 3, 4]
    assert batch["completion_ids"].tolist() == [[5, 1, 1, 1], [2, 2, 2, 1]]
    assert batch["completion_mask"].tolist() == [[True, True, False, False], [True] * 4]


def test_log_probs_are_those_of_each_sequence_alone(tiny_model, tokenizer):
    """Padding, other lengths in the batch and the trimmed logits change nothing, and EOS is counted."""
    problems = [("1+1=", "2"), ("12*345=", "4140"), ("7x+1=50", "7")]
    rows = [row(p, a) | {"id": i} for i, (p, a) in enumerate(problems)]
    examples, _ = common.encode(rows, tokenizer, "direct", 2048)
    for pad_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        together = common.completion_log_probs(tiny_model, common.collate(examples, pad_id))
        assert together.dtype == torch.float32 and together.shape == (3,)
        for example, value in zip(examples, together, strict=True):
            ids = torch.tensor([example.prompt_ids + example.completion_ids])
            log_probs = tiny_model(ids).logits.double().log_softmax(-1)[0, :-1]
            tokens = log_probs.gather(1, ids[0, 1:, None]).squeeze(1)[-len(example.completion_ids) :]
            assert value.item() == pytest.approx(tokens.sum().item(), abs=1e-4)


def test_logits_of_the_completion_columns_only(tiny_model, tokenizer):
    examples, _ = common.encode([row("12345678901234567890=", "22")], tokenizer, "direct", 2048)
    shapes = []
    tiny_model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    common.completion_log_probs(tiny_model, common.collate(examples, 0))
    assert shapes == [(1, 4, len(tokenizer))]  # two digits, EOS, and the column before them


def test_gradient_does_not_reach_padding(tiny_model, tokenizer):
    rows = [row("1+1=", "2"), row("123456*7=", "864192") | {"id": 1}]
    examples, _ = common.encode(rows, tokenizer, "direct", 2048)
    common.completion_log_probs(tiny_model, common.collate(examples, tokenizer.pad_token_id)).sum().backward()
    assert tiny_model.model.embed_tokens.weight.grad[tokenizer.pad_token_id].abs().max() == 0
    assert tiny_model.model.embed_tokens.weight.grad[tokenizer.bos_token_id].abs().max() > 0


def test_attention_that_loses_the_gradient_of_padded_batches_is_off():
    torch.backends.cuda.enable_cudnn_sdp(True)
    common.make_accelerator()
    assert not torch.backends.cuda.cudnn_sdp_enabled(), "pytorch/pytorch#196678"


def test_unknown_character_is_a_data_error(tokenizer, capsys):
    with pytest.raises(SystemExit) as stop:
        common.encode([row("1€+1=")], tokenizer, "direct", 2048)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "data.jsonl:1" in error and "'€'" in error and error.count("\n") == 1


def test_too_long_is_dropped_and_counted_never_cut(tokenizer):
    rows = [row(), row("1" * 60)]
    examples, dropped = common.encode(rows, tokenizer, "direct", 20)
    assert len(examples) == 1 and dropped == {"too long": 1}


def test_cot_rows_without_a_solution_are_dropped_and_counted(tokenizer):
    examples, dropped = common.encode([row(), row(solution="1+1=\\boxed{2}")], tokenizer, "cot", 2048)
    assert len(examples) == 1 and dropped == {"without a solution": 1}
    text = tokenizer.decode(examples[0].completion_ids, skip_special_tokens=True)
    assert common.TEMPLATES["cot"].extract(text) == "2"


def test_extraction():
    assert common.extract_boxed("so \\boxed{1}, or \\boxed{\\frac{1}{2}} it is") == "\\frac{1}{2}"
    assert common.extract_boxed("\\boxed{1") is None and common.extract_boxed("1") is None
    r1 = common.TEMPLATES["r1"].extract
    assert r1(" well </think> <answer> 4 </answer>") == "4"
    for broken in (
        "well <answer> 4 </answer>",  # no </think>
        " </think> <answer> 4 </answer> <answer> 5 </answer>",
        " <answer> 4 </answer> </think>",
        " </think> <answer> 4",
        " </think> 4 </answer> <answer>",
        " </think> <answer> </answer>",
        " <think> </think> <answer> 4 </answer>",
    ):
        assert r1(broken) is None, broken


def test_r1_completion_is_in_the_format_that_r1_asks_for(tokenizer):
    (example,), _ = common.encode([row(solution="1+1=\\boxed{2}")], tokenizer, "r1", 2048)
    assert tokenizer.decode(example.prompt_ids).endswith("User: 1+1=\nAssistant: <think>")
    assert common.read_answer(example.completion_ids, tokenizer, "r1") == "2"


def test_answers_are_read_up_to_the_end_and_not_tidied(tokenizer):
    def ids(text, end=True):
        return tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * end

    assert common.read_answer(ids("1 , 2"), tokenizer, "direct") == "1 , 2"
    assert common.read_answer(ids("12", end=False), tokenizer, "direct") is None  # it did not end
    assert common.read_answer([], tokenizer, "direct") is None


def test_generate_samples_from_p_itself(tiny_model, tokenizer):
    """The model's own generation settings are ignored: with top_k 1 in them, samples would all be the same."""
    prompt = common.encode([row()], tokenizer, "direct", 2048)[0][0].prompt_ids
    tiny_model.generation_config.top_k = 1
    tiny_model.generation_config.temperature = 0.01
    (samples,) = common.generate(tiny_model, tokenizer, [prompt], 64, 4, seed=1)
    assert len({tuple(ids) for ids in samples}) > 50
    assert common.generate(tiny_model, tokenizer, [prompt], 64, 4, seed=1) == [samples]
    assert common.generate(tiny_model, tokenizer, [prompt], 64, 4, seed=2) != [samples]
    greedy = common.generate(tiny_model, tokenizer, [prompt], 1, 4, seed=None)[0][0]
    logits = tiny_model(torch.tensor([prompt])).logits[0, -1]
    assert greedy[0] == logits.argmax().item()


def test_generate_leaves_the_random_state_alone(tiny_model, tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    common.generate(tiny_model, tokenizer, [[1, 5]], 4, 3, seed=9)
    assert torch.rand(3).equal(expected)


# Loading


def write(tmp_path, *lines):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_load_problems_maps_columns(tmp_path):
    write(tmp_path, {"question": "1+1=", "Answer": 2, "Solution": "easy", "level": "Level 5"}, "\n")
    (loaded,) = common.load_problems(str(tmp_path), "train")
    assert loaded["problem"] == "1+1=" and loaded["answer"] == "2" and loaded["level"] == 5
    assert loaded["source"].endswith("train.jsonl:1") and loaded["solution"] == "easy"
    assert common.load_problems(str(tmp_path), "test", required=False) == []


GOOD = {"problem": "1+1=", "answer": "2"}


@pytest.mark.parametrize(
    "lines, told",
    [
        ([GOOD, '{"problem": \n'], "train.jsonl:2: not JSON"),
        ([GOOD, "[1]\n"], "train.jsonl:2: not a JSON object"),
        ([GOOD, GOOD, {"problem": "2+2="}], "train.jsonl:3: field 'answer' is missing"),
        ([{"problem": "2+2=", "answer": " "}], "train.jsonl:1: field 'answer' is missing or empty"),
        ([{"answer": "4"}], "train.jsonl:1: field 'problem' is missing"),
        ([], "no problems"),
    ],
)
def test_bad_rows_name_file_line_and_field(tmp_path, capsys, lines, told):
    write(tmp_path, *lines)
    with pytest.raises(SystemExit) as stop:
        common.load_problems(str(tmp_path), "train")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and told in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "data, told", [("./nothing/here", "is not a folder"), ("somebody/nothing", "cannot be loaded")]
)
def test_data_that_is_not_there(data, told, capsys):
    with pytest.raises(SystemExit) as stop:
        common.load_problems(data, "train")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and told in error and error.count("\n") == 1


def test_two_empty_answers_in_maths_twelve_thousand_are_dropped_and_counted(tmp_path, capsys, tokenizer):
    write(tmp_path, *[GOOD] * 1998, GOOD | {"answer": ""}, GOOD | {"answer": " "})
    rows = common.load_problems(str(tmp_path), "train")
    examples, dropped = common.encode(rows, tokenizer, "direct", 99)
    assert len(examples) == 1998 and dropped == {"without an answer": 2}
    write(tmp_path, *[GOOD] * 1997, *[GOOD | {"answer": ""}] * 3)  # more than one in a thousand is no accident
    with pytest.raises(SystemExit):
        common.load_problems(str(tmp_path), "train")
    assert "train.jsonl:1998: field 'answer' is missing or empty" in capsys.readouterr().err


def hub(monkeypatch, **splits):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda name: splits)


def test_data_sets_of_the_hub(monkeypatch, capsys):
    """The columns of nlile/hendrycks-MATH-benchmark and of HuggingFaceH4/aime_2024."""
    math = {
        "problem": "1+1=",
        "solution": "\\boxed{2}",
        "answer": "2",
        "subject": "Algebra",
        "level": 5,
        "unique_id": "x",
    }
    hub(monkeypatch, train=[math, math], test=[math])
    train, test = (common.load_problems("nlile/hendrycks-MATH-benchmark", split) for split in ("train", "test"))
    assert len(train) == 2 and test[0]["level"] == 5 and test[0]["solution"] == "\\boxed{2}"
    aime = {"id": 60, "problem": "1+1=", "solution": "easy", "answer": "204", "url": "", "year": "2024"}
    hub(monkeypatch, train=[aime] * 30)
    assert len(common.load_problems("HuggingFaceH4/aime_2024", "test")) == 30  # its only split
    assert common.load_problems("HuggingFaceH4/aime_2024", "test", required=False) == []  # but not while training
    hub(monkeypatch, test=[math])
    with pytest.raises(SystemExit):  # nobody trains on a test split by accident
        common.load_problems("HuggingFaceH4/MATH-500", "train")
    assert "has no split 'train' but ['test']" in capsys.readouterr().err


# The embedded set


def test_generator_makes_the_committed_files_byte_for_byte(tmp_path):
    folder = ROOT / "examples/arithmetic"
    subprocess.run([sys.executable, folder / "generate.py", "--out", tmp_path], check=True)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_tiny_llama_generator_makes_the_committed_files(tmp_path):
    folder = ROOT / "examples/tiny_llama"
    (tmp_path / "generate.py").write_bytes((folder / "generate.py").read_bytes())
    subprocess.run([sys.executable, tmp_path / "generate.py"], check=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_arithmetic_set_is_right_disjoint_and_solved(tokenizer):
    splits = {name: common.load_problems(str(ROOT / "examples/arithmetic"), name) for name in ("train", "test")}
    assert [len(rows) for rows in splits.values()] == [1500, 500]
    problems = [item["problem"] for rows in splits.values() for item in rows]
    assert len(set(problems)) == len(problems)
    for rows in splits.values():
        assert [sum(item["level"] == level for item in rows) for level in range(1, 6)] == [len(rows) // 5] * 5
        for item in rows:
            problem, answer = item["problem"], item["answer"]
            if item["level"] == 1:
                value = eval(problem.split("=")[0].replace("x", f"*{answer}"))
                assert value == int(problem.split("=")[1])
            elif problem.startswith("s"):
                assert sum(map(int, str(eval(problem[1:-1].replace("^", "**"))))) == int(answer)
            elif ":" in problem:
                polynomial, x = problem[:-1].split(":")
                assert eval(polynomial.replace("x", f"*({x})").replace("^", "**")) == int(answer)
            else:
                assert eval(problem[:-1].replace("^", "**")) == int(answer)
            assert common.extract_boxed(item["solution"]) == answer
        for template in common.TEMPLATES:
            examples, dropped = common.encode(rows, tokenizer, template, 2048)
            assert len(examples) == len(rows) and not dropped


def test_tiny_llama_serves_the_lean_scripts_too(tokenizer):
    text = "h : p → q ∧ ¬r\n⊢ ∀ x, ∃ y : ℕ, x ≤ y ↔ y ≥ x ∨ x ≠ y · ← ⟨⟩ ℤ ℝ"
    ids = tokenizer(text).input_ids
    assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids, skip_special_tokens=True) == text
    assert common.longest_context(str(ROOT / "examples/tiny_llama")) == 2048
