"""Measure pass@N coverage of checkpoints, exactly and from samples, and draw the paper's figures.

    python eval_passn.py runs/direct-n1/epoch-24 runs/direct-n64/epoch-24     # exact, no sampling
    python eval_passn.py runs/direct-n1 runs/direct-n64 --validate 0.4        # early stopping
    python eval_passn.py runs/cot-n1/epoch-8 runs/cot-n64/epoch-8 --n 64 --ns 1,16,64
    accelerate launch eval_passn.py runs/direct-n64/epoch-4 --n 4096          # 8 GPUs

pass@N is the probability that at least one of N independent samples is right (Eq. 2):

    exact     1 - (1 - p)^N,  p = p̂(y|x) of the reference answer; for direct answers
    sampled   1 - C(n-c, N) / C(n, N)  from n samples of a problem, of which c are right

Prints tables of coverage, of its errors, and of differences from the first row, problem by problem.
With --validate, the epoch of each run is chosen, for each N, on validation problems, and reported
on the others beside the last epoch. Writes passn-<data>.json and, by the paper's numbers:

    Tables 1, 3, 4, 5     Table 3 with --n 1024 --ns 1,16,64; 5: --data HuggingFaceH4/aime_2024;
                          of several epochs of a run also epochs-<data>.png
    Figures 1, 3, 7, 9    confidence-<data>.png: in the greedy answer; in the most frequent (3)
    Figures 2a, 6, 8, 10  passn-<data>.png; with --temperature 0.7,1,1.3,2 a curve for each
    Figure 2b             --figure 2b: F(N, p) over p
    Figure 4              --figure 4 RUN ...: discarded samples by step
    Figures 5, 13         examples/by_level.py
    Figure 11             --figure 11: the bounds of Lemmas 4.2 and 4.3
    Figure 12             --figure 12 CHECKPOINT ...: accuracy by rank of confidence
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
    return [float(number) for number in text.split(",")]


def share_or_file(text):
    if not Path(text).is_file() and not 0 < float(text) < 1:
        raise ValueError
    return text


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="CHECKPOINT", help="folder, run (all epochs) or hub name")
    add("--figure", choices=["2b", "4", "11", "12"], help="draw this figure")
    add("--data", help="folder, file of JSON lines or hub name (default: the training data's)")
    add("--validate", type=share_or_file, metavar="SHARE|FILE", help="choose epochs on it")
    add("--ns", type=numbers, help="N of the table (default: 1,16,256,4096 up to --n)")
    add("--temperature", type=numbers, default=[1.0], help="one or several (default: 1, p̂ itself)")
    add("--micro-batch-tokens", type=int, default=4096 if torch.cuda.is_available() else 512)
    add("--out", type=Path, help="default: the checkpoint's folder, or that of all checkpoints")
    add("--template", choices=["direct", "cot", "r1", "r1-short"], help="default: as in dco.json")
    add("--prompt", help="instead of the template's, with {problem} in it")
    add("--max-new-tokens", type=int, help="paper: 1,024 for reasoning traces")
    add("--n", type=int, help="samples per problem (default: none, exact coverage only)")
    add("--engine", default="auto", choices=["auto", "vllm", "transformers"])
    add("--gpu-memory", type=float, default=0.85, help="vLLM's share of each GPU's memory")
    add("--gpus-per-engine", type=int, default=1, help="for models too large for one GPU")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.ns = sorted(map(int, args.ns or [n for n in (1, 16, 256, 4096) if n <= (args.n or n)]))
    if min(args.n or 1, args.ns[0], args.max_new_tokens or 1, *args.temperature) <= 0:
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
    args.out.mkdir(parents=True, exist_ok=True)
    if args.figure in FIGURES:
        panels = FIGURES[args.figure](args)
        path = args.out / f"figure-{args.figure}.json"
        path.write_text(json.dumps(panels) + "\n")
        print(f"wrote {path} and {draw(panels, path.with_suffix('.png'))}")
        return

    # -------- checkpoints and data are checked before the first model is loaded
    checkpoints = [one for path in args.checkpoints for one in epochs_of(path)]
    records = [read_record(checkpoint, args) for checkpoint in checkpoints]
    data = {record["data"] for record in records}
    if len(data) > 1 or "unknown data" in data or (not args.data and Path(*data).is_file()):
        common.fail(f"trained on {', '.join(data)}: say with --data what to evaluate on")
    args.data = data.pop()
    rows, reported = split(common.load_problems(args.data, "test"), args)
    golds = [row["answer"] for row in rows]
    args.name = Path(args.data).name.removesuffix(".jsonl")

    # -------- measure each checkpoint at each temperature
    accelerator = common.make_accelerator()
    grader = common.Grader(min(os.cpu_count(), 8)) if accelerator.is_main_process else None
    results = []
    for checkpoint, record in zip(checkpoints, records, strict=True):
        for temperature in args.temperature:
            result = measure(args, accelerator, checkpoint, record, temperature, rows)
            inputs = result, golds, grader, reported, args
            results.append(common.on_main(accelerator, grade, *inputs))

    # -------- report
    if accelerator.is_main_process:
        report = {"arguments": vars(args), "grading_timeouts": getattr(grader, "timeouts", 0)}
        grader.close()
        validated, last = choose_epochs(results, reported) if args.validate else ([], results)
        compare([*validated, *results], reported)
        print_tables([*validated, *last], reported.sum(), args)
        print(f"\nanswers that took too long to grade, counted wrong: {report['grading_timeouts']}")
        path = args.out / f"passn-{args.name}.json"
        report |= {"validated": validated, "checkpoints": results}
        path.write_text(json.dumps(report, default=str) + "\n")
        figures = [*draw_results(validated, last, args), *draw_epochs(results, args)]
        print("\nwrote", ", ".join(map(str, [path, *figures])))
    accelerator.end_training()


def epochs_of(path):
    """Return the checkpoints of a run in order, or the checkpoint itself."""
    epochs = [one for one in Path(path).glob("epoch-*") if one.name[6:].isdigit()]
    known = sorted(map(str, epochs), key=lambda one: int(one.rpartition("-")[2]))
    return known or [path.rstrip("/")]


def split(rows, args):
    """Return all problems, and for each whether it is reported: bool [problems]. The others, a
    random share of the rows or the rows of another file, only choose the epoch (--validate)."""
    if args.validate and Path(args.validate).is_file():
        others = common.load_problems(args.validate, "test")
        reported = np.arange(len(rows) + len(others)) < len(rows)
        return [row | {"id": i} for i, row in enumerate([*rows, *others])], reported
    order = np.random.default_rng(args.seed).permutation(len(rows))
    reported = order >= float(args.validate or 0) * len(rows)
    return rows, reported if reported.any() else common.fail("--validate leaves no problem")


def read_record(checkpoint, args):
    """Return the checkpoint's dco.json, as training wrote it, with what args override."""
    path = Path(checkpoint) / "dco.json"
    if Path(checkpoint).is_dir() and not any(path.parent.glob("*.safetensors")):
        common.fail(f"{checkpoint} holds no weights: give a folder that training has written")
    record = {"template": "direct", "prompt": None, "max_new_tokens": None, "data": "unknown data"}
    record |= json.loads(path.read_text()) if path.is_file() else {}
    given = {name: value for name, value in vars(args).items() if value is not None}
    record |= {name: given[name] for name in given.keys() & record.keys()}
    if record["template"] != "direct" and not args.n:
        common.fail("pass@N of reasoning traces is estimated from samples: give --n, say 1024")
    return record


