"""What the scripts share, in sections that can be copied one by one:

    the loss                 dco_factor, dco_loss, completion_log_probs (each stands alone and needs only torch)
    tokens and templates     prompts, completions, the collator, sampling
    data                     problems from JSON lines or from a hub
    refill                   which examples a step is made of (§5.1, App. B)
    grading                  math-verify in child processes that can be killed
    coverage                 pass@N from samples and exactly, with intervals
    accelerate               processes, models, what is split over them
    files                    output folders and checkpoints

Symbols as in the paper: x a problem, y its answer, p = p̂(y|x) the probability that the model gives to the whole answer,
end-of-sequence token included; N samples at test time, N' in the training loss.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

EXAMPLES = Path(__file__).resolve().parent / "examples"


def refuse(message: str):
    """End the script over something that is the user's to mend: one line on stderr, once a machine, and exit 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------------------------------


def dco_loss(log_p: torch.Tensor, n: float) -> torch.Tensor:
    """ℓ_DCO^N = -log(1 - (1-p)^N), Eq. 3, from log p alone. N = 1 is cross-entropy.

    log_p: any shape, values in [-inf, 0]: the log-probability of each whole answer. n: N >= 1. Returns log_p's shape
    and dtype, computed in float64; the gradient is -dco_factor(log_p, n).
    """

    def log1mexp(x):  # log(1 - e^x) for x < 0, with all its digits at both ends; neither side of `where` makes a NaN
        near_zero = x > -0.693
        far = torch.where(near_zero, -1.0, x)
        return torch.where(near_zero, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(far)))

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
    1 for N = 1 and as p -> 0, 0 at p = 1 for N > 1. To weight a loss with it, detach it.
    """

    def log1mexp(x):  # log(1 - e^x) for x < 0, with all its digits at both ends; neither side of `where` makes a NaN
        near_zero = x > -0.693
        far = torch.where(near_zero, -1.0, x)
        return torch.where(near_zero, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(far)))

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

    batch holds (see `collate`) input_ids, attention_mask, position_ids [B, T] and completion_ids, completion_mask
    [B, C], laid out as [pad … prompt][completion … pad]: all completions start at the same column, so the model is
    asked for the logits of the last C + 1 columns only, and a vocabulary of 128k stays out of memory.
    """
    width = batch["completion_ids"].shape[1]
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        logits_to_keep=width + 1,
        use_cache=False,
    ).logits
    logits = logits[:, -width - 1 : -1].float()  # [B, C, V]; column t predicts completion token t
    chosen = logits.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    token_log_probs = chosen - logits.logsumexp(-1)  # [B, C]
    return token_log_probs.masked_fill(~batch["completion_mask"], 0.0).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Tokens and templates
# ---------------------------------------------------------------------------------------------------------------------


class Template(NamedTuple):
    """How a row of the data becomes a prompt and a completion, and how an answer is read out of a completion."""

    prompt: str
    completion: str
    extract: Callable[[str], str | None]


