"""Samples that share the price of their beginnings are still independent samples from p̂."""

import itertools
import math
from collections import Counter

import pytest
import torch

import common


@pytest.fixture(scope="module")
def prompts(tokenizer):
    """Of several lengths: in one call, they are padded on the left."""
    return [tokenizer(text).input_ids for text in ("1+1=", "12*(3+45)-678=", "7")]


@pytest.fixture
def short_model(tokenizer, tiny_model):
    """The tiny model, made to end soon, so that all lengths up to the limit occur."""
    with torch.no_grad():
        tiny_model.lm_head.weight *= 1.5
    return tiny_model.eval()


def exact(model, tokenizer, prompt, length):
    """{completion of at most `length` tokens: its probability}: one forward of each, no cache, no padding."""
    eos, vocabulary = tokenizer.eos_token_id, range(model.config.vocab_size)
    found, beginnings = {}, {(): 1.0}
    for _ in range(length):
        ids = torch.tensor([[*prompt, *beginning] for beginning in beginnings])
        with torch.no_grad():
            p = model(input_ids=ids).logits[:, -1].double().softmax(-1)
        longer = {
            (*beginning, token): before * p[row, token].item()
            for row, (beginning, before) in enumerate(beginnings.items())
            for token in vocabulary
        }
        found |= {ids: chance for ids, chance in longer.items() if ids[-1] == eos}
        beginnings = {ids: chance for ids, chance in longer.items() if ids[-1] != eos}
    found |= beginnings
    assert sum(found.values()) == pytest.approx(1, abs=1e-6)
    return found


def z_of_chi_squared(counts, expected):
    """Pearson's, rare completions taken together; its excess over the degrees of freedom in standard deviations."""
    n = sum(counts.values())
    assert counts.keys() <= expected.keys()
    cells, rare = [], [0, 0.0]
    for ids, chance in expected.items():
        if n * chance >= 10:
            cells.append((counts[ids], n * chance))
        else:
            rare = [rare[0] + counts[ids], rare[1] + n * chance]
    cells += [rare] if rare[1] >= 10 else []
    degrees = len(cells) - 1
    assert degrees >= 20
    return (sum((found - wanted) ** 2 / wanted for found, wanted in cells) - degrees) / math.sqrt(2 * degrees)


def test_whole_completions_have_their_probabilities(short_model, tokenizer, prompts):
    """Prompts of different lengths and numbers in one call, against p̂ of every completion there is."""
    counts = [200_000, 50_000, 100_000]
    drawn = common.sample_together(short_model, tokenizer, prompts, counts, 2, [3, 4, 5])
    for prompt, n, found in zip(prompts, counts, drawn, strict=True):
        assert found.total() == n
        assert abs(z_of_chi_squared(found, exact(short_model, tokenizer, prompt, 2))) < 5


def test_as_samples_that_share_nothing(short_model, tokenizer, prompts):
    """`generate` draws each by itself; both fit p̂, and so does neither fit another prompt's."""
    live = common.LiveModel(common.make_accelerator(), short_model, tokenizer)
    (alone,) = live.generate(prompts[:1], 8192, 2, [5])
    (together,) = live.generate(prompts[:1], [8192], 2, [5])
    expected = exact(short_model, tokenizer, prompts[0], 2)
    for found in (alone, together):
        assert len(found) == 8192
        assert abs(z_of_chi_squared(Counter(tuple(one.token_ids) for one in found), expected)) < 5
    other = exact(short_model, tokenizer, prompts[2], 2)
    assert z_of_chi_squared(Counter(tuple(one.token_ids) for one in together), other) > 10


def test_completions_end_with_eos_or_at_the_limit(short_model, tokenizer, prompts):
    eos, counts = tokenizer.eos_token_id, [300, 1, 77]
    drawn = common.sample_together(short_model, tokenizer, prompts, counts, 6, [0, 1, 2])
    assert [found.total() for found in drawn] == counts
    completions = [ids for found in drawn for ids in found]
    assert all(eos not in ids[:-1] and (ids[-1] == eos or len(ids) == 6) for ids in completions)
    assert {len(ids) for ids in completions} > {6} and any(ids[-1] == eos for ids in completions)
    assert any(len(ids) == 6 and ids[-1] != eos for ids in completions)