def load(checkpoint, tokenizer, accelerator):
    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    return common.load_model(checkpoint, tokenizer, dtype).eval().to(accelerator.device)


# ---- Measuring -----------------------------------------------------------------------------------
def measure(args, accelerator, checkpoint, record, temperature, rows):
    """Score and sample with one checkpoint. Returns its result, for `grade`."""
    tokenizer, config = common.load_tokenizer(checkpoint), common.load_config(checkpoint)
    settings = {"template": record["template"], "prompt": record["prompt"]}
    direct = record["template"] == "direct"
    examples, dropped = common.encode(rows, tokenizer, config, **settings, prompts_only=not direct)
    if not examples:
        common.fail(f"{checkpoint}: no problem of {args.data} is usable ({dropped})")
    longest = max(len(example.completion_ids) for example in examples) if direct else 1024
    name = checkpoint + (f", T = {temperature:g}" if temperature != 1 else "")
    result = settings | {"name": name, "checkpoint": checkpoint, "temperature": temperature}
    result |= {"n": args.n, "max_new_tokens": record["max_new_tokens"] or longest}
    accelerator.print(f"{name}: {len(rows):,} problems, dropped, hence unsolved: {dropped or 0}")
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

    They are kept in samples-<data>-<hash>.json, and not drawn again after an interruption. The hash
    is of the times of the weights' files, the prompts and all else that changes the samples.
    """
    prompts = [example.prompt_ids for example in examples]
    seeds = [common.seed_of(args.seed, "evaluation", example.id) for example in examples]
    files = sorted(Path(result["checkpoint"]).glob("*.safetensors"))
    times = [file.stat().st_mtime_ns for file in files]
    key = common.seed_of(times, prompts, args.seed, sorted(result.items()))
    path = args.out / f"samples-{args.name}-{key}.json"
    known = common.on_main(accelerator, lambda: path.read_text() if path.exists() else "[]")
    samples = json.loads(known)  # [examples, answers, 2]
    if len(samples) < len(examples):
        length = max(map(len, prompts)) + result["max_new_tokens"]
        sampler = common.make_sampler(args, accelerator, result["checkpoint"], tokenizer, length)
        size = max(accelerator.num_processes, (1 << 13) // args.n)  # problems in a call
        starts = range(len(samples), len(examples), size)
        for start in tqdm(starts, unit="call", disable=not accelerator.is_main_process):
            part = slice(start, start + size)
            limits = result["max_new_tokens"], seeds[part], result["temperature"]
            for completions in sampler.generate(prompts[part], args.n, *limits):
                answers = common.count_answers(completions, tokenizer, result["template"])
                samples.append(answers.most_common())
            if accelerator.is_main_process:
                path.with_suffix(".partial").write_text(json.dumps(samples))
                path.with_suffix(".partial").rename(path)
        sampler.shut_down()
    return [dict(answers) for answers in samples]


# ---- Summaries -----------------------------------------------------------------------------------
def grade(result, golds, grader, reported, args):
    """Grade a result's answers, and add pass@N of each problem as result[kind][N]["values"]."""
    samples, direct = result.pop("samples", []), result["template"] == "direct"
    result["right"] = []
    for gold, counts in zip(golds, samples, strict=bool(args.n)):
        verdicts = grader.grade([(gold, answer) for answer in counts])
        result["right"].append(int(np.dot(list(counts.values()), verdicts)))
    if not direct:
        modes = [common.most_frequent_answer(counts, grader) for counts in samples]
        result["answer"] = [answer for answer, _ in modes]
        result["confidence"] = [count / args.n for _, count in modes]
        result["ranked"] = [list(filter(None, counts))[:16] for counts in samples]
    result["answer_right"] = grader.grade(list(zip(golds, result["answer"], strict=True)))
    if args.figure == "12":
        result["ranks"] = {}
        for rank in range(1, 17):
            answers = [dict(enumerate(ranked, 1)).get(rank) for ranked in result["ranked"]]
            right = grader.grade(list(zip(golds, answers, strict=True)))
            result["ranks"][rank] = common.mean_and_interval(100 * np.array(right)[reported])

    for kind in ["exact"] * direct + ["sampled"] * bool(args.n):
        result[kind] = {}
        for n in sorted({*args.ns, *(2**i for i in range(args.ns[-1].bit_length()))}):
            epoch = Path(result["checkpoint"]).name
            result[kind][n] = {"values": coverage(result, kind, n), "epoch": epoch}
            if kind == "sampled":
                right = np.array(result["right"])[reported]
                result[kind][n]["error"] = sampling_error(args.n, right, n)
    return result


