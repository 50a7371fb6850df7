"""What the scripts share, in sections that can be copied one by one: the loss, tokens and templates, data, refill,
grading, coverage, accelerate, files, engines.

Symbols as in the paper: x a problem, y its answer, p = p̂(y|x) the probability that the model gives to the whole answer,
end-of-sequence token included; N samples at test time, N' in the training loss."""

import atexit
import copy
import hashlib
import json
import logging
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import threading
import time
from collections import Counter, namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from functools import cache, partial
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path

import accelerate
import numpy as np
import psutil
import torch
import transformers
from safetensors import SafetensorError
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor
from tqdm import tqdm

EXAMPLES = Path(__file__).resolve().parent / "examples"


def refuse(message: str):
    """End the script over something that is the user's to mend: one line on stderr, once a machine, and exit 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# ---- The loss: each of these functions stands alone and needs only torch ---------------------------------------------
def dco_loss(log_p: torch.Tensor, n: float) -> torch.Tensor:
    """ℓ_DCO^N = -log(1 - (1-p)^N), Eq. 3, from log p alone. N = 1 is cross-entropy.
    log_p: any shape, values in [-inf, 0]: the log-probability of each whole answer. n: N >= 1. Returns log_p's shape
    and dtype, computed in float64; the gradient is -dco_factor(log_p, n)."""

    def log1mexp(x):  # log(1 - e^x) for x < 0, with all its digits at both ends; neither side of `where` makes a NaN
        return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x.clamp(max=-0.693))))

    if n == 1:
        return -log_p
    x = log_p.double()
    # Below p = e^-40, Np < 1e-11 for every N in use: the first term of the series. e^x would underflow at x = -745.
    tiny, certain = x < -40, x >= 0
    inside = torch.where(tiny | certain, -1.0, x)
    loss = -log1mexp(n * log1mexp(inside))
    loss = torch.where(tiny, -x.new_tensor(n).log() - x + (n - 1) / 2 * x.exp(), loss)
    return torch.where(certain, 0.0, loss).to(log_p.dtype)


def dco_factor(log_p: torch.Tensor, n: float) -> torch.Tensor:
    """F(N, p) = N (1-p)^(N-1) p / (1 - (1-p)^N), Eq. 4: the DCO gradient is F times the cross-entropy gradient.
    log_p: any shape, values in [-inf, 0]. n: N >= 1. Returns log_p's shape and dtype, computed in float64, in [0, 1]:
    1 for N = 1 and as p -> 0, 0 at p = 1 for N > 1. To weight a loss with it, detach it."""

    def log1mexp(x):  # log(1 - e^x) for x < 0, with all its digits at both ends; neither side of `where` makes a NaN
        return torch.where(x > -0.693, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x.clamp(max=-0.693))))

    if n == 1:
        return torch.ones_like(log_p)
    x = log_p.double()
    tiny, certain = x < -40, x >= 0
    inside = torch.where(tiny | certain, -1.0, x)
    log_miss = log1mexp(inside)  # log(1 - p)
    factor = (x.new_tensor(n).log() + (n - 1) * log_miss + inside - log1mexp(n * log_miss)).exp()
    factor = torch.where(tiny, 1 - (n - 1) / 2 * x.exp(), factor)
    return torch.where(certain, 0.0, factor).to(log_p.dtype)


def completion_log_probs(model, batch: dict) -> torch.Tensor:
    """log p̂(y|x) of each completion, its end-of-sequence token included: float32 [B], with the gradient.
    batch: input_ids, attention_mask, position_ids [B, T] and completion_ids, completion_mask [B, C], laid out as
    [pad … prompt][completion … pad] (see `collate`): all completions start at the same column, so that the logits of
    the last C + 1 columns suffice, and a vocabulary of 128k stays out of memory.
    In a trainer of your own, on Hopper GPUs, call `torch.backends.cuda.enable_cudnn_sdp(False)` first: with padding,
    gradients can be NaN without (see `make_accelerator`)."""
    width = batch["completion_ids"].shape[1]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    logits = model(**inputs, logits_to_keep=width + 1, use_cache=False).logits
    logits = logits[:, -width - 1 : -1].float()  # [B, C, V]; column t predicts completion token t
    chosen = logits.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    return (chosen - logits.logsumexp(-1)).masked_fill(~batch["completion_mask"], 0.0).sum(-1)


# ---- Tokens and templates: prompts, completions, the collator, sampling ----------------------------------------------
# How a row becomes a prompt and a completion (two formats), and an answer is read out of one (text -> answer or None).
Template = namedtuple("Template", ["prompt", "completion", "extract"])


def extract_boxed(text: str) -> str | None:
    """The content of the last \\boxed{…} with balanced braces, or None."""
    _, boxed, rest = text.rpartition("\\boxed{")
    depth = 1
    for i, character in enumerate(rest if boxed else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:i].strip() or None
    return None


def extract_r1(text: str) -> str | None:
    """The answer of a completion in exactly the format asked for, `…</think> … <answer>…</answer>`, else None."""
    parts = re.split("(</?think>|</?answer>)", text)  # text and tags by turns
    in_order = parts[1::2] == ["</think>", "<answer>", "</answer>"]
    return parts[4].strip() or None if in_order else None


TEMPLATES = {
    "direct": Template("{problem}\n", "{answer}", lambda text: text.strip() or None),  # §4: the answer alone
    "cot": Template("{problem}\n", "{solution}", extract_boxed),  # §5.4: the golden solution, its answer in a box
    "r1": Template(  # App. B: the prompt of DeepSeek-R1, which GRPO is trained with
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The "
        "Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. "
        "The reasoning process is enclosed within <think> </think> and the answer is enclosed within <answer> "
        "</answer> tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.\n"
        "User: {problem}\nAssistant: <think>",
        " {solution} </think> <answer> {answer} </answer>",
        extract_r1,
    ),
}
TEMPLATES["r1-short"] = TEMPLATES["r1"]._replace(prompt="User: {problem}\nAssistant: <think>")  # for small models
TEMPLATES["lean"] = TEMPLATES["direct"]._replace(prompt="{problem}\n---\n")  # §5.3: a proof state and its tactic


@dataclass
class Example:
    """A tokenised row. Training and sampling take the ids as they are; they are never made from a string again."""

    id: int  # the row's number in its file
    prompt_ids: list[int]
    completion_ids: list[int]  # closed by the end-of-sequence token

    def __len__(self):
        return len(self.prompt_ids) + len(self.completion_ids)


def encode(rows: list[dict], tokenizer, template: str, max_length: int) -> tuple[list[Example], dict[str, int]]:
    """Tokenise prompt and completion apart. -> (examples, {why: how many rows were dropped})."""
    form, examples, dropped = TEMPLATES[template], [], Counter()
    for row in rows:
        without_solution = "{solution}" in form.completion and not row.get("solution", "").strip()
        if without_solution or not row["answer"].strip():
            dropped["without a solution" if without_solution else "without an answer"] += 1
            continue
        try:
            prompt_ids = tokenizer(form.prompt.format(**row)).input_ids
            completion_ids = tokenizer(form.completion.format(**row), add_special_tokens=False).input_ids
        except TypeError:  # half of a surrogate pair
            refuse(f"{row['source']}: the text is not valid Unicode")
        unknown = tokenizer.unk_token_id
        if unknown not in (None, tokenizer.bos_token_id) and unknown in prompt_ids + completion_ids:
            text = (form.prompt + form.completion).format(**row)
            strange = next((c for c in text if unknown in tokenizer(c, add_special_tokens=False).input_ids), text)
            refuse(f"{row['source']}: the tokenizer has no token for {strange!r}; remove it or use another model")
        examples.append(Example(row["id"], prompt_ids, completion_ids + [tokenizer.eos_token_id]))
        if len(examples[-1]) > max_length:  # dropped, never cut: an example without its end would teach not to end
            examples.pop()
            dropped["too long"] += 1
    return examples, dict(dropped)


def collate(examples: list[Example], pad_id: int, device="cpu") -> dict:
    """Lay out [pad … prompt][completion … pad]; masks come from the lengths, since pad may be the same id as EOS.
    -> input_ids, attention_mask, position_ids [B, T]; completion_ids, completion_mask [B, C]."""
    width = max(len(example.prompt_ids) for example in examples)
    input_ids = torch.full((len(examples), width + max(len(example.completion_ids) for example in examples)), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, example in enumerate(examples):
        place = slice(width - len(example.prompt_ids), width + len(example.completion_ids))
        input_ids[i, place] = torch.tensor(example.prompt_ids + example.completion_ids)
        attention_mask[i, place] = 1
    batch = {"input_ids": input_ids, "attention_mask": attention_mask}
    batch["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    batch |= {"completion_ids": input_ids[:, width:], "completion_mask": attention_mask[:, width:].bool()}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def neutral_generation_config(tokenizer, **settings):
    """Sampling from p̂ itself: no top-k (`generate` defaults to 50), no nucleus, no penalty, stop at EOS only."""
    neutral = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    neutral |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return transformers.GenerationConfig(**neutral | {"pad_token_id": pad_token_id(tokenizer)} | settings)


def pad_token_id(tokenizer) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


@torch.no_grad()
def generate(model, tokenizer, prompts: list, n: int, max_new_tokens: int, seed: int | None, temperature=1.0) -> list:
    """n completions of each prompt (token ids) by `model.generate`; seed None means greedy.
    -> for each prompt, n lists of token ids, cut after the end-of-sequence token where there is one."""
    device = next(model.parameters()).device
    batch = collate([Example(0, ids, []) for ids in prompts], pad_token_id(tokenizer), device)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    how = {"do_sample": False, "temperature": 1.0} if seed is None else {"temperature": temperature}
    config = neutral_generation_config(tokenizer, max_new_tokens=max_new_tokens, num_return_sequences=n, **how)
    training = model.training
    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # a training run's state does not move
        torch.manual_seed(seed or 0)
        output = model.generate(**inputs, generation_config=config)
    model.train(training)
    eos, completions = tokenizer.eos_token_id, output[:, inputs["input_ids"].shape[1] :].tolist()
    completions = [ids[: ids.index(eos) + 1] if eos in ids else ids for ids in completions]
    return [completions[i : i + n] for i in range(0, len(completions), n)]


@torch.no_grad()
def sample_together(model, tokenizer, prompts: list, counts: list[int], max_new_tokens: int, seeds: list[int]) -> list:
    """counts[i] independent samples of prompts[i], for the price of their distinct beginnings: samples that are the
    same so far share a row, whose next token is drawn from a multinomial. -> a Counter of token ids of each prompt."""
    device, eos, rngs = next(model.parameters()).device, tokenizer.eos_token_id, [*map(np.random.default_rng, seeds)]
    batch = collate([Example(0, ids, []) for ids in prompts], pad_token_id(tokenizer), device)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    found, cache = [Counter() for _ in prompts], None
    rows, owners, counts = [()] * len(prompts), np.arange(len(prompts)), np.array(counts)  # of each row: ids, prompt, n
    for length in range(1, max_new_tokens + 1):
        output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        p = output.logits[:, -1].double().softmax(-1).cpu().numpy()  # [rows, V]
        p /= p.sum(-1, keepdims=True)
        draws = [rngs[i].multinomial(counts[owners == i], p[owners == i]) for i in np.unique(owners)]  # rows in order
        parents, tokens = (draws := np.concatenate(draws)).nonzero()
        rows = [(*rows[row], token) for row, token in zip(parents, tokens.tolist(), strict=True)]
        owners, counts = owners[parents], draws[parents, tokens]
        ended = (tokens == eos) | (length == max_new_tokens)
        for k in ended.nonzero()[0]:
            found[owners[k]][rows[k]] += int(counts[k])
        left = (~ended).nonzero()[0]
        if not len(left):
            break
        rows, owners, counts = [rows[k] for k in left], owners[left], counts[left]
        chosen, cache = torch.as_tensor(parents[left], device=device), output.past_key_values
        cache.batch_select_indices(chosen)
        mask = torch.nn.functional.pad(inputs["attention_mask"][chosen], (0, 1), value=1)
        last = torch.as_tensor(tokens[left], device=device)[:, None]
        inputs = {"input_ids": last, "attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
    return found


def read_answer(completion_ids: list[int], tokenizer, template: str) -> str | None:
    """The answer in a completion, or None: a completion that did not end by itself has none."""
    if not completion_ids or completion_ids[-1] != tokenizer.eos_token_id:
        return None
    text = tokenizer.decode(completion_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return TEMPLATES[template].extract(text)


def count_answers(completions: list, tokenizer, template: str) -> Counter:
    """{answer: how many of a problem's completions end in it}; under None, those that have none."""
    answers = Counter()
    for token_ids, count in Counter(tuple(one.token_ids) for one in completions).items():
        answers[read_answer(token_ids, tokenizer, template)] += count
    return answers


def seed_of(*parts) -> int:
    """A 31-bit seed from anything printable. Chunk j of a request uses seed_of(…) + 256 j: engines add a sample's
    number to the seed, so nearer seeds would share samples."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


# ---- Data: problems from JSON lines or from a hub --------------------------------------------------------------------
# Our field <- the names under which data sets carry it; the first that is there is taken.
COLUMNS = {"problem": ("problem", "Problem", "question"), "answer": ("answer", "Answer", "final_answer")}
COLUMNS |= {"solution": ("solution", "Solution"), "level": ("level", "Level")}
HUB_NAME = re.compile(r"[^./~][^/]*/[^/]*")  # owner/name, of a data set or of a model; no path


def load_problems(data: str, split: str, required: bool = True) -> list[dict]:
    """-> rows {"id", "source", "problem", "answer"} and, where known, "solution", "level" (an int).
    data: a folder with {split}.jsonl, a file, or a hub name. A missing split gives [] unless `required`. Bad rows end
    the script; but up to one empty answer in a thousand (MATH has two in 12,000) is left for `encode` to drop."""
    folder = Path(data).is_dir()
    path = Path(data) / f"{split}.jsonl" if folder else Path(data)
    if path.is_file():
        found = read_json_lines(path) if folder or required else []  # a file is no more than the required split
    elif folder:
        found = refuse(f"{path} does not exist: --data needs {split}.jsonl") if required else []
    elif HUB_NAME.fullmatch(data):
        found = read_hub(data, split, required)
    else:
        refuse(f"--data {data} is not a folder, a file of JSON lines or the name of a data set on the hub")
    rows, unanswered = [], []
    for i, (source, raw) in enumerate(found):
        row = {"id": i, "source": source}
        for field, names in COLUMNS.items():
            values = [str(raw[name]) for name in names if raw.get(name) is not None]
            row |= {field: values[0]} if values else {}
        for field in ("problem", "answer"):
            if not row.get(field, "").strip():
                told = f"{source}: field {field!r} is missing or empty; every row needs a problem and an answer"
                unanswered += [told] if field == "answer" and field in row else refuse(told)
        if "level" in row:
            row["level"] = int((re.findall(r"\d+", row["level"]) or [0])[0])
        rows.append(row)
    if len(unanswered) > len(rows) / 1000:
        refuse(unanswered[0])
    if required and not rows:
        refuse(f"{path}: there are no problems in it")
    return rows


def read_json_lines(path: Path) -> Iterator[tuple[str, dict]]:
    """-> ("file:line", object) for each line that is not blank."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:  # also text that is not UTF-8
            refuse(f"{path}:{number}: not JSON ({error}); each line must be one object")
        if not isinstance(value, dict):
            refuse(f"{path}:{number}: not a JSON object but {type(value).__name__}")
        yield f"{path}:{number}", value


def load_theorems(path: Path) -> list[dict]:
    """-> theorems as LeanDojo's benchmark has them, from a JSON list or an object a line: "url", "commit", "file_path",
    "full_name", "traced_tactics": [{"tactic", "state_before", …}], and what else is there; "source" is added."""
    if not path.is_file():
        refuse(f"{path} does not exist; LeanDojo Benchmark 4 is at https://zenodo.org/records/12740403")
    if path.suffix == ".jsonl":
        found = list(read_json_lines(path))
    else:
        try:
            found = [(f"{path}, theorem {i}", theorem) for i, theorem in enumerate(json.loads(path.read_bytes()), 1)]
        except (ValueError, TypeError) as error:
            refuse(f"{path}: not a JSON list of theorems ({first_line(error)})")
    for source, theorem in found:
        for field in ("url", "commit", "file_path", "full_name"):
            if not isinstance(theorem, dict) or not isinstance(theorem.get(field), str):
                refuse(f"{source}: field {field!r} is missing; a theorem has the fields of LeanDojo's benchmark")
        steps = theorem.get("traced_tactics", [])
        for step in steps if isinstance(steps, list) else [None]:
            if not isinstance(step, dict) or {"tactic", "state_before"} - step.keys():
                refuse(f"{source}: field 'traced_tactics' must list steps with 'tactic' and 'state_before', or be []")
    return [theorem | {"source": source} for source, theorem in found]


def read_hub(name: str, split: str, required: bool) -> list[tuple[str, dict]]:
    import datasets

    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # whatever went wrong is shown to the user, and the script ends
        why = f"data set {name} cannot be loaded ({first_line(error)}); is this machine online, and the name right?"
        refuse(f"{why} --data also takes a folder with train.jsonl and test.jsonl")
    if split not in splits:
        if not required:
            return []
        if len(splits) > 1 or split == "train":
            refuse(f"data set {name} has no split {split!r} but {sorted(splits)}")
        (split,) = splits  # AIME 2024 is there to be evaluated on, and has one split only, called train
    return [(f"{name}/{split}:{i + 1}", row) for i, row in enumerate(splits[split])]


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- Refill: which examples a step is made of (§5.1, App. B) ---------------------------------------------------------
# An optimizer step. ids: positions of its examples in their list, in stream order. candidates: how many were looked at,
# up to and with the last one used; later ones went back. values [candidates]: what `score` or `train` returned of each.
Step = namedtuple("Step", ["ids", "candidates", "values"])


class Refill:
    """Cuts the stream of candidates into steps of examples that matter (§5.1: "replaced with new training examples").
    A step is the first `batch_size` candidates that `accept` lets in under its weights, whatever the processes, the
    micro-batch and the way of computing. The stream is a fresh permutation each epoch and goes on right after the last
    candidate used. Accepted candidates that fill no step by the end of an epoch lead the next one (and are struck out
    of it further down); those of the last epoch make a short step.
    Either the candidates are scored without gradient first (each costs 1 + k·a forwards, a the share accepted, k the
    cost of forward and backward in forwards), or all are trained on straight, the rejected contributing zero (k). The
    cheaper way changes at a = (k-1)/k, and is chosen each round from the share seen in this step and the one before."""

    def __init__(
        self, size, batch_size, accept, seed, processes=1, micro_batch_size=8, backward_cost=3, lengths=None, tokens=0
    ):
        """accept: values [n] -> bool [n], None lets every one in unscored. backward_cost: k; infinite, all are scored;
        None, scoring is sampling, and all are. lengths, tokens: see `that_fit`; without lengths, all fit."""
        self.size, self.batch_size, self.accept, self.seed = size, batch_size, accept, seed
        self.processes, self.micro_batch_size, self.k = processes, micro_batch_size, backward_cost
        self.lengths, self.tokens = lengths, tokens
        self.mean_length = sum(map(sum, lengths)) / len(lengths) if lengths else 0
        self.epoch, self.position, self.order, self.leftovers = 0, 0, [], []
        self.steps, self.used = 0, 0  # of this epoch: steps made, examples in them
        self.recent = (1, 1)  # accepted, candidates of the step before

    def start_epoch(self, last: bool):
        self.epoch, self.position, self.last_epoch, self.steps, self.used = self.epoch + 1, 0, last, 0, 0
        generator = torch.Generator().manual_seed(seed_of(self.seed, "epoch", self.epoch))
        permutation = torch.randperm(self.size, generator=generator).tolist()
        self.order, self.leftovers = list(dict.fromkeys(self.leftovers + permutation)), []

    def state_dict(self) -> dict:
        """Its place in the stream, for JSON; `load_state_dict` goes on from there."""
        names = ("epoch", "position", "order", "leftovers", "steps", "used", "recent", "last_epoch")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict):
        vars(self).update(state)

    def next_step(self, score, train, discard) -> Step | None:
        """Compute the gradients of the next step; None at the end of the epoch.
        score(ids) -> values [len(ids)], without gradient.
        train(ids, room, count, chosen) -> values [len(ids)]: adds the gradients of the mean over `count` examples, from
            all `ids` if chosen, else from the first `room` accepted. The call that fills `room` is the step's last.
        discard() throws away the gradients added so far."""
        if self.position == len(self.order):
            return None
        values, trained, start = [], 0, self.position
        accepted = [] if self.accept else self.order[start : start + self.batch_size]
        self.position += len(accepted)
        while self.accept and len(accepted) < self.batch_size and self.position < len(self.order):
            room = self.batch_size - len(accepted)
            rate = (self.recent[0] + len(accepted) + 1) / (self.recent[1] + self.position - start + 1)
            straight = trained == len(accepted) and self.straight_pays(room, rate)
            ids = self.order[self.position : self.position + self.round_size(room, rate, straight)]
            if straight:
                ids = ids if len(ids) <= room else self.first_piece(ids)  # in order: the first are to get the room
                values.append(self.train_in_pieces(train, ids, room, self.batch_size, False))
            else:
                values.append(self.in_pieces(score, ids, scoring=True) if self.k else score(ids))
            kept = self.accept(values[-1]).nonzero().flatten().tolist()[:room]
            accepted += [ids[i] for i in kept]
            trained = len(accepted) if straight else trained
            self.position += kept[-1] + 1 if len(accepted) == self.batch_size else len(ids)
        candidates = self.position - start
        self.recent = (len(accepted), candidates) if candidates else self.recent
        if len(accepted) < self.batch_size:
            if trained:  # the share accepted fell so fast that a straight step was begun and cannot be filled
                discard()
                trained = 0
            if not self.last_epoch:
                self.leftovers = accepted
                return None
        if trained < len(accepted):
            room = len(accepted) - trained
            found = self.train_in_pieces(train, accepted[trained:], room, len(accepted), True)
            values += [] if self.accept else [found]
        self.steps, self.used = self.steps + bool(accepted), self.used + len(accepted)
        return Step(accepted, candidates, torch.cat(values)[:candidates]) if accepted else None

    def first_piece(self, ids, scoring=False):
        """What is computed at once; in scoring, without activations to keep, four times as many of average length."""
        size, tokens = self.micro_batch_size, self.tokens
        if scoring:
            size, tokens = 4 * size, 4 * min(tokens, size * self.mean_length)
        ids = ids[: self.processes * size]
        return that_fit(ids, self.lengths, tokens, self.processes) if self.lengths else ids

    def in_pieces(self, compute, ids, scoring=False):
        """compute(piece) of all pieces of `ids`. -> the values, in the order of `ids`. Of several pieces, each has like
        lengths, as it is padded to its longest (MATH in eights as they come: three times its tokens). The longest come
        first, so that what is too much for the memory shows in the first step."""
        places, found = list(range(len(ids))), []
        if self.lengths and len(self.first_piece(ids, scoring)) < len(ids):
            places.sort(key=lambda place: -sum(self.lengths[ids[place]]))
        left = [ids[place] for place in places]
        while left:
            piece = self.first_piece(left, scoring)
            found.append(compute(piece))
            left = left[len(piece) :]
        return torch.cat(found)[torch.tensor(places).argsort()] if len(found) > 1 else found[0]

    def train_in_pieces(self, train, ids, room, count, chosen):
        """`train` in pieces. Where there are several, all that is accepted has room: their order does not matter."""
        before = []

        def train_piece(piece):
            filled = 0 if not before else sum(map(len, before)) if chosen else int(self.accept(torch.cat(before)).sum())
            before.append(train(piece, room - filled, count, chosen))
            return before[-1]

        return self.in_pieces(train_piece, ids)

    def straight_pays(self, room, rate):
        """Where the rest of an epoch may not fill the step (expected less a standard deviation), score first."""
        if self.k is None or rate * self.k <= self.k - 1:
            return False
        expected = (len(self.order) - self.position) * rate
        return expected - math.sqrt(expected * (1 - rate)) >= room

    def round_size(self, room, rate, straight):
        """How many candidates to look at next: hardly ever more than the step will turn out to need (two standard
        deviations under the number expected), but no rounds so small that their number would cost more."""
        spread = 2 * math.sqrt(room * (1 - rate)) / rate
        if self.k is None:  # scoring is sampling, which wants to be one call: as many as nearly always will do
            wanted = math.ceil(room / rate + math.sqrt(2) * spread)  # √2: the rate is an estimate of as few candidates
            return min(wanted, 32 * self.batch_size)  # where hardly any was accepted so far: not all of the epoch
        wanted = math.ceil(max(room, room / rate - spread, 0.02 * self.batch_size / rate))
        one = self.processes * self.micro_batch_size
        if straight and room >= one and self.recent[1] >= one:  # the rate is known well enough not to look in between
            return room
        most = one if straight else max(4 * one, self.batch_size)
        return min(self.processes * math.ceil(wanted / self.processes), most)


