"""Measure pass@N coverage of checkpoints, exactly and from samples, and draw the paper's figures.

    python eval_passn.py runs/direct-n1/epoch-24 runs/direct-n64/epoch-24     # exact, no sampling
    python eval_passn.py runs/cot-n1/epoch-8 runs/cot-n64/epoch-8 --n 64 --ns 1,16,64
    accelerate launch eval_passn.py runs/direct-n64/epoch-4 --n 4096          # 8 GPUs

pass@N is the probability that at least one of N independent samples is right (Eq. 2):

    exact     1 - (1 - p)^N,  p = p̂(y|x) of the reference answer; for direct answers
    sampled   1 - C(n-c, N) / C(n, N)  from n samples of a problem, of which c are right

Prints Markdown tables: coverage, its errors, and differences from the first checkpoint, paired by
problem. Writes passn-<data>.json and, by the paper's numbers:

    Tables 1, 4, 5        of a run's epochs; Table 5 with --data HuggingFaceH4/aime_2024
    Table 3               with --n 1024 --ns 1,16,64
    Figures 1, 3, 7, 9    confidence-<data>.png: of greedy answers, or most frequent ones with --n
    Figures 2a, 6, 8, 10  passn-<data>.png; with --temperature 0.7,1,1.3,2 a curve for each
    Figure 2b             --figure 2b: F(N, p) over p
    Figure 4              --figure 4 RUN ...: discarded samples by step
    Figure 5              --figure 5 CHECKPOINT ...: test loss along a step on data of each level
    Figure 11             --figure 11: the bounds of Lemmas 4.2 and 4.3
    Figure 12             --figure 12 CHECKPOINT ...: accuracy by rank of confidence
    Figure 13             --figure 13 CHECKPOINT ...: confidence and F on data of each level
    Tables 2, 6, Fig. 2c  prove.py
"""

import argparse
import gc
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from tqdm import tqdm

import common

TABLE_NS = (1, 16, 256, 4096)
POSITIVE = ("n", "max_new_tokens", "micro_batch_tokens", "gpu_memory", "gpus_per_engine")


def integers(text):
    return sorted({int(number) for number in text.split(",")})