def choose_epochs(results, reported):
    """For each run, choose for each N the epoch with the best pass@N on the validation problems,
    those that are not reported. Returns (a result of these epochs, the last epoch's) by run."""
    runs, chosen = {}, []
    for result in results:
        run = os.path.dirname(result["checkpoint"]), result["temperature"]
        runs.setdefault(run, []).append(result)
    for (run, temperature), epochs in runs.items():
        name = f"{run}, validated" + (f", T = {temperature:g}" if temperature != 1 else "")
        chosen.append({"name": name})
        for kind in {"exact", "sampled"} & epochs[0].keys():
            chosen[-1][kind] = {}
            for n in epochs[0][kind]:
                means = [epoch[kind][n]["values"][~reported].mean() for epoch in epochs]
                chosen[-1][kind][n] = dict(epochs[int(np.argmax(means))][kind][n])
    return chosen, [epochs[-1] for epochs in runs.values()]


def compare(results, reported):
    """Average over the reported problems, and compare with the first result on the same ones."""
    for kind in ("exact", "sampled"):
        measured = [result[kind] for result in results if kind in result]
        first = {n: one["values"][reported] for n, one in measured[0].items()} if measured else {}
        for estimates in measured:
            for n, estimate in estimates.items():
                values = estimate.pop("values")[reported]
                estimate |= common.mean_and_interval(values)
                difference = common.mean_and_interval(values - first[n])
                estimate |= {f"{name}_difference": one for name, one in difference.items()}