def that_fit(ids: list[int], lengths: list[tuple[int, int]], tokens: int, processes: int) -> list[int]:
    """The first of `ids`: as many as make no more than `tokens` tokens a process with their padding, but at least one
    for each process. lengths: of prompt and completion, for each id."""
    prompt, completion = 0, 0
    for count, i in enumerate(ids):
        prompt, completion = max(prompt, lengths[i][0]), max(completion, lengths[i][1])
        if count >= processes and math.ceil((count + 1) / processes) * (prompt + completion) > tokens:
            return ids[:count]
    return ids


# ---- Grading: math-verify in child processes that can be killed ------------------------------------------------------
INTEGER = re.compile(r"-?[0-9]{1,18}")
RATIONAL = re.compile(r"(-?)(?:\\[dt]?frac\{(-?[0-9]{1,18})\}\{(-?[0-9]{1,18})\}|([0-9]{1,18})/([0-9]{1,18}))")
NUMBER = re.compile(r"-?[0-9][0-9,]*(\.[0-9]+)?")
BASED = re.compile(r"(\w+)_\{?([0-9]+)\}?")  # 1001_2, a number with its base
# A sum, difference or product of numbers left as it is (but for 3.2 x 10^5), a chain of equations, one with no unknown.
UNEVALUATED = re.compile(r"[0-9)}]\s*([-+*]|(\\cdot|\\times)(?!\s*10\s*\^))\s*[0-9(\\]|=.*=|^[^a-zA-Z]*=")