def extract_boxed(text: str) -> str | None:
    """The content of the last \\boxed{…} with balanced braces, or None."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for i in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : i].strip() or None
    return None


def extract_r1(text: str) -> str | None:
    """The answer of a completion in exactly the format asked for, `…</think> … <answer>…</answer>`, else None."""
    if [text.count(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")] != [0, 1, 1, 1]:
        return None
    after_thought = text.partition("</think>")[2]
    _, opened, rest = after_thought.partition("<answer>")
    answer, closed, _ = rest.partition("</answer>")
    return answer.strip() or None if opened and closed else None


TEMPLATES = {
    # §4: the answer alone, without any reasoning.
    "direct": Template("{problem}\n", "{answer}", lambda text: text.strip() or None),
    # §5.4: the golden solution; its last \boxed{} is the answer.
    "cot": Template("{problem}\n", "{solution}", extract_boxed),
    # App. B: the prompt of DeepSeek-R1, which GRPO is trained with.
    "r1": Template(
        "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The "
        "Assistant first thinks about the reasoning process in the mind and then provides the User with the answer. "
        "The reasoning process is enclosed within <think> </think> and the answer is enclosed within <answer> "
        "</answer> tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here </answer>.\n"
        "User: {problem}\nAssistant: <think>",
        " {solution} </think> <answer> {answer} </answer>",
        extract_r1,
    ),
}


@dataclass
class Example:
    """A tokenised row: the ids go to training and to sampling as they are, and are never made from a string again."""

    id: int  # the row's number in its file
    prompt_ids: list[int]
    completion_ids: list[int]  # closed by the end-of-sequence token

    def __len__(self):
        return len(self.prompt_ids) + len(self.completion_ids)


def encode(rows: list[dict], tokenizer, template: str, max_length: int) -> tuple[list[Example], dict[str, int]]:
    """Tokenise prompt and completion apart. -> (examples, {why: how many rows were dropped})."""
    form, examples, dropped = TEMPLATES[template], [], Counter()
    for row in rows:
        if "{solution}" in form.completion and not row.get("solution", "").strip():
            dropped["without a solution"] += 1
            continue
        if "{answer}" in form.completion and not row["answer"].strip():
            dropped["without an answer"] += 1
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
        example = Example(row["id"], prompt_ids, completion_ids + [tokenizer.eos_token_id])
        if len(example) > max_length:  # dropped, never cut: an example without its end would teach not to end
            dropped["too long"] += 1
        else:
            examples.append(example)
    return examples, dict(dropped)


def collate(examples: list[Example], pad_id: int, device="cpu") -> dict:
    """Lay out [pad … prompt][completion … pad]; masks come from the lengths, since pad may be the same id as EOS.

    -> input_ids, attention_mask, position_ids [B, T]; completion_ids, completion_mask [B, C].
    """
    prompt_width = max(len(example.prompt_ids) for example in examples)
    completion_width = max(len(example.completion_ids) for example in examples)
    input_ids = torch.full((len(examples), prompt_width + completion_width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, example in enumerate(examples):
        first, last = prompt_width - len(example.prompt_ids), prompt_width + len(example.completion_ids)
        input_ids[i, first:last] = torch.tensor(example.prompt_ids + example.completion_ids)
        attention_mask[i, first:last] = 1
    batch = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        "completion_ids": input_ids[:, prompt_width:],
        "completion_mask": attention_mask[:, prompt_width:].bool(),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def neutral_generation_config(tokenizer, **settings):
    """Sampling from p̂ itself: no top-k (`generate` defaults to 50), no nucleus, no penalty, stop at EOS only."""
    from transformers import GenerationConfig

    neutral = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": pad_token_id(tokenizer),
    }
    return GenerationConfig(**{**neutral, **ids, **settings})


def pad_token_id(tokenizer) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


@torch.no_grad()
def generate(
    model, tokenizer, prompts: list[list[int]], n: int, max_new_tokens: int, seed: int | None, temperature=1.0
):
    """n completions of each prompt by `model.generate`; seed None means greedy.

    -> for each prompt, n lists of token ids, cut after the end-of-sequence token where there is one.
    """
    device = next(model.parameters()).device
    batch = collate([Example(0, ids, []) for ids in prompts], pad_token_id(tokenizer), device)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    how = {"do_sample": False, "temperature": 1.0} if seed is None else {"temperature": temperature}
    config = neutral_generation_config(tokenizer, max_new_tokens=max_new_tokens, num_return_sequences=n, **how)
    training = model.training
    model.eval()
    # Sampling must not move the random state of a training run.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed or 0)
        output = model.generate(**inputs, generation_config=config)
    model.train(training)
    completions = []
    for ids in output[:, inputs["input_ids"].shape[1] :].tolist():
        end = ids.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in ids else len(ids)
        completions.append(ids[:end])
    return [completions[i : i + n] for i in range(0, len(completions), n)]


def read_answer(completion_ids: list[int], tokenizer, template: str) -> str | None:
    """The answer in a completion, or None: a completion that did not end by itself has none."""
    if not completion_ids or completion_ids[-1] != tokenizer.eos_token_id:
        return None
    text = tokenizer.decode(completion_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return TEMPLATES[template].extract(text)


def seed_of(*parts) -> int:
    """A 31-bit seed from anything printable. Chunk j of a request uses seed_of(…) + 256 j: engines add a sample's
    number to the seed, so nearer seeds would share samples."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

# Our field <- the names under which data sets carry it; the first that is there is taken.
COLUMNS = {
    "problem": ("problem", "Problem", "question"),
    "answer": ("answer", "Answer", "final_answer"),
    "solution": ("solution", "Solution"),
    "level": ("level", "Level"),
}


