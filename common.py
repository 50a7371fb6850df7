"""Shared by all scripts, in nine sections that can be copied one by one.

Notation as in the paper: x a problem, y its answer, p = p̂(y|x) the model's probability of the whole
answer, end-of-sequence token included; N samples at test time, N' in the training loss.
"""

import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import sys
from collections import ChainMap, Counter, namedtuple
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from fractions import Fraction
from functools import lru_cache, partial
from importlib.util import find_spec
from itertools import chain, islice
from math import ceil, inf, isfinite, sqrt
from pathlib import Path
from resource import RLIMIT_DATA, setrlimit

import accelerate
import datasets
import numpy as np
import pebble
import sympy
import torch
import transformers
from math_verify import verify
from math_verify.parser import NormalizationConfig, normalize_latex, parse_latex_cached
from safetensors import SafetensorError
from torch.multiprocessing.reductions import reduce_tensor


def fail(message):
    """End the script over what the user can mend: one line on stderr, exit code 2."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# ---- Loss (Eq. 3 and 4) --------------------------------------------------------------------------
# To use it in a trainer of your own, copy these three functions: they need nothing but torch.
def log1mexp(x):
    """log(1 - e^x) for x < 0, accurate at both ends; the unused branch makes no NaN gradient."""
    near_zero = torch.log(-torch.expm1(x))
    return torch.where(x > -0.693, near_zero, torch.log1p(-torch.exp(x.clamp(max=-0.693))))


def dco_loss(log_p, n):
    """ℓ_DCO^N = -log(1 - (1-p)^N), Eq. 3, from log p alone. N = 1 is cross-entropy.

    log_p: any shape, values in [-inf, 0], the log-probability of each whole answer. n: N >= 1.
    Returns log_p's shape and dtype, computed in float64.
    """
    if n == 1:
        return -log_p
    x = log_p.double()
    tiny, certain = x < -40, x >= 0  # p < e^-40: the series, since e^x underflows at x = -745
    inside = torch.where(tiny | certain, -1.0, x)
    loss = -log1mexp(n * log1mexp(inside))
    loss = torch.where(tiny, -x.new_tensor(n).log() - x + (n - 1) / 2 * x.exp(), loss)
    return torch.where(certain, 0.0, loss).to(log_p.dtype)


def dco_factor(log_p, n):
    """F(N, p) = N (1-p)^(N-1) p / (1 - (1-p)^N), Eq. 4: ∇ℓ_DCO^N = F(N, p) ∇(-log p).

    Arguments and result as for `dco_loss`. In [0, 1]: 1 for N = 1 and as p -> 0, and 0 at p = 1.
    Detach it before you weight a loss with it.
    """
    if n == 1:
        return torch.ones_like(log_p)
    x = log_p.double()
    tiny, certain = x < -40, x >= 0
    inside = torch.where(tiny | certain, -1.0, x)
    log_miss = log1mexp(inside)  # log(1 - p)
    log_f = x.new_tensor(n).log() + (n - 1) * log_miss + inside - log1mexp(n * log_miss)
    factor = torch.where(tiny, 1 - (n - 1) / 2 * x.exp(), log_f.exp())
    return torch.where(certain, 0.0, factor).to(log_p.dtype)


# ---- Tokens and templates ------------------------------------------------------------------------
Template = namedtuple("Template", ["prompt", "completion", "extract"])  # extract: text -> answer


def extract_boxed(text):
    """Return the content of the last \\boxed{…} with balanced braces, or None."""
    _, boxed, rest = text.rpartition("\\boxed{")
    depth = 1
    for i, character in enumerate(rest if boxed else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:i].strip() or None
    return None


def extract_r1(text):
    """Return the answer of a completion of the exact form `…</think> … <answer>…</answer>`."""
    parts = re.split("(</?think>|</?answer>)", text)  # text and tags alternate
    in_order = parts[1::2] == ["</think>", "<answer>", "</answer>"]
    return parts[4].strip() or None if in_order else None


R1_PREAMBLE = (
    "A conversation between User and Assistant. The User asks a question, and the Assistant "
    "solves it. The Assistant first thinks about the reasoning process in the mind and then "
    "provides the User with the answer. The reasoning process is enclosed within <think> </think> "
    "and the answer is enclosed within <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>.\n"
)
R1_PROMPT = "User: {problem}\nAssistant: <think>"
R1_COMPLETION = " {solution} </think> <answer> {answer} </answer>"
TEMPLATES = {
    "direct": Template("{problem}\n", "{answer}", lambda text: text.strip() or None),  # §4
    "cot": Template("{problem}\n", "{solution}", extract_boxed),  # §5.4
    "r1": Template(R1_PREAMBLE + R1_PROMPT, R1_COMPLETION, extract_r1),  # App. B
    "r1-short": Template(R1_PROMPT, R1_COMPLETION, extract_r1),  # for small models
    "lean": Template("{problem}\n---\n", "{answer}", lambda text: text.strip() or None),  # §5.3
}


@dataclass
class Example:
    """A tokenized problem. Training and sampling use the same ids; text is tokenized only once."""

    id: int  # row number in the data
    prompt_ids: list[int]
    completion_ids: list[int]  # ends with the end-of-sequence token; empty if only sampled

    def __len__(self):
        return len(self.prompt_ids) + len(self.completion_ids)


def encode(rows, tokenizer, config, template, prompt=None, max_length=inf, prompts_only=False):
    """Tokenize the prompt and the completion of each row apart, and close the completion with EOS.

    prompt: replaces the template's. max_length: tokens, at most those of the model. prompts_only:
    leave the completions empty. Returns (examples, {reason: number of rows dropped}).
    """
    form, eos = TEMPLATES[template], tokenizer.eos_token_id
    completion = "" if prompts_only else form.completion
    needed = {"answer", *re.findall(r"\{(\w+)\}", completion)}
    max_length = min(max_length, getattr(config, "max_position_embeddings", inf))
    vocabulary, unknown = config.get_text_config().vocab_size, tokenizer.unk_token_id
    examples, dropped = [], Counter()
    for row in rows:
        if not all(row.get(field, "").strip() for field in needed):
            dropped["without an answer or solution"] += 1
            continue
        prompt_ids = tokenizer(fill(prompt or form.prompt, row)).input_ids
        if prompt_ids[-1:] == [eos]:  # some tokenizers close every text
            prompt_ids.pop()
        completion_ids = tokenizer(fill(completion, row), add_special_tokens=False).input_ids
        ids = prompt_ids + completion_ids
        if prompt_ids[:1] == [tokenizer.bos_token_id]:
            ids = ids[1:]
        if eos in ids:
            fail(f"{row['source']}: its text contains {tokenizer.eos_token!r}, which ends a text")
        if unknown is not None and unknown in ids:
            fail(f"{row['source']}: the tokenizer does not know a character of it")
        if max(ids, default=0) >= vocabulary:
            fail(f"{row['source']}: token {max(ids)} in a model of {vocabulary} tokens")
        if not prompts_only:
            completion_ids = [*completion_ids, eos]
        example = Example(row["id"], prompt_ids, completion_ids)
        if len(example) > max_length:  # dropped, not cut: that would teach not to stop
            dropped["too long"] += 1
        else:
            examples.append(example)
    return examples, dict(dropped)


def fill(form, row):
    """Replace {problem}, {solution} and {answer}; other braces stay as they are."""
    return re.sub(r"\{(problem|solution|answer)\}", lambda match: row[match[1]], form)


def seed_of(*parts):
    """A 31-bit seed from anything printable."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") >> 1