def plain(answer: str) -> str:
    """The answer without what carries no meaning: white space and $ around it, a dollar sign, a final full stop."""
    return answer.replace("\\$", "").strip("$ \n\t").removesuffix(".").strip()


def textual(answer: str) -> str:
    """A plain answer for comparison as a string: no \\text{} around it, no white space but between words or numbers."""
    answer = re.sub(r"\A\\text\{([^{]*)\}\Z", r"\1", answer)
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", " ".join(answer.split()))


def rational(answer: str) -> Fraction | None:
    """The value of an integer or a quotient of integers; None for whatever else."""
    if INTEGER.fullmatch(answer):
        return Fraction(answer)
    if not (found := RATIONAL.fullmatch(answer)):
        return None
    sign, *written = found.groups()
    above, below = (int(number) for number in written if number is not None)
    return Fraction(-above if sign else above, below) if below else None


def verdict_at_sight(gold: str, prediction: str) -> bool | None:
    """The verdict where it takes no algebra, or where math-verify is too lenient: it evaluates 28-29 (so that copying a
    problem would solve it), takes the last of a chain of equations, and drops a number's base. None: it may decide."""
    gold, prediction = plain(gold), plain(prediction)
    gold_based, based = (BASED.fullmatch(answer.replace(" ", "")) for answer in (gold, prediction))
    if based and (not gold_based or gold_based.groups() != based.groups()):
        return False
    if "$" in prediction or (NUMBER.fullmatch(gold) and UNEVALUATED.search(prediction)):  # $: several formulas
        return False
    numbers = rational(gold), rational(prediction)  # most of what is sampled
    if None not in numbers:
        return numbers[0] == numbers[1]
    return True if textual(gold) == textual(prediction) else None


def bound_memory(megabytes: int):
    """Runs first in each grading process, which may take so much memory from now on and no more."""
    import math_verify  # noqa: F401  (not in the time of the first answer)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the trainer finishes its step, with these
    logging.disable(logging.CRITICAL)  # math-verify logs every text that it cannot read
    resource.setrlimit(resource.RLIMIT_DATA, (megabytes << 20, megabytes << 20))


def is_right(gold: str, prediction: str) -> bool:
    """math-verify's verdict. The texts are only ever parsed as LaTeX: its other parser evaluates Python. Its own time
    limits use signals and can hang; they are off, and this runs in a process that is killed when it takes too long."""
    from math_verify import LatexExtractionConfig, parse, verify

    answers = [parse(f"${plain(one)}$", [LatexExtractionConfig()], parsing_timeout=None) for one in (gold, prediction)]
    return bool(verify(*answers, timeout_seconds=None))


class Grader:
    """The one judge of answers, for p̂, rewards and evaluation alike: math-verify, cached by (gold, prediction).
    seconds: a pair that takes longer is wrong. megabytes: memory of one grading process. max_characters: a longer
    prediction is wrong unread. What is graded is untrusted: it can cost no more than these."""

    def __init__(self, workers: int = 2, seconds: float = 3.0, megabytes: int = 2048, max_characters: int = 2000):
        if find_spec("math_verify") is None:
            refuse("math-verify is not installed, so answers cannot be graded: pip install -r requirements.txt")
        import pebble

        self.seconds, self.max_characters = seconds, max_characters
        self.verdicts: dict[tuple[str, str | None], bool] = {}
        context = multiprocessing.get_context("forkserver")  # quick to replace a killed process; no threads, no GPU
        context.set_forkserver_preload(["common", "math_verify"])
        self.pool = pebble.ProcessPool(workers, context=context, initializer=bound_memory, initargs=[megabytes])
        if not self.pool.schedule(is_right, ["\\frac{1}{2}", "0.5"], timeout=120).result():
            raise RuntimeError("math-verify does not take 0.5 for 1/2: a broken installation, not wrong answers")

    def grade(self, pairs: list[tuple[str, str | None]]) -> list[bool]:
        """Verdicts of (gold, prediction) pairs, in their order; a prediction of None is wrong."""
        futures = {}
        for gold, prediction in dict.fromkeys(pair for pair in pairs if pair not in self.verdicts):
            unread = prediction is None or len(prediction) > self.max_characters
            verdict = False if unread else verdict_at_sight(gold, prediction)
            if verdict is None:
                futures[gold, prediction] = self.pool.schedule(is_right, [gold, prediction], timeout=self.seconds)
            else:
                self.verdicts[gold, prediction] = verdict
        for pair, future in futures.items():
            # An exception is a text that breaks the parser, a time-out or a process that it killed: not a right answer.
            self.verdicts[pair] = future.exception() is None and future.result()
        if not self.pool.active:  # then the exceptions above were not the texts'
            raise RuntimeError("the grading processes cannot be started any more")
        return [self.verdicts[pair] for pair in pairs]

    def count_right(self, golds: list[str], answers: list[Counter]) -> list[int]:
        """How many samples of each problem are right, in whatever way they write it. answers: see `count_answers`."""
        pairs = list(zip(golds, answers, strict=True))
        self.grade([(gold, answer) for gold, counts in pairs for answer in counts])
        return [sum(counts[one] for one in counts if self.verdicts[gold, one]) for gold, counts in pairs]

    def close(self):
        self.pool.stop()
        self.pool.join()


# ---- Coverage: pass@N from samples and exactly -----------------------------------------------------------------------
def pass_at_n(n: int, c, k: int) -> np.ndarray:
    """The unbiased estimate 1 - C(n-c, k) / C(n, k) of pass@k (Eq. 2) from n samples of which c (an int or an array)
    were right. Exact products, no binomials: right for n to 1e5. k > n is refused: no unbiased estimate exists."""
    if k > n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples: draw at least {k}")
    i = np.arange(n)  # C(n-c, k) / C(n, k) = Π_{i=0}^{c-1} (n-k-i) / (n-i): one table for all c by a running product
    all_wrong = np.concatenate([[1.0], np.cumprod(np.maximum(n - k - i, 0) / (n - i))])
    return 1 - all_wrong[np.asarray(c)]


def sampled_summary(accelerator, sampler, tokenizer, grader, examples, golds, args) -> dict:
    """pass@1/16/64 and the mean share of the most frequent answer (Table 3, Figure 3), from args.eval_n samples.
    golds: the right answers of the examples. grader: the main process's."""
    n, seeds = args.eval_n, [seed_of(args.seed, "evaluation", example.id) for example in examples]
    found = sampler.generate([example.prompt_ids for example in examples], n, args.max_new_tokens, seeds)

    def measure():
        answers = [count_answers(completions, tokenizer, args.template) for completions in found]
        right = grader.count_right(golds, answers)
        modes = [max([0, *(counts[answer] for answer in counts if answer is not None)]) for counts in answers]
        coverage = {f"pass@{k}": float(pass_at_n(n, right, k).mean()) for k in (1, 16, 64) if k <= n}
        return coverage | {"mode_confidence": float(np.mean(modes)) / n}

    return on_main(accelerator, measure)