def load_problems(data: str, split: str, required: bool = True) -> list[dict]:
    """-> rows {"id", "source", "problem", "answer"} and, where known, "solution", "level" (an int).

    data: a folder with {split}.jsonl, a file of JSON lines, or the name of a data set on the hub. A missing split
    gives [] unless `required`. Bad rows end the script with the file, the line and the field; but an empty answer in up
    to one row of a thousand (MATH has two in 12,000) is left to `encode`, which drops and counts it.
    """
    path = Path(data)
    if path.is_dir():
        path = path / f"{split}.jsonl"
        if not path.is_file():
            return refuse(f"{path} does not exist: --data needs {split}.jsonl") if required else []
        found = read_json_lines(path)
    elif path.is_file():
        found = read_json_lines(path) if required else []
    elif data.count("/") == 1 and not data.startswith((".", "/", "~")):
        found = read_hub(data, split, required)
    else:
        refuse(f"--data {data} is not a folder, a file of JSON lines or the name of a data set on the hub")
    rows, unanswered = [], []
    for i, (source, raw) in enumerate(found):
        row = {"id": i, "source": source}
        for field, names in COLUMNS.items():
            value = next((raw[name] for name in names if raw.get(name) is not None), None)
            if value is not None:
                row[field] = str(value)
        for field in ("problem", "answer"):
            if not row.get(field, "").strip():
                told = f"{source}: field {field!r} is missing or empty; every row needs a problem and an answer"
                if row.get(field) is None or field == "problem":
                    refuse(told)
                unanswered.append(told)
        if "level" in row:
            row["level"] = int((re.findall(r"\d+", row["level"]) or [0])[0])
        rows.append(row)
    if len(unanswered) > len(rows) / 1000:
        refuse(unanswered[0])
    if required and not rows:
        refuse(f"{path}: there are no problems in it")
    return rows


