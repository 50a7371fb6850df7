"""TransformersSampler: samples that share rows are still independent samples from p̂."""

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
def short_model(tiny_model):
    """The tiny model, made to end soon, so that all lengths up to the limit occur."""
    with torch.no_grad():
        tiny_model.lm_head.weight *= 1.5
    return tiny_model


@pytest.fixture
def sampler(short_model, tokenizer):
    return common.TransformersSampler(common.make_accelerator(), short_model, tokenizer)


def said(found):
    return [[tuple(one.token_ids) for one in completions] for completions in found]


def exact(model, prompt, eos, length):
    """{completion of at most `length` tokens: its probability}, without a cache or padding."""
    found, beginnings = {}, {(): 1.0}
    for _ in range(length):
        ids = torch.tensor([[*prompt, *beginning] for beginning in beginnings])
        with torch.no_grad():
            p = model(input_ids=ids).logits[:, -1].double().softmax(-1)
        longer = {
            (*beginning, token): before * p[row, token].item()
            for row, (beginning, before) in enumerate(beginnings.items())
            for token in range(p.shape[1])
        }
        found |= {ids: chance for ids, chance in longer.items() if ids[-1] == eos}
        beginnings = {ids: chance for ids, chance in longer.items() if ids[-1] != eos}
    assert sum(found.values()) + sum(beginnings.values()) == pytest.approx(1, abs=1e-6)
    return found | beginnings


def z_of_chi_squared(counts, expected):
    """How far Pearson's statistic is from its mean, in standard deviations."""
    n, rare, cells = sum(counts.values()), [0, 0.0], []
    assert counts.keys() <= expected.keys()
    for ids, chance in expected.items():
        if n * chance >= 10:
            cells.append((counts[ids], n * chance))
        else:
            rare = [rare[0] + counts[ids], rare[1] + n * chance]
    cells += [rare] if rare[1] >= 10 else []
    degrees = len(cells) - 1
    assert degrees >= 20
    chi2 = sum((found - wanted) ** 2 / wanted for found, wanted in cells)
    return (chi2 - degrees) / math.sqrt(2 * degrees)


def test_whole_completions_have_their_probabilities(sampler, short_model, tokenizer, prompts):
    """Prompts of different lengths and numbers in one call, against p̂ of every completion."""
    counts, eos = [100_000, 25_000, 50_000], tokenizer.eos_token_id
    drawn = said(sampler.generate(prompts, counts, 2, [3, 4, 5]))
    for prompt, n, found in zip(prompts, counts, drawn, strict=True):
        assert len(found) == n
        assert abs(z_of_chi_squared(Counter(found), exact(short_model, prompt, eos, 2))) < 5
    other = exact(short_model, prompts[2], eos, 2)
    assert z_of_chi_squared(Counter(drawn[0]), other) > 10, "no prompt gets another's samples"


def test_a_temperature_divides_the_logits(sampler, short_model, tokenizer, prompts):
    """In sampling and in log p alike."""
    examples = [common.Example(0, prompt, [7, 8, 2]) for prompt in prompts]
    (found,) = said(sampler.generate(prompts[:1], 40_000, 2, [3], temperature=1.5))
    with torch.no_grad():
        log_p = common.log_probs(short_model, examples, temperature=1.5)
        expected = exact(short_model, prompts[0], tokenizer.eos_token_id, 2)
        assert z_of_chi_squared(Counter(found), expected) > 10
        short_model.lm_head.weight /= 1.5
        expected = exact(short_model, prompts[0], tokenizer.eos_token_id, 2)
        assert abs(z_of_chi_squared(Counter(found), expected)) < 5
        torch.testing.assert_close(log_p, common.log_probs(short_model, examples))


def test_log_prob_is_that_of_teacher_forcing(sampler, short_model, prompts):
    """So the cache is right where rows were dropped and doubled."""
    found = sampler.generate(prompts, [200, 200, 200], 12, [1, 2, 3])
    drawn, told = [], []
    for prompt, completions in zip(prompts, found, strict=True):
        drawn += [common.Example(0, prompt, one.token_ids) for one in completions]
        told += [one.log_prob for one in completions]
    assert sum(len(example.completion_ids) == 12 for example in drawn) > 5
    with torch.no_grad():
        expected = torch.cat([common.log_probs(short_model, [one]) for one in drawn])
    assert told == pytest.approx(expected.tolist(), abs=1e-4)


def test_without_seeds_it_is_greedy(sampler, short_model, tokenizer, prompts):
    for prompt, found in zip(prompts, said(sampler.generate(prompts, 2, 12)), strict=True):
        expected = []
        while len(expected) < 12 and tokenizer.eos_token_id not in expected:
            with torch.no_grad():
                logits = short_model(torch.tensor([prompt + expected])).logits
            expected.append(logits[0, -1].argmax().item())
        assert found == [tuple(expected)] * 2


def test_a_seed_decides_whatever_is_sampled_beside_it(sampler, prompts):
    first, again, other = (
        said(sampler.generate(prompts, [30, 40, 50], 5, [seed, 1, 2])) for seed in (7, 7, 8)
    )
    assert first == again and first[0] != other[0] and first[1:] == other[1:]
    assert said(sampler.generate(prompts[1:2], 40, 5, [1])) == first[1:2]
    sampler.tokens = 100  # a few samples at once
    assert said(sampler.generate(prompts, [30, 40, 50], 5, [7, 1, 2])) == first


def test_a_batch_with_its_padding_keeps_to_its_tokens(sampler, prompts):
    sampler.tokens, sizes = 100, []
    sampler.model.register_forward_pre_hook(
        lambda _, __, inputs: sizes.append(inputs["attention_mask"].numel()), with_kwargs=True
    )
    sampler.generate([prompts[1], *[prompts[2]] * 20], 1, 5)
    assert max(sizes) <= 100


def test_nothing_is_drawn_twice_in_several_requests(tiny_model, tokenizer, prompts):
    """Twelve tokens of an untrained model: two samples agree once in 10^15 or so."""
    sampler = common.TransformersSampler(common.make_accelerator(), tiny_model, tokenizer)
    (found,) = said(sampler.generate(prompts[:1], 2500, 12, [3]))
    full = [ids for ids in found if len(ids) == 12]
    assert len(found) == 2500 and len(full) > 2000 and len(set(full)) == len(full)