def bootstrap_interval(values, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap of the mean over problems: how much it would move with another draw of the test set."""
    values = np.asarray(values, dtype=float)
    picks = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[picks].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mean_and_interval(values: np.ndarray) -> dict:
    low, high = bootstrap_interval(values)
    return {"pass": float(values.mean()), "low": low, "high": high}


def exact_pass_at_n(log_p, n: int) -> np.ndarray:
    """C^N = 1 - (1-p)^N = e^(-ℓ_DCO^N) of each problem, without any sample. It counts the reference answer alone: a
    lower bound where other strings are right as well. log_p: [problems]."""
    return dco_loss(torch.as_tensor(log_p, dtype=torch.float64), n).neg().exp().numpy()


def batch_that_fits(examples: list[Example], max_new_tokens: int, tokenizer, batch_size: int) -> int:
    """At most batch_size sequences, fewer where logits would pass 2^28 numbers (4 GB with copies) or the batch 2^16
    tokens (8 GB of keys and values for Llama-3-8B)."""
    prompt = max((len(example.prompt_ids) for example in examples), default=1)
    completion = max([max_new_tokens, *(len(example.completion_ids) for example in examples)])
    return max(1, min(batch_size, 2**28 // ((completion + 1) * len(tokenizer)), 2**16 // (prompt + completion)))


@torch.no_grad()
def log_probs_of(model, examples: list[Example], accelerator, pad_id: int, batch_size: int) -> torch.Tensor:
    """log p̂ of each example's completion by teacher forcing, split over the processes: float32 [len(examples)]."""
    found = []
    for i in range(0, len(examples), batch_size * accelerator.num_processes):
        part = examples[i : i + batch_size * accelerator.num_processes]
        batch = collate(split_evenly(part, accelerator), pad_id, accelerator.device)
        found.append(gather_in_order(completion_log_probs(model, batch), len(part), accelerator))
    return torch.cat(found).cpu()


def greedy_completions(model, tokenizer, examples: list[Example], accelerator, max_new_tokens: int, batch_size: int):
    """-> each example with its completion replaced by the greedy one, in order, on every process."""
    live = LiveModel(accelerator, model, tokenizer, batch_size)
    found = live.generate([example.prompt_ids for example in examples], 1, max_new_tokens)
    return [Example(e.id, e.prompt_ids, one.token_ids) for e, (one,) in zip(examples, found, strict=True)]


def exact_summary(model, tokenizer, examples, accelerator, max_new_tokens: int, batch_size: int, ns) -> dict:
    """Exact pass@N for N of ns, and the mean confidence p̂(y_greedy|x) of the greedy completions, over `examples`."""
    pad_id = pad_token_id(tokenizer)
    batch_size = batch_that_fits(examples, max_new_tokens, tokenizer, batch_size)
    log_p = log_probs_of(model, examples, accelerator, pad_id, batch_size)
    greedy = greedy_completions(model, tokenizer, examples, accelerator, max_new_tokens, batch_size)
    confidence = log_probs_of(model, greedy, accelerator, pad_id, batch_size).exp()
    coverage = {f"pass@{n}": float(exact_pass_at_n(log_p, n).mean()) for n in ns}
    return coverage | {"greedy_confidence": confidence.mean().item()}


def colours_for(count: int):
    """Colour-blind safe: Okabe and Ito's where they suffice, else steps of cividis."""
    from matplotlib import colormaps

    palette = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
    return palette[:count] if count <= len(palette) else [colormaps["cividis"](i / (count - 1)) for i in range(count)]


def new_figure(panels: int, columns: int, share: bool = False):
    """-> (figure, the axes of its panels in reading order). share: the y axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = math.ceil(panels / columns)
    size = (5.6, 3.6) if panels == 1 else (2.6 * columns, 2.6 * rows) if share else (3.2 * columns, 2.8 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharey=share)
    for axis in axes.flat[panels:]:
        axis.set_visible(False)
    return figure, axes.flat[:panels]


def coverage_panel(curves: dict, x: str, y: str, **more) -> dict:
    """For `draw_panels`, of {label: {N: {"pass", "low", "high"}}}: percent over N, with intervals."""
    points = {
        label: [(n, *(100 * value[name] for name in ("pass", "low", "high"))) for n, value in curve.items()]
        for label, curve in curves.items()
    }
    return {"x": x, "y": y, "curves": points, "log_base": 4, "y_limits": (0, 100), **more}


def draw_panels(panels: list[dict], path: Path) -> list[Path]:
    """A panel: "x", "y" (names of its axes), "curves" {label: [(x, y, low, high)]}, low and high None where there is no
    interval; and, if wanted, "title", "log_base" (of x), "y_scale", "y_limits", "zero" (a line there), "envelope" (the
    largest y at each x as well), "highlight" (the label of the one curve that is not to be faint)."""
    figure, axes = new_figure(len(panels), min(len(panels), 3))
    for axis, panel in zip(axes, panels, strict=True):
        curves = panel["curves"]
        xs = [x for x, *_ in next(iter(curves.values()))]
        if panel.get("envelope"):
            largest = [max(y for _, y, *_ in points) for points in zip(*curves.values(), strict=True)]
            axis.plot(xs, largest, color="0.8", linewidth=7, solid_capstyle="round", label="Pareto envelope")
        for i, (colour, (label, points)) in enumerate(zip(colours_for(len(curves)), curves.items(), strict=True)):
            own, ys, lows, highs = zip(*points, strict=True)
            look = {"color": colour, "alpha": 1 if panel.get("highlight") in (None, label) else 0.3}
            marker = "osD^vPX"[i % 7] if len(own) <= 20 else None
            axis.plot(own, ys, **look, marker=marker, markersize=3.5, linewidth=1.4, label=label)
            if lows[0] is not None:
                axis.fill_between(own, lows, highs, color=colour, alpha=0.12 * look["alpha"], linewidth=0)
        if base := panel.get("log_base"):
            axis.set_xscale("log", base=base)
            ticks = [x for x in xs if math.log(x, base).is_integer()]
            axis.set_xticks(*(ticks, [f"{x:g}" for x in ticks]) if base == 4 else (axis.get_xticks(),))
        elif len(xs) <= 8:
            axis.set_xticks(xs)
        axis.set(xlabel=panel["x"], ylabel=panel["y"], yscale=panel.get("y_scale", "linear"))
        axis.set(ylim=panel.get("y_limits"))
        axis.set_title(panel.get("title", ""), fontsize=8)
        axis.grid(alpha=0.25)
        if panel.get("zero"):
            axis.axhline(0, color="0.4", linewidth=0.8)
        if len(curves) > 1 or next(iter(curves)):
            axis.legend(fontsize=7)
    return save_figure(figure, path)


def save_figure(figure, path: Path) -> list[Path]:
    from matplotlib import pyplot

    paths = [path, path.with_suffix(".pdf")]
    for one in paths:
        figure.savefig(one, dpi=150)
    pyplot.close(figure)
    return paths


# ---- Accelerate: processes, models, what is split over them ----------------------------------------------------------
PAPERS = "meta-llama/Meta-Llama-3-8B", "nlile/hendrycks-MATH-benchmark"  # --model and --data
EMBEDDED = "tiny_llama", "arithmetic"


def defaults_for_this_machine(model: str | None, data: str | None, papers=PAPERS, embedded=EMBEDDED) -> tuple[str, str]:
    """What --model and --data mean when left out: the paper's on a GPU, the embedded ones without."""
    cuda, taken = torch.cuda.is_available(), []
    if model is None:
        model = papers[0] if cuda else relative(EXAMPLES / embedded[0])
        taken.append(f"--model {model}")
    if data is None:
        data = relative(EXAMPLES / embedded[1]) if is_example(model) or not cuda else papers[1]
        taken.append(f"--data {data}")
    if taken and os.environ.get("RANK", "0") == "0":
        print(f"{'CUDA found' if cuda else 'no CUDA'}: taking {' and '.join(taken)}", flush=True)
    return model, data


def relative(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def is_example(model: str) -> bool:
    """Whether it is a model of examples/ or was trained from one."""
    return base_of(model).startswith("examples/")


def base_of(model: str) -> str:
    """The model with which a checkpoint's training began; any other model is its own."""
    path = Path(model).resolve()
    own = str(path.relative_to(EXAMPLES.parent)) if path.is_relative_to(EXAMPLES) else model
    return read_record(model).get("base", own)


def read_record(checkpoint: str) -> dict:
    """What training wrote about its checkpoint: template, max_new_tokens, n_prime, data, base; {} for other models."""
    path = Path(checkpoint) / "dco.json"
    try:
        return {**json.loads(path.read_bytes())} if path.is_file() else {}
    except (ValueError, TypeError) as error:
        refuse(f"{path}: not a JSON object ({error}): copy the checkpoint anew, or take this file away to do without")


def zero_config(stage: int, clip: float, micro_batch_size: int, offload: bool) -> dict:
    """The whole DeepSpeed configuration: gradients and optimizer states (stage 2), or weights as well (stage 3), are
    split over the processes. On GPUs the weights are bf16, and their float32 masters are among the optimizer states.
    offload: with stage 3, gradients and optimizer states are in the main memory, where the update is made."""
    cuda = torch.cuda.is_available()
    offloaded = {"offload_optimizer": {"device": "cpu", "pin_memory": cuda}} if offload else {}
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,  # it wants one; nothing here depends on it
        "gradient_accumulation_steps": 1,  # `backward` says which call is a step's last one
        "gradient_clipping": clip,
        "bf16": {"enabled": cuda},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW stays: the same update, and no compiler needed
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True} | offloaded,
    }


def make_accelerator(
    report_to="none", out=None, zero=0, clip=1.0, micro_batch_size=1, patience_minutes=60, offload=False
):
    """The Accelerator, and a check that as many processes met as were launched: apart, they would train apart.
    patience_minutes: how long a process waits for the others before it gives up."""
    cuda, launched = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", 1))
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)  # it would divide every loss once more
    # cuDNN's attention (PyTorch 2.11 to 2.13 prefer it on Hopper) makes NaN gradients where the length is 64 beyond a
    # multiple of 128 and a row is masked, as all left-padded batches have: pytorch/pytorch#196678.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns, in the middle of the progress bar
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # a model that one trains on a CPU is so small that threads get in its way
    for name, wanted in ((report_to, report_to != "none"), ("deepspeed", zero > 0)):
        if wanted and find_spec(name) is None:  # accelerate would go on without a tracker
            refuse(f"{name} is asked for but not installed: pip install {name}")
    if zero and "RANK" not in os.environ:
        refuse(f"--zero {zero} splits a model over processes: start them with accelerate launch or torchrun")
    settings = {"log_with": None if report_to == "none" else report_to, "project_dir": out}
    settings |= {"mixed_precision": "bf16" if cuda else "no", "cpu": not cuda and not zero}  # cpu rules DeepSpeed out
    if zero:
        settings["deepspeed_plugin"] = accelerate.DeepSpeedPlugin(zero_config(zero, clip, micro_batch_size, offload))
    if launched > 1:  # without it, DeepSpeed's processes on a CPU each believe that they are alone
        together = {"backend": "nccl" if cuda else "gloo", "timeout": timedelta(minutes=patience_minutes)}
        settings["kwargs_handlers"] = [accelerate.InitProcessGroupKwargs(**together)]
    accelerator = accelerate.Accelerator(**settings)
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED"):
        refuse(f"accelerate is set up for {kind}: these scripts take plain DDP, or --zero 2 or 3")
    if accelerator.num_processes != launched:
        raise RuntimeError(f"{launched} processes were launched, but this one sees {accelerator.num_processes}")
    if launched > 1:  # over Gloo: waiting in NCCL would keep the GPUs busy, which engines need
        on_main.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(minutes=2 * patience_minutes))
    return accelerator


def backward(accelerator, model, loss: torch.Tensor, last: bool):
    """Add the gradient of `loss`. In the last call of a step DDP averages over the processes; DeepSpeed, which has been
    averaging all along, clips and makes the update inside of that call."""
    accelerator.sync_gradients = last
    with accelerator.trigger_sync_in_backward(model) if last else nullcontext():
        accelerator.backward(loss)


def discard_gradients(accelerator, optimizer):
    """Forget what `backward` has added since the last step."""
    accelerator.sync_gradients = True  # or zero_grad would do nothing
    optimizer.zero_grad()
    if accelerator.distributed_type.value == "DEEPSPEED":
        zero = accelerator.deepspeed_engine_wrapped.engine.optimizer
        zero.zero_grad()
        if accelerator.state.deepspeed_plugin.zero_stage == 2:  # which adds them up here, in float32 and in bf16
            for name in ("all_grad_tensors", "averaged_gradients"):
                setattr(zero, name, dict.fromkeys(getattr(zero, name)))


def end(accelerator):
    """Close trackers and leave the process group."""
    accelerator.wait_for_everyone()
    # Gloo's thread needs the interpreter's lock to let go of the last collective's tensors, and the group's destructor
    # holds that lock while it waits for the thread. Without this pause a run can hang at its end.
    time.sleep(0.2)
    accelerator.end_training()