def read_json_lines(path: Path) -> list[tuple[str, dict]]:
    """-> ("file:line", object) for each line that is not blank."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:  # also text that is not UTF-8
            refuse(f"{path}:{number}: not JSON ({error}); each line must be one object")
        if not isinstance(value, dict):
            refuse(f"{path}:{number}: not a JSON object but {type(value).__name__}")
        found.append((f"{path}:{number}", value))
    return found


def read_hub(name: str, split: str, required: bool) -> list[tuple[str, dict]]:
    import datasets

    try:
        splits = datasets.load_dataset(name)
    except Exception as error:  # whatever went wrong is shown to the user, and the script ends
        refuse(
            f"data set {name} cannot be loaded ({first_line(error)}); is this machine online, and the name right? "
            "--data also takes a folder with train.jsonl and test.jsonl"
        )
    if split not in splits:
        if not required:
            return []
        if len(splits) > 1 or split == "train":
            refuse(f"data set {name} has no split {split!r} but {sorted(splits)}")
        (split,) = splits  # AIME 2024 is there to be evaluated on, and has one split only, called train
    return [(f"{name}/{split}:{i + 1}", row) for i, row in enumerate(splits[split])]


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------------------------------------------------------
# Refill
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """The examples of one optimizer step, in stream order, and what was measured of every candidate looked at."""

    ids: list[int]  # positions in the list of examples
    candidates: int  # up to and with the last one used; later ones went back to the stream
    values: torch.Tensor  # [candidates], what `score` or `train` returned of each


class Refill:
    """Cuts the stream of candidates into steps of examples that matter (§5.1: "replaced with new training examples").

    A step is the first `batch_size` candidates of the stream that `accept` lets in under that step's weights. Neither
    the number of processes, nor the micro-batch, nor the way of computing changes which these are. The stream is a
    fresh permutation each epoch; it goes on right after the last candidate used. Accepted candidates that fill no
    step by the end of an epoch lead the next one (and are struck out of it further down); those of the last epoch
    make a short step.

    There are two ways to compute a step: score the candidates without gradient first, then train on the accepted (a
    candidate costs 1 + k·a forwards, a the share accepted, k the cost of forward and backward in forwards), or train
    straight, with the rejected contributing zero (k). The cheaper one changes at a = (k-1)/k and is chosen anew each
    round from the share seen in this step and the one before.
    """

    def __init__(self, size, batch_size, accept, seed, processes=1, micro_batch_size=8, backward_cost=3):
        """accept: values [n] -> bool [n]; None lets every candidate in, unscored. backward_cost: k, None to always
        score first."""
        self.size, self.batch_size, self.accept, self.seed = size, batch_size, accept, seed
        self.processes, self.micro_batch_size, self.k = processes, micro_batch_size, backward_cost
        self.epoch, self.position, self.order, self.leftovers = 0, 0, [], []
        self.recent = (1, 1)  # accepted, candidates of the step before

    def start_epoch(self, last: bool):
        self.epoch, self.position, self.last_epoch = self.epoch + 1, 0, last
        generator = torch.Generator().manual_seed(seed_of(self.seed, "epoch", self.epoch))
        permutation = torch.randperm(self.size, generator=generator).tolist()
        placed = set(self.leftovers)
        self.order = self.leftovers + [i for i in permutation if i not in placed]
        self.leftovers = []

    def next_step(self, score, train, discard) -> Step | None:
        """Compute the gradients of the next step; None at the end of the epoch.

        score(ids) -> values [len(ids)], without gradient.
        train(ids, room, count, chosen) -> values [len(ids)]: adds to the gradients those of the mean over `count`
            examples, from all `ids` if chosen, else from the first `room` that `accept` lets in. The call in which
            the number of examples reaches `room` is the last one of the step.
        discard() throws away the gradients added so far.
        """
        accepted, values, trained, start = [], [], 0, self.position
        while len(accepted) < self.batch_size and self.position < len(self.order):
            room = self.batch_size - len(accepted)
            rate = self.accept_rate(len(accepted), self.position - start)
            if self.accept is None:
                ids = self.order[self.position : self.position + room]
                kept = range(len(ids))
            else:
                straight = trained == len(accepted) and self.straight_pays(room, rate)
                ids = self.order[self.position : self.position + self.round_size(room, rate, straight)]
                found = train(ids, room, self.batch_size, chosen=False) if straight else score(ids)
                kept = self.accept(found).nonzero().flatten().tolist()[:room]
                values.append(found)
            accepted += [ids[i] for i in kept]
            trained = len(accepted) if self.accept is not None and straight else trained
            # Surplus candidates, behind the one that fills the step, go back to the stream and keep nothing.
            self.position += kept[-1] + 1 if len(accepted) == self.batch_size else len(ids)
        candidates = self.position - start
        self.recent = (len(accepted), candidates) if candidates else self.recent
        short = len(accepted) < self.batch_size
        if short and trained:  # the share accepted fell so fast that a straight step was begun and cannot be filled
            discard()
            trained = 0
        if short and not self.last_epoch:
            self.leftovers = accepted
            return None
        round_size = self.processes * self.micro_batch_size
        for i in range(trained, len(accepted), round_size):
            found = train(accepted[i : i + round_size], len(accepted) - i, len(accepted), chosen=True)
            if self.accept is None:
                values.append(found)
        return Step(accepted, candidates, torch.cat(values)[:candidates]) if accepted else None

    def accept_rate(self, accepted, candidates):
        return (self.recent[0] + accepted + 1) / (self.recent[1] + candidates + 1)

    def straight_pays(self, room, rate):
        """Where the rest of an epoch may not fill the step (expected less a standard deviation), score first."""
        if self.k is None or rate <= (self.k - 1) / self.k:
            return False
        expected = (len(self.order) - self.position) * rate
        return expected - math.sqrt(expected * (1 - rate)) >= room

    def round_size(self, room, rate, straight):
        """How many candidates to look at next: hardly ever more than the step will turn out to need (two standard
        deviations under the number expected), but no rounds so small that their number would cost more."""
        expected = room / rate - 2 * math.sqrt(room * (1 - rate)) / rate
        wanted = math.ceil(max(room, expected, 0.02 * self.batch_size / rate))
        wanted = math.ceil(wanted / self.processes) * self.processes
        # Without activations to keep, four micro-batches fit where one is trained.
        return min(wanted, self.processes * self.micro_batch_size * (1 if straight else 4))


# ---------------------------------------------------------------------------------------------------------------------
# Grading
# ---------------------------------------------------------------------------------------------------------------------


INTEGER = re.compile(r"-?[0-9]{1,18}")
NUMBER = re.compile(r"-?[0-9][0-9,]*(\.[0-9]+)?")
BASED = re.compile(r"(\w+)_\{?([0-9]+)\}?")  # 1001_2, a number with its base
# A sum, difference or product of numbers left as it is (but for 3.2 x 10^5), a chain of equations, one with no unknown.
UNEVALUATED = re.compile(r"[0-9)}]\s*([-+*]|(\\cdot|\\times)(?!\s*10\s*\^))\s*[0-9(\\]|=.*=|^[^a-zA-Z]*=")


def plain(answer: str) -> str:
    """The answer without what carries no meaning: white space and $ around it, a dollar sign, a final full stop."""
    return answer.replace("\\$", "").strip("$ \n\t").removesuffix(".").strip()


def textual(answer: str) -> str:
    """An answer for comparison as a string: no \\text{} around it, no white space but between two words or numbers."""
    answer = plain(answer)
    if answer.startswith("\\text{") and answer.endswith("}") and answer.count("{") == 1:
        answer = answer[len("\\text{") : -1]
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", " ".join(answer.split()))


def is_refused(gold: str, prediction: str) -> bool:
    """Whether math-verify's lenience would take for right what is not: it evaluates 28-29 to -1, so that copying a
    problem would solve it, takes the last part of a chain of equations, and leaves out a number's base."""
    gold, prediction = plain(gold), plain(prediction)
    if "$" in prediction:  # several formulas
        return True
    bases = BASED.fullmatch(gold.replace(" ", "")), BASED.fullmatch(prediction.replace(" ", ""))
    if bases[1]:
        return not bases[0] or bases[0].groups() != bases[1].groups()
    return bool(NUMBER.fullmatch(gold) and UNEVALUATED.search(prediction))