def numbers(text):
    return sorted({float(number) for number in text.split(",")})


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="folder or hub name")
    add("--figure", choices=["2b", "4", "5", "11", "12", "13"], help="draw this figure")
    add("--data", help="folder, file of JSON lines or hub name (default: the training data's)")
    add("--split", default="test", help="paper: test, 500 problems of MATH")
    add("--ns", type=integers, help="N of the table (default: 1,16,256,4096 up to --n)")
    add("--temperature", type=numbers, default=[1.0], help="one or several (default: 1, p̂ itself)")
    add("--micro-batch-tokens", type=int, default=4096 if torch.cuda.is_available() else 512)
    add("--out", type=Path, help="default: the checkpoint's folder, or that of all checkpoints")
    # prompts and completions: by default as in the checkpoint's dco.json
    add("--template", choices=["direct", "cot", "r1", "r1-short"])
    add("--prompt", help="instead of the template's, with {problem} in it")
    add("--max-new-tokens", type=int, help="paper: 1,024 for reasoning traces")
    # sampling
    add("--n", type=int, help="samples per problem (default: none, exact coverage only)")
    add("--engine", default="auto", choices=["auto", "vllm", "transformers"])
    add("--gpu-memory", type=float, default=0.85, help="vLLM's share of each GPU's memory")
    add("--gpus-per-engine", type=int, default=1, help="for models too large for one GPU")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in POSITIVE:
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    if not all(0 < temperature < math.inf for temperature in args.temperature):
        parser.error("--temperature must be positive")
    args.ns = args.ns or [n for n in TABLE_NS if not args.n or n <= args.n]
    if args.ns[0] < 1:
        parser.error("--ns takes whole numbers from 1 up")
    if args.n and args.n < args.ns[-1]:
        parser.error(f"pass@{args.ns[-1]} cannot be estimated from --n {args.n} samples")
    if "{problem}" not in (args.prompt or "{problem}"):
        parser.error("--prompt must contain {problem}")
    if not args.checkpoints and args.figure not in ("2b", "11"):
        parser.error("give a checkpoint, or several; for Figure 4 the folder of a run")
    if not args.out:
        folders = [os.path.abspath(one) for one in args.checkpoints if Path(one).is_dir()]
        args.out = Path(os.path.relpath(os.path.commonpath(folders)) if folders else "runs")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.figure in FIGURES:
        panels = FIGURES[args.figure](args)
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / f"figure-{args.figure}.json"
        path.write_text(json.dumps(panels) + "\n")
        draw(panels, path.with_suffix(".png"))
        print(f"wrote {path} and {path.with_suffix('.png')}")
        return

    # -------- checkpoints and data are checked before the first model is loaded
    records = [read_record(checkpoint) for checkpoint in args.checkpoints]
    templates = {args.template or record.get("template", "direct") for record in records}
    if templates != {"direct"} and not args.n:
        common.fail("pass@N of reasoning traces is estimated from samples: give --n, say 1024")
    args.data = args.data or recorded_data(records)
    rows = common.load_problems(args.data, args.split)
    name = Path(args.data).name.removesuffix(".jsonl")
    args.name = name if args.split == "test" else f"{name}-{args.split}"
    if args.n:
        args.engine = common.choose_engine(args.engine)

    # -------- measure each checkpoint at each temperature
    accelerator = common.make_accelerator()
    grader = common.Grader(min(os.cpu_count(), 8)) if accelerator.is_main_process else None
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    for checkpoint, record in zip(args.checkpoints, records, strict=True):
        for temperature in args.temperature:
            result = measure(args, accelerator, checkpoint, record, temperature, rows)
            first = results[0] if results else result
            results.append(
                common.on_main(accelerator, summarise, result, first, rows, grader, args)
            )

    # -------- report
    if accelerator.is_main_process:
        report = {"data": args.data, "split": args.split, "ns": args.ns, "arguments": vars(args)}
        report |= {"grading_timeouts": getattr(grader, "timeouts", 0), "checkpoints": results}
        grader.close()
        path = args.out / f"passn-{args.name}.json"
        path.write_text(json.dumps(report, default=str) + "\n")
        print_tables(results, args)
        if report["grading_timeouts"]:
            print(
                f"\n{report['grading_timeouts']} answers took too long to grade: counted as wrong"
            )
        print("\nwrote", ", ".join(map(str, [path, *draw_results(results, args)])))
    accelerator.wait_for_everyone()
    accelerator.end_training()


# ---- Checkpoints ---------------------------------------------------------------------------------
def read_record(checkpoint):
    """Return what training wrote into the checkpoint's dco.json: template, n_prime, data, ..."""
    folder = Path(checkpoint)
    if folder.suffix == ".partial" or (folder.is_dir() and not any(folder.glob("*.safetensors"))):
        common.fail(f"{checkpoint} holds no whole weights: give what a training script wrote")
    path = folder / "dco.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def recorded_data(records):
    """Return the data that the checkpoints were trained on."""
    names = {str(record.get("data")) for record in records}
    if len(names) > 1 or names == {"None"} or Path(*names).is_file():
        common.fail(f"the checkpoints were trained on {', '.join(names)}: give --data")
    return names.pop()


def load(checkpoint, tokenizer, accelerator):
    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    return common.load_model(checkpoint, tokenizer, dtype).eval().to(accelerator.device)