def load_tokenizer(model: str):
    transformers.logging.set_verbosity_error()  # its warnings are about flags that we set on purpose
    transformers.logging.disable_progress_bar()
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # each state of a tied head would be warned of
    check_model(model)
    tokenizer = from_hub_or_folder(transformers.AutoTokenizer, model)
    if tokenizer.eos_token_id is None:
        refuse(f"{model}: the tokenizer has no end-of-sequence token, which has to close every completion")
    return tokenizer


def load_config(model: str):
    """The model's configuration, dropout off: p is that of the model which is sampled, in every forward of a step."""
    config = from_hub_or_folder(transformers.AutoConfig, model)
    config.update({name: 0.0 for name, value in vars(config).items() if "drop" in name and isinstance(value, float)})
    return config


def longest_context(model: str) -> int:
    """How many tokens the model has positions for."""
    return getattr(load_config(model), "max_position_embeddings", None) or sys.maxsize


def load_model(model: str, tokenizer, dtype=torch.float32, seed: int = 0, accelerator=None, **settings):
    """-> (model, whether it was initialised from scratch because its folder holds no weights).
    accelerator: needed under ZeRO-3 only, where pretrained weights are split over the processes as they are read."""
    config, scratch = load_config(model), not check_model(model)
    if scratch:
        torch.manual_seed(seed)
        split = accelerator.state.deepspeed_plugin if accelerator else None
        if split:  # initialised in shares, each process would draw other weights: they are split afterwards
            transformers.integrations.unset_hf_deepspeed_config()
        loaded = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        if split:
            split.set_deepspeed_weakref()
    else:
        settings |= {"config": config, "dtype": dtype, "use_safetensors": True}
        loaded = from_hub_or_folder(transformers.AutoModelForCausalLM, model, **settings)
    loaded.generation_config = neutral_generation_config(tokenizer)
    return loaded, scratch


def check_model(model: str) -> bool:
    """Refuse what is no model. -> whether it has weights: not a folder with a configuration only; hub names have."""
    folder = Path(model)
    if not folder.is_dir():
        return bool(HUB_NAME.fullmatch(model)) or refuse(f"{model}: there is no such folder")
    if not (folder / "config.json").is_file():
        refuse(f"{model}: the folder has no config.json, so it is not a Hugging Face checkpoint")
    if any(folder.glob("*.safetensors")):
        return True
    for other in [*folder.glob("*.bin"), *folder.glob("*.pt*"), *folder.glob("*.index.json")]:
        refuse(f"{model} holds {other.name} but no *.safetensors: convert the weights, pickles are not loaded")
    return False


def from_hub_or_folder(kind, model: str, **settings):
    try:
        return kind.from_pretrained(model, **settings)
    except (OSError, ValueError, SafetensorError) as error:  # gated, missing, offline, broken
        if Path(model).is_dir():
            refuse(f"{model} cannot be loaded: {first_line(error)}")
        why = f"{model} is no folder here and cannot be fetched from the hub. If it is gated, accept its licence on its"
        refuse(f"{why} page and run `hf auth login`; if this machine is offline, give a folder. ({first_line(error)})")


def split_evenly(items: list, accelerator) -> list:
    """This process's share: every so many-th item, the last one repeated so that all processes do the same work."""
    end = math.ceil(len(items) / accelerator.num_processes) * accelerator.num_processes
    places = range(accelerator.process_index, end, accelerator.num_processes)
    return [items[min(i, len(items) - 1)] for i in places]


def gather_in_order(values: torch.Tensor, count: int, accelerator) -> torch.Tensor:
    """The inverse of `split_evenly` for one value an item: [share] on each process -> [count] on all of them."""
    by_process = accelerator.gather(values.detach()).view(accelerator.num_processes, -1)
    return by_process.T.reshape(-1)[:count]


def on_main(accelerator, compute, *inputs):
    """compute(*inputs) on the main process, once all have come so far; its result on all. What it raises ends all."""
    if accelerator.num_processes == 1:
        return compute(*inputs)
    torch.distributed.barrier(on_main.group)
    outcome = [None, True]  # the result, and whether there is none
    try:
        outcome = [compute(*inputs), False] if accelerator.is_main_process else outcome
    except Exception:
        torch.distributed.broadcast_object_list(outcome, 0, on_main.group)
        raise
    torch.distributed.broadcast_object_list(outcome, 0, on_main.group)
    if outcome[1]:
        raise SystemExit(1)  # the main process says why
    return outcome[0]


def process_group(store, name: str, device: str, rank: int, size: int, minutes: float):
    """A group beside the default one, of processes that meet at `store`: NCCL for "cuda", Gloo for "cpu"."""
    store, timeout = torch.distributed.PrefixStore(name, store), timedelta(minutes=minutes)
    if device == "cpu":
        return torch.distributed.ProcessGroupGloo(store, rank, size, timeout)
    options = torch.distributed.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return torch.distributed.ProcessGroupNCCL(store, rank, size, options)


# ---- Files: output folders and checkpoints ---------------------------------------------------------------------------
RUN_FILES = ("args.json", "metrics.jsonl", "epochs.jsonl", "state", "epoch-*", "step-*")


def check_out(args):
    """Refuse to write into a run that is there already, unless it is to be replaced or resumed, or nothing written."""
    out, resumed = args.out, args.resume and (args.out / "args.json").is_file()
    if args.overwrite and args.resume:
        refuse("--overwrite begins anew and --resume goes on: choose one of them")
    if out.exists() and not out.is_dir():
        refuse(f"--out {out} is a file")
    found = [path for name in RUN_FILES for path in out.glob(name)]
    if found and not (args.overwrite or resumed or args.dry_run):
        refuse(f"--out {out} holds a run already ({found[0].name}): choose another folder, --resume or --overwrite")
    for path in found if args.overwrite else []:
        if path.name not in RUN_FILES and not (path / "dco.json").is_file() and path.suffix != ".partial":
            refuse(f"--out {out}: {path.name} is no checkpoint, and --overwrite would not keep it: move it away")
    ancestor = next(path for path in out.absolute().parents if path.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        refuse(f"--out {out}: nothing can be written to {ancestor}")


def make_folder(out: Path):
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--out {out} cannot be made: {error.strerror}")


def start_out(out: Path, args: dict):
    """Remove what an earlier run left in `out` and nothing else (`check_out` has asked), unless it is resumed; write
    args.json."""
    make_folder(out)
    if args["resume"] and (out / "args.json").exists():
        return
    for old in [path for name in (*RUN_FILES, "engine-*.log") for path in out.glob(name)]:
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink(missing_ok=True)
    write_whole(out / "args.json", json.dumps(args, indent=2, default=str) + "\n")


def write_whole(path: Path, text: str):
    """A file of that name is always a whole one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.rename(path)


def append_json(path: Path, line: dict):
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def read_whole_lines(path: Path) -> list[dict]:
    """What `append_json` has written; a last line that was cut short by a kill is removed."""
    if not path.exists():
        return []
    with open(path, "r+b") as file:
        whole = file.read().rpartition(b"\n")[0]
        file.truncate(len(whole) + bool(whole))
    return [line for _, line in read_json_lines(path)]


def fingerprint(checkpoint: str) -> list | str:
    """What tells a checkpoint's weights from others: the size and the last MiB of each file, wherever the folder is."""
    found = []
    for path in sorted(Path(checkpoint).glob("*.safetensors")):
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (1 << 20)))
            found.append((path.name, size, hashlib.sha256(file.read()).hexdigest()))
    return found or checkpoint


def save_checkpoint(accelerator, model, tokenizer, folder: Path, record: dict):
    """An ordinary Hugging Face folder, plus dco.json with `record` (template, max_new_tokens, …), which evaluation
    reads. It is written beside its place and renamed, so that a folder of that name is always a whole one."""
    state = accelerator.get_state_dict(model)  # all processes: stage 3 gathers parameter by parameter into the first
    if accelerator.is_main_process:
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        unwrapped = accelerator.unwrap_model(model)
        unwrapped.generation_config = neutral_generation_config(tokenizer)
        if accelerator.mixed_precision == "bf16":
            cast = {}  # tied weights stay one tensor
            state = {name: cast.setdefault(t.data_ptr(), t.to(torch.bfloat16)) for name, t in state.items()}
        with writing(folder):
            unwrapped.save_pretrained(partial, state_dict=state)
            if accelerator.mixed_precision == "bf16":
                config = copy.deepcopy(unwrapped.config)
                config.dtype = torch.bfloat16  # what was written is that of the float32 weights
                config.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            (partial / "dco.json").write_text(json.dumps(record) + "\n")
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    accelerator.wait_for_everyone()


# ---- Training: what the four scripts do alike around their losses ----------------------------------------------------
def size_text(count: float) -> str:
    unit = next(unit for unit in (2**40, 2**30, 2**20) if count >= unit or unit == 2**20)
    return f"{count / unit:.1f} {'MGT'[(unit.bit_length() - 21) // 10]}iB"


