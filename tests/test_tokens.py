"""Templates, token boundaries, packed log-probabilities, and loading of problems."""

import json
import shutil

import datasets
import pytest
import torch
import transformers
from small_runs import TINY_LLAMA, plain_log_probs, refused, write_rows
from tokenizers import Tokenizer, models, processors

import common

GOOD = {"problem": "1+1=", "answer": "2"}


def row(problem="1+1=", answer="2", **more):
    return {"id": 0, "source": "data.jsonl:1", "problem": problem, "answer": answer} | more


@pytest.fixture(scope="session")
def config():
    return common.load_config(TINY_LLAMA)


def make_tokenizer(post="<s> $A", eos="</s>"):
    """A BPE tokenizer that merges "=2". post: what it adds to a text."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "1", "=", "2", "=2", "3"])}
    backend = Tokenizer(models.BPE(vocabulary, [("=", "2")]))
    special = [("<s>", 0), ("</s>", 1)]
    backend.post_processor = processors.TemplateProcessing(single=post, special_tokens=special)
    backend.add_special_tokens(["<s>", "</s>"])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos
    )


# ---- Tokens


@pytest.mark.parametrize(
    "post, eos, prompt_ids",
    [
        ("<s> $A </s>", "</s>", [0, 2, 3]),
        ("$A </s>", "</s>", [2, 3]),
        ("<s> $A", "<s>", [0, 2, 3]),
    ],
    ids=["BOS and EOS", "EOS alone", "BOS is EOS"],
)
def test_no_token_crosses_the_boundary_and_eos_closes_the_completion(post, eos, prompt_ids, config):
    tokenizer = make_tokenizer(post, eos)
    assert 5 in tokenizer("1=2").input_ids, "one text would merge over the boundary"
    ((example,), _) = common.encode([row("1=")], tokenizer, config, "direct", "{problem}")
    assert example.prompt_ids == prompt_ids
    assert example.completion_ids == [4, tokenizer.eos_token_id]


@pytest.mark.parametrize("post", ["<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("bad", [row("1", "2</s>3"), row("1</s>1", "2"), row("1", "2</s>")])
def test_a_text_that_contains_eos_is_refused(bad, post, config, capsys):
    error = refused(capsys, common.encode, [bad], make_tokenizer(post), config, "direct")
    assert "data.jsonl:1" in error and "</s>" in error


@pytest.mark.parametrize("bad", [row("1", "3"), row("3", "1"), row("1€"), row(answer="€")])
def test_tokens_that_the_model_or_the_tokenizer_does_not_have_are_refused(bad, tokenizer, capsys):
    config, unknown = transformers.LlamaConfig(vocab_size=6), "€" in str(bad)
    arguments = [bad], tokenizer if unknown else make_tokenizer(), config, "direct"
    error = refused(capsys, common.encode, *arguments)
    assert "data.jsonl:1" in error and ("character" if unknown else "6") in error
    config.vocab_size = 7
    assert unknown or common.encode(*arguments)[0]


def test_too_long_is_dropped_and_counted_never_cut(tokenizer):
    config = transformers.LlamaConfig(vocab_size=118, max_position_embeddings=20)
    rows = [row("1" * 16), row("1" * 17), row(), row("1", "")]  # + BOS, line end, answer, EOS
    examples, dropped = common.encode(rows, tokenizer, config, "direct")
    assert list(map(len, examples)) == [20, 8] and dropped["too long"] == 1 and len(dropped) == 2
    examples, dropped = common.encode(rows, tokenizer, config, "direct", max_length=8)
    assert list(map(len, examples)) == [8] and dropped["too long"] == 2


def test_rows_without_what_the_template_needs_are_dropped_and_counted(tokenizer, config):
    rows = [row(), row(answer=" "), row(solution="2"), row(solution=" ")]
    examples, dropped = common.encode(rows, tokenizer, config, "cot")
    assert len(examples) == 1 and list(dropped.values()) == [3]
    sampled, dropped = common.encode(rows, tokenizer, config, "cot", prompts_only=True)
    assert [one.completion_ids for one in sampled] == [[]] * 3 and list(dropped.values()) == [1]


def test_a_prompt_may_hold_other_braces(tokenizer, config):
    prompt = "{x} {problem} {answer} {problem} {"
    (example,), _ = common.encode([row("{answer}", "2")], tokenizer, config, "direct", prompt)
    text = tokenizer.decode(example.prompt_ids, skip_special_tokens=True)
    assert text == "{x} {answer} 2 {answer} {"  # what was filled in is not filled again


# ---- Templates

R1 = "2 </think> so <answer> 4 </answer>"


@pytest.mark.parametrize(
    "template, text, answer",
    [
        ("cot", "so \\boxed{1}, or \\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}"),
        ("cot", "\\boxed{ {a} \\{ }} }", "{a} \\{ }"),
        ("cot", "\\boxed{1", None),
        ("r1", R1, "4"),
        ("r1-short", R1 + ".", "4"),
        ("r1", R1.replace("</think>", ""), None),
        ("r1", R1.replace("</answer>", ""), None),
        ("r1", R1 + " <answer> 5 </answer>", None),
        ("r1", "<think> </think>" + R1, None),
        ("r1", R1.replace("4", ""), None),
        ("direct", " 2 ", "2"),
    ],
)
def test_extraction(template, text, answer):
    """The last box with balanced braces; one closed thought and exactly one answer."""
    assert common.TEMPLATES[template].extract(text) == answer


# ---- Packed log-probabilities

PACKABLE = ["Llama", "GPT2", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3Text", "Phi3", "GPTNeoX"]
MIXING = ["Bloom", "Mamba"]
SIZES = {  # those that an architecture does not have, it ignores
    "vocab_size": 118,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}


def make_model(architecture):
    config = getattr(transformers, architecture + "Config")(**SIZES)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).train(False)


@pytest.fixture(scope="session")
def examples(tokenizer, config):
    problems = [("1+1=", "2"), ("12*345=", "4140"), ("7x+1=50", "7"), ("9" * 30, "123456789")]
    rows = [row(problem, answer, id=i) for i, (problem, answer) in enumerate(problems)]
    return common.encode(rows, tokenizer, config, "direct")[0]


@pytest.mark.parametrize("architecture", PACKABLE)
def test_packed_log_probs_and_gradients_are_those_of_each_example_alone(architecture, examples):
    model = make_model(architecture)
    weights = torch.tensor([1.0, -0.5, 2.0, 0.3])
    packed = common.log_probs(model, examples)
    assert packed.dtype == torch.float32 and packed.shape == (4,)
    alone = torch.stack(
        [plain_log_probs(model, one.prompt_ids, one.completion_ids).sum() for one in examples]
    )
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    gradients = []
    for log_p in (packed, alone):
        model.zero_grad()
        (weights * log_p).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    scale = gradients[1].abs().max().item()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5 * scale)
    common.check_packing(common.make_accelerator(), model, examples[:2])


@pytest.mark.parametrize("architecture", MIXING)
def test_an_architecture_that_mixes_packed_examples_is_refused(architecture, examples, capsys):
    model = make_model(architecture)
    if architecture == "Mamba":  # its state is known to mix, even where no difference shows
        model.get_output_embeddings().weight.data.zero_()
    symmetric = common.Example(0, [7, 7, 7], [7, 7])  # in any order it is the same
    arguments = common.make_accelerator(), model, [symmetric, examples[1]]
    assert "packed" in refused(capsys, common.check_packing, *arguments)


# ---- Loading
def test_weights_that_are_not_in_safetensors_are_refused(tokenizer, tmp_path, capsys):
    folder = shutil.copytree(TINY_LLAMA, tmp_path / "model")
    (folder / "pytorch_model.bin").touch()
    assert "safetensors" in refused(capsys, common.load_model, str(folder), tokenizer)


def load(tmp_path, *rows):
    write_rows(tmp_path, train=rows)
    return common.load_problems(str(tmp_path), "train")


def test_columns_are_mapped_and_answers_are_text_without_leading_zeros(tmp_path):
    raw = {"question": "1+1=", "final_answer": ["2"], "Solution": "easy", "level": "Level 5"}
    one, two, three = load(tmp_path, raw, {"problem": "x", "Answer": 2}, GOOD | {"answer": [2.5]})
    assert one.pop("source").endswith("train.jsonl:1")
    assert one == {"id": 0, "problem": "1+1=", "answer": "2", "solution": "easy", "level": 5}
    assert (two["answer"], three["answer"]) == ("2", "2.5")
    assert common.load_problems(str(tmp_path), "test", required=False) == []
    assert len(common.load_problems(str(tmp_path / "train.jsonl"), "test")) == 3
    zeros = load(tmp_path, *[GOOD | {"answer": one} for one in ("025", "000", "0.25", "x01")])
    assert [row["answer"] for row in zeros] == ["25", "0", "0.25", "x01"]


@pytest.mark.parametrize("field", ["answer", "problem"])
@pytest.mark.parametrize(
    "value", [["2", "3"], [], {"a": 1}, [["2"]], [None], True, float("nan"), None]
)
def test_a_value_that_is_no_text_is_refused_by_file_line_and_field(value, field, tmp_path, capsys):
    error = refused(capsys, load, tmp_path, GOOD, GOOD | {field: value})
    assert "train.jsonl:2" in error and repr(field) in error


@pytest.mark.parametrize(
    "raw, words",
    [
        (json.dumps(GOOD).encode("utf-16"), "UTF-16"),
        (json.dumps(GOOD).encode("utf-16-le"), "UTF-16"),
        (b'\n{"problem": \n', "train.jsonl:2: not JSON"),
        (b"\n[1]\n", "train.jsonl:2: not a JSON"),
        ('{"problem": "é"}\n'.encode("latin-1"), "UTF-8"),
        (b"\n", "no problems"),
    ],
)
def test_files_that_are_not_json_lines_in_utf_8_are_refused(raw, words, tmp_path, capsys):
    path = tmp_path / "train.jsonl"
    path.write_bytes(raw)
    assert words in refused(capsys, common.load_problems, str(path), "train")
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    assert len(common.load_problems(str(path), "train")) == 1


def test_data_sets_of_the_hub(monkeypatch, capsys):
    """The columns and splits of three data sets that the commands name."""
    math = GOOD | {"solution": "\\boxed{2}", "subject": "Algebra", "level": 5, "unique_id": "x"}
    aime = GOOD | {"id": 60, "answer": "025", "url": "", "year": "2024"}
    hub = {
        "user/math": {"train": [math] * 3, "test": [math]},
        "user/aime": {"train": [aime] * 30},
        "user/test-only": {"test": [math]},
    }
    monkeypatch.setattr(datasets, "load_dataset", hub.__getitem__)
    assert len(common.load_problems("user/math", "train")) == 3
    assert common.load_problems("user/math", "test")[0]["level"] == 5
    assert {row["answer"] for row in common.load_problems("user/aime", "test")} == {"25"}
    assert common.load_problems("user/aime", "test", required=False) == []  # while training on it
    assert "train" in refused(capsys, common.load_problems, "user/test-only", "train")
    assert "nobody/x" in refused(capsys, common.load_problems, "nobody/x", "train")