# ---- Data ----------------------------------------------------------------------------------------
COLUMNS = {  # our field: its names in data sets; the first one present is used
    "problem": ("problem", "Problem", "question"),
    "answer": ("answer", "Answer", "final_answer"),
    "solution": ("solution", "Solution"),
    "level": ("level", "Level"),
}


def load_problems(data, split, required=True):
    """Return rows {"id", "source", "problem", "answer", "level" (0: unknown)} and "solution".

    data: a folder with {split}.jsonl, a file of JSON lines, or a data set on the hub. A split that
    is missing gives [] unless it is required.
    """
    path = Path(data)
    if path.is_file():
        lines = read_json_lines(path) if required else []  # a file is one split
    elif (path / f"{split}.jsonl").is_file():
        lines = read_json_lines(path / f"{split}.jsonl")
    elif path.is_dir():
        lines = fail(f"{path} has no {split}.jsonl") if required else []
    else:
        lines = load_from_hub(data, split, required)
    rows = []
    for i, (source, raw) in enumerate(lines):
        row = {"id": i, "source": source}
        for field, names in COLUMNS.items():
            name = next((name for name in names if raw.get(name) is not None), None)
            if name:
                row[field] = text_of(raw[name], f"{source}: field {name!r}")
            elif field in ("problem", "answer"):
                fail(f"{source}: field {field!r} is missing")
        if re.fullmatch("0+[0-9]+", row["answer"]):  # AIME's 025
            row["answer"] = str(int(row["answer"]))
        row["level"] = int("".join(re.findall(r"\d", row.get("level", ""))) or 0)
        rows.append(row)
    if required and not rows:
        fail(f"{data}: there are no problems in it")
    return rows