def bytes_of_activations(config, dtype, tokens: int, checkpointing: bool) -> int:
    """What autograd keeps of a sequence until its backward, logits apart: counted on models of one and two layers whose
    tensors have no storage. With checkpointing: the layers' inputs, and all of one layer."""

    def kept(layers, checkpointing):
        config.num_hidden_layers, found = layers, {}
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        ids = torch.zeros(1, tokens, dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": ids + 1, "position_ids": ids.cumsum(1)}
        batch |= {"completion_ids": ids[:, :1], "completion_mask": ids[:, :1] == 0}

        def keep(tensor):
            found[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            completion_log_probs(model, batch)
        return sum(tensor.untyped_storage().nbytes() for key, tensor in found.items() if key not in own)

    config, layers = copy.deepcopy(config), config.num_hidden_layers
    with FakeTensorMode():
        one, two = kept(1, False), kept(2, False)
        if not checkpointing:
            return one + (layers - 1) * (two - one)
        return one + (layers - 1) * (kept(2, True) - kept(1, True))


def plan_memory(args, examples: list[Example], checkpoints: int, scored=0, completion=0, engine=0.0):
    """Say what the run will take of each GPU and of the disk, before anything is loaded. Where it was left open, choose
    --zero; turn on --gradient-checkpointing where it does not fit without. --dry-run ends here. checkpoints: how many
    will be written. scored: so many times the tokens are computed at once without gradient. completion: longer than the
    examples' may be. engine: vLLM's share of a GPU. Sets args.tokens_that_fit: how many, with padding, a process may
    compute at once."""
    if args.offload and args.zero not in (None, 3):
        refuse(f"--offload goes with --zero 3, not {args.zero}")
    cuda, count = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", 1))
    here = psutil.virtual_memory().total / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    memory = torch.cuda.get_device_properties(0).total_memory if cuda else here
    if args.dry_run and args.dry_run != "here":
        if not (asked := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", args.dry_run)):
            refuse(f"--dry-run takes GPUS x GB, as in 8x80, or nothing; not {args.dry_run}")
        cuda, count, memory = True, int(asked[1]), int(asked[2]) << 30
    config, dtype = load_config(args.model), torch.bfloat16 if cuda else torch.float32
    with torch.device("meta"):
        n = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    longest = max(len(one.prompt_ids) + max(completion, len(one.completion_ids)) for one in examples)
    # Of each logit in training: the model's, its float32 copy, and on the way back three more of those at a time.
    logits, unknown = config.vocab_size * max(20, 10 * scored), ""

    def states(zero):
        split, byte = count if zero else 1, 2 if zero and cuda else 4
        found = {"weights": n * byte / (count if zero == 3 else 1), "gradients": n * 4 / split}
        found["optimizer states"] = n * (12 if zero else 8) / split  # two moments; with ZeRO float32 masters as well
        # DeepSpeed has two buckets of up to 5e8 numbers, and in stage 3 gathers up to 1e9 weights at a time; DDP copies
        # the gradients to reduce them, and autocast makes bf16 copies of the weights.
        found["buffers"] = 2 * byte * min(n, 5e8) + byte * min(n, 1e9) * (zero == 3)
        if not zero:
            found["buffers"] = n * (4 * (count > 1) + 2 * cuda)
        if args.offload:
            found |= {"gradients": 0, "optimizer states": 0}
        return found | {"engine": engine * memory}

    @cache
    def activations(checkpointing):
        nonlocal unknown
        try:
            return bytes_of_activations(config, dtype, longest, checkpointing)
        except Exception as error:  # some other architecture: an estimate is not worth a run
            unknown = f", activations unknown ({first_line(error)[:100]})"
            return 0

    def tokens_left(zero, checkpointing):
        left = 0.95 * memory - sum(states(zero).values())
        return int(left / (activations(checkpointing) / longest + logits))

    if args.zero is None:
        args.zero = 3 if args.offload else 0 if count == 1 or not cuda else 2 if tokens_left(2, True) >= longest else 3
    if tokens_left(args.zero, args.gradient_checkpointing) < longest:
        args.gradient_checkpointing = True
    tokens = tokens_left(args.zero, args.gradient_checkpointing)
    elsewhere = args.dry_run not in (None, "here")  # where the size of the main memory is not known
    enough = tokens >= longest and (not args.offload or elsewhere or 16 * n / count < here)
    tokens = max(longest, tokens)
    wanted = getattr(args, "tokens_per_micro_batch", 0) or args.micro_batch_size * longest
    found, most = states(args.zero), min(tokens, max(wanted, longest))
    found["activations"] = activations(args.gradient_checkpointing) * most / longest
    found["logits"] = logits * most
    state, checkpoint = n * (12 if not args.zero else 14 if cuda else 16), n * (2 if cuda else 4)
    disk = 2 * state + checkpoints * checkpoint
    free = shutil.disk_usage(next(path for path in args.out.absolute().parents if path.exists())).free
    if os.environ.get("RANK", "0") == "0":
        sizes = ", ".join(f"{name} {size_text(size)}" for name, size in found.items() if size)
        offloaded = f"\n          and {size_text(16 * n / count)} of the main memory a process" if args.offload else ""
        recomputed = ", with gradient checkpointing" if args.gradient_checkpointing else ""
        print(
            f"  memory  {count} x {size_text(memory)}{' of GPU' * cuda}, ZeRO-{args.zero}{recomputed}, "
            f"about {size_text(sum(found.values()))} of each: {'fits' if enough else 'DOES NOT FIT'}"
            f"{'' if enough or args.offload else ' (--offload takes less)'}\n"
            f"          {sizes}{unknown}{offloaded}\n"
            f"          at most {most:,} tokens at once; the longest example has {longest:,}\n"
            f"  disk    two states of {size_text(state)}, {checkpoints} checkpoints of {size_text(checkpoint)}: "
            f"{size_text(disk)}, {size_text(free)} free{'' if disk < free else ', NOT ENOUGH'}",
            flush=True,
        )
    if args.dry_run:
        raise SystemExit(0 if enough and disk < free else 1)
    args.tokens_that_fit = tokens


def prepare_training(args, tokenizer, accelerator):
    """-> (model, optimizer, the model in words)."""
    # What each process has decided by the memory of its own GPU, they all do.
    decided = torch.tensor([[args.zero, args.gradient_checkpointing, -args.tokens_that_fit]], device=accelerator.device)
    zero, checkpointing, tokens = accelerator.gather(decided).max(0).values.tolist()
    if zero != args.zero:
        refuse(f"the GPUs differ, and so do the ZeRO stages that they would need: give --zero {zero}")
    args.gradient_checkpointing, args.tokens_that_fit = bool(checkpointing), -tokens
    # Without ZeRO the weights are float32 and computed with in bf16; with it, DeepSpeed keeps the float32 masters.
    dtype = torch.bfloat16 if args.zero and accelerator.device.type == "cuda" else torch.float32
    model, scratch = load_model(args.model, tokenizer, dtype, args.seed, accelerator)
    model.train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    args.parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())  # ds_numel: split by stage 3
    how = {"weight_decay": args.weight_decay} | ({"fused": True} if args.offload else {})  # ten times as fast on a CPU
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, tuple(args.betas), **how)
    origin = "from scratch, since its folder holds no weights" if scratch else "pretrained"
    about = f"{args.model}: {args.parameters:,} parameters, {origin}, {accelerator.device}"
    return *accelerator.prepare(model, optimizer), about


def begin_run(args, accelerator, loss: str, model: str, data: str, step: str, micro_batch: str):
    """Say what is about to happen, and make the run's folder. The texts: see the scripts."""
    processes, most = accelerator.num_processes, f", at most {args.max_steps} steps" if args.max_steps else ""
    accelerator.print(
        f"{loss}\n"
        f"  model   {model}\n"
        f"  data    {args.data}: {data}\n"
        f"  steps   {step} each, from {processes} process{'es' if processes > 1 else ''} "
        f"{f'(ZeRO-{args.zero}) ' if args.zero else ''}x micro-batches of {micro_batch}, {args.epochs} epochs{most}\n"
        f"  AdamW   lr {args.lr:g} after {args.warmup_steps} steps, betas {tuple(args.betas)}, "
        f"weight decay {args.weight_decay:g}, clip {args.clip:g}, seed {args.seed}\n"
        f"  out     {args.out}, with a state to --resume from every {args.save_every} steps"
    )
    if is_example(args.model):
        accelerator.print("  (the settings of the embedded experiment, not the paper's, unless given by flags)")
    if accelerator.is_main_process:
        start_out(args.out, vars(args))
    if args.report_to != "none":
        accelerator.init_trackers("dco", config={name: str(value) for name, value in vars(args).items()})
    accelerator.wait_for_everyone()


def end_epoch(args, accelerator, refill: Refill, step: int, started: float, measured: dict):
    """A line of epochs.jsonl, one on the terminal. measured: pass@N and confidence on the test split, or nothing."""
    summary = {"epoch": refill.epoch, "step": step, "steps": refill.steps, "used": refill.used}
    summary |= {"candidates": refill.position, "carried_over": len(refill.leftovers)}
    summary |= {"seconds": time.perf_counter() - started} | measured
    if accelerator.is_main_process:
        append_json(args.out / "epochs.jsonl", summary)
        shown = "".join(f"  {name} {100 * value:.1f}" for name, value in measured.items() if "pass@" in name)
        confidences = [f"  {name.replace('_', ' ')} {measured[name]:.3f}" for name in measured if "confidence" in name]
        rejected = refill.position - refill.used - len(refill.leftovers)
        counted = f"{refill.steps} steps on {refill.used} of {refill.position} candidates, {rejected} rejected"
        counted += f", {len(refill.leftovers)} carried over" if refill.leftovers else ""
        shown = "  |".join(["", shown + "".join(confidences)] if shown else [""])
        tqdm.write(f"epoch {refill.epoch}/{args.epochs}: {counted}{shown}")
    accelerator.log({name: value for name, value in summary.items() if name != "epoch"}, step=step)


# ---- State: a run goes on after a kill at any instant ----------------------------------------------------------------
# What --resume may change: where a run is kept, how far it goes, how much it does at once. All else must be the same.
FREE = ["out", "overwrite", "resume", "save_every", "grace", "patience", "dry_run", "report_to", "show_every"]
FREE += ["tokens_that_fit", "max_steps", "micro_batch_size", "tokens_per_micro_batch", "gradient_checkpointing"]
FREE += ["gpu_memory", "gpus_per_engine"]


def check_resume(args, examples: list[Example]):
    """Note in `args` how many processes and which examples there are; refuse to resume a run that had others, or other
    arguments."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(np.array([example.id, *example.prompt_ids, -1, *example.completion_ids]).tobytes())
    args.processes, args.digest = int(os.environ.get("WORLD_SIZE", 1)), digest.hexdigest()
    path = args.out / "args.json"
    if args.resume and path.is_file():
        now, then = json.loads(json.dumps(vars(args), default=str)), json.loads(path.read_text())
        for name in now.keys() - FREE:
            if now[name] != then.get(name):
                own = {"digest": "a digest of the examples in --data", "processes": "the number of processes"}
                named = own.get(name, f"--{name.replace('_', '-')}")
                refuse(f"--resume: {named} was {then.get(name)}, as {path} says, and is {now[name]} now")


class NotWritten(RuntimeError):
    """A state or a checkpoint that could not be written, most likely since the disk is full."""


@contextmanager
def writing(folder: Path):
    """What goes wrong in writing `folder` becomes one clear error."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if is_of_the_group(error):
            raise
        free = shutil.disk_usage(folder.parent).free
        why = f"{folder} cannot be written ({first_line(error)[:200]}); the disk has {size_text(free)} left"
        raise NotWritten(why) from error


def is_of_the_group(error: BaseException) -> bool:
    """Whether it is another process of the group that failed, or that has not come to a collective in time."""
    told = re.search(r"gloo|NCCL|Connection (closed|reset)|Broken pipe|[Tt]imed? ?out waiting", str(error))
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and bool(told))