def bound_memory(megabytes: int):
    """Runs first in each grading process: what it does from now on may take so much memory and no more."""
    import logging

    import math_verify  # noqa: F401  (not in the time of the first answer)

    logging.disable(logging.CRITICAL)  # it logs every text that it cannot read
    resource.setrlimit(resource.RLIMIT_DATA, (megabytes << 20, megabytes << 20))


def is_right(gold: str, prediction: str) -> bool:
    """math-verify's verdict. The texts are only ever parsed as LaTeX: its other parser evaluates Python. Its own time
    limits use signals and can hang; they are off, and this runs in a process that is killed when it takes too long."""
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig()]
    answers = [parse(f"${plain(text)}$", config, parsing_timeout=None) for text in (gold, prediction)]
    return bool(verify(*answers, timeout_seconds=None))


class Grader:
    """The one judge of answers, for p̂, rewards and evaluation alike: math-verify, cached by (gold, prediction).

    seconds: a pair that takes longer is wrong. megabytes: memory of one grading process. max_characters: a longer
    prediction is wrong unread. What is graded is untrusted: it can cost no more than these.
    """

    def __init__(self, workers: int = 2, seconds: float = 3.0, megabytes: int = 2048, max_characters: int = 2000):
        if find_spec("math_verify") is None:
            refuse("math-verify is not installed, so answers cannot be graded: pip install -r requirements.txt")
        import pebble

        self.seconds, self.max_characters = seconds, max_characters
        self.verdicts: dict[tuple[str, str | None], bool] = {}
        # A fork server starts a killed process again in milliseconds, and forks nothing that has threads or a GPU.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["common", "math_verify"])
        self.pool = pebble.ProcessPool(workers, context=context, initializer=bound_memory, initargs=[megabytes])
        if not self.pool.schedule(is_right, ["\\frac{1}{2}", "0.5"], timeout=120).result():
            raise RuntimeError("math-verify does not take 0.5 for 1/2: a broken installation, not wrong answers")

    def grade(self, pairs: list[tuple[str, str | None]]) -> list[bool]:
        """Verdicts of (gold, prediction) pairs, in their order; a prediction of None is wrong."""
        futures = {}
        for gold, prediction in dict.fromkeys(pairs):
            if (gold, prediction) in self.verdicts:
                continue
            if prediction is None or len(prediction) > self.max_characters or is_refused(gold, prediction):
                self.verdicts[gold, prediction] = False
            elif textual(gold) == textual(prediction):
                self.verdicts[gold, prediction] = True
            elif INTEGER.fullmatch(plain(gold)) and INTEGER.fullmatch(plain(prediction)):  # most of what is sampled
                self.verdicts[gold, prediction] = int(plain(gold)) == int(plain(prediction))
            else:
                futures[gold, prediction] = self.pool.schedule(is_right, [gold, prediction], timeout=self.seconds)
        for pair, future in futures.items():
            # An exception is a text that breaks the parser, a time-out or a process that it killed: not a right answer.
            self.verdicts[pair] = future.exception() is None and future.result()
        if not self.pool.active:  # then the exceptions above were not the texts'
            raise RuntimeError("the grading processes cannot be started any more")
        return [self.verdicts[pair] for pair in pairs]

    def close(self):
        self.pool.stop()
        self.pool.join()