def text_of(value, where):
    """Return the text of a string, of a number, or of a list of one of these."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    number = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
    if not isinstance(value, str) and not number:
        fail(f"{where} must be a text or a number, not {json.dumps(value)}")
    return str(value)


def read_json_lines(path):
    """Yield ("file:line", object) for each line that is not blank."""
    raw = Path(path).read_bytes()
    if b"\0" in raw or raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        fail(f"{path} is not UTF-8 but looks like UTF-16: convert it with iconv -f UTF-16 -t UTF-8")
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                fail(f"{path}:{number}: not JSON in UTF-8 ({error})")
            if not isinstance(value, dict):
                fail(f"{path}:{number}: not a JSON object")
            yield f"{path}:{number}", value


def load_from_hub(name, split, required):
    try:
        splits = datasets.load_dataset(name)
    except Exception as error:
        fail(f"{name} is no folder or file, and not to be loaded from the hub ({error})")
    if split not in splits and (len(splits) > 1 or split == "train" or not required):
        return fail(f"{name} has the splits {sorted(splits)}, not {split}") if required else []
    rows = splits[split] if split in splits else next(iter(splits.values()))  # AIME24: one split
    return [(f"{name}/{split}:{i}", row) for i, row in enumerate(rows, start=1)]


# ---- Batch refill: which examples make a step (§5.1, App. B) -------------------------------------
Step = namedtuple("Step", ["ids", "seen", "values"])  # accepted ids; all candidates, their values


class Refill:
    """Cuts the stream of candidates, a fresh permutation per epoch, into optimizer steps.

    A step uses the first `batch_size` candidates in stream order that `accept` lets through under
    the current weights; the rest of an epoch, if any is accepted, makes a last, short step. The
    gradient is the sum over the accepted divided by `batch_size`.

    Scoring first and training on the accepted costs 1 + k·a forwards a candidate (a: accept rate,
    k: forward and backward); training straight, with the rejected at weight 0, costs k. Straight
    is cheaper above a = (k-1)/k. Then a step trains on its first candidates straight and scores
    only those that replace the rejected.
    """

    def __init__(
        self, size, batch_size, accept, rounds, seed, straight_above=1.0, processes=1, spare=-1.0
    ):
        """size: number of examples. accept: values [n, …] -> bool [n]. rounds: ids -> lists of ids,
        one list per forward. straight_above: (k-1)/k, or 1 to score always. spare: how many more
        than are needed to score at once, in √(number needed); above 0, few calls are the aim."""
        self.size, self.batch_size, self.accept, self.rounds = size, batch_size, accept, rounds
        self.seed, self.straight_above, self.processes = seed, straight_above, processes
        self.spare = spare
        self.epoch, self.position, self.order, self.rate = 0, 0, [], 1.0

    def state_dict(self):
        names = ("size", "epoch", "position", "order", "rate")
        return {name: getattr(self, name) for name in names}

    def start_epoch(self):
        self.epoch, self.position = self.epoch + 1, 0
        generator = torch.Generator().manual_seed(seed_of(self.seed, "epoch", self.epoch))
        self.order = torch.randperm(self.size, generator=generator).tolist()

    def next_step(self, score, forward):
        """Accumulate the gradient of the next step. Returns None where the epoch has none left.

        score(ids) -> values, without gradients. forward(ids) -> (values, backward), where
        backward(weights, last) adds Σ_i weights[i] ∇loss_i; last: nothing more in this step.
        """
        accepted, trained, seen, values = [], 0, [], []
        straight = self.rate > self.straight_above
        while len(accepted) < self.batch_size and self.position < len(self.order):
            room = self.batch_size - len(accepted)
            need = max(room + self.spare * sqrt(room), 1) / self.rate  # the surplus is lost
            count = room if straight else self.processes * ceil(need / self.processes)
            ids = self.order[self.position : self.position + count]
            new = self.train(ids, forward) if straight else score(ids)
            hits = self.accept(new).nonzero().flatten().tolist()
            before = self.batch_size / self.rate  # candidates of a step: they count once more
            self.rate = max(0.01, (len(hits) + self.batch_size) / (len(ids) + before))
            used = hits[room - 1] + 1 if len(hits) >= room else len(ids)
            accepted += [ids[i] for i in hits[:room]]
            trained = len(accepted) if straight else trained
            self.position, seen, straight = self.position + used, seen + ids[:used], False
            values.append(new[:used])
        if not accepted:
            return None
        if trained < self.batch_size:  # if all are trained, one more with weight 0 ends the step
            weight = 1 / self.batch_size if trained < len(accepted) else 0.0
            rounds = self.rounds(accepted[trained:] or accepted[:1])
            for ids in rounds:
                _, backward = forward(ids)
                backward(torch.full([len(ids)], weight), last=ids is rounds[-1])
        return Step(accepted, seen, torch.cat(values))

    def train(self, ids, forward):
        """Train on those of ids that are accepted. Returns the values of all."""
        values, count = {}, 0
        for part in self.rounds(ids):
            new, backward = forward(part)
            hits = self.accept(new)
            count += int(hits.sum())
            backward(hits / self.batch_size, last=count == self.batch_size)
            values.update(zip(part, new, strict=True))
        return torch.stack([values[i] for i in ids])


def make_rounds(ids, length, processes, tokens, padded=False):
    """Split ids into rounds. In a round every process computes equally many examples, of like
    lengths and of at most `tokens` tokens together, but at least one. padded: each of them counts
    as the longest of its round."""
    ids, rounds, used, cost = sorted(ids, key=length, reverse=True), [], inf, 0
    for start in range(0, len(ids), processes):
        if not padded:
            cost = length(ids[start])  # the longest of those that are dealt out, one to a process
        used += cost
        if used > tokens:
            rounds.append([])
            used = cost = length(ids[start])
        rounds[-1] += ids[start : start + processes]
    return rounds


# ---- Grading: normalise, decide at sight, ask math-verify -----------------------------------
UNICODE = {"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "∞": "infinity", "²": "^2", "³": "^3"}
REWRITES = [  # (pattern, replacement), in this order
    (r"\\?%|°|\^\{?\\circ\}?|\u200b|(?<!\\)\\[,;:()\[\]]", " "),  # \(7.2\,\%\) -> 7.2
    (r"\\(text|mbox) ?\{([^{}]*)\}|(?<=_)\{(\d+)\}(?=\W*$)", r" \2\3 "),  # \text{A5}_{11} -> A5_11
    (r"√(\d+|\w|\(\w+\))", r"\\sqrt{\1}"),  # √12 -> \sqrt{12}
    (r"(?<=\d)i(?![A-Za-z])", " i"),  # 3+4i -> 3+4 i, which math-verify takes for complex
    (r"(?<!,\d)(?<!,\d\d)(?<=\d)[ ,](?=\d{3}([ ,]\d{3})*(\.\d+)?[}\s]*$)", ""),  # 1,000 -> 1000
    (r"[.,\s\\]+$|(?<![A-Za-z0-9π)}\\])\s+|\s+(?![A-Za-z0-9\s])", ""),  # ( 2 ,4 ). -> (2,4)
    (r"(?i)(?<=[\diπ)}])( (?!pi\b|[ap]m)([a-z/]{2,}|[gmsl])\.?)+(\^\{?\d\}?)?$", ""),  # 2 cm^2
    (r"(?<=\d) (\d+)/(\d+)$", r"\\frac{\1}{\2}"),  # 137 1/2 -> 137\frac{1}{2}
    (r"^(-?)\\frac\{(-?\d+)\}\{(\d+)\}$", r"\1\2/\3"),  # \frac{1}{2} -> 1/2
    (r"(?<=\d)(\*|\\times|\\cdot) ?10\^\{?(-?\d{1,3})\}?$", r"e\2"),  # 3.2 \times 10^{5} -> 3.2e5
]
NUMBER = re.compile(r"[-+]?(\d+/0*[1-9]\d*|\d*\.?\d+(e-?\d{1,3})?)")  # 3/4, -.25, 3.2e5
BASED = re.compile(r"-?[\dA-Za-z.]+_\d+")  # 40_9
WORD = re.compile(r"(?<![\\A-Za-z{])([A-Z]{2}|[A-Za-z]{3})(?![A-Za-z]*=)|[ap]\.m")  # LQSX, 8 p.m.
# Operations, each with those before: 5!, \log_2 8; 29-28, 3 \times 4, 3(4); \sqrt{16}, 3 4, 1=2=5.
FUNCTION = r"[!|]|vert|binom|log|\\ln|sum|int|lim|gcd|lcm|sin|cos|tan|cot|sec|csc|floor|ceil|mod"
SUM = FUNCTION + r"|[\w)}](?<!matrix\})([-+]|\\pm)|(\*|times|cdot|div) ?([-\d(]|\\frac)|[\d)}]\("
POWER = SUM + r"|\^|sqrt|\d \d|=[^,]*=|^[^A-Za-z]*="
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off


@lru_cache(maxsize=1 << 16)
def normalise(answer):
    """The answer without what carries no meaning: spaces, dollar signs, units, ways of writing."""
    answer = answer.translate(str.maketrans(UNICODE)).strip("*$ \n").rstrip("*$ \n.")
    answer = normalize_latex(answer, NormalizationConfig(malformed_operators=True))
    for pattern, replacement in REWRITES:
        answer = re.sub(pattern, replacement, answer)
    return answer


def verdict_at_sight(gold, prediction):
    """True or False where no algebra is needed, else None. math-verify carries out operations, so
    that a copied problem would count as solved: one that the gold answer does not have is wrong."""
    if prediction is None or len(prediction) > 1000:
        return False
    gold, prediction = normalise(gold), normalise(prediction)
    if gold == prediction:
        return True
    if BASED.fullmatch(gold) or BASED.fullmatch(prediction) or WORD.search(gold):
        return prediction.lower() in (gold.lower(), gold.lower().split("_")[0])
    if re.fullmatch(r"-?\d+", gold) and re.search(r"/|frac", prediction):
        return False  # 6/2 is not yet 3
    if NUMBER.fullmatch(gold) and NUMBER.fullmatch(prediction):
        return Fraction(gold) == Fraction(prediction)
    for operation in (FUNCTION, SUM, POWER):
        if re.search(operation, prediction) and not re.search(operation, gold):
            return False


def is_right(gold, prediction, cpu_seconds=0):
    """math-verify's verdict. Only LaTeX is parsed: its other parser evaluates Python. In a grading
    process the memory is bounded, and SIGPROF ends the process after cpu_seconds, in C code too."""
    if cpu_seconds:
        setrlimit(RLIMIT_DATA, (4 << 30, 4 << 30))
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    right = False
    with suppress(Exception):  # of a text that is not LaTeX
        gold, prediction = (parse_latex_cached(normalise(one)) for one in (gold, prediction))
        right = verify(gold, prediction, allow_set_relation_comp=True, timeout_seconds=None)
        if right and isinstance(gold, sympy.Expr) and isinstance(prediction, sympy.Expr):
            right = gold.equals(prediction) is not False  # 2^{-98} is 0 to math-verify
    signal.setitimer(signal.ITIMER_PROF, 0)
    return right


class Grader:
    r"""Grades (gold, prediction) pairs; None is wrong. `timeouts` counts pairs given up as costly.
    Known gaps: units and duplicates are not compared, and not read are 0.\overline{3}, degrees in
    \sin 30^\circ, inequalities joined by "or", an unknown before a word or a base (x = 40_9)."""

    def __init__(self, workers=2):
        self.verdicts, self.timeouts = {}, 0
        context = multiprocessing.get_context("forkserver")  # no threads, no GPU
        context.set_forkserver_preload([__name__])
        self.pool = pebble.ProcessPool(workers, 0, is_right, [r"\sqrt{8}", r"2\sqrt{2}"], context)
        assert self.grade([(r"\sqrt{8}", r"2\sqrt{2}")]) == [True], "math-verify is broken"

    def grade(self, pairs):
        ask = partial(self.pool.schedule, is_right, kwargs={"cpu_seconds": 3}, timeout=60)
        new = {pair: verdict_at_sight(*pair) for pair in pairs if pair not in self.verdicts}
        jobs = {pair: ask(pair) for pair, verdict in new.items() if verdict is None}
        for pair in [pair for pair, job in jobs.items() if job.exception()]:
            jobs[pair] = ask(pair)  # once more, alone
            self.timeouts += jobs[pair].exception() is not None
        new.update({pair: not job.exception() and job.result() for pair, job in jobs.items()})
        self.verdicts.update(new)
        return [self.verdicts[pair] for pair in pairs]

    def close(self):
        self.pool.stop()
        self.pool.join()


# ---- Models and gradients, on one or several processes -------------------------------------------
def zero_config(zero, args):
    """DeepSpeed ZeRO. On GPUs the weights are bf16 with float32 masters in the optimizer state."""
    cuda = torch.cuda.is_available()
    return {
        "train_micro_batch_size_per_gpu": 1,  # required, unused: `backward` says when a step ends
        "gradient_accumulation_steps": 1,
        "gradient_clipping": args.clip,
        "bf16": {"enabled": cuda},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW: the same update, nothing to compile
        "zero_optimization": {
            "stage": zero,
            "stage3_gather_16bit_weights_on_model_save": True,
            "offload_optimizer": {"device": "cpu" if args.offload else "none", "pin_memory": cuda},
        },
    }


def make_accelerator(args=None):
    """Connect the processes of this launch. args: those of a training script; without them neither
    ZeRO nor a tracker. args.zero None is ZeRO-2 on several GPUs, else none."""
    cuda, world = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", 1))
    zero = args.zero if args else 0
    if zero is None:
        zero = 2 if cuda and world > 1 else 0
    # cuDNN's attention, preferred on Hopper by PyTorch 2.11 to 2.13, has made NaN gradients where a
    # row was masked whole (pytorch/pytorch#196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)  # it would divide every loss
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    settings = {"mixed_precision": "bf16" if cuda else "no", "cpu": not cuda and not zero}
    if zero:
        if "RANK" not in os.environ:
            fail(f"--zero {zero} needs several processes: use accelerate launch or torchrun")
        settings["deepspeed_plugin"] = accelerate.DeepSpeedPlugin(zero_config(zero, args))
    if world > 1:
        backend, limit = "nccl" if cuda else "gloo", timedelta(hours=1)
        settings["kwargs_handlers"] = [accelerate.InitProcessGroupKwargs(backend, timeout=limit)]
    if args and args.report_to != "none":
        settings |= {"log_with": args.report_to, "project_dir": args.out}
    accelerator = accelerate.Accelerator(**settings)
    if world > 1:  # waiting in NCCL would keep the GPUs busy, which the engines need
        on_main.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=24))
    return accelerator


def on_main(accelerator, compute, *inputs):
    """Return compute(*inputs) of the main process on all processes."""
    outcome = [compute(*inputs) if accelerator.is_main_process else None]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(outcome, 0, on_main.group)
    return outcome[0]


def load_tokenizer(model):
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not Path(model).is_dir() and not re.fullmatch(r"[^./~][^/]*/[^/]*", model):
        fail(f"{model}: there is no such folder")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        fail(f"{model} cannot be loaded: {reason} (offline? gated: run `hf auth login`)")
    if tokenizer.eos_token_id is None:
        fail(f"{model}: the tokenizer has no end-of-sequence token")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # only sampling pads
    return tokenizer


def load_config(model):
    """With dropout off: p must be that of the model that is sampled, in every forward of a step."""
    config = transformers.AutoConfig.from_pretrained(model)
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def load_model(model, tokenizer, dtype=torch.float32, seed=0, accelerator=None):
    """Load pretrained weights, or draw random ones where the folder has only a configuration."""
    config, folder = load_config(model), Path(model)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")):
            fail(f"{model}: its weights must be in safetensors: save_pretrained() writes them")
        torch.manual_seed(seed)
        plugin = accelerator.state.deepspeed_plugin if accelerator else None
        if plugin:  # under ZeRO-3 each process would draw its shard differently: split afterwards
            transformers.integrations.unset_hf_deepspeed_config()
        loaded = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        if plugin:
            plugin.set_deepspeed_weakref()
    else:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            model, config=config, dtype=dtype, use_safetensors=True
        )
    loaded.generation_config = transformers.GenerationConfig(  # sampling from p̂, not its top 50
        do_sample=True,
        top_k=0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return loaded


def prepare_training(args, tokenizer, accelerator, train):
    """Load the model and AdamW, wrapped for DDP or DeepSpeed. Refuses a model that cannot compute
    packed examples, as train[:2] show."""
    # Plain: float32 weights and bf16 autocast. ZeRO: bf16 weights, float32 masters in DeepSpeed.
    zero = accelerator.state.deepspeed_plugin is not None
    dtype = torch.bfloat16 if zero and accelerator.device.type == "cuda" else torch.float32
    model = load_model(args.model, tokenizer, dtype, args.seed, accelerator).train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    settings = {"lr": args.lr, "betas": tuple(args.betas), "weight_decay": args.weight_decay}
    prepared = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), **settings))
    check_packing(accelerator, prepared[0], train[:2])
    return prepared


def log_probs(model, examples, temperature=1.0):
    """Return log p̂(y|x) of each example's completion, end-of-sequence token included: float32 [B].

    Nothing is padded: the examples stand one after the other in one row [1, T]. Position ids start
    anew at each example; without an attention mask and a cache, transformers reads from them which
    tokens belong together. Logits exist only where a completion token is predicted: [K, V].
    """
    token_ids, positions, predicting, owner = [], [], [], []
    for i, example in enumerate(examples):
        first = len(token_ids) + len(example.prompt_ids) - 1  # predicts the first completion token
        predicting += range(first, first + len(example.completion_ids))
        owner += [i] * len(example.completion_ids)
        token_ids += example.prompt_ids + example.completion_ids
        positions += range(len(example))
    device = next(model.parameters()).device
    token_ids, positions, predicting, owner = (
        torch.tensor(numbers, device=device)
        for numbers in (token_ids, positions, predicting, owner)
    )
    output = model(
        input_ids=token_ids[None],
        position_ids=positions[None],
        logits_to_keep=predicting,
        use_cache=False,
    )
    logits = output.logits[0].float()
    if temperature != 1:
        logits = logits / temperature
    by_token = token_log_probs(logits, token_ids[predicting + 1])
    return by_token.new_zeros(len(examples)).index_add(0, owner, by_token)


def token_log_probs(logits, targets):
    """log p of each target: logits [K, V], targets [K] -> [K]. examples/rivals.py replaces it."""
    return logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1)


def check_packing(accelerator, model, examples):
    """Refuse a model for which an example's log p̂ depends on what stands before it in its row."""
    before, example = (
        Example(one.id, one.prompt_ids, one.completion_ids or one.prompt_ids)
        for one in (examples[0], examples[-1])
    )
    vocabulary = accelerator.unwrap_model(model).config.get_text_config().vocab_size
    ids = [(token + 1) % vocabulary for token in before.prompt_ids + before.completion_ids]
    cut = len(before.prompt_ids)
    other = Example(before.id, ids[:cut], ids[cut:])  # of the same shape: no rounding differs
    with torch.no_grad():
        one, two = (log_probs(model, [first, example])[1] for first in (before, other))
    tolerance = 5e-2 if accelerator.mixed_precision == "bf16" else 1e-4
    same = torch.allclose(one, two, rtol=tolerance, atol=tolerance)
    # A recurrent state runs on into the next example, at times by less than the tolerance.
    if not same or accelerator.unwrap_model(model)._is_stateful:
        fail(f"this architecture mixes packed examples: log p {one:.6g} or {two:.6g} by neighbour")