class TrainingState:
    """All that a run needs to go on: weights, optimizer and random states as accelerate and DeepSpeed save them, the
    place in the stream, counters. It is written to <out>/state/step-<k>.partial and renamed when it is whole; only then
    the one before is removed. What ends a run before its time is told here as well, once for all its processes."""

    def __init__(self, args, accelerator, refill: Refill):
        self.args, self.accelerator, self.refill = args, accelerator, refill
        self.folder, self.step, self.saved = args.out / "state", 0, None
        self.signal, self.saving, self.leaving, self.abandoned, self.evaluating = 0, False, False, False, False
        atexit.register(self.exit_as_told)  # before the engines, so that it comes after they have been shut down
        if accelerator.distributed_type.value == "DEEPSPEED":
            from deepspeed.runtime.zero.config import ZeroStageEnum

            # Python 3.11.2 and its like pickle a member by way of getattr, which `load` does not let in.
            ZeroStageEnum.__reduce_ex__ = lambda stage, protocol: (ZeroStageEnum, (stage.value,))

    def states(self) -> list[Path]:
        """The whole ones, the newest last. There are two for a moment, or after a kill in that moment."""
        return sorted(self.folder.glob("step-*[0-9]"), key=lambda path: int(path.name[5:]))

    def restore(self) -> tuple[int, int, str]:
        """With --resume, return to the last state, if there is one. -> its step, how many steps were clipped, the last
        checkpoint."""
        seen = torch.tensor([float((self.args.out / "args.json").is_file())], device=self.accelerator.device)
        if not self.accelerator.gather(seen).all():  # all know: who waits for one that has left may wait for long
            refuse("not all processes see the --out of the main process: name the same on all nodes, on a shared disk")
        states = self.states() if self.args.resume else []
        clipped, checkpoint = 0, "none"
        if states:
            self.accelerator.print(f"resuming from {states[-1]}", flush=True)
            self.step, clipped, checkpoint, place = json.loads((states[-1] / "place.json").read_text())
            self.refill.load_state_dict(place)
            self.load(states[-1])
            self.saved = self.step
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.remove_unfinished()
            (self.folder / "ended").unlink(missing_ok=True)
            self.folder.mkdir(exist_ok=True)
            for name, field, last in (("metrics", "step", self.step), ("epochs", "epoch", self.refill.epoch - 1)):
                path = self.args.out / f"{name}.jsonl"
                lines = [json.dumps(line) + "\n" for line in read_whole_lines(path) if line[field] <= last]
                if path.exists():
                    write_whole(path, "".join(lines))
        self.accelerator.wait_for_everyone()
        return self.step, clipped, checkpoint

    def remove_unfinished(self):
        """What was being written when a run ended."""
        for left in [*self.args.out.glob("*.partial"), *self.folder.glob("*.partial")]:
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

    def load(self, folder: Path):
        """By unpickling tensors and DeepSpeed's few own classes, and nothing else."""
        if self.accelerator.distributed_type.value != "DEEPSPEED":
            return self.accelerator.load_state(folder)
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        engine = self.accelerator.deepspeed_engine_wrapped.engine
        # mmap: or each process would hold its part of the state twice.
        engine.checkpoint_engine.load = partial(torch.load, weights_only=True, mmap=True)
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            self.accelerator.load_state(folder)

    def save(self, step: int, clipped: int, checkpoint):
        """Called on all processes."""
        self.step = step
        if self.saved == step:
            return
        self.saving, folder, main = True, self.folder / f"step-{step}", self.accelerator.is_main_process
        unfinished = folder.with_name(folder.name + ".partial")
        with writing(folder):
            if main:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.accelerator.save_state(unfinished)
            self.accelerator.wait_for_everyone()
            if main:
                place = [step, clipped, str(checkpoint), self.refill.state_dict()]
                (unfinished / "place.json").write_text(json.dumps(place))
                for path in filter(Path.is_file, unfinished.rglob("*")):
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())  # a node may go down as well
                unfinished.rename(folder)
                for old in self.states()[:-1]:
                    shutil.rmtree(old)
            self.accelerator.wait_for_everyone()
        self.saved, self.saving = step, False

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, from the one under way. Until `end_run`, SIGTERM and SIGINT (Ctrl-C) let a step
        end, if it does so within --grace seconds, and what else ends the run is told by `tell`."""
        reading, self.written = os.pipe()
        os.set_blocking(self.written, False)
        threading.Thread(target=self.wait_for_signals, args=[reading], daemon=True).start()
        numbers = (signal.SIGTERM, signal.SIGINT)
        self.handlers = {number: signal.signal(number, self.leave_if_abandoned) for number in numbers}
        signal.set_wakeup_fd(self.written)  # is told of a signal also while the main thread waits in a collective
        sys.excepthook = self.tell
        for epoch in range(max(1, self.refill.epoch), self.args.epochs + 1):
            if self.refill.epoch < epoch:
                self.refill.start_epoch(last=epoch == self.args.epochs)
            self.evaluating = False
            yield epoch

    def end_run(self):
        sys.excepthook = sys.__excepthook__
        signal.set_wakeup_fd(-1)
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        os.close(self.written)  # ends the thread that reads

    def end_step(self, step: int, clipped: int, checkpoint):
        """Save where --save-every says so, or where a signal has come to any of the processes, which then all leave."""
        self.step = step
        if step % self.args.save_every == 0:
            self.save(step, clipped, checkpoint)
        number = self.accelerator.gather(torch.tensor([self.signal], device=self.accelerator.device)).max().item()
        self.leaving = number > 0
        if self.leaving:
            self.save(step, clipped, checkpoint)
            self.say(f"stopped by {signal.Signals(number).name} after step {step}")
            end(self.accelerator)
            raise SystemExit(128 + number)  # as if killed by it: a scheduler is not to take it for completion

    def end_epoch(self, step: int, clipped: int, checkpoint):
        """Save; what comes now, until the next epoch, can be done again from here and need not be waited for."""
        self.save(step, clipped, checkpoint)
        self.evaluating = True

    def leave_if_abandoned(self, number, frame):
        if self.abandoned:
            raise SystemExit(128 + self.signal)

    def exit_as_told(self):
        """Ray makes exit code 1 of every SystemExit that comes while it is waited for."""
        if self.abandoned:
            self.kill(128 + self.signal)

    def wait_for_signals(self, reading):
        while told := os.read(reading, 1):
            if told[0] in (signal.SIGTERM, signal.SIGINT) and not self.signal:
                self.signal = told[0]
                after(0 if self.evaluating else self.args.grace, self.abandon)
        os.close(reading)

    def abandon(self):
        """Leave the step as it is, unless it has ended and the state is being written."""
        if self.saving or self.leaving:
            return after(1, self.abandon)
        self.abandoned, name = True, signal.Signals(self.signal).name
        what = "the evaluation was" if self.evaluating else f"step {self.step + 1} took more than --grace and was"
        self.say(f"stopped by {name}: {what} abandoned")
        after(10, self.kill, 128 + self.signal)
        os.kill(os.getpid(), self.signal)  # to `leave_if_abandoned`, if the main thread is not stuck in a collective

    def tell(self, kind, error, trace):
        """What ends the script by an exception ends here (sys.excepthook)."""
        after(20, self.kill, 1)  # the interpreter may wait for a group that is no more
        why = f"{kind.__name__}: {first_line(error)[:300]}"
        if is_of_the_group(error):
            why = "a process of the group has died, or has kept the others waiting for more than --patience "
            why += f"{self.args.patience:g} minutes ({first_line(error)[:200]})"
        elif kind is NotWritten:
            why = first_line(error)
        else:
            sys.__excepthook__(kind, error, trace)
        if kind is torch.OutOfMemoryError:
            why += ". A smaller micro-batch, --gradient-checkpointing or a higher --zero take less memory"
        self.say(f"error: step {self.step + 1}: {why}")
        self.remove_unfinished()  # here all processes do so: the last one to come is the last one that wrote anything

    def say(self, why: str):
        """One clear message for all processes: from the first that has something to say."""
        states = self.states()
        kept = f"the last state is {states[-1]}" if states else "no state was written so far"
        told = f"{why}; {kept}. The same command with --resume goes on from there"
        try:
            with open(self.folder / "ended", "x") as file:
                file.write(told + "\n")
        except FileExistsError:
            return
        except OSError as error:  # where nothing can be written, each process says it
            told += f" ({error.strerror})"
        print(f"\n{told}", file=sys.stderr, flush=True)

    def kill(self, code: int):
        """Leave no process behind."""
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def after(seconds: float, call, *inputs):
    timer = threading.Timer(seconds, call, inputs)
    timer.daemon = True
    timer.start()


# ---- Engines: what samples, in training and in evaluation ------------------------------------------------------------
# token_ids: they end with the end-of-sequence token, or else it was the limit that stopped them. log_prob: the engine's
# (of a LiveModel None), to be compared only: p for DCO is always the trainer's.
Completion = namedtuple("Completion", ["token_ids", "log_prob"])


class LiveModel:
    """Samples by `model.generate`: slower than an engine, but nothing to install and no weights to hand over."""

    def __init__(self, accelerator, model, tokenizer, sequences=512):
        """sequences: how many a process computes at once, fewer where they would hold more than 2^16 tokens."""
        self.accelerator, self.tokenizer, self.sequences = accelerator, tokenizer, sequences
        self.model = accelerator.unwrap_model(model)

    def generate(self, prompts, n, max_new_tokens: int, seeds=None, temperature=1.0) -> list[list[Completion]]:
        """n completions of each prompt, on every process. n: an int, or one a prompt (at temperature 1, one process).
        seeds: one a prompt (see `seed_of`), None is greedy."""
        if not isinstance(n, int):
            return self._generate_counts(prompts, n, max_new_tokens, seeds)
        longest = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens
        fits, processes = max(1, min(self.sequences, 2**16 // longest)), self.accelerator.num_processes
        size = max(1, min(fits // n, math.ceil(len(prompts) / processes)))
        batches = [range(i, min(i + size, len(prompts))) for i in range(0, len(prompts), size)]
        jobs, found = [(places, start) for places in batches for start in range(0, n, fits)], []
        for first in range(0, len(jobs), processes):  # all make the same calls: ZeRO-3 needs them together
            part = jobs[first : first + processes]
            ((places, start),) = split_evenly(part, self.accelerator)
            seed = None if seeds is None else seeds[places[0]] + start
            how = (min(fits, n - start), max_new_tokens, seed, temperature)
            drawn = generate(self.model, self.tokenizer, [prompts[i] for i in places], *how)
            for completions in chain(*accelerate.utils.gather_object([drawn])[: len(part)]):
                found += [Completion(token_ids, None) for token_ids in completions]
        return [found[i : i + n] for i in range(0, len(found), n)]  # only a prompt alone has several jobs

    def _generate_counts(self, prompts, counts, max_new_tokens, seeds):
        config = self.model.config  # how much memory a token's keys and values take, in all layers
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token = 2 * config.num_hidden_layers * heads * size * next(self.model.parameters()).element_size()
        longest = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens
        most = max(1, min(2**31 // (token * longest), 2**28 // config.vocab_size))  # rows, if no two begin alike
        found, pieces = [[] for _ in prompts], [(i, j) for i, n in enumerate(counts) for j in range(0, n, most)]
        while pieces:
            part, total = [], 0
            while pieces and total + (n := min(most, counts[pieces[0][0]] - pieces[0][1])) <= most:
                part.append((*pieces.pop(0), n))
                total += n
            asked = ([prompts[i] for i, _, _ in part], [n for *_, n in part], max_new_tokens)
            drawn = sample_together(self.model, self.tokenizer, *asked, [seeds[i] + first for i, first, _ in part])
            for (i, _, _), tally in zip(part, drawn, strict=True):
                found[i] += [Completion(list(ids), None) for ids, count in tally.items() for _ in range(count)]
        return found

    def update_weights(self, model):
        """The weights that it samples from are the model's own."""

    def shut_down(self):
        """There is nothing to end."""