def coverage(result, kind, n):
    """Return pass@n of each problem in percent: float64 [problems]."""
    if kind == "exact":
        return 100 * common.exact_pass_at_n(result["log_p"], n)
    return 100 * common.pass_at_n(result["n"], result["right"], n)


def sampling_error(n, c, k, resamples=500):
    """Return the standard error of mean pass@k, in percent, with the problems fixed (± of Table 3).

    c: right samples of each problem, of n. A problem with c = 0 may have p > 0: p is drawn from its
    posterior, after a beta prior fitted to all problems by its moments. The squared difference of
    pass@k between two sets of new samples with that p is twice the variance, on average.
    """
    c, rng = np.asarray(c), np.random.default_rng(0)
    mean = (c.sum() + 0.5) / (n * len(c) + 1)
    # Var(c/n) = mean (1 - mean) (1 + (n-1) ρ) / n, where ρ = 1 / (a + b + 1)
    rho = ((c / n).var() * n / (mean * (1 - mean)) - 1) / max(n - 1, 1)
    total = 1 / np.clip(rho, 1e-3, 1 - 1e-3) - 1  # a + b
    p = rng.beta(total * mean + c, total * (1 - mean) + n - c, size=(resamples, len(c)))
    first, second = (common.pass_at_n(n, rng.binomial(n, p), k) for _ in range(2))
    return 100 * float(np.sqrt(((first - second) ** 2 / 2).mean(0).sum()) / len(c))


def print_tables(results, problems, args):
    """Print coverage, its 95 % intervals, and differences from the first result, in percent."""
    narrow = " (too narrow: fewer than 100)" if problems < 100 else ""
    for kind, how in (("exact", "exact"), ("sampled", f"{args.n} samples")):
        measured = {result["name"]: result[kind] for result in results if kind in result}
        error = ", samples ± {error:.2f}" if kind == "sampled" else ""
        tables = {"pass@N in percent": "{pass:.1f}"}
        tables[f"95 % over problems{narrow}"] = "{low:.1f} to {high:.1f}" + error
        if len(measured) > 1:
            title = f"less {next(iter(measured))}, paired{narrow}"
            tables[title] = "{pass_difference:+.1f} [{low_difference:+.1f}, {high_difference:+.1f}]"
        if args.validate:
            tables["epoch"] = "{epoch}"
        for title, cell in tables.items() if measured else []:
            print(f"\n| {title}, {how} | " + " | ".join(f"pass@{n}" for n in args.ns) + " |")
            print("|---" * (len(args.ns) + 1) + "|")
            for name, estimates in measured.items():
                cells = [cell.format(**estimates[n]) for n in args.ns]
                print(f"| {name} | " + " | ".join(cells) + " |")


# ---- Figures -------------------------------------------------------------------------------------
def draw(panels, path):
    """panel: {"axes": for matplotlib's Axes.set} with "curves": {label: [(x, y) or (x, y, low,
    high)]} and perhaps "envelope": True, or with "histogram": {label: values in [0, 1]}."""
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    size = max(5.6, 3.2 * columns), 3.6 if rows == 1 else 2.9 * rows
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
            largest = np.max([[point[1] for point in one] for one in curves.values()], axis=0)
            axis.plot(x, largest, color="0.8", linewidth=6, zorder=0, label="Pareto envelope")
        if histogram:
            style = {"label": list(histogram), "color": ["#0072B2", "#E69F00"], "stacked": True}
            axis.hist(list(histogram.values()), np.linspace(0, 1, 21), **style)
        axis.set(**panel["axes"])
        axis.title.set_size(8)
        axis.grid(alpha=0.25)
        axis.minorticks_off()
        if axis.get_ylim()[0] < 0:
            axis.axhline(0, color="0.4", linewidth=0.8)
        if "" not in curves:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=150)
    return path


