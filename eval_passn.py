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
    Figures 1, 3, 7, 9    confidence-<data>.png: in the greedy answer; in the most frequent (3)
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
    add("--ns", type=numbers, help="N of the table (default: 1,16,256,4096 up to --n)")
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
    args.ns = [int(n) for n in args.ns or (1, 16, 256, 4096) if args.ns or n <= (args.n or n)]
    if min(args.n or 1, args.ns[0], args.max_new_tokens or 1, args.temperature[0]) <= 0:
        parser.error("--n, --ns, --max-new-tokens and --temperature must be positive")
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
        path = args.out / f"figure-{args.figure}.png"
        print("wrote", draw(FIGURES[args.figure](args), path))
        return

    # -------- checkpoints and data are checked before the first model is loaded
    records = [read_record(checkpoint) for checkpoint in args.checkpoints]
    templates = {args.template or record["template"] for record in records}
    if templates != {"direct"} and not args.n:
        common.fail("pass@N of reasoning traces is estimated from samples: give --n, say 1024")
    data = {args.data or record["data"] for record in records}
    if len(data) > 1 or (not args.data and Path(*data).is_file()):
        common.fail(f"trained on {', '.join(data)}: say with --data what to evaluate on")
    args.data = data.pop()
    rows = common.load_problems(args.data, "test")
    golds = [row["answer"] for row in rows]
    args.name = Path(args.data).name.removesuffix(".jsonl")

    # -------- measure each checkpoint at each temperature
    accelerator = common.make_accelerator()
    args.out.mkdir(parents=True, exist_ok=True)
    grader = common.Grader(min(os.cpu_count(), 8)) if accelerator.is_main_process else None
    results = []
    for checkpoint, record in zip(args.checkpoints, records, strict=True):
        for temperature in args.temperature:
            result = measure(args, accelerator, checkpoint, record, temperature, rows)
            inputs = result, results, golds, grader, args
            results.append(common.on_main(accelerator, summarise, *inputs))

    # -------- report
    if accelerator.is_main_process:
        timeouts = getattr(grader, "timeouts", 0)
        grader.close()
        print_tables(results, args)
        print(f"\nGrading took too long for {timeouts} answers, which count as wrong.")
        path = args.out / f"passn-{args.name}.json"
        report = {"arguments": vars(args), "grading_timeouts": timeouts, "checkpoints": results}
        path.write_text(json.dumps(report, default=str) + "\n")
        print("\nwrote", ", ".join(map(str, [path, *draw_results(results, args)])))
    accelerator.end_training()


def read_record(checkpoint):
    """Return what training wrote into the checkpoint's dco.json: template, n_prime, data, ..."""
    folder = Path(checkpoint)
    if folder.suffix == ".partial" or (folder.is_dir() and not any(folder.glob("*.safetensors"))):
        common.fail(f"{checkpoint} does not hold whole weights, as a training script writes them")
    record = {"template": "direct", "prompt": None, "n_prime": None, "data": "data unknown"}
    path = folder / "dco.json"
    return record | json.loads(path.read_text()) if path.is_file() else record


def load(checkpoint, tokenizer, accelerator):
    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    return common.load_model(checkpoint, tokenizer, dtype).eval().to(accelerator.device)


# ---- Measuring -----------------------------------------------------------------------------------
def measure(args, accelerator, checkpoint, record, temperature, rows):
    """Score and sample with one checkpoint. Returns its result, for `summarise`."""
    tokenizer, config = common.load_tokenizer(checkpoint), common.load_config(checkpoint)
    template, prompt = args.template or record["template"], args.prompt or record["prompt"]
    direct = template == "direct"
    settings = {"template": template, "prompt": prompt, "prompts_only": not direct}
    examples, dropped = common.encode(rows, tokenizer, config, **settings)
    if not examples:
        common.fail(f"{checkpoint}: no problem of {args.data} is usable ({dropped})")
    longest = max(len(example.completion_ids) for example in examples) if direct else 1024
    max_new_tokens = args.max_new_tokens or record.get("max_new_tokens", longest)
    result = {"checkpoint": checkpoint, "n_prime": record["n_prime"], "template": template}
    result |= {"temperature": temperature, "max_new_tokens": max_new_tokens, "n": args.n}
    dropped = f", dropped and counted as unsolved: {dropped}" if dropped else ""
    accelerator.print(f"{name_of(result)}: {len(rows):,} problems, template {template}{dropped}")
    columns = score(args, accelerator, tokenizer, examples, result) if direct else {}
    torch.cuda.empty_cache()  # engines take most of the memory
    if args.n:
        columns["samples"] = sample(args, accelerator, tokenizer, examples, result)
    # In the order of the rows; what was dropped has p = 0 and no answer.
    blank = {"log_p": -math.inf, "confidence": 0.0, "answer": None, "ranked": [], "samples": {}}
    for name, values in columns.items():
        by_id = {example.id: value for example, value in zip(examples, values, strict=True)}
        result[name] = [by_id.get(row["id"], blank[name]) for row in rows]
    return result