class VLLMEngines:
    """vLLM engines, each in a Ray actor: on the GPUs of the training processes, which never import vLLM (App. B), in
    the cluster RAY_ADDRESS or one started here. Methods without an underscore are called on every process."""

    def __init__(
        self, accelerator, checkpoint, tokenizer, max_length, logs, model=None, memory=0.3, gpus=1, patience_minutes=60
    ):
        """model: to take the weights from, else the checkpoint's. max_length: tokens of prompt and completion. logs:
        folder of engine-<i>.log. memory: share of each GPU's. gpus: of an engine. patience_minutes: limit of a wait."""
        self.accelerator, self.eos, self.logs = accelerator, tokenizer.eos_token_id, Path(logs).absolute()
        self.engines, self.cuda, self.patience_minutes = [], accelerator.device.type == "cuda", patience_minutes
        checkpoint = os.path.abspath(checkpoint) if Path(checkpoint).is_dir() else checkpoint  # Ray's folder is another
        settings = {"model": checkpoint, "dtype": "bfloat16" if self.cuda else "float32", "max_model_len": max_length}
        settings |= {"skip_tokenizer_init": True, "worker_extension_cls": f"{__name__}.WeightReceiver"}
        settings |= {"load_format": "dummy" if model else "auto", "enforce_eager": not self.cuda}
        settings["generation_config"] = "vllm"  # not the checkpoint's, which may ask for top-k or a temperature
        if self.cuda:
            settings |= {"gpu_memory_utilization": memory, "tensor_parallel_size": gpus}
        else:  # a prompt cut in two would need a seeded generator that can go back, which a CPU's cannot
            settings |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(4096, max_length)}
        on_main(accelerator, self._spawn, settings, gpus)
        if model:
            self._connect(model)
            self.update_weights(model)

    def _spawn(self, settings, gpus):
        self.ray = ray = start_ray()
        atexit.register(self.shut_down)  # also after an exception or Ctrl-C
        there = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
        count = sum(found // gpus for found in there) if self.cuda else 1
        if count == 0:
            raise RuntimeError(f"Ray finds {there} GPUs by node and an engine is to have {gpus}: --gpus-per-engine")
        actor = ray.remote(Engine).options(num_cpus=0, num_gpus=gpus if self.cuda else 0)
        self.engines = [actor.remote(self.logs / f"engine-{i}.log", settings) for i in range(count)]
        self.gpus = list(chain(*self._wait([engine.ask.remote("gpu") for engine in self.engines], "starting")))

    def _wait(self, calls, doing):
        """What the engines answer; if one fails or is too slow, an error that says at what, with its last lines."""
        try:
            return self.ray.get(calls, timeout=60 * self.patience_minutes)
        except self.ray.exceptions.GetTimeoutError:
            why = f"no answer of the engines within {self.patience_minutes} minutes while {doing}"
        except self.ray.exceptions.RayError as error:
            why = f"an engine failed while {doing}: {str(error).strip().splitlines()[-1][:300]}"
        for log in sorted(self.logs.glob("engine-*.log")):
            lines = log.read_text(errors="replace").splitlines()[-15:]
            why += "\n".join([f"\n--- the end of {log}", *(line[:300] for line in lines)])
        raise RuntimeError(why)

    def generate(self, prompts, n, max_new_tokens: int, seeds=None, temperature=1.0) -> list[list[Completion]]:
        """n completions of each prompt, on every process. n: an int, or one a prompt. seeds: one a prompt (see
        `seed_of`), None is greedy. More than 256 of a prompt are drawn in pieces: sample i of a piece has seed + i."""
        if seeds is None:
            seeds, temperature = [0] * len(prompts), 0.0
        counts = [n] * len(prompts) if isinstance(n, int) else n
        asked = zip(prompts, counts, seeds, strict=True)
        requests = [(prompt, min(256, n - i), seed + i) for prompt, n, seed in asked for i in range(0, n, 256)]
        found = on_main(self.accelerator, self._sample, requests, max_new_tokens, temperature)
        return [list(islice(iterator, count)) for iterator in [iter(found)] for count in counts]

    def _sample(self, requests, max_new_tokens, temperature):
        found, how, count = [None] * len(requests), (max_new_tokens, temperature, self.eos), len(self.engines)
        calls = [engine.generate.remote(requests[i::count], *how) for i, engine in enumerate(self.engines)]
        for i, drawn in enumerate(self._wait(calls, "sampling")):
            found[i::count] = drawn
        return list(chain(*found))

    def _connect(self, model):
        """Lay out a buffer through which all weights pass, a few at a time. An engine on a GPU with a training process
        opens that process's buffer (CUDA IPC); to others the main process broadcasts it (NCCL; on CPUs Gloo)."""
        # Not named_parameters(): it leaves out a head that is tied to the embedding, and the engine would keep its own.
        weights = self.accelerator.unwrap_model(model).state_dict(keep_vars=True)
        shapes = {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in weights.items()}
        room = max(1 << 28, *map(math.prod, shapes.values()))
        self.layout, end = [[]], 0  # chunks that fill the buffer: (name, shape, first, last)
        for name, shape in shapes.items():
            if end + math.prod(shape) > room:
                self.layout, end = [*self.layout, []], 0
            self.layout[-1].append((name, shape, end, end := end + math.prod(shape)))
        size, dtype = max(chunk[-1][-1] for chunk in self.layout), torch.bfloat16 if self.cuda else torch.float32
        self.buffer = torch.empty(size, dtype=dtype, device=self.accelerator.device)
        handle = [(WeightReceiver.gpu(self.buffer), reduce_tensor(self.buffer)[1])] if self.cuda else []
        on_main(self.accelerator, self._meet, dict(accelerate.utils.gather_object(handle)))

    def _meet(self, handles):
        size, minutes = 1 + len(self.gpus), self.patience_minutes  # of the group: this process has rank 0
        apart = [1 + i for i, gpu in enumerate(self.gpus) if gpu not in handles]
        host, each = self.ray.util.get_node_ip_address(), len(self.gpus) // len(self.engines)
        self.store = torch.distributed.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        where = (host, self.store.port, size, self.buffer.numel(), handles, apart, minutes)
        calls = [engine.ask.remote("connect", 1 + i * each, *where) for i, engine in enumerate(self.engines)]
        self.control = process_group(self.store, "control", "cpu", 0, size, minutes)
        kind, self.data = self.buffer.device.type, None
        if apart:
            self.data = process_group(self.store, "data", kind, 0, 1 + len(apart), minutes)
        self._wait(calls, "connecting")

    def update_weights(self, model):
        """From now on, sample with the weights that `model` has now."""
        weights, whole = self.accelerator.unwrap_model(model).state_dict(keep_vars=True), nullcontext
        if any(hasattr(weight, "ds_id") for weight in weights.values()):  # ZeRO-3 has split them over the processes
            from deepspeed.runtime.zero.partition_parameters import GatheredParameters as whole
        for i, chunk in enumerate(self.layout):
            for name, shape, first, last in chunk:
                with whole([weights[name]]):
                    self.buffer[first:last].view(shape).copy_(weights[name].detach())
            if self.cuda:
                torch.cuda.synchronize()
            on_main(self.accelerator, self._hand_over, i)

    def _hand_over(self, i):
        if i == 0:
            self.calls = [engine.ask.remote("receive_weights", self.layout) for engine in self.engines]
        try:
            if self.data:
                self.data.broadcast(self.buffer, 0).wait()
            self.control.barrier().wait()  # the buffer is filled
            self.control.barrier().wait()  # and read: it may be filled anew
        except RuntimeError:
            self._wait(self.calls, "taking over weights")  # knows more, if it was an engine that failed
            raise
        if i == len(self.layout) - 1:
            self._wait(self.calls, "taking over weights")

    def shut_down(self):
        """End the engines, and Ray where it was started here."""
        if self.engines and self.ray.is_initialized():  # if not, they have ended, and `kill` would start Ray anew
            for engine in self.engines:
                self.ray.kill(engine)
            self.ray.shutdown()
        self.engines = []


os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # a thread that still asks Ray for something at the end starts none anew


def start_ray():
    """-> the module, connected to the cluster RAY_ADDRESS or to one that is started here and ends with this process."""
    import ray

    if not ray.is_initialized():
        path = os.pathsep.join(filter(None, [str(EXAMPLES.parent), os.getcwd(), os.environ.get("PYTHONPATH")]))
        variables = {"PYTHONPATH": path, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # no process between the actor and its engine
        variables["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB
        network = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HF_HOME", "HF_TOKEN", "HF_HUB_OFFLINE")
        for name in (*network, "GITHUB_ACCESS_TOKEN", "CACHE_DIR", "DISABLE_REMOTE_CACHE", "TACTIC_CPU_LIMIT"):
            variables |= {name: os.environ[name]} if name in os.environ else {}
        address = os.environ.get("RAY_ADDRESS", "local")
        local = {"include_dashboard": False, "object_store_memory": 1 << 30} if address == "local" else {}
        before = signal.getsignal(signal.SIGTERM)
        ray.init(address, log_to_driver=False, logging_level="error", runtime_env={"env_vars": variables}, **local)
        # Ray has put its own there. A launcher ends this process: see to the rest first.
        signal.signal(signal.SIGTERM, (lambda *_: sys.exit(143)) if before is signal.SIG_DFL else before)
    return ray


class Engine:
    """What runs in a Ray actor: one vLLM engine."""

    def __init__(self, log: Path, settings: dict):
        log.parent.mkdir(parents=True, exist_ok=True)
        for stream in (1, 2):  # all that is said in here goes to the log, of which `_wait` shows the end
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name, None)  # the training processes' group is not its own
        from vllm import LLM

        self.llm = LLM(**settings)

    def ask(self, method, *inputs):
        """Call a method of `WeightReceiver` in the worker of each GPU."""
        answers = self.llm.collective_rpc(method, args=inputs)
        self.llm.reset_prefix_cache()  # its keys and values may be of other weights
        return answers

    def generate(self, requests, max_new_tokens, temperature, eos):
        """-> for each request (prompt, n, seed), its n Completions."""
        from vllm import SamplingParams

        how = {"max_tokens": max_new_tokens, "temperature": temperature, "logprobs": 0, "detokenize": False}
        how |= {"ignore_eos": True, "stop_token_ids": [eos]}  # not those that the model's configuration may name
        params = [SamplingParams(n=n, seed=seed, **how) for _, n, seed in requests]
        prompts = [{"prompt_token_ids": prompt} for prompt, _, _ in requests]
        outputs = self.llm.generate(prompts, params, use_tqdm=False) if requests else []
        drawn = [sorted(output.outputs, key=lambda one: one.index) for output in outputs]
        return [[Completion(list(one.token_ids), one.cumulative_logprob) for one in group] for group in drawn]


class WeightReceiver:
    """Becomes a part of vLLM's worker, of which an engine has one on each of its GPUs."""

    def gpu(self):
        """The name of the GPU that `self` is on (also a tensor), the same in all processes; None on a CPU."""
        return str(torch.cuda.get_device_properties(self.device).uuid) if self.device.type == "cuda" else None

    def connect(self, rank, host, port, size, numel, handles, apart, minutes):
        rank, self.data = rank + self.rank, None
        self.store = torch.distributed.TCPStore(host, port, timeout=timedelta(minutes=minutes))
        self.control = process_group(self.store, "control", "cpu", rank, size, minutes)
        if rank in apart:
            self.buffer = torch.empty(numel, dtype=self.model_config.dtype, device=self.device)
            rank = 1 + apart.index(rank)
            self.data = process_group(self.store, "data", self.device.type, rank, 1 + len(apart), minutes)
        else:
            handle = handles[self.gpu()]  # its 6 is the GPU's number, which is another one in this process
            self.buffer = rebuild_cuda_tensor(*handle[:6], self.device.index, *handle[7:])

    def receive_weights(self, layout):
        def arriving():
            for chunk in layout:
                if self.data:
                    self.data.broadcast(self.buffer, 0).wait()
                self.control.barrier().wait()  # the buffer is filled
                copies = [(name, self.buffer[first:last].view(shape).clone()) for name, shape, first, last in chunk]
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
                self.control.barrier().wait()  # and read: it may be filled anew
                yield from copies

        try:
            self.reload_weights(weights_iterator=arriving())  # layer by layer: a CPU's weights are packed once more
        except BaseException:
            self.control = self.data = None  # closes the connection, or the trainer would wait at the next barrier
            raise


def choose_engine(asked: str) -> str:
    """auto is vLLM where it can be imported."""
    installed = find_spec("vllm") is not None
    if asked == "vllm" and not installed:
        refuse("--engine vllm: vLLM is not installed (see requirements.txt); --engine transformers does without")
    return asked if asked != "auto" else "vllm" if installed else "transformers"


def spawn_engines(args, accelerator, tokenizer, max_length: int, model):
    """What samples for a training script, by its flags --engine, --gpu-memory, --gpus-per-engine."""
    if args.engine == "transformers":
        return LiveModel(accelerator, model, tokenizer)
    gpus = args.gpus_per_engine
    if gpus is None:  # so many that bf16 weights take 60 % of its share at most. App. B: 2 of 80 GB for 8B
        cuda = accelerator.device.type == "cuda"
        room = 0.6 * args.gpu_memory * torch.cuda.get_device_properties(0).total_memory if cuda else math.inf
        gpus = next(count for count in (1, 2, 4, 8) if 2 * args.parameters / count <= room or count == 8)
    how = (args.gpu_memory, gpus, args.patience)
    return VLLMEngines(accelerator, args.model, tokenizer, max_length, args.out, model, *how)