def draw_results(validated, results, args):
    """Draw coverage, confidence and, with --figure 12, ranks. Returns the files' paths."""
    figures, rows = {}, [*validated, *results]
    for kind in ("exact", "sampled"):
        curves = {result["name"]: curve_of(result[kind]) for result in rows if kind in result}
        ticks = [4**i for i in range(20) if 4**i <= args.ns[-1]]
        axes = {"xscale": "log", "xticks": ticks, "xticklabels": ticks, "ylim": (0, 100)}
        axes |= {"xlabel": "N (samples per problem)", "ylabel": f"pass@N (%), {kind}"}
        if curves:
            panel = {"axes": axes, "curves": curves, "envelope": len(curves) > 1}
            figures["passn-sampled" if figures else "passn"] = [panel]
    if args.figure == "12":
        curves = {result["name"]: curve_of(result["ranks"]) for result in results}
        axes = {"xlabel": "rank of confidence", "ylabel": "right (%)"}
        figures["figure-12"] = [{"axes": axes, "curves": curves}]
    figures["confidence"] = []
    highest = max(np.histogram(one["confidence"], 20, (0, 1))[0].max() for one in results) + 1
    for result in results:
        histogram = {"right": [], "wrong": []}
        for confidence, right in zip(result["confidence"], result["answer_right"], strict=True):
            histogram["right" if right else "wrong"].append(confidence)
        axes = {"title": f"{result['name']}\nmean {np.mean(result['confidence']):.2f}"}
        axes |= {"xlabel": "confidence in the answer", "ylabel": "problems", "ylim": (0, highest)}
        figures["confidence"].append({"axes": axes, "histogram": histogram})
    return [draw(panels, args.out / f"{name}-{args.name}.png") for name, panels in figures.items()]


def draw_epochs(results, args):
    """Draw pass@N by epoch, a panel for each N, where a run has several. Returns its path."""
    panels = {n: {} for n in args.ns}  # {N: {run: points}}
    for result in results:
        run, epoch = os.path.split(result["checkpoint"])
        epoch = epoch.removeprefix("epoch-")
        if epoch.isdigit() and result["temperature"] == args.temperature[0]:
            for n, curves in panels.items():
                one = (result.get("exact") or result["sampled"])[n]
                point = int(epoch), one["pass"], one["low"], one["high"]
                curves[run] = sorted([*curves.get(run, []), point])
    if not any(len(points) > 1 for points in panels[args.ns[0]].values()):
        return []
    drawn = []
    for n, curves in panels.items():
        axes = {"xlabel": "epoch", "ylabel": f"pass@{n} (%)"}
        drawn.append({"axes": axes, "curves": curves})
    return [draw(drawn, args.out / f"epochs-{args.name}.png")]


def curve_of(estimates):
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
    """Of an optimal policy's largest confidence (Lemma 4.2, Eq. 13). True for k = 2, not always."""
    ratio = ((k - 1) * p1 / (1 - p1 - epsilon)) ** (1 / (n - 1))
    return 1 - (k - 1) / ((k - 1) * ratio + 1)


def lower_bound(n, p1, p2):
    """Of the same (Lemma 4.3, Eq. 18). True for up to s + 1 answers, s = (1 - p1) / p2 rounded."""
    s, ratio = (1 - p1 + p2) / p2, (p1 / p2) ** (1 / (n - 1))
    return 1 - s / (s * ratio + 1)


def figure_11(args):
    ns = np.geomspace(1.01, 4096, 120).tolist()
    curves = {"upper, Lemma 4.2": [(n, upper_bound(n, 0.5, 0.25, k=2)) for n in ns]}
    curves["lower, Lemma 4.3"] = [(n, lower_bound(n, 0.5, 0.25)) for n in ns]
    axes = {"title": "p1 = 1/2, p2 = ε = 1/4, k = 2", "xlabel": "N", "xscale": "log"}
    return [{"axes": axes | {"ylabel": "largest confidence"}, "curves": curves}]


FIGURES = {"2b": figure_2b, "4": figure_4, "11": figure_11}


if __name__ == "__main__":
    main()