def test_a_long_completion_goes_on_as_the_model_would(short_model, tokenizer, prompts):
    """The cache of rows that were dropped and doubled: p̂ of the last token, given all before, by teacher forcing."""
    drawn = common.sample_together(short_model, tokenizer, prompts, [400] * 3, 12, [1, 2, 3])
    seen, forward = [], short_model.forward

    def watched(**inputs):
        output = forward(**inputs)
        seen.append(output.logits[:, -1].double().log_softmax(-1))
        return output

    short_model.forward = watched
    assert common.sample_together(short_model, tokenizer, prompts, [400] * 3, 12, [1, 2, 3]) == drawn
    short_model.forward = forward
    long = [(prompt, ids) for prompt, found in zip(prompts, drawn, strict=True) for ids in found if len(ids) == 12]
    assert len(long) > 5 and len(seen) == 12
    beginnings = [(prompt, ids[:-1]) for prompt, ids in long]
    for prompt, ids in beginnings[:20]:
        with torch.no_grad():
            expected = short_model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1].double().log_softmax(-1)
        assert (seen[-1] - expected).abs().amax(1).min() < 1e-4


def test_a_seed_decides(short_model, tokenizer, prompts):
    live = common.LiveModel(common.make_accelerator(), short_model, tokenizer)
    first, again, other = (live.generate(prompts, [30, 40, 50], 5, [seed, 1, 2]) for seed in (7, 7, 8))
    assert first == again and [len(found) for found in first] == [30, 40, 50]
    assert first[0] != other[0] and first[1:] == other[1:]
    (alone,) = live.generate(prompts[1:2], [40], 5, [1])  # whatever is sampled beside it
    assert sorted(one.token_ids for one in alone) == sorted(one.token_ids for one in first[1])


def test_pieces_where_memory_is_small(short_model, tokenizer, prompts, monkeypatch):
    """No call is for more samples than fit; none is lost, and no two calls share a seed."""
    calls, sample_together = [], common.sample_together

    def counted(model, tokenizer, prompts, counts, *more):
        calls.append((sum(counts), *more[-1]))
        return sample_together(model, tokenizer, prompts, counts, *more)

    monkeypatch.setattr(common, "sample_together", counted)
    live = common.LiveModel(common.make_accelerator(), short_model, tokenizer)
    longest = max(map(len, prompts)) + 2
    config = short_model.config
    token = 2**31 // longest // 100  # bytes a token's keys and values seem to take: 100 samples fit
    monkeypatch.setattr(config, "head_dim", token // (2 * config.num_hidden_layers * config.num_key_value_heads * 4))
    counts = [25_000, 10, 130]
    found = live.generate(prompts, counts, 2, [11, 22, 33])
    assert [len(drawn) for drawn in found] == counts
    sizes, seeds = [size for size, *_ in calls], [seed for _, *seeds in calls for seed in seeds]
    assert sum(sizes) == sum(counts) and 95 < max(sizes) <= 105 and len(sizes) < 1.1 * sum(counts) / 100
    assert len(set(seeds)) == len(seeds)
    drawn = Counter(tuple(one.token_ids) for one in found[0])
    assert abs(z_of_chi_squared(drawn, exact(short_model, tokenizer, prompts[0], 2))) < 5


def test_one_price_for_what_is_the_same(short_model, tokenizer, prompts):
    """Rows computed: the distinct beginnings, not the samples."""
    rows = []
    forward = short_model.forward

    def counting(**inputs):
        rows.append(len(inputs["input_ids"]))
        return forward(**inputs)

    short_model.forward = counting
    (found,) = common.sample_together(short_model, tokenizer, prompts[:1], [5000], 3, [2])
    eos = tokenizer.eos_token_id
    beginnings = [{ids[:k] for ids in found if len(ids) > k and eos not in ids[:k]} for k in range(3)]
    assert rows == [len(level) for level in beginnings] and rows[0] == 1 and sum(rows) < 5000
    assert all(a < b for a, b in itertools.pairwise(rows))