def score(args, accelerator, tokenizer, examples, result):
    """Return, by example, log p̂ of the reference answer and the confidence in the greedy one."""
    model = load(result["checkpoint"], tokenizer, accelerator)
    common.check_packing(accelerator, model, examples[:2])
    sampler = common.TransformersSampler(accelerator, model, tokenizer)
    prompts = [example.prompt_ids for example in examples]
    completions = [one for (one,) in sampler.generate(prompts, 1, result["max_new_tokens"])]
    greedy, answers = [], []
    for example, completion in zip(examples, completions, strict=True):
        greedy.append(common.Example(example.id, example.prompt_ids, completion.token_ids))
        answers += common.count_answers([completion], tokenizer, "direct")
    settings = args.micro_batch_tokens, result["temperature"]
    log_p = common.score(accelerator, model, examples, *settings).tolist()
    confidence = common.score(accelerator, model, greedy, *settings).exp().tolist()
    columns = {"log_p": log_p, "confidence": confidence, "answer": answers}
    if args.figure == "12":
        prompts = tqdm(prompts, unit="problem", disable=not accelerator.is_main_process)
        settings = tokenizer, result["max_new_tokens"]
        columns["ranked"] = [beam_search(model, prompt, *settings) for prompt in prompts]
    return columns


@torch.no_grad()
def beam_search(model, prompt, tokenizer, max_new_tokens, width=256, kept=16):
    """Return the answers of the likeliest completions in a beam, the likeliest first."""
    ids = torch.tensor([prompt], device=model.device)  # [1, T]
    settings = {"num_beams": width, "num_return_sequences": kept, "length_penalty": 0.0}
    settings |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": max_new_tokens}
    ids = model.generate(ids, do_sample=False, **settings)[:, len(prompt) :]  # [kept, T']
    return [text.strip() or None for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


def sample(args, accelerator, tokenizer, examples, result):
    """Return, by example, {answer: count} of n samples; None is the answer of those without one.

    Samples are kept in samples-<data>-<hash>.jsonl, a line per problem, and not drawn again. The
    hash is of the state of the weights' files, the prompts and all else that changes the samples.
    """
    prompts = [example.prompt_ids for example in examples]
    files = [path.stat() for path in sorted(Path(result["checkpoint"]).glob("*.safetensors"))]
    weights = [(file.st_size, file.st_mtime_ns) for file in files]
    key = common.seed_of(weights, prompts, args.seed, sorted(result.items()))
    path = args.out / f"samples-{args.name}-{key}.jsonl"
    known = common.on_main(accelerator, read_samples, path)
    left = [example for example in examples if example.id not in known]
    if left:
        length = max(map(len, prompts)) + result["max_new_tokens"]
        sampler = common.make_sampler(args, accelerator, result["checkpoint"], tokenizer, length)
    size = max(accelerator.num_processes, (1 << 13) // args.n)
    groups = [left[start : start + size] for start in range(0, len(left), size)]
    for group in tqdm(groups, unit="call", disable=not accelerator.is_main_process):
        prompts = [example.prompt_ids for example in group]
        seeds = [common.seed_of(args.seed, "evaluation", example.id) for example in group]
        limits = result["max_new_tokens"], seeds, result["temperature"]
        completions = sampler.generate(prompts, args.n, *limits)
        if accelerator.is_main_process:
            with open(path, "a") as file:
                for example, found in zip(group, completions, strict=True):
                    answers = common.count_answers(found, tokenizer, result["template"])
                    line = {"id": example.id, "answers": answers.most_common()}
                    file.write(json.dumps(line) + "\n")
    if left:
        sampler.shut_down()
    known = common.on_main(accelerator, read_samples, path)
    return [known[example.id] for example in examples]


def read_samples(path):
    common.keep_lines(path, "id", math.inf)  # a kill may have cut off the last line
    lines = [line for _, line in common.read_json_lines(path)] if path.exists() else []
    return {line["id"]: dict(map(tuple, line["answers"])) for line in lines}


# ---- Summaries -----------------------------------------------------------------------------------
def summarise(result, earlier, golds, grader, args):
    """Grade a result's answers, average over the problems, and compare with the first result."""
    samples, direct = result.pop("samples", []), result["template"] == "direct"
    result["right"] = []
    for gold, counts in zip(golds, samples, strict=bool(args.n)):
        verdicts = grader.grade([(gold, answer) for answer in counts])
        right = zip(counts.values(), verdicts, strict=True)
        result["right"].append(sum(count for count, is_right in right if is_right))
    if not direct:
        modes = [common.most_frequent_answer(counts, grader) for counts in samples]
        result["answer"] = [answer for answer, _ in modes]
        result["confidence"] = [count / args.n for _, count in modes]
        result["ranked"] = [[one for one in counts if one is not None] for counts in samples]
    result["answer_right"] = grader.grade(list(zip(golds, result["answer"], strict=True)))
    if args.figure == "12":
        result["ranks"] = {}
        for rank in range(1, 17):
            answers = [dict(enumerate(ranked, 1)).get(rank) for ranked in result["ranked"]]
            right = grader.grade(list(zip(golds, answers, strict=True)))
            result["ranks"][rank] = common.mean_and_interval(100 * np.array(right))

    for kind in ["exact"] * direct + ["sampled"] * bool(args.n):
        result[kind] = {}
        for n in sorted({*args.ns, *(2**i for i in range(args.ns[-1].bit_length()))}):
            values = coverage(result, kind, n)
            result[kind][n] = common.mean_and_interval(values)
            if kind == "sampled":
                result[kind][n]["error"] = sampling_error(args.n, result["right"], n)
            first = next((one for one in earlier if kind in one), result)
            difference = common.mean_and_interval(values - coverage(first, kind, n))
            result[kind][n] |= {f"{name}_difference": one for name, one in difference.items()}
    return result


def coverage(result, kind, n):
    """Return pass@n of each problem in percent: float64 [problems]."""
    if kind == "exact":
        return 100 * common.exact_pass_at_n(result["log_p"], n)
    return 100 * common.pass_at_n(result["n"], result["right"], n)


def sampling_error(n, c, k, resamples=500):
    """Return the standard error of mean pass@k, in percent, with the problems fixed (± of Table 3).

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
    return 100 * float(np.sqrt(((first - second) ** 2 / 2).mean(0).sum()) / len(c))


def print_tables(results, args):
    """Print coverage, its 95 % intervals, and differences from the first result, in percent."""
    for kind, how in (("exact", "exact"), ("sampled", f"from {args.n} samples")):
        measured = {name_of(result): result[kind] for result in results if kind in result}
        error = ", samples ± {error:.2f}" if kind == "sampled" else ""
        tables = {
            f"pass@N in percent, {how}": "{pass:.1f}",
            "95 % over problems": "{low:.1f} to {high:.1f}" + error,
            f"less {name_of(results[0])}, paired": "{pass_difference:+.1f} "
            "[{low_difference:+.1f}, {high_difference:+.1f}]",
        }
        for title, cell in tables.items() if measured else []:
            print(f"\n| {title} | " + " | ".join(f"pass@{n}" for n in args.ns) + " |")
            print("|---" * (len(args.ns) + 1) + "|")
            for name, estimates in measured.items():
                cells = [cell.format(**estimates[n]) for n in args.ns]
                print(f"| {name} | " + " | ".join(cells) + " |")
    if len(results[0]["answer"]) < 100:
        print("\nThese intervals are too narrow: bootstraps need 100 problems or more.")


def name_of(result):
    temperature = result["temperature"]
    return result["checkpoint"] + (f", T = {temperature:g}" if temperature != 1 else "")


# ---- Figures -------------------------------------------------------------------------------------
def draw(panels, path):
    """Draw a PNG, with its numbers in a JSON file beside it. panel: {"axes": for matplotlib's
    Axes.set, and "curves": {label: [(x, y)] or [(x, y, low, high)]} or "histogram": {label: values
    in [0, 1]}}, and where it is wanted "envelope": the largest y at each x."""
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    size = (5.6, 3.8) if len(panels) == 1 else (3.2 * columns, 2.9 * rows)
    figure = Figure(figsize=size, layout="constrained")
    for i, panel in enumerate(panels):
        axis = figure.add_subplot(rows, columns, i + 1)
        curves, histogram = panel.get("curves", {}), panel.get("histogram", {})
        for j, (label, points) in enumerate(curves.items()):
            x, y, *interval = zip(*points, strict=True)
            color = colormaps["viridis"](0.9 * j / max(len(curves) - 1, 1))
            axis.plot(x, y, "o-" if len(x) <= 20 else "-", color=color, ms=4, label=label)
            if interval:
                axis.fill_between(x, *interval, color=color, alpha=0.15)
        if panel.get("envelope"):
            largest = [
                max(y for _, y, *_ in points) for points in zip(*curves.values(), strict=True)
            ]
            axis.plot(x, largest, color="0.8", linewidth=8, zorder=0, label="Pareto envelope")
        if histogram:
            bins, colors = np.linspace(0, 1, 21), ["#0072B2", "#E69F00"]
            style = {"stacked": True, "color": colors, "label": list(histogram)}
            axis.hist(list(histogram.values()), bins, **style)
        axis.set(**panel["axes"])
        axis.title.set_size(8)
        axis.grid(alpha=0.25)
        if axis.get_ylim()[0] < 0:
            axis.axhline(0, color="0.4", linewidth=0.8)
        if "" not in curves:
            axis.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(panels) + "\n")
    figure.savefig(path, dpi=150)
    return path


def draw_results(results, args):
    """Draw coverage, confidence and, with --figure 12, ranks. Returns the files' paths."""
    figures = {}
    for kind in ("exact", "sampled"):
        curves = {name_of(result): points(result[kind]) for result in results if kind in result}
        ticks = [4**i for i in range(20) if 4**i <= args.ns[-1]]
        axes = {"xscale": "log", "xticks": ticks, "xticklabels": ticks, "ylim": (0, 100)}
        axes |= {"xlabel": "N (samples per problem)", "ylabel": f"pass@N (%), {kind}"}
        if curves:
            panel = {"axes": axes, "curves": curves, "envelope": len(curves) > 1}
            figures["passn-sampled" if figures else "passn"] = [panel]
    if args.figure == "12":
        curves = {name_of(result): points(result["ranks"]) for result in results}
        axes = {"xlabel": "rank of confidence", "ylabel": "right (%)"}
        figures["figure-12"] = [{"axes": axes, "curves": curves}]
    figures["confidence"] = []
    for result in results:
        histogram = {"right": [], "wrong": []}
        for confidence, right in zip(result["confidence"], result["answer_right"], strict=True):
            histogram["right" if right else "wrong"].append(confidence)
        answer = "greedy" if result["template"] == "direct" else "most frequent"
        axes = {"title": f"{name_of(result)}\nmean {np.mean(result['confidence']):.2f}"}
        axes |= {"xlabel": f"confidence in the {answer} answer", "ylabel": "problems"}
        figures["confidence"].append({"axes": axes, "histogram": histogram})
    paths = {name: args.out / f"{name}-{args.name}.png" for name in figures}
    return [draw(panels, paths[name]) for name, panels in figures.items()]


def points(estimates):
    return [(x, one["pass"], one["low"], one["high"]) for x, one in estimates.items()]


def figure_2b(args):
    """F(N, p): it vanishes for p well above 1/N."""
    p = torch.logspace(-6, 0, 200, dtype=torch.float64)
    factors = {n: common.dco_factor(p.log(), n) for n in args.ns}
    curves = {f"N = {n}": torch.stack([p, f], dim=1).tolist() for n, f in factors.items()}
    return [{"axes": {"xlabel": "p(y|x)", "ylabel": "F(N, p)", "xscale": "log"}, "curves": curves}]


def figure_4(args):
    """Discarded samples by step, from metrics.jsonl."""
    curves = {}
    for run in args.checkpoints:
        steps = [step for _, step in common.read_json_lines(Path(run) / "metrics.jsonl")]
        curves[run] = [(step["step"], step["candidates"] - step["accepted"]) for step in steps]
    return [{"axes": {"xlabel": "step", "ylabel": "discarded samples"}, "curves": curves}]


def upper_bound(n, p1, epsilon, k):
    """Of an optimal policy's largest confidence (Lemma 4.2, Eq. 13). p1: the largest accuracy of an
    answer; 1 - epsilon: that of the best k together. Holds for k = 2; false in general."""
    ratio = ((k - 1) * p1 / (1 - p1 - epsilon)) ** (1 / (n - 1))
    return 1 - (k - 1) / ((k - 1) * ratio + 1)


def lower_bound(n, p1, p2):
    """Of the same (Lemma 4.3, Eq. 18), by the two largest accuracies. Holds for at most s + 1
    answers, s = (1 - p1) / p2 rounded up; false for R more, since the confidence tends to 1/R."""
    s, ratio = (1 - p1 + p2) / p2, (p1 / p2) ** (1 / (n - 1))
    return 1 - s / (s * ratio + 1)


def figure_11(args):
    ns = np.geomspace(1.01, 4096, 120).tolist()
    curves = {"upper, Lemma 4.2": [(n, upper_bound(n, 0.5, 0.25, k=2)) for n in ns]}
    curves["lower, Lemma 4.3"] = [(n, lower_bound(n, 0.5, 0.25)) for n in ns]
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
        settings = tokenizer, config, "direct", args.prompt or record["prompt"]
        rows = common.load_problems(args.data or record["data"], "train")
        test_rows = common.load_problems(args.data or record["data"], "test")
        levels = {level: [] for level in sorted({row.get("level", 0) for row in rows})}
        for example in common.encode(rows, *settings)[0]:
            if example.id not in record["seen_ids"]:
                levels[rows[example.id].get("level", 0)].append(example)
        test, _ = common.encode(test_rows, *settings)
        title = f"{Path(checkpoint).name}, {len(record['seen_ids']):,} of {len(rows):,} seen"
        yield title, accelerator, load(checkpoint, tokenizer, accelerator), levels, test


def level_panel(title, ylabel, points, **axes):
    """points: [(level, middle, low, high)]."""
    axes |= {
        "title": title,
        "xlabel": "difficulty level",
        "xticks": [level for level, *_ in points],
    }
    return {"axes": axes | {"ylabel": ylabel}, "curves": {"": points}}


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
    products = [(a.float() * b.float()).sum() for a, b in zip(test_gradient, step, strict=True)]
    return -sum(products).item()


def figure_5(args, n=256):
    """∇_g of the test loss Σ ℓ_DCO^n along steps of cross-entropy on unseen data, by level. Where
    it is below 0, such data lower the test loss. Per example; mean ± deviation over batches."""
    panels, tokens = [], args.micro_batch_tokens
    for title, _, model, levels, test in unseen_by_level(args):
        test_gradient, points = gradient(model, test, n, tokens), []
        size = max(1, min(64, min(map(len, levels.values())) // 4))  # four batches or more
        for level, unseen in levels.items():
            starts = range(0, len(unseen) - size + 1, size)[:16]
            batches = [unseen[start : start + size] for start in starts]
            found = [along_step(test_gradient, model, batch, tokens) / size for batch in batches]
            mean, deviation = float(np.mean(found)), float(np.std(found))
            points.append((level, mean, mean - deviation, mean + deviation))
        ylabel = rf"$\nabla_g$ of the test loss, N = {n}"
        panels.append(level_panel(f"{title}, batches of {size}", ylabel, points))
    return panels


def figure_13(args, n=256):
    """Confidence and F by level on unseen training data: the median and the quartiles."""
    panels = []
    for title, accelerator, model, levels, _ in unseen_by_level(args):
        confidence, factor = [], []
        for level, unseen in levels.items():
            log_p = common.score(accelerator, model, unseen, args.micro_batch_tokens).cpu()
            for points, values in (
                (confidence, log_p.exp()),
                (factor, common.dco_factor(log_p, n)),
            ):
                points.append((level, *np.quantile(values, [0.5, 0.25, 0.75]).tolist()))
        panels.append(level_panel(title, "p(y|x), quartiles", confidence, yscale="log"))
        panels.append(level_panel(title, f"F({n}, p), quartiles", factor, ylim=(0, 1.02)))
    return panels


FIGURES = {"2b": figure_2b, "4": figure_4, "5": figure_5, "11": figure_11, "13": figure_13}


if __name__ == "__main__":
    main()