def fingerprint(checkpoint):
    """Return hashes of the weights, since a path may hold those of another run tomorrow."""
    hashes = []
    for path in sorted(Path(checkpoint).glob("*.safetensors")):
        with open(path, "rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes or checkpoint


# ---- Measuring -----------------------------------------------------------------------------------
def measure(args, accelerator, checkpoint, record, temperature, rows):
    """Score and sample with one checkpoint. Returns its result, for `summarise`."""
    tokenizer, config = common.load_tokenizer(checkpoint), common.load_config(checkpoint)
    template = args.template or record.get("template", "direct")
    prompt, direct = args.prompt or record.get("prompt"), template == "direct"
    examples, dropped = common.encode(
        rows, tokenizer, config, template, prompt, prompts_only=not direct
    )
    if not examples:
        common.fail(f"{checkpoint}: no problem of {args.data} is usable ({dropped})")
    longest = max(len(example.completion_ids) for example in examples) if direct else 1024
    max_new_tokens = args.max_new_tokens or record.get("max_new_tokens", longest)
    accelerator.print(
        f"{checkpoint}: {len(rows):,} problems of {args.data} ({args.split}), template {template}, "
        f"temperature {temperature:g}; dropped and counted as unsolved: {dropped or 'none'}"
    )
    result = {"checkpoint": checkpoint, "n_prime": record.get("n_prime"), "template": template}
    result |= {"temperature": temperature, "max_new_tokens": max_new_tokens, "n": args.n}
    problems = {}
    for row in rows:  # these are the values of problems that are dropped
        problems[row["id"]] = {"id": row["id"], "level": row.get("level"), "answer": None}
        problems[row["id"]] |= {"confidence": 0.0, "samples": {}}
    model = None
    if direct or args.engine == "transformers":
        model = load(checkpoint, tokenizer, accelerator)
    if direct:
        common.check_packing(accelerator, model, examples[:2])
        for id, found in score(args, accelerator, model, tokenizer, examples, result).items():
            problems[id] |= found
    if direct and args.figure == "12":
        for example in tqdm(examples, unit="problem", disable=not accelerator.is_main_process):
            problems[example.id]["ranked"] = beam_search(model, tokenizer, example, max_new_tokens)
    if args.n:
        if args.engine == "vllm":  # it takes most of the GPU's memory
            model = None
            gc.collect()
            torch.cuda.empty_cache()
        for id, answers in sample(args, accelerator, model, tokenizer, examples, result).items():
            problems[id]["samples"] = answers
    return result | {"per_problem": list(problems.values())}


def score(args, accelerator, model, tokenizer, examples, result):
    """Return log p̂ of each reference answer, and the greedy answer with its confidence."""
    sampler = common.TransformersSampler(accelerator, model, tokenizer)
    prompts = [example.prompt_ids for example in examples]
    completions = sampler.generate(prompts, 1, result["max_new_tokens"])
    greedy = [
        common.Example(example.id, example.prompt_ids, completion.token_ids)
        for example, (completion,) in zip(examples, completions, strict=True)
    ]
    settings = args.micro_batch_tokens, result["temperature"]
    log_p = common.score(accelerator, model, examples, *settings).tolist()
    confidence = common.score(accelerator, model, greedy, *settings).exp().tolist()
    found = {}
    for i, example in enumerate(examples):
        (answer,) = common.count_answers(completions[i], tokenizer, "direct")
        found[example.id] = {"log_p": log_p[i], "answer": answer, "confidence": confidence[i]}
    return found


@torch.no_grad()
def beam_search(model, tokenizer, example, max_new_tokens, width=256, kept=16):
    """Return the answers of the likeliest completions that a beam finds, the likeliest first."""
    prompt = torch.tensor([example.prompt_ids], device=model.device)  # [1, T]
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        num_beams=width,
        num_return_sequences=kept,
        length_penalty=0.0,
        max_new_tokens=max_new_tokens,
    )
    texts = tokenizer.batch_decode(found[:, prompt.shape[1] :], skip_special_tokens=True)
    return [common.TEMPLATES["direct"].extract(text) for text in texts]