# ---------------------------------------------------------------------------------------------------------------------
# Coverage
# ---------------------------------------------------------------------------------------------------------------------


def pass_at_n(n: int, c, k: int) -> np.ndarray:
    """The unbiased estimate 1 - C(n-c, k) / C(n, k) of pass@k (Eq. 2) from n samples of which c were right.

    c: an int or an array of them. Exact products, no binomials: right for n to 1e5. k > n is refused, since no
    unbiased estimate exists.
    """
    if k > n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples: draw at least {k}")
    c = np.asarray(c)
    # C(n-c, k) / C(n, k) = Π_{i=0}^{c-1} (n-k-i) / (n-i): one table for all c by a running product.
    i = np.arange(n)
    all_wrong = np.concatenate([[1.0], np.cumprod(np.maximum(n - k - i, 0) / (n - i))])
    return 1 - all_wrong[c]


def bootstrap_interval(values, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap of the mean over problems: how much it would move with another draw of the test set."""
    values = np.asarray(values, dtype=float)
    generator = np.random.default_rng(seed)
    means = values[generator.integers(len(values), size=(resamples, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def sampling_error(n: int, c, k: int, resamples: int = 500, seed: int = 0) -> float:
    """Standard error of mean pass@k with the problems fixed (the ± of Table 3): a parametric bootstrap over samples."""
    c = np.asarray(c)
    redrawn = np.random.default_rng(seed).binomial(n, c / n, size=(resamples, len(c)))
    return float(pass_at_n(n, redrawn, k).mean(1).std())


def exact_pass_at_n(log_p, n: int) -> np.ndarray:
    """C^N = 1 - (1-p)^N = e^(-ℓ_DCO^N) of each problem, without any sample. It counts the reference answer alone: a
    lower bound where other strings are right as well. log_p: [problems]."""
    return dco_loss(torch.as_tensor(log_p, dtype=torch.float64), n).neg().exp().numpy()


def batch_that_fits(examples: list[Example], max_new_tokens: int, tokenizer, batch_size: int) -> int:
    """At most batch_size sequences, fewer where their logits would pass 2^28 numbers or the batch 2^16 tokens: about
    4 GB of logits with their copies, and 8 GB of keys and values for Llama-3-8B."""
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
    from accelerate.utils import gather_object

    found, processes, unwrapped = [], accelerator.num_processes, accelerator.unwrap_model(model)
    for i in range(0, len(examples), batch_size * processes):
        part = examples[i : i + batch_size * processes]
        prompts = [example.prompt_ids for example in split_evenly(part, accelerator)]
        completions = [ids for (ids,) in generate(unwrapped, tokenizer, prompts, 1, max_new_tokens, seed=None)]
        if processes > 1:  # process by process, as in `gather_in_order`
            gathered, share = gather_object(completions), len(prompts)
            completions = [gathered[j % processes * share + j // processes] for j in range(len(part))]
        found += [Example(e.id, e.prompt_ids, ids) for e, ids in zip(part, completions, strict=True)]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Accelerate
# ---------------------------------------------------------------------------------------------------------------------


def defaults_for_this_machine(model: str | None, data: str | None) -> tuple[str, str]:
    """What --model and --data mean when left out: the paper's on a GPU, the embedded ones without."""
    cuda, taken = torch.cuda.is_available(), []
    if model is None:
        model = "meta-llama/Meta-Llama-3-8B" if cuda else relative(EXAMPLES / "tiny_llama")
        taken.append(f"--model {model}")
    if data is None:
        embedded = is_example(model) or not cuda
        data = relative(EXAMPLES / "arithmetic") if embedded else "nlile/hendrycks-MATH-benchmark"
        taken.append(f"--data {data}")
    if taken and os.environ.get("RANK", "0") == "0":
        print(f"{'CUDA found' if cuda else 'no CUDA'}: taking {' and '.join(taken)}", flush=True)
    return model, data


def relative(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def is_example(model: str) -> bool:
    return Path(model).resolve().is_relative_to(EXAMPLES)


def zero_config(stage: int, clip: float, micro_batch_size: int) -> dict:
    """The whole DeepSpeed configuration: gradients and optimizer states (stage 2), or weights as well (stage 3), are
    split over the processes. On GPUs the weights are bf16, and their float32 masters are among the optimizer states."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,  # it wants one; nothing here depends on it
        "gradient_accumulation_steps": 1,  # `backward` says which call is a step's last one
        "gradient_clipping": clip,
        "bf16": {"enabled": torch.cuda.is_available()},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
    }


def make_accelerator(
    report_to: str = "none", out: Path | None = None, zero: int = 0, clip=1.0, micro_batch_size=1, patience_minutes=30
):
    """The Accelerator, and a check that as many processes met as were launched: apart, they would train apart.

    patience_minutes: how long a process waits for the others before it gives up.
    """
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

    cuda, launched = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", 1))
    backend, timeout = "nccl" if cuda else "gloo", timedelta(minutes=patience_minutes)
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)  # it would divide every loss once more
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns, in the middle of the progress bar
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # a model that one trains on a CPU is so small that threads get in its way
    for name, wanted in ((report_to, report_to != "none"), ("deepspeed", zero > 0)):
        if wanted and find_spec(name) is None:  # accelerate would go on without a tracker
            refuse(f"{name} is asked for but not installed: pip install {name}")
    if zero and "RANK" not in os.environ:
        refuse(f"--zero {zero} splits a model over processes: start them with accelerate launch or torchrun")
    accelerator = Accelerator(
        cpu=not cuda and not zero,  # cpu=True would switch DeepSpeed off
        mixed_precision="bf16" if cuda else "no",
        log_with=None if report_to == "none" else report_to,
        project_dir=out,
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=zero_config(zero, clip, micro_batch_size)) if zero else None,
        # Without it, DeepSpeed's processes on a CPU each believe that they are alone.
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=timeout)] if launched > 1 else [],
    )
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "DEEPSPEED"):
        refuse(f"accelerate is set up for {kind}: these scripts take plain DDP, or --zero 2 or 3")
    if accelerator.num_processes != launched:
        raise RuntimeError(f"{launched} processes were launched, but this one sees {accelerator.num_processes}")
    return accelerator


def backward(accelerator, model, loss: torch.Tensor, last: bool):
    """Add the gradient of `loss`. In the last call of a step DDP averages it over the processes; DeepSpeed, which has
    been averaging all along, clips and makes the update inside of that call."""
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
        for name in ("all_grad_tensors", "averaged_gradients"):  # where stage 2 adds them up, in float32 and in bf16
            if accelerator.state.deepspeed_plugin.zero_stage == 2:
                setattr(zero, name, dict.fromkeys(getattr(zero, name)))


def end(accelerator):
    """Close trackers and leave the process group."""
    accelerator.wait_for_everyone()
    # Gloo's thread still has to let go of the last collective's tensors, for which it needs the interpreter's lock; the
    # group's destructor waits for that thread while it holds the lock. Without this pause a run can hang at its end.
    time.sleep(0.2)
    accelerator.end_training()


def load_tokenizer(model: str):
    import transformers
    from transformers import AutoTokenizer

    transformers.logging.set_verbosity_error()  # its warnings are about flags that we set on purpose
    transformers.logging.disable_progress_bar()
    check_model_name(model)
    tokenizer = from_hub_or_folder(AutoTokenizer.from_pretrained, model)
    if tokenizer.eos_token_id is None:
        refuse(f"{model}: the tokenizer has no end-of-sequence token, which has to close every completion")
    return tokenizer


def load_config(model: str):
    """The model's configuration, dropout off: p is that of the model which is going to be sampled, and the same in
    every forward of a step."""
    from transformers import AutoConfig

    config = from_hub_or_folder(AutoConfig.from_pretrained, model)
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def longest_context(model: str) -> int:
    """How many tokens the model has positions for."""
    return getattr(load_config(model), "max_position_embeddings", None) or sys.maxsize


def load_model(model: str, tokenizer, dtype=torch.float32, seed: int = 0, accelerator=None, **settings):
    """-> (model, whether it was initialised from scratch because its folder holds no weights).

    accelerator: needed under ZeRO-3 only, where pretrained weights are split over the processes as they are read.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations import unset_hf_deepspeed_config

    config, scratch = load_config(model), not holds_weights(model)
    if scratch:
        torch.manual_seed(seed)
        split = accelerator.state.deepspeed_plugin if accelerator else None
        if split:  # initialised in shares, each process would draw other weights: they are split afterwards
            unset_hf_deepspeed_config()
        loaded = AutoModelForCausalLM.from_config(config, dtype=dtype)
        if split:
            split.set_deepspeed_weakref()
    else:
        settings |= {"config": config, "dtype": dtype, "use_safetensors": True}
        loaded = from_hub_or_folder(AutoModelForCausalLM.from_pretrained, model, **settings)
    loaded.generation_config = neutral_generation_config(tokenizer)
    return loaded, scratch


def holds_weights(model: str) -> bool:
    """False for a folder with a configuration only; hub names are taken to hold some."""
    folder = Path(model)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return True
    for other in [*folder.glob("*.bin"), *folder.glob("*.pt*"), *folder.glob("*.index.json")]:
        refuse(f"{model} holds {other.name} but no *.safetensors: convert the weights, pickles are not loaded")
    return False


def check_model_name(model: str):
    looks_like_a_path = model.count("/") != 1 or model.startswith((".", "/", "~"))
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            refuse(f"{model}: the folder has no config.json, so it is not a Hugging Face checkpoint")
    elif looks_like_a_path:
        refuse(f"{model}: there is no such folder")


def from_hub_or_folder(load, model: str, **settings):
    from safetensors import SafetensorError

    try:
        return load(model, **settings)
    except (OSError, ValueError, SafetensorError) as error:  # gated, missing, offline, broken
        if Path(model).is_dir():
            refuse(f"{model} cannot be loaded: {first_line(error)}")
        refuse(
            f"{model} is no folder here and cannot be fetched from the hub. If it is gated, accept its licence on its "
            f"page and run `hf auth login`; if this machine is offline, give a folder. ({first_line(error)})"
        )


def split_evenly(items: list, accelerator) -> list:
    """This process's share: every so many-th item, the last one repeated so that all processes do the same work."""
    share = math.ceil(len(items) / accelerator.num_processes)
    places = [min(accelerator.process_index + i * accelerator.num_processes, len(items) - 1) for i in range(share)]
    return [items[i] for i in places]


def gather_in_order(values: torch.Tensor, count: int, accelerator) -> torch.Tensor:
    """The inverse of `split_evenly` for one value an item: [share] on each process -> [count] on all of them."""
    gathered = accelerator.gather(values.detach())  # process by process
    return gathered.view(accelerator.num_processes, -1).T.reshape(-1)[:count]


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


RUN_FILES = ("args.json", "metrics.jsonl", "epochs.jsonl", "state")


def check_out(out: Path, overwrite: bool):
    """Refuse to write into a run that is there already."""
    if out.exists() and not out.is_dir():
        refuse(f"--out {out} is a file")
    folders = [*out.glob("epoch-*"), *out.glob("step-*")]
    found = [out / name for name in RUN_FILES if (out / name).exists()] + folders
    if found and not overwrite:
        refuse(f"--out {out} holds a run already ({found[0].name}): choose another folder, or --overwrite")
    for folder in folders:
        if not (folder / "dco.json").is_file() and folder.suffix != ".partial":
            refuse(f"--out {out}: {folder.name} is no checkpoint, and --overwrite would not keep it: move it away")
    ancestor = next(path for path in out.absolute().parents if path.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        refuse(f"--out {out}: nothing can be written to {ancestor}")


def make_folder(out: Path):
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        refuse(f"--out {out} cannot be made: {error.strerror}")


def start_out(out: Path, args: dict):
    """Remove what an earlier run left in `out` and nothing else (`check_out` has asked); write args.json."""
    make_folder(out)
    for old in [*out.glob("epoch-*"), *out.glob("step-*"), *(out / name for name in RUN_FILES)]:
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink(missing_ok=True)
    (out / "args.json").write_text(json.dumps(args, indent=2, default=str) + "\n")


def append_json(path: Path, line: dict):
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


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
        unwrapped.save_pretrained(partial, state_dict=state)
        tokenizer.save_pretrained(partial)
        (partial / "dco.json").write_text(json.dumps(record) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    accelerator.wait_for_everyone()