def gathered_log_probs(accelerator, model, examples, grad=False, temperature=1.0):
    """log p̂ of the examples of one round, dealt out to the processes.

    Returns (this process's share with its graph, for `backward`; all, in order and detached).
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    # Every process computes as many; where there are too few, it repeats the last.
    firsts = range(0, len(examples), world)
    share = [examples[min(first + rank, len(examples) - 1)] for first in firsts]
    with accelerator.no_sync(model), torch.set_grad_enabled(grad):
        mine = log_probs(model, share, temperature)
    everyone = accelerator.gather(mine.detach()).view(world, -1).T.reshape(-1)[: len(examples)]
    if not everyone.isfinite().all():
        fail("log p of an example is not finite: training diverged. Try a lower --lr or --clip")
    return mine, everyone


def backward(accelerator, model, mine, weights, last):
    """Add the gradient of Σ_i weights[i] · (-log p_i).

    mine: from `gathered_log_probs`. weights: of all examples of the round. last: this ends a step,
    in which DDP averages the gradients and DeepSpeed updates the weights.
    """
    share_weights = torch.zeros_like(mine)  # a repeated example keeps the weight 0
    share = weights[accelerator.process_index :: accelerator.num_processes]
    share_weights[: len(share)] = share.to(mine)
    loss = -(share_weights * mine).sum() * accelerator.num_processes  # gradients are averaged
    accelerator.sync_gradients = last
    with accelerator.trigger_sync_in_backward(model) if last else nullcontext():
        accelerator.backward(loss)


def score(accelerator, model, examples, tokens, temperature=1.0):
    """log p̂ of any number of examples, without gradients: float32 [n]. tokens: see make_rounds."""
    log_p = {}
    world = accelerator.num_processes
    for ids in make_rounds(range(len(examples)), lambda i: len(examples[i]), world, tokens):
        raise_if_stopped(accelerator)
        batch = [examples[i] for i in ids]
        _, values = gathered_log_probs(accelerator, model, batch, temperature=temperature)
        log_p.update(zip(ids, values, strict=True))
    return torch.stack([log_p[i] for i in range(len(examples))])


# ---- Output folder, state, signals ---------------------------------------------------------------
MAY_CHANGE = {"out", "resume", "overwrite", "save_every", "max_steps", "micro_batch_tokens",
              "gradient_checkpointing", "report_to", "gpu_memory", "gpus_per_engine"}  # fmt: skip


def check_out(args):
    """Refuse to overwrite a run, or to resume it with other arguments."""
    path, states = args.out / "args.json", [*args.out.glob("state/step-*[0-9]")]
    checkpoints = [*args.out.glob("epoch-[1-9]*"), *args.out.glob("step-*")]
    args.processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.resume and path.exists() and (states or not checkpoints):
        now, then = json.loads(json.dumps(vars(args), default=str)), json.loads(path.read_text())
        for name in sorted(now.keys() - MAY_CHANGE):
            if now[name] != then.get(name):
                fail(f"--resume: {name} was {then.get(name)} and is {now[name]} now")
    elif not args.overwrite and (path.exists() or states or checkpoints):
        resume = "args.json or its state is missing: use" if args.resume else "use --resume,"
        fail(f"{args.out} holds a run; {resume} --overwrite or another --out")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {args.out}: {error.strerror}")


class StopRequested(Exception):
    """SIGTERM or Ctrl-C reached a process."""


def raise_if_stopped(accelerator):
    """Raise StopRequested on all processes where SIGTERM or Ctrl-C has reached one of them."""
    flag = torch.tensor([Run.stop_signal], device=accelerator.device)
    Run.stop_signal = int(accelerator.gather(flag).max())
    if Run.stop_signal:
        raise StopRequested


class Run:
    """A training run's output folder: args.json, metrics.jsonl, epochs.jsonl, checkpoints, state/.

    state/step-<k> holds all that --resume needs, as accelerate writes it. SIGTERM and Ctrl-C end
    the run after the current step, or within its scoring, with a state and exit code 128 + signal
    (Ctrl-\\ at once). A checkpoint of an epoch has a state beside it, unless that is removed.

        with Run(args, accelerator, model, tokenizer, refill, record) as run:
            ...
    """

    stop_signal = 0  # the signal that asked to stop; 0: none

    def __init__(self, args, accelerator, model, tokenizer, refill, record):
        """record: what evaluation reads from a checkpoint's dco.json."""
        self.args, self.accelerator, self.refill = args, accelerator, refill
        self.model, self.tokenizer, self.record = model, tokenizer, record
        self.step, self.clipped = 0, 0
        self.logs = [args.out / "metrics.jsonl", args.out / "epochs.jsonl"]
        accelerator.register_for_checkpointing(self)

    def state_dict(self):
        sizes = [path.stat().st_size if path.exists() else 0 for path in self.logs]
        refill = self.refill.state_dict()
        return {"step": self.step, "clipped": self.clipped, "refill": refill, "sizes": sizes}

    def load_state_dict(self, state):
        self.step, self.clipped = state["step"], state["clipped"]
        if state["refill"]["size"] != self.refill.size:
            fail("--resume: the data has changed")
        vars(self.refill).update(state["refill"])
        for path, size in zip(self.logs, state["sizes"], strict=True):
            os.truncate(path, size) if path.exists() else None  # what came after this state

    def __enter__(self):
        """Start a new run, or return to the last state with --resume."""
        out, accelerator, last_state = self.args.out, self.accelerator, self.last_state()
        if self.args.resume and last_state:
            accelerator.print(f"resuming from {last_state}", flush=True)
            accelerator.load_state(last_state)
            if self.step > (self.args.max_steps or inf):
                fail(f"--max-steps {self.args.max_steps}: the run is at step {self.step}")
        elif accelerator.is_main_process:
            for path in [out / "state", *out.glob("epoch-*"), *out.glob("step-*"), *self.logs]:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            partial = out / "args.json.partial"
            partial.write_text(json.dumps(vars(self.args), default=str))
            partial.rename(out / "args.json")
        accelerator.wait_for_everyone()
        if self.args.report_to != "none":
            accelerator.init_trackers("dco", {k: str(v) for k, v in vars(self.args).items()})
        Run.stop_signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.on_signal)
        return self

    def on_signal(self, number, frame):
        Run.stop_signal = number  # a launcher may send it once more

    def next_step(self, score, forward):
        """As `Refill.next_step`; a step that a signal cuts short begins anew after --resume."""
        before = self.refill.state_dict()
        try:
            return self.refill.next_step(score, forward)
        except StopRequested:
            vars(self.refill).update(before)
            raise

    def end_step(self, metrics):
        """Log a step, and save where --save-every says so or a signal came to any process."""
        self.log(self.logs[0], metrics)
        raise_if_stopped(self.accelerator)
        if self.step % self.args.save_every == 0:
            self.save_state()

    def end_epoch(self, summary):
        self.log(self.logs[1], summary)

    def log(self, path, line):
        """Append a line to a file of the run, and send its numbers to the tracker."""
        if self.accelerator.is_main_process:
            try:
                with open(path, "a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                self.fail_to_write(path, error)
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
        self.accelerator.log(numbers, step=self.step)

    def last_state(self):
        states = self.args.out.glob("state/step-*[0-9]")
        return max(states, key=lambda path: int(path.name[5:]), default=None)

    def save_state(self):
        folder = self.args.out / "state" / f"step-{self.step}"
        if not folder.exists():
            with self.whole(folder) as partial:
                self.accelerator.save_state(partial)
            if self.accelerator.is_main_process:
                for old in set(folder.parent.glob("step-*")) - {folder}:
                    unnamed = old.rename(old.with_suffix(".partial"))  # no longer a whole state
                    shutil.rmtree(unnamed, ignore_errors=True)

    def save_epoch(self):
        """At the end of an epoch or of --max-steps, save a state and a checkpoint. Returns the name
        of the latter."""
        finished = self.refill.position == len(self.refill.order)
        name = f"epoch-{self.refill.epoch}" if finished else f"step-{self.step}"
        self.save_state()
        self.save_checkpoint(name)
        return name

    def save_checkpoint(self, name, **more):
        """Write a Hugging Face folder plus dco.json: the record, step, epoch and `more`."""
        weights = self.accelerator.get_state_dict(self.model)  # ZeRO-3: gathered into the first
        with self.whole(self.args.out / name) as partial:
            if self.accelerator.is_main_process:
                model = self.accelerator.unwrap_model(self.model)
                model.save_pretrained(partial, state_dict=weights)
                self.tokenizer.save_pretrained(partial)
                record = self.record | {"step": self.step, "epoch": self.refill.epoch} | more
                (partial / "dco.json").write_text(json.dumps(record))

    @contextmanager
    def whole(self, folder):
        """Yield another folder to write to. It gets its name when it is complete and on the disk,
        so that a kill at any instant leaves only whole folders of that name."""
        partial = folder.with_name(folder.name + ".partial")
        try:
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            yield partial
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                for path in filter(Path.is_file, partial.rglob("*")):
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
                shutil.rmtree(folder, ignore_errors=True)
                partial.rename(folder)
            self.accelerator.wait_for_everyone()
        except (OSError, RuntimeError, SafetensorError) as error:
            self.fail_to_write(folder, error)

    def fail_to_write(self, path, error):
        """As `fail`, but on the process that cannot write, whichever that is."""
        message = f"{path} cannot be written: {error}. Last good state: {self.last_state()}"
        print(f"error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(2)

    def __exit__(self, kind, error, trace):
        if kind is StopRequested:
            self.save_state()
            self.accelerator.print(f"\nstopped after step {self.step}: --resume continues the run")
        if kind is StopRequested or kind is None:
            self.accelerator.wait_for_everyone()
            self.accelerator.end_training()
        if kind is StopRequested:
            number, Run.stop_signal = Run.stop_signal, 0
            raise SystemExit(128 + number)


# ---- Coverage ------------------------------------------------------------------------------------
def pass_at_n(n, c, k):
    """Unbiased pass@k from n samples of which c (int or array) are right: 1 - C(n-c,k) / C(n,k)."""
    if k > n:
        raise ValueError(f"pass@{k} cannot be estimated from {n} samples: draw at least {k}")
    i = np.arange(n)  # the quotient is Π_{i<c} (n-k-i) / (n-i): one running product serves all c
    all_wrong = np.concatenate([[1.0], np.cumprod(np.maximum(n - k - i, 0) / (n - i))])
    return 1 - all_wrong[np.asarray(c)]


def exact_pass_at_n(log_p, n):
    """1 - (1-p)^N = exp(-ℓ_DCO^N), without samples. Counts the reference string only: a lower bound
    where other strings are right as well."""
    return dco_loss(torch.as_tensor(log_p, dtype=torch.float64), n).neg().exp().numpy()


def mean_and_interval(values, resamples=2000):
    """Mean over problems with its 95 % bootstrap interval."""
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"pass": float(values.mean()), "low": float(low), "high": float(high)}


def evaluate_exactly(accelerator, model, tokenizer, examples, max_new_tokens, tokens, ns):
    """Exact pass@N for each N, and the mean confidence p̂(greedy completion)."""
    sampler = TransformersSampler(accelerator, model, tokenizer)
    greedy = sampler.generate([example.prompt_ids for example in examples], 1, max_new_tokens)
    confidence = float(np.exp([completion.log_prob for (completion,) in greedy]).mean())
    log_p = score(accelerator, model, examples, tokens).cpu()
    coverage = {f"pass@{n}": float(exact_pass_at_n(log_p, n).mean()) for n in ns}
    return coverage | {"greedy_confidence": confidence}


def count_answers(completions, tokenizer, template):
    """{answer: how many completions end in it}. A completion without EOS has the answer None."""
    answers = Counter()
    for ids, count in Counter(tuple(one.token_ids) for one in completions).items():
        ended = bool(ids) and ids[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(ids, skip_special_tokens=True) if ended else ""
        answers[TEMPLATES[template].extract(text) if ended else None] += count
    return answers


def most_frequent_answer(answers, grader):
    """Return (answer, count) of the most frequent one, where answers that the grader takes for
    equal are one. answers: {answer: count}. The eight most frequent strings are its candidates."""
    texts = [answer for answer, _ in Counter(answers).most_common() if answer is not None]
    best, most = None, 0
    for text in texts[:8]:
        # Either must accept the other: 9^{99} is not compared with each of the plain numbers.
        similar = [other for other in texts if verdict_at_sight(other, text) is not False]
        equal = grader.grade([(text, other) for other in similar])
        count = sum(answers[other] for other, same in zip(similar, equal, strict=True) if same)
        if count > most:
            best, most = text, count
    return best, most


def evaluate_by_sampling(sampler, grader, tokenizer, examples, golds, args):
    """pass@k and the share of the most frequent answer (Table 3), from args.eval_n samples each.
    On the main process, where the grader is; None on the others."""
    n, seeds = args.eval_n, [seed_of(args.seed, "evaluation", example.id) for example in examples]
    prompts = [example.prompt_ids for example in examples]
    found = sampler.generate(prompts, n, args.max_new_tokens, seeds)
    if grader is None:
        return None
    right, modes = [], []
    for gold, completions in zip(golds, found, strict=True):
        answers = count_answers(completions, tokenizer, args.template)
        verdicts = grader.grade([(gold, answer) for answer in answers])
        right.append(sum(count for count, ok in zip(answers.values(), verdicts, strict=True) if ok))
        modes.append(most_frequent_answer(answers, grader)[1])
    coverage = {f"pass@{k}": float(pass_at_n(n, right, k).mean()) for k in (1, 16, 64) if k <= n}
    confidence = float(np.mean(modes)) / n
    return coverage | {"mode_confidence": confidence, "grader_timeouts": grader.timeouts}


# ---- Sampling: vLLM engines beside the trainer (App. B), or the model in training itself ---------
# token_ids end with the end-of-sequence token unless the limit came first. log_prob is for
# comparison only: p for DCO always comes from `log_probs`.
Completion = namedtuple("Completion", ["token_ids", "log_prob"])


def make_sampler(args, accelerator, checkpoint, tokenizer, max_length, model=None):
    """Return the sampler of args.engine; auto is vLLM where it is installed. max_length: tokens of
    prompt and completion. model: the one in training; None: the checkpoint's weights."""
    if args.engine == "vllm" or (args.engine == "auto" and find_spec("vllm")):
        return VLLMEngines(args, accelerator, checkpoint, tokenizer, max_length, model)
    if model is None:
        dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
        model = load_model(checkpoint, tokenizer, dtype).eval().to(accelerator.device)
    return TransformersSampler(accelerator, model, tokenizer)


class Sampler:
    """The interface of both samplers. All processes call these methods together."""

    def generate(self, prompts, n, max_new_tokens, seeds=None, temperature=1.0):
        """Return n Completions of each prompt, the same on every process. n: an int, or one per
        prompt. seeds: one per prompt, on which alone its samples depend; None is greedy."""
        counts = [n] * len(prompts) if isinstance(n, int) else n
        if seeds is None:
            seeds, temperature = [0] * len(prompts), 0.0
        requests = []
        for prompt, count, seed in zip(prompts, counts, seeds, strict=True):
            for first in range(0, count, self.request_size):
                requests.append((prompt, min(self.request_size, count - first), seed + first))
        completions = chain(*self._sample(requests, max_new_tokens, temperature))
        return [list(islice(completions, count)) for count in counts]

    def update_weights(self, model):
        """From now on, sample with the weights that `model` has now."""

    def shut_down(self):
        """End the engines."""


class TransformersSampler(Sampler):
    """Samples with the model in training itself. Samples of a prompt that are the same so far share
    a row of the batch: many samples of a model that is sure of itself cost little more than one.
    tokens: most that a process computes at once, prompts and completions."""

    request_size = 1024

    def __init__(self, accelerator, model, tokenizer, tokens=1 << 16):
        self.accelerator, self.tokenizer, self.tokens = accelerator, tokenizer, tokens
        self.model = accelerator.unwrap_model(model)

    def _sample(self, requests, max_new_tokens, temperature):
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        if any(hasattr(weight, "ds_id") for weight in self.model.parameters()):
            world, rank = 1, 0  # under ZeRO-3 all processes have to compute the same
        most = [count * (len(prompt) + max_new_tokens) for prompt, count, _ in requests]
        found, training = {}, self.model.training
        self.model.eval()
        rounds = make_rounds(
            range(len(requests)), most.__getitem__, world, self.tokens, padded=True
        )
        for ids in rounds:
            if share := ids[rank::world]:
                batch = [requests[i] for i in share]
                completions = self._sample_batch(batch, max_new_tokens, temperature)
                found.update(zip(share, completions, strict=True))
        self.model.train(training)
        if world > 1:
            found = dict(ChainMap(*accelerate.utils.gather_object([found])))
        return [found[i] for i in range(len(requests))]

    @torch.no_grad()
    def _sample_batch(self, requests, max_new_tokens, temperature):
        """Return a list of Completions for each request (prompt, count, seed)."""
        prompts, counts, _ = zip(*requests, strict=True)
        device, eos, cache = self.accelerator.device, self.tokenizer.eos_token_id, None
        batch = {"input_ids": prompts}
        batch = self.tokenizer.pad(batch, padding_side="left", return_tensors="pt").to(device)
        inputs, mask = batch["input_ids"], batch["attention_mask"]  # [rows, T]
        # A row holds the samples that are the same so far: row[i] is that of sample alive[i].
        row = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts)).to(device)
        alive = torch.arange(len(row), device=device)
        draws = [np.random.default_rng(seed).random((n, max_new_tokens)) for _, n, seed in requests]
        uniform = torch.from_numpy(np.concatenate(draws)).to(device)
        token_ids = torch.full(uniform.shape, eos, device=device)
        log_prob = torch.zeros_like(uniform[:, 0])
        for step in range(max_new_tokens):
            output = self.model(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -inputs.shape[1] :],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, logits = output.past_key_values, output.logits[:, -1].double()  # [rows, V]
            log_p = (logits / (temperature or 1.0)).log_softmax(-1)
            vocabulary = log_p.shape[1]
            if temperature == 0:
                token = log_p.argmax(-1)[row]
            else:  # inverse transform: the token at which the cumulative probability passes uniform
                ends = log_p.exp().cumsum(-1)
                ends = ends / ends[:, -1:] + torch.arange(len(ends), device=device)[:, None]
                place = torch.searchsorted(ends.flatten(), row + uniform[alive, step], right=True)
                token = (place - row * vocabulary).clamp(max=vocabulary - 1)
            log_prob[alive] += log_p[row, token]
            token_ids[alive, step] = token
            alive, row, token = (one[token != eos] for one in (alive, row, token))
            if not len(alive):
                break
            # Samples of one row and one token share a row from here on.
            keys, row = torch.unique(row * vocabulary + token, return_inverse=True)
            parents = keys // vocabulary
            if not torch.equal(parents, torch.arange(len(mask), device=device)):
                cache.batch_select_indices(parents)
            mask = torch.nn.functional.pad(mask[parents], (0, 1), value=1)
            inputs = keys[:, None] % vocabulary
        found = (
            Completion(ids[: ids.index(eos) + 1] if eos in ids else ids, value)
            for ids, value in zip(token_ids.tolist(), log_prob.tolist(), strict=True)
        )
        return [list(islice(found, count)) for count in counts]