def sample(args, accelerator, model, tokenizer, examples, result):
    """Return {id: {answer: count}} of n samples of each problem, None for those without an answer.

    They are kept in samples-<data>-<hash>.jsonl, a line per problem, and not sampled again. The
    hash is of the weights, the prompts and all that changes the samples.
    """
    weights = common.on_main(accelerator, fingerprint, result["checkpoint"])
    max_new_tokens, temperature = result["max_new_tokens"], result["temperature"]
    settings = args.n, args.seed, temperature, max_new_tokens, result["template"]
    key = common.seed_of(weights, [example.prompt_ids for example in examples], settings)
    path = args.out / f"samples-{args.name}-{key}.jsonl"
    known = common.on_main(accelerator, read_samples, path)
    left = [example for example in examples if example.id not in known]
    if left and args.engine == "vllm":
        sampler = common.VLLMEngines(
            accelerator,
            result["checkpoint"],
            tokenizer,
            max_length=max(len(example.prompt_ids) for example in examples) + max_new_tokens,
            logs=args.out,
            memory=args.gpu_memory,
            gpus=args.gpus_per_engine,
        )
    elif left:
        sampler = common.TransformersSampler(accelerator, model, tokenizer)
    samples = 1 << 15 if args.engine == "vllm" else 1 << 12  # of a call
    count = max(accelerator.num_processes, samples // args.n)  # problems of a call
    groups = [left[i : i + count] for i in range(0, len(left), count)]
    for group in tqdm(groups, unit="call", disable=not accelerator.is_main_process):
        seeds = [common.seed_of(args.seed, "evaluation", example.id) for example in group]
        prompts = [example.prompt_ids for example in group]
        found = sampler.generate(prompts, args.n, max_new_tokens, seeds, temperature)
        if accelerator.is_main_process:
            with open(path, "a") as file:
                for example, completions in zip(group, found, strict=True):
                    answers = common.count_answers(completions, tokenizer, result["template"])
                    line = {"id": example.id, "answers": answers.most_common()}
                    file.write(json.dumps(line) + "\n")
    if left:
        sampler.shut_down()
    return common.on_main(accelerator, read_samples, path)


def read_samples(path):
    common.keep_lines(path, "id", math.inf)  # a kill may have cut off the last line
    lines = [line for _, line in common.read_json_lines(path)] if path.exists() else []
    return {line["id"]: dict(map(tuple, line["answers"])) for line in lines}


# ---- Summaries -----------------------------------------------------------------------------------
def summarise(result, first, rows, grader, args):
    """Grade the answers of a result's problems, and average over the problems."""
    problems = result["per_problem"]
    for row, problem in zip(rows, problems, strict=True):
        samples = problem.pop("samples")
        verdicts = grader.grade([(row["answer"], answer) for answer in samples])
        counts = zip(samples.values(), verdicts, strict=True)
        problem["right"] = sum(count for count, is_right in counts if is_right)
        if result["template"] != "direct":
            problem["answer"], count = common.most_frequent_answer(samples, grader)
            problem["confidence"] = count / args.n
            problem["ranked"] = [answer for answer in samples if answer is not None][:16]
        (problem["answer_right"],) = grader.grade([(row["answer"], problem["answer"])])
        if args.figure == "12":
            ranked = problem.get("ranked", [])
            problem["ranked_right"] = grader.grade([(row["answer"], answer) for answer in ranked])
    result["confidence"] = float(np.mean([problem["confidence"] for problem in problems]))
    result["accuracy"] = float(np.mean([problem["answer_right"] for problem in problems]))
    if args.figure == "12":
        result["ranks"] = {}
        for rank in range(16):
            right = [any(problem["ranked_right"][rank : rank + 1]) for problem in problems]
            result["ranks"][rank + 1] = common.mean_and_interval(right)

    curve_ns = {*args.ns, *(2**i for i in range(args.ns[-1].bit_length()))}
    if result["template"] == "direct":
        result["exact"] = {}
    if args.n:
        result["sampled"] = {}
    for kind in result.keys() & {"exact", "sampled"}:
        for n in sorted(curve_ns):
            values = coverage(result, kind, n)
            estimate = common.mean_and_interval(values)
            if kind == "sampled":
                right = [problem["right"] for problem in problems]
                estimate["sampling_error"] = sampling_error(args.n, right, n)
            if kind in first:  # paired: on the same problems
                difference = common.mean_and_interval(values - coverage(first, kind, n))
                estimate |= {f"{name}_difference": one for name, one in difference.items()}
            result[kind][n] = estimate
    return result


def coverage(result, kind, n):
    """Return pass@n of each problem: float64 [problems]."""
    problems = result["per_problem"]
    if kind == "sampled":
        return common.pass_at_n(result["n"], [problem["right"] for problem in problems], n)
    return common.exact_pass_at_n([problem.get("log_p", -math.inf) for problem in problems], n)


def sampling_error(n, c, k, resamples=500):
    """Return the standard error of mean pass@k with the problems fixed (the ± of Table 3).

    c: right samples of each problem, of n. A problem with c = 0 may still have p > 0. So p is drawn
    from its posterior, the prior being a beta distribution fitted to all problems by its moments;
    then pass@k of two new samples with that p differs by twice the variance that is sought.
    """
    c, rng = np.asarray(c), np.random.default_rng(0)
    mean = (c.sum() + 0.5) / (n * len(c) + 1)
    # Var(c/n) = mean (1 - mean) (1 + (n-1) ρ) / n, where ρ = 1 / (a + b + 1)
    rho = ((c / n).var() * n / (mean * (1 - mean)) - 1) / max(n - 1, 1)
    rho = np.clip(rho, 1e-3, 1 - 1e-3)
    a, b = mean * (1 / rho - 1), (1 - mean) * (1 / rho - 1)
    p = rng.beta(a + c, b + n - c, size=(resamples, len(c)))
    first, second = (common.pass_at_n(n, rng.binomial(n, p), k) for _ in range(2))
    return float(np.sqrt(((first - second) ** 2 / 2).mean(0).sum()) / len(c))


def print_tables(results, args):
    """Print coverage, its 95 % intervals, and differences from the first result, in percent."""
    for kind in ("exact", "sampled"):
        measured = [result for result in results if kind in result]
        if not measured:
            continue
        how = (
            "exact, reference answers only" if kind == "exact" else f"from {args.n:,} samples each"
        )
        print(f"\npass@N in percent, {how}")
        print_table("checkpoint", measured, kind, args.ns, "{pass:.1f}")
        interval = "{low:.1f} to {high:.1f}"
        interval += ", samples ± {sampling_error:.2f}" if kind == "sampled" else ""
        print_table("95 % over problems", measured, kind, args.ns, interval)
        if len(measured) > 1:
            title = f"less {name_of(measured[0])}, same problems"
            cell = "{pass_difference:+.1f} [{low_difference:+.1f}, {high_difference:+.1f}]"
            print_table(title, measured[1:], kind, args.ns, cell)
    count = len(results[0]["per_problem"])
    if count < 100:
        print(f"\nThe intervals are too narrow: bootstraps need 100 problems, these are {count}.")


def print_table(title, results, kind, ns, cell):
    print(f"\n| {title} | " + " | ".join(f"pass@{n}" for n in ns) + " |")
    print("|---" * (len(ns) + 1) + "|")
    for result in results:
        cells = []
        for n in ns:
            percent = {name: 100 * value for name, value in result[kind][n].items()}
            cells.append(cell.format(**percent))
        print(f"| {name_of(result)} | " + " | ".join(cells) + " |")


def name_of(result):
    temperature = result["temperature"]
    return result["checkpoint"] + (f", T = {temperature:g}" if temperature != 1 else "")


# ---- Figures -------------------------------------------------------------------------------------
def draw(panels, path):
    """panel: {"axes": what matplotlib's Axes.set takes} with either "curves" {label: {"x", "y" and
    perhaps "low", "high"}} or "histogram" {label: values in [0, 1]}."""
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    size = (5.6, 3.8) if len(panels) == 1 else (3.2 * columns, 2.9 * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, panel in zip(axes, panels, strict=False):
        curves = panel.get("curves", {})
        for i, (label, curve) in enumerate(curves.items()):
            color = colormaps["viridis"](0.9 * i / max(len(curves) - 1, 1))
            marker = "osD^vPX"[i % 7] if len(curve["x"]) <= 20 else None
            axis.plot(curve["x"], curve["y"], color=color, marker=marker, ms=4, label=label)
            if "low" in curve:
                axis.fill_between(curve["x"], curve["low"], curve["high"], color=color, alpha=0.15)
        if "histogram" in panel:
            groups = panel["histogram"].values()
            weights = [[100 / sum(map(len, groups))] * len(group) for group in groups]
            bins, colors = np.linspace(0, 1, 21), ["#0072B2", "#E69F00"]
            axis.hist(groups, bins, weights=weights, stacked=True, color=colors,
                      label=list(panel["histogram"]))  # fmt: skip
        axis.set(**panel["axes"])
        axis.title.set_size(8)
        if axis.get_ylim()[0] < 0:
            axis.axhline(0, color="0.4", linewidth=0.8)
        axis.grid(alpha=0.25)
        if list(curves) != [""]:
            axis.legend(fontsize=7)
    for axis in list(axes)[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(path, dpi=150)


def curve_of(estimates):
    """Return a curve, in percent, of {x: estimate}."""
    curve = {"x": list(estimates)}
    for axis, name in (("y", "pass"), ("low", "low"), ("high", "high")):
        curve[axis] = [100 * estimate[name] for estimate in estimates.values()]
    return curve


def label_of(result):
    """Return N' where it is known, and the last two parts of the path."""
    n_prime = result["n_prime"]
    loss = "" if n_prime is None else "CE, " if n_prime == 1 else f"N' = {n_prime:g}, "
    return loss + "/".join(Path(name_of(result)).parts[-2:])


def draw_results(results, args):
    """Draw coverage, confidence and, with --figure 12, ranks. Returns the files' paths."""
    paths = []
    for kind in ("exact", "sampled"):
        curves = {label_of(result): curve_of(result[kind]) for result in results if kind in result}
        if curves:
            ns = [n for n in next(iter(curves.values()))["x"] if math.log(n, 4).is_integer()]
            axes = {"xscale": "log", "xticks": ns, "xticklabels": ns, "ylim": (0, 100)}
            axes |= {"xlabel": "N (samples per problem)", "ylabel": f"pass@N (%), {kind}"}
            paths.append(args.out / f"passn-{args.name}{'-sampled' * len(paths)}.png")
            draw([{"axes": axes, "curves": curves}], paths[-1])
    if args.figure == "12":
        curves = {label_of(result): curve_of(result["ranks"]) for result in results}
        axes = {"xlabel": "rank of confidence", "ylabel": "right (%)"}
        paths.append(args.out / f"figure-12-{args.name}.png")
        draw([{"axes": axes, "curves": curves}], paths[-1])
    panels = []
    for result in results:
        groups = {"right": [], "wrong": []}
        for problem in result["per_problem"]:
            groups["right" if problem["answer_right"] else "wrong"].append(problem["confidence"])
        answer = "greedy" if result["template"] == "direct" else "most frequent"
        title = f"{label_of(result)}\nmean {result['confidence']:.2f}"
        axes = {"title": title, "xlabel": f"confidence in the {answer} answer"}
        panels.append({"axes": axes | {"ylabel": "problems (%)"}, "histogram": groups})
    paths.append(args.out / f"confidence-{args.name}.png")
    draw(panels, paths[-1])
    return paths


def figure_2b(args):
    """F(N, p): it vanishes for p well above 1/N."""
    p = torch.logspace(-6, 0, 200, dtype=torch.float64)
    curves = {}
    for n in args.ns:
        curves[f"N = {n}"] = {"x": p.tolist(), "y": common.dco_factor(p.log(), n).tolist()}
    return [{"axes": {"xlabel": "p(y|x)", "ylabel": "F(N, p)", "xscale": "log"}, "curves": curves}]


def figure_4(args):
    """Discarded samples by step, from metrics.jsonl."""
    curves = {}
    for run in args.checkpoints:
        path = Path(run) / "metrics.jsonl"
        if not path.is_file():
            common.fail(f"{path} does not exist: Figure 4 takes the folders of runs")
        steps = [step for _, step in common.read_json_lines(path)]
        discarded = [step["candidates"] - step["accepted"] for step in steps]
        curves[run] = {"x": [step["step"] for step in steps], "y": discarded}
    return [{"axes": {"xlabel": "step", "ylabel": "discarded samples"}, "curves": curves}]


def upper_bound(n, p1, epsilon, k):
    """Of an optimal policy's largest confidence (Lemma 4.2, Eq. 13). p1: the largest accuracy of an
    answer; 1 - epsilon: that of the best k together. Holds for k = 2; false in general, see
    tests/test_figures.py."""
    ratio = ((k - 1) * p1 / (1 - p1 - epsilon)) ** (1 / (n - 1))
    return 1 - (k - 1) / ((k - 1) * ratio + 1)


def lower_bound(n, p1, p2):
    """Of the same (Lemma 4.3, Eq. 18), by the two largest accuracies. Holds for at most s + 1
    answers, s = (1 - p1) / p2 rounded up; false for R more, since the confidence tends to 1/R."""
    s, ratio = (1 - p1 + p2) / p2, (p1 / p2) ** (1 / (n - 1))
    return 1 - s / (s * ratio + 1)


def figure_11(args):
    ns = [1.01 * 1.05**i for i in range(120)]
    upper, lower = (
        [upper_bound(n, 0.5, 0.25, 2) for n in ns],
        [lower_bound(n, 0.5, 0.25) for n in ns],
    )
    curves = {
        "upper, Lemma 4.2": {"x": ns, "y": upper},
        "lower, Lemma 4.3": {"x": ns, "y": lower},
    }
    axes = {"title": "p1 = 1/2, p2 = ε = 1/4, k = 2", "xlabel": "N", "xscale": "log"}
    return [{"axes": axes | {"ylabel": "largest confidence"}, "curves": curves}]


def unseen_by_level(args):
    """For each checkpoint within the first epoch, yield (title, accelerator, model, {level:
    training examples that it has not seen}, test examples)."""
    accelerator = common.make_accelerator()
    for checkpoint in args.checkpoints:
        record = read_record(checkpoint)
        if "seen_ids" not in record:
            common.fail(f"{checkpoint} was not saved by train_direct.py --checkpoint-at")
        tokenizer, config = common.load_tokenizer(checkpoint), common.load_config(checkpoint)
        rows, examples = {}, {}
        for split in ("train", "test"):
            rows[split] = common.load_problems(args.data or record["data"], split)
            examples[split], _ = common.encode(
                rows[split], tokenizer, config, "direct", args.prompt or record["prompt"]
            )
        levels, seen = {}, set(record["seen_ids"])
        for example in examples["train"]:
            if example.id not in seen:
                level = rows["train"][example.id].get("level", 0)
                levels.setdefault(level, []).append(example)
        model = load(checkpoint, tokenizer, accelerator)
        title = f"{Path(checkpoint).name}, {len(seen):,} of {len(rows['train']):,} seen"
        yield title, accelerator, model, dict(sorted(levels.items())), examples["test"]


def gradient(model, examples, n, tokens):
    """Return the gradient of Σ ℓ_DCO^n over the examples: a tensor for each parameter."""
    model.zero_grad()  # the tensors returned before stay as they are
    for ids in common.make_rounds(range(len(examples)), lambda i: len(examples[i]), 1, tokens):
        log_p = common.log_probs(model, [examples[i] for i in ids])
        common.dco_loss(log_p, n).sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def along_step(test_gradient, model, batch, tokens):
    """Return the derivative of the test loss along a step of cross-entropy, g = -Σ ∇ℓ_CE."""
    step = gradient(model, batch, 1, tokens)
    return -sum(
        (a.float() * b.float()).sum().item() for a, b in zip(test_gradient, step, strict=True)
    )


def figure_5(args, n=256):
    """∇_g of the test loss Σ ℓ_DCO^n along steps of cross-entropy on unseen data, by level. Where
    it is below 0, such data lower the test loss. Per example; mean ± deviation over batches."""
    panels, tokens = [], args.micro_batch_tokens
    for title, _, model, levels, test in unseen_by_level(args):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        test_gradient = gradient(model, test, n, tokens)
        size = max(1, min(64, min(map(len, levels.values())) // 4))  # four batches or more
        curve = {"x": list(levels), "y": [], "low": [], "high": []}
        for unseen in levels.values():
            starts = range(0, len(unseen) - size + 1, size)[:16]
            batches = [unseen[start : start + size] for start in starts]
            found = [along_step(test_gradient, model, batch, tokens) / size for batch in batches]
            mean, deviation = float(np.mean(found)), float(np.std(found))
            curve["y"].append(mean)
            curve["low"].append(mean - deviation)
            curve["high"].append(mean + deviation)
        axes = {"title": f"{title}, batches of {size}", "xlabel": "difficulty level"}
        axes |= {"xticks": list(levels), "ylabel": rf"$\nabla_g$ of the test loss, N = {n}"}
        panels.append({"axes": axes, "curves": {"": curve}})
    return panels


def figure_13(args, n=256):
    """Confidence and F by level on unseen training data: the median and the quartiles."""
    panels = []
    for title, accelerator, model, levels, _ in unseen_by_level(args):
        confidence, factor = [], []  # [levels, 3]
        for unseen in levels.values():
            log_p = common.score(accelerator, model, unseen, args.micro_batch_tokens).cpu()
            confidence.append(np.quantile(log_p.exp(), [0.25, 0.5, 0.75]))
            factor.append(np.quantile(common.dco_factor(log_p, n), [0.25, 0.5, 0.75]))
        for name, quartiles in (("p(y|x)", confidence), (f"F({n}, p)", factor)):
            low, median, high = np.transpose(quartiles).tolist()
            axes = {"title": title, "xlabel": "difficulty level", "xticks": list(levels)}
            axes |= {"ylabel": f"{name}: median and quartiles"}
            axes |= {"yscale": "log"} if quartiles is confidence else {"ylim": (0, 1.02)}
            curve = {"x": list(levels), "y": median, "low": low, "high": high}
            panels.append({"axes": axes, "curves": {"": curve}})
    return panels


FIGURES = {"2b": figure_2b, "4": figure_4, "5": figure_5, "11": figure_11, "13": figure_13}


if __name__ == "__main__":
    main()