class VLLMEngines(Sampler):
    """vLLM engines on the GPUs of the training processes, each in a Ray actor (App. B). New weights
    go by vLLM's own worker methods: on GPUs each process copies its weights, half a GiB at a time,
    and the engine on the same GPU opens the copies (CUDA IPC). On a CPU, where there is one engine,
    they go through Ray. The training processes never import vLLM."""

    request_size = 256  # so that a prompt's samples are spread over the engines
    limit_minutes = 60  # of every wait

    def __init__(self, args, accelerator, checkpoint, tokenizer, max_length, model=None):
        self.accelerator, self.cuda = accelerator, accelerator.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.gpus = args.gpus_per_engine if self.cuda else 1
        self.logs, self.engines = args.out.absolute(), []
        settings = {
            "model": os.path.abspath(checkpoint) if os.path.isdir(checkpoint) else checkpoint,
            "load_format": "auto" if model is None else "dummy",
            "dtype": str(self.dtype).removeprefix("torch."),
            "max_model_len": max_length,
            "max_num_batched_tokens": max(8192, max_length),
            "gpu_memory_utilization": args.gpu_memory,
            "tensor_parallel_size": self.gpus,
            "weight_transfer_config": {"backend": "ipc"},
            "skip_tokenizer_init": True,
            "generation_config": "vllm",  # the checkpoint's may ask for top-k or a temperature
            "enforce_eager": not self.cuda,
            # A prompt cut in two would need a seeded generator that can go back: a CPU's cannot.
            "enable_chunked_prefill": self.cuda,
        }
        all_gpus = torch.cuda.device_count() if model is None else accelerator.num_processes
        count, left = divmod(all_gpus, self.gpus) if self.cuda else (1, 0)
        if left:
            fail(f"--gpus-per-engine {self.gpus} does not divide the {all_gpus} GPUs")
        on_main(accelerator, self._start, count, tokenizer.eos_token_id, settings)
        if model is not None:
            self.update_weights(model)

    def _start(self, count, *inputs):
        self.ray = start_ray()
        actor = self.ray.remote(Engine).options(num_cpus=0, num_gpus=self.gpus if self.cuda else 0)
        self.engines = [actor.remote(self.logs, i, count, *inputs) for i in range(count)]
        self._ask("starting", "__ray_ready__")

    def _ask(self, doing, method, *inputs):
        """Call a method of every engine. An error shows the last lines of the engines' logs."""
        try:
            calls = [getattr(engine, method).remote(*inputs) for engine in self.engines]
            return self.ray.get(calls, timeout=60 * self.limit_minutes)
        except self.ray.exceptions.RayError as error:  # the time limit, too
            lines = [f"an engine failed while {doing}: {str(error).strip().splitlines()[-1]}"]
        for log in sorted(self.logs.glob("engine-*.log")):
            lines += [f"--- the end of {log}", *log.read_text(errors="replace").splitlines()[-15:]]
        raise RuntimeError("\n".join(line[:300] for line in lines))

    def _sample(self, requests, *settings):
        found = on_main(self.accelerator, self._ask, "sampling", "generate", requests, *settings)
        return [found[i % len(found)][i // len(found)] for i in range(len(requests))]

    def update_weights(self, model):
        def call_workers(*inputs):
            on_main(self.accelerator, self._ask, "taking over weights", "call_workers", *inputs)

        chunks = weight_chunks(self.accelerator.unwrap_model(model), self.dtype)
        if not self.cuda:
            call_workers("reload_weights", [*chain(*chunks)])
            return
        call_workers("start_weight_update")
        for chunk in chunks:
            call_workers("update_weights", self._export(chunk))
            torch.cuda.ipc_collect()  # frees the copies that the engines have read
        call_workers("finish_weight_update")

    def _export(self, chunk):
        """Return the arguments of vLLM's "ipc" backend: {GPU: handle of the copy} by weight."""
        gpu = str(torch.cuda.get_device_properties(self.accelerator.device).uuid)
        handles = [{gpu: reduce_tensor(weight)[1]} for _, weight in chunk]
        torch.cuda.synchronize()
        handles = zip(*accelerate.utils.gather_object([handles]), strict=True)  # by weight
        return {
            "names": [name for name, _ in chunk],
            "dtype_names": [str(weight.dtype).removeprefix("torch.") for _, weight in chunk],
            "shapes": [list(weight.shape) for _, weight in chunk],
            "ipc_handles": [dict(ChainMap(*of_all_processes)) for of_all_processes in handles],
        }

    def shut_down(self):
        for engine in self.engines:
            self.ray.kill(engine)
        self.engines = []


def weight_chunks(model, dtype, chunk_bytes=1 << 29):
    """Yield lists of (name, copy). Under ZeRO-3, all processes iterate together."""
    chunk = []
    # Not named_parameters(): that leaves out a tied head, and an engine may keep one of its own.
    for name, weight in model.state_dict(keep_vars=True).items():
        with accelerate.utils.GatheredParameters([weight]):  # no-op but under ZeRO-3
            chunk.append((name, weight.detach().to(dtype, copy=True)))
        if sum(copy.nbytes for _, copy in chunk) >= chunk_bytes:
            yield chunk
            chunk = []
    yield chunk


class Engine:
    """Runs in a Ray actor: one vLLM engine."""

    def __init__(self, logs, index, count, eos, settings):
        self.index, self.count, self.eos = index, count, eos
        with open(logs / f"engine-{index}.log", "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        for name in list(os.environ):  # the launcher's group of training processes is not its own
            if re.fullmatch("(LOCAL_)?(RANK|WORLD_SIZE)|MASTER_.*|TORCHELASTIC_.*", name):
                del os.environ[name]
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # no process between actor and engine
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        import vllm

        self.vllm, self.llm = vllm, vllm.LLM(**settings)

    def call_workers(self, method, *inputs):
        """Call a method of vLLM's worker on each GPU of this engine."""
        self.llm.collective_rpc(method, args=inputs)
        self.llm.reset_prefix_cache()  # its keys and values may be of other weights

    def generate(self, requests, max_new_tokens, temperature):
        """Return a list of Completions for each of this engine's requests (prompt, count, seed)."""
        settings = {
            "temperature": temperature,
            "max_tokens": max_new_tokens,
            "ignore_eos": True,  # of those that the model's configuration may name
            "stop_token_ids": [self.eos],
            "logprobs": 0,  # of the token drawn, no others
            "detokenize": False,
        }
        prompts, params = [], []
        for prompt, count, seed in requests[self.index :: self.count]:  # sample i has seed + i
            prompts.append({"prompt_token_ids": prompt})
            params.append(self.vllm.SamplingParams(n=count, seed=seed, **settings))
        outputs = self.llm.generate(prompts, params, use_tqdm=False) if prompts else []
        return [
            [Completion(list(one.token_ids), one.cumulative_logprob) for one in output.outputs]
            for output in outputs
        ]


def start_ray():
    """Connect to the Ray cluster RAY_ADDRESS, or start one that ends with this process."""
    import ray  # only vLLM and proof search need it

    if not ray.is_initialized():
        handler = signal.getsignal(signal.SIGTERM)
        address = os.environ.get("RAY_ADDRESS", "local")
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level="error")
        signal.signal(signal.SIGTERM, handler)  # Ray has put its own in place
    return ray
