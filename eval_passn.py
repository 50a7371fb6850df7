"""Measure pass@N of checkpoints, exactly and from samples, and draw what the paper draws.

    python eval_passn.py runs/direct-n1/epoch-4 runs/direct-n64/epoch-4          # exact, no samples
    python eval_passn.py runs/direct-n64/epoch-4 --n 4096                        # from 4,096 samples a problem as well
    accelerate launch eval_passn.py runs/direct-n64/epoch-4 --n 4096             # the problems split over 8 GPUs

pass@N coverage is the probability that at least one of N independent samples is right (Eq. 2). Two estimates:

    exact     C^N = 1 - (1 - p)^N, with p = p̂(y|x) of the reference answer from one forward; direct answers only
    sampled   1 - C(n-c, N) / C(n, N) from n samples of which c are right by the grader

The template and the length of a completion are read from the checkpoint; flags override them. It prints tables and
writes passn-<data>.json. Each distinct answer is graded once; an evaluation that was interrupted goes on where it
stopped. By the paper's numbers, figures as PNG and PDF, and their numbers in a JSON file beside them:

    Tables 1, 4, 5        the table, of a run's epochs; Table 5 with --data HuggingFaceH4/aime_2024
    Table 3               the same with --n 1024 --ns 1,16,64: its second table has both kinds of error
    Figures 1, 7, 9, 3    confidence-<data>.png: of greedy completions; with --n of the most frequent answers (3)
    Figures 2a, 8         passn-<data>.png (and -sampled); Figures 6 and 10: --highlight CHECKPOINT
    Figure 2b             --figure 2b: F(N, p) over p
    Figure 4              --figure 4 RUN ...: discarded samples by step, from the runs' metrics.jsonl
    Figure 5              --figure 5 CHECKPOINT ...: derivative of the test loss along a cross-entropy step, by level
    Figure 11             --figure 11: the bounds of Lemmas 4.2 and 4.3
    Figure 12             --figure 12 CHECKPOINT ...: accuracy by rank of confidence; with --n of sampled answers
    Figure 13             --figure 13 CHECKPOINT ...: confidence and F by level, of training data not seen so far
    Tables 2, 6, Fig. 2c  prove.py
"""

import argparse
import gc
import json
import math
import os
from collections import Counter
from pathlib import Path

TABLE_NS = "1,16,256,4096"


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        usage="%(prog)s CHECKPOINT [CHECKPOINT ...] [--flag VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help="what training wrote, or hub names")
    parser.add_argument(
        "--figure",
        choices=["2b", "4", "5", "11", "12", "13"],
        help="draw this figure of the paper; the others need no such flag",
    )
    parser.add_argument("--highlight", metavar="CHECKPOINT", help="in the figure of pass@N, as in Figures 6 and 10")
    what = parser.add_argument_group("what is measured")
    what.add_argument("--data", help="folder, file of JSON lines or hub name (default: what was trained on)")
    what.add_argument("--split", default="test", help="paper: test, 500 problems of MATH")
    what.add_argument("--ns", help=f"the table's N, by commas (paper: {TABLE_NS}; up to --n)")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--n", type=int, help="samples a problem; without it nothing is sampled (paper: 4096)")
    sampling.add_argument("--engine", default="auto", choices=["auto", "vllm", "transformers"], help="what samples")
    sampling.add_argument("--gpu-memory", type=float, default=0.85, help="vLLM's share of each GPU")
    sampling.add_argument("--gpus-per-engine", type=int, help="default: 1, or all of a model that is too large for one")
    sampling.add_argument("--template", choices=["direct", "cot", "r1", "r1-short"], help="default: the checkpoint's")
    sampling.add_argument("--max-new-tokens", type=int, help="default: the checkpoint's (paper: 1,024 for CoT)")
    sampling.add_argument("--temperature", type=float, default=1.0, help="1 is p̂ itself (paper: 1)")
    sampling.add_argument("--seed", type=int, default=0)
    sampling.add_argument("--batch-size", type=int, default=512, help="sequences that transformers compute at once")
    parser.add_argument("--out", type=Path, help="default: the checkpoint's folder, or the one that holds them all")
    args = parser.parse_args(argv)
    try:
        default = [n for n in map(int, TABLE_NS.split(",")) if not args.n or n <= args.n]
        args.ns = sorted({int(n) for n in args.ns.split(",")}) if args.ns else default
    except ValueError:
        parser.error(f"--ns takes whole numbers separated by commas, not {args.ns!r}")
    if args.ns[0] < 1:
        parser.error(f"--ns takes numbers from 1 up, not {args.ns[0]}")
    for name in ("n", "max_new_tokens", "temperature", "batch_size", "gpu_memory", "gpus_per_engine"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    if args.n and args.n < args.ns[-1]:
        parser.error(f"pass@{args.ns[-1]} cannot be estimated from {args.n} samples: raise --n, or lower --ns")
    if not args.checkpoints and args.figure not in ("2b", "11"):
        parser.error("give a checkpoint, or several" if args.figure != "4" else "give a run's folder, or several")
    if args.highlight not in (None, *args.checkpoints):
        parser.error(f"--highlight {args.highlight} is not one of the checkpoints")
    if len({os.path.normpath(checkpoint) for checkpoint in args.checkpoints}) < len(args.checkpoints):
        parser.error("a checkpoint is given twice")
    return args


if __name__ == "__main__":
    parse_arguments()  # --help and what is wrong with the arguments are not kept waiting for these imports

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from accelerate.utils import gather_object  # noqa: E402
from tqdm import tqdm  # noqa: E402

import common  # noqa: E402


def main(argv=None):
    args = parse_arguments(argv)
    if args.figure in FIGURES:
        return draw_figure(args)

    # Everything about every checkpoint is checked before the first one is loaded.
    for checkpoint in args.checkpoints:
        check_checkpoint(checkpoint)
    records = [common.read_record(checkpoint) for checkpoint in args.checkpoints]
    templates = [args.template or record.get("template", "direct") for record in records]
    if not args.n and set(templates) != {"direct"}:
        common.refuse("pass@N of solutions can only be estimated from samples: give --n, 4096 for instance")
    args.engine = common.choose_engine(args.engine)
    data = args.data or recorded_data(records)
    rows = [row for row in common.load_problems(data, args.split) if row["answer"].strip()]
    tokenizers = [common.load_tokenizer(checkpoint) for checkpoint in args.checkpoints]
    out = args.out or default_out(args.checkpoints)
    accelerator = common.make_accelerator(patience_minutes=24 * 60)  # processes wait for the one that grades
    if accelerator.is_main_process:
        common.make_folder(out)
    accelerator.wait_for_everyone()
    data_name = Path(data).name.removesuffix(".jsonl") if Path(data).exists() else data.replace("/", "-")
    data_name += "" if args.split == "test" else f"-{args.split}"
    golds = {row["id"]: row["answer"] for row in rows}
    grader = common.Grader(workers=min(os.cpu_count(), 8)) if accelerator.is_main_process else None

    results = []
    for checkpoint, record, template, tokenizer in zip(args.checkpoints, records, templates, tokenizers, strict=True):
        examples, dropped = encode_for(rows, tokenizer, template, checkpoint)
        if not examples:
            common.refuse(f"{checkpoint}: all {len(rows)} problems are too long for it")
        longest = max((len(example.completion_ids) for example in examples), default=1)
        max_new_tokens = args.max_new_tokens or record.get("max_new_tokens", longest if template == "direct" else 1024)
        accelerator.print(
            f"{checkpoint}: {len(rows):,} problems of {data} ({args.split}), template {template}"
            + (f", {dropped} too long for the model and counted as unsolved" if dropped else "")
            + (f", {args.n:,} samples each of up to {max_new_tokens} tokens by {args.engine}" if args.n else "")
        )
        model, spread = None, spread_over_gpus(checkpoint, accelerator)
        if template == "direct" or args.engine == "transformers":
            dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
            model, _ = common.load_model(checkpoint, tokenizer, dtype, **({"device_map": "auto"} if spread else {}))
            model = model.eval() if spread else model.eval().to(accelerator.device)

        result = {"checkpoint": checkpoint, "template": template, "max_new_tokens": max_new_tokens}
        result |= {"n_prime": record.get("n_prime"), "too_long": dropped}
        # One entry a problem; what is measured of it is added to it below.
        problems = {row["id"]: {"id": row["id"], "level": row.get("level")} for row in rows}
        if template == "direct":
            measure_exactly(model, tokenizer, examples, accelerator, max_new_tokens, args, problems)
            if args.figure == "12":
                for id, answers in beam_search(model, tokenizer, examples, accelerator, max_new_tokens).items():
                    problems[id]["ranked"] = answers
        if args.n and args.engine == "vllm":  # which gets the GPU's memory to itself
            model = None
            gc.collect()  # hooks of a model that is spread over GPUs refer to it
            torch.cuda.empty_cache()

        if args.n:
            how = (template, max_new_tokens, out, data_name)
            counts = sample_all(args, accelerator, checkpoint, tokenizer, model, examples, *how)
            for id, (answers, unanswered) in counts.items():
                problems[id] |= {"answers": answers, "unanswered": unanswered}
        if accelerator.is_main_process:
            result |= summarise(list(problems.values()), golds, grader, args)
            results.append(result)

    if accelerator.is_main_process:
        grader.close()
        for kind in ("exact", "sampled"):
            measured = [result for result in results if kind in result]
            if measured:
                how = "exact, reference answers only" if kind == "exact" else f"from {args.n:,} samples a problem"
                how += f", temperature {args.temperature:g}" if kind == "sampled" and args.temperature != 1 else ""
                print(f"\npass@N in percent, {how}\n\n{markdown_table(measured, kind, args.ns)}")
                print(f"\n{markdown_errors(measured, kind, args.ns)}")
        report = {"data": data, "split": args.split, "problems": len(rows), "ns": args.ns}
        report["arguments"] = {name: str(value) for name, value in vars(args).items()}
        report["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
        report["checkpoints"] = results
        path = out / f"passn-{data_name}.json"
        common.write_whole(path, json.dumps(report) + "\n")
        figures = draw_coverage(results, "exact", args.highlight, out / f"passn-{data_name}.png")
        sampled = out / f"passn-{data_name}{'-sampled' * bool(figures)}.png"
        figures += draw_coverage(results, "sampled", args.highlight, sampled)
        if args.figure == "12":
            figures += common.draw_panels([figure_12(results)], out / f"figure-12-{data_name}.png")
        figures += draw_confidence(results, out / f"confidence-{data_name}.png")
        print("\nwrote", ", ".join(map(str, [path, *figures])))
    common.end(accelerator)


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def check_checkpoint(checkpoint: str):
    if checkpoint.rstrip("/").endswith(".partial"):
        common.refuse(f"{checkpoint} was not written to its end")
    if not common.check_model(checkpoint):
        common.refuse(f"{checkpoint} holds no weights: give a checkpoint that a training script wrote")


def recorded_data(records: list[dict]) -> str:
    """What the checkpoints were trained on, whose test split they are to be measured on."""
    found = {record.get("data") for record in records}
    if len(found) > 1:
        common.refuse(f"the checkpoints were trained on different data ({', '.join(map(str, found))}): give --data")
    (data,) = found
    if data and Path(data).is_file():
        common.refuse(f"the checkpoint was trained on the file {data}, which has no test split: give --data")
    return data or common.defaults_for_this_machine("", None)[1]


def default_out(checkpoints: list[str]) -> Path:
    if not all(Path(checkpoint).is_dir() for checkpoint in checkpoints):
        return Path("runs") / checkpoints[0].replace("/", "-")
    common_folder = Path(os.path.commonpath([os.path.abspath(checkpoint) for checkpoint in checkpoints]))
    if common_folder == Path(common_folder.root):
        common.refuse("the checkpoints have no folder in common: give --out")
    return Path(common.relative(common_folder))


def encode_for(rows, tokenizer, template: str, checkpoint: str):
    """-> (examples, how many problems are too long). Only direct answers are scored: others need no completion."""
    if template != "direct":
        rows = [row | {"solution": "0", "answer": "0"} for row in rows]
    examples, dropped = common.encode(rows, tokenizer, template, common.longest_context(checkpoint))
    return examples, dropped.get("too long", 0)


def spread_over_gpus(checkpoint: str, accelerator) -> bool:
    """Whether the model is too large for one GPU and has to be spread over those of this one process."""
    if accelerator.device.type != "cuda" or accelerator.num_processes > 1 or torch.cuda.device_count() == 1:
        return False
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(checkpoint))
    return 2 * sum(p.numel() for p in model.parameters()) > 0.8 * torch.cuda.get_device_properties(0).total_memory


# ---- Measuring -------------------------------------------------------------------------------------------------------


def measure_exactly(model, tokenizer, examples, accelerator, max_new_tokens, args, problems):
    """log p̂ of the reference answers, and the greedy completions with their confidence, into `problems`."""
    pad_id = common.pad_token_id(tokenizer)
    batch_size = common.batch_that_fits(examples, max_new_tokens, tokenizer, args.batch_size)
    log_p = common.log_probs_of(model, examples, accelerator, pad_id, batch_size)
    greedy = common.greedy_completions(model, tokenizer, examples, accelerator, max_new_tokens, batch_size)
    greedy_log_p = common.log_probs_of(model, greedy, accelerator, pad_id, batch_size)
    for problem in problems.values():
        problem |= {"log_p": None, "greedy": None, "greedy_confidence": 0.0}  # of those that are too long
    for i, example in enumerate(greedy):
        problems[example.id] |= {
            "log_p": log_p[i].item(),
            "greedy": common.read_answer(example.completion_ids, tokenizer, "direct"),
            "greedy_confidence": greedy_log_p[i].exp().item(),
        }


def beam_search(model, tokenizer, examples, accelerator, max_new_tokens, width=256, kept=16) -> dict:
    """-> {id: the answers of the `kept` likeliest completions that a beam of `width` finds, the likeliest first}."""
    how = {"do_sample": False, "num_beams": width, "num_return_sequences": kept, "length_penalty": 0.0}
    config, found = common.neutral_generation_config(tokenizer, max_new_tokens=max_new_tokens, **how), {}
    share = common.split_evenly(examples, accelerator)
    for example in tqdm(share, unit="problem", disable=not accelerator.is_local_main_process):
        prompt = torch.tensor([example.prompt_ids], device=accelerator.device)
        with torch.no_grad():
            ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        eos, completions = tokenizer.eos_token_id, ids[:, prompt.shape[1] :].tolist()
        cut = [one[: one.index(eos) + 1] if eos in one else one for one in completions]
        found[example.id] = [common.read_answer(one, tokenizer, "direct") for one in cut]
    return {id: answers for part in gather_object([found]) for id, answers in part.items()}


def sample_all(args, accelerator, checkpoint, tokenizer, model, examples, template, max_new_tokens, out, data_name):
    """n samples of each problem, counted by distinct answer, so that memory does not grow with n.

    -> {id: ({answer: count}, samples without an answer)}. A line a problem is appended to samples-…jsonl as soon as
    its samples are there; what is in such a file of the same checkpoint and settings is not sampled again.
    """
    asked = (args.split, args.n, args.seed, args.temperature, template, max_new_tokens)
    key = common.seed_of(common.fingerprint(checkpoint), [example.prompt_ids for example in examples], *asked)
    path = out / f"samples-{data_name}-{key}.jsonl"
    counts = common.on_main(accelerator, read_counts, path)
    left = [example for example in examples if example.id not in counts]
    if not left:
        return counts
    sampler = start_sampler(args, accelerator, checkpoint, tokenizer, model, examples, max_new_tokens, out)
    # A call for as many samples, of many problems or of one, as keep engines busy and are few enough to be held: 2^24
    # tokens. Transformers get one batch a process: what has been written then shows how far they have come.
    samples = min(1 << 16, (1 << 24) // max_new_tokens)
    samples = args.batch_size * accelerator.num_processes if args.engine == "transformers" else samples
    together = max(accelerator.num_processes, samples // args.n)  # problems in a call
    piece = max(1, samples // together)  # samples of each of them
    progress = tqdm(total=len(left) * args.n, unit="sample", disable=not accelerator.is_local_main_process)
    for group in (left[i : i + together] for i in range(0, len(left), together)):
        tallies = [Counter() for _ in group]
        for first in range(0, args.n, piece):
            seeds = [common.seed_of(args.seed, key, example.id) + first for example in group]
            prompts, n = [example.prompt_ids for example in group], min(piece, args.n - first)
            found = sampler.generate(prompts, n, max_new_tokens, seeds, args.temperature)
            if accelerator.is_main_process:
                for tally, completions in zip(tallies, found, strict=True):
                    tally.update(common.count_answers(completions, tokenizer, template))
            progress.update(len(group) * n)
        if accelerator.is_main_process:
            for example, tally in zip(group, tallies, strict=True):
                entry = {"id": example.id, "unanswered": tally.pop(None, 0), "answers": dict(tally.most_common())}
                common.append_json(path, entry)
    progress.close()
    sampler.shut_down()
    return common.on_main(accelerator, read_counts, path)


def start_sampler(args, accelerator, checkpoint, tokenizer, model, examples, max_new_tokens, out):
    if args.engine == "transformers":
        return common.LiveModel(accelerator, model, tokenizer, args.batch_size)
    longest = max(len(example.prompt_ids) for example in examples) + max_new_tokens
    spread = spread_over_gpus(checkpoint, accelerator)
    gpus = args.gpus_per_engine or (torch.cuda.device_count() if spread else 1)
    how = {"max_length": min(longest, common.longest_context(checkpoint)), "memory": args.gpu_memory, "gpus": gpus}
    return common.VLLMEngines(accelerator, checkpoint, tokenizer, logs=out, **how)


def read_counts(path: Path) -> dict:
    """{id: ({answer: count}, samples without an answer)}."""
    return {entry["id"]: (entry["answers"], entry["unanswered"]) for entry in common.read_whole_lines(path)}


def summarise(problems: list[dict], golds: dict, grader, args) -> dict:
    """Grade what was found and estimate coverage; adds "greedy_right", "right", "mode" and so on to each problem."""
    summary = {}
    if "log_p" in problems[0]:
        verdicts = grader.grade([(golds[problem["id"]], problem["greedy"]) for problem in problems])
        for problem, verdict in zip(problems, verdicts, strict=True):
            problem["greedy_right"] = verdict
        log_p = [-math.inf if problem["log_p"] is None else problem["log_p"] for problem in problems]
        summary["exact"] = {}
        for n in curve_ns(args.ns):
            values = common.exact_pass_at_n(log_p, n)
            summary["exact"][n] = common.mean_and_interval(values)
        summary["greedy"] = {
            "confidence": float(np.mean([problem["greedy_confidence"] for problem in problems])),
            "accuracy": float(np.mean(verdicts)),
        }
    if args.n:
        pairs = [(golds[problem["id"]], answer) for problem in problems for answer in problem.get("answers", {})]
        right = dict(zip(pairs, grader.grade(pairs), strict=True))
        for problem in problems:
            answers = problem.pop("answers", {})
            # A right answer may be written in several ways: its count is the sum over them. The mode is a string's.
            problem["right"] = sum(count for answer, count in answers.items() if right[golds[problem["id"]], answer])
            problem["mode"] = next(iter(answers), None)
            problem["mode_confidence"] = answers.get(problem["mode"], 0) / args.n
            problem["mode_right"] = bool(answers) and right[golds[problem["id"]], problem["mode"]]
            problem["distinct"] = len(answers)
            problem.setdefault("ranked", list(answers)[:16])
        c = np.array([problem["right"] for problem in problems])
        summary["sampled"] = {"n": args.n}
        for n in [n for n in curve_ns(args.ns) if n <= args.n]:
            values = common.pass_at_n(args.n, c, n)
            summary["sampled"][n] = common.mean_and_interval(values) | {"sampling_error": sampling_error(args.n, c, n)}
        summary["mode"] = {
            "confidence": float(np.mean([problem["mode_confidence"] for problem in problems])),
            "accuracy": float(np.mean([problem["mode_right"] for problem in problems])),
        }
    if args.figure == "12":
        for problem in problems:
            asked = [(golds[problem["id"]], answer) for answer in problem.get("ranked", [])]
            problem["ranked_right"] = grader.grade(asked)
        ranked = [problem["ranked_right"] for problem in problems]
        at_rank = [[len(right) > rank and right[rank] for right in ranked] for rank in range(max(map(len, ranked)))]
        summary["ranks"] = [common.mean_and_interval(np.array(verdicts)) for verdicts in at_rank]
    return summary | {"per_problem": problems}


def sampling_error(n: int, c, k: int, resamples: int = 500, seed: int = 0) -> float:
    """Standard error of mean pass@k with the problems fixed (the ± of Table 3): a parametric bootstrap over samples."""
    c = np.asarray(c)
    redrawn = np.random.default_rng(seed).binomial(n, c / n, size=(resamples, len(c)))
    return float(common.pass_at_n(n, redrawn, k).mean(1).std())


def curve_ns(ns: list[int]) -> list[int]:
    """The table's N and powers of two between 1 and the largest, for the curves."""
    return sorted({*ns, *(2**i for i in range(ns[-1].bit_length()))})


# ---- Tables and figures ----------------------------------------------------------------------------------------------


def markdown_table(results: list[dict], kind: str, ns: list[int]) -> str:
    """Checkpoints down, N across, percent; the best of each column in bold."""
    shown = [[f"{100 * result[kind][n]['pass']:.1f}" for n in ns] for result in results]
    best = [max(float(row[i]) for row in shown) for i in range(len(ns))]
    lines = ["| checkpoint | " + " | ".join(f"pass@{n}" for n in ns) + " |", "|---" * (len(ns) + 1) + "|"]
    for result, row in zip(results, shown, strict=True):
        cells = [f"**{x}**" if len(results) > 1 and float(x) == best[i] else x for i, x in enumerate(row)]
        lines.append(f"| {result['checkpoint']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def label_of(result: dict) -> str:
    """N' where it is known, and the last two parts of the path."""
    loss = {None: "", 1: "CE, "}.get(result["n_prime"], f"N' = {result['n_prime'] or 0:g}, ")
    return loss + "/".join(Path(result["checkpoint"]).parts[-2:])


def markdown_errors(results: list[dict], kind: str, ns: list[int]) -> str:
    """95 % intervals over problems and, of samples, the standard error with the problems fixed (the ± of Table 3)."""
    lines = ["| 95 % over problems | " + " | ".join(f"pass@{n}" for n in ns) + " |", "|---" * (len(ns) + 1) + "|"]
    for result in results:
        found = [result[kind][n] for n in ns]
        cells = [f"{100 * one['low']:.1f}-{100 * one['high']:.1f}" for one in found]
        if kind == "sampled":
            cells = [cells[i] + f", samples ± {100 * one['sampling_error']:.2f}" for i, one in enumerate(found)]
        lines.append(f"| {result['checkpoint']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_coverage(results: list[dict], kind: str, highlight: str | None, path: Path) -> list[Path]:
    """pass@N over N with 95 % intervals over problems, and the largest at each N: the Pareto envelope (Figure 2a)."""
    curves, bold = {}, None
    for result in [result for result in results if kind in result]:
        label = result["checkpoint"] if label_of(result) in curves else label_of(result)
        curves[label] = {n: value for n, value in result[kind].items() if n != "n"}
        bold = label if result["checkpoint"] == highlight else bold
    names, more = ("N (samples a problem)", f"pass@N coverage (%), {kind}"), {"envelope": len(curves) > 1}
    return common.draw_panels([common.coverage_panel(curves, *names, highlight=bold, **more)], path) if curves else []


def draw_confidence(results: list[dict], path: Path) -> list[Path]:
    """Histograms of the confidence in the greedy completion, or in the most frequent answer, right and wrong apart
    (Figures 1 and 3)."""
    kind = "greedy" if all("greedy" in result for result in results) else "mode"
    if not all(kind in result for result in results):
        return []
    columns = math.ceil(len(results) / math.ceil(len(results) / 4))
    figure, axes = common.new_figure(len(results), columns, share=True)
    bins = np.linspace(0, 1, 21)
    for axis, result in zip(axes, results, strict=True):
        problems = result["per_problem"]
        groups = [[p[f"{kind}_confidence"] for p in problems if p[f"{kind}_right"] is right] for right in (True, False)]
        weights = [[100 / len(problems)] * len(group) for group in groups]
        axis.hist(groups, bins, weights=weights, stacked=True, color=["#0072B2", "#E69F00"], label=["right", "wrong"])
        axis.set_title(f"{label_of(result)}\nmean {result[kind]['confidence']:.2f}", fontsize=8)
        axis.set_xlabel("greedy confidence" if kind == "greedy" else "confidence of the commonest answer", fontsize=8)
        axis.set_xlim(0, 1)
        axis.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes[0].set_ylabel("problems (%)")
    axes[0].legend(fontsize=8)
    return common.save_figure(figure, path)


# ---- Figures that are no evaluation of pass@N ------------------------------------------------------------------------


def draw_figure(args):
    """Compute one of `FIGURES`, a list of panels as `common.draw_panels` takes them; write it as PNG, PDF and JSON."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        common.refuse(f"--figure {args.figure} is drawn by one process: start it with python")
    panels = FIGURES[args.figure](args)
    out = args.out or (default_out(args.checkpoints) if args.checkpoints else Path("runs"))
    common.make_folder(out)
    path = out / f"figure-{args.figure}.json"
    common.write_whole(path, json.dumps(panels) + "\n")
    print("wrote", ", ".join(map(str, [path, *common.draw_panels(panels, path.with_suffix(".png"))])))


def figure_2b(args) -> list[dict]:
    """The factor by which DCO changes cross-entropy's gradient: it vanishes for p well above 1/N."""
    p = torch.logspace(-6, 0, 200, dtype=torch.float64)
    of_n = {f"N = {n}": common.dco_factor(p.log(), n).tolist() for n in args.ns}
    curves = {label: [(x, y, None, None) for x, y in zip(p.tolist(), f, strict=True)] for label, f in of_n.items()}
    return [{"x": "p(y|x)", "y": "F(N, p)", "log_base": 10, "curves": curves}]


def figure_4(args) -> list[dict]:
    curves = {}
    for run in args.checkpoints:
        path = Path(run) / "metrics.jsonl"
        if not path.is_file():
            common.refuse(f"{path} does not exist: Figure 4 takes the folders of runs")
        steps = [line for _, line in common.read_json_lines(path)]
        curves[run] = [(step["step"], step["candidates"] - step["accepted"], None, None) for step in steps]
    return [{"x": "step", "y": "discarded samples", "curves": curves}]


def upper_bound(n, p1: float, epsilon: float, k: int):
    """Of an optimal policy's largest confidence (Lemma 4.2, Eq. 13). p1: an answer's largest accuracy; 1 - epsilon:
    that of the k best together. It holds for k = 2 and is false in general (tests/test_figures.py)."""
    ratio = ((k - 1) * p1 / (1 - p1 - epsilon)) ** (1 / (n - 1))
    return 1 - (k - 1) / ((k - 1) * ratio + 1)


def lower_bound(n, p1: float, p2: float):
    """Of the same (Lemma 4.3, Eq. 18), by the two largest accuracies. It holds for at most s + 1 answers, s = (1-p1)/p2
    rounded up, and must fail for R more as N grows, where the confidence goes to 1/R."""
    s, ratio = (1 - p1 + p2) / p2, (p1 / p2) ** (1 / (n - 1))
    return 1 - s / (s * ratio + 1)


def figure_11(args) -> list[dict]:
    ns = [1.01 * 1.05**i for i in range(120)]
    bounds = {
        "upper, Lemma 4.2": lambda n: upper_bound(n, 0.5, 0.25, 2),
        "lower, Lemma 4.3": lambda n: lower_bound(n, 0.5, 0.25),
    }
    curves = {label: [(n, bound(n), None, None) for n in ns] for label, bound in bounds.items()}
    return [
        {"title": "p1 = 1/2, p2 = 1/4, k = 2", "x": "N", "y": "largest confidence", "log_base": 10, "curves": curves}
    ]


def figure_12(results: list[dict]) -> dict:
    """Accuracy of the likeliest completions by rank (beam search), or of the most frequent answers."""
    curves = {label_of(result): dict(enumerate(result["ranks"], 1)) for result in results}
    return common.coverage_panel(curves, "rank of confidence", "right (%)", log_base=None, y_limits=None)


def of_first_epoch(args):
    """Of each checkpoint within the first epoch: -> (its label, model, tokenizer, accelerator, {difficulty level: the
    training examples that it has not seen}, the test examples)."""
    accelerator = common.make_accelerator()
    for checkpoint in args.checkpoints:
        record = common.read_record(checkpoint)
        if "seen_ids" not in record:
            common.refuse(f"{checkpoint} does not say what it has seen: train with --checkpoint-at 0.11 0.86")
        tokenizer, data, levels = common.load_tokenizer(checkpoint), args.data or record["data"], {}
        rows, how = common.load_problems(data, "train"), (tokenizer, "direct", common.longest_context(checkpoint))
        seen, test = set(record["seen_ids"]), common.encode(common.load_problems(data, "test"), *how)[0]
        for example in [example for example in common.encode(rows, *how)[0] if example.id not in seen]:
            levels.setdefault(rows[example.id].get("level", 0), []).append(example)
        if not levels:
            common.refuse(f"{data}: {checkpoint} has seen all of it")
        dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
        model = common.load_model(checkpoint, tokenizer, dtype)[0].to(accelerator.device).train()  # without dropout
        model.gradient_checkpointing_enable({"use_reentrant": False})
        label = f"{label_of({'checkpoint': checkpoint, 'n_prime': None})} ({record['epoch']}. epoch)"
        yield label, model, tokenizer, accelerator, dict(sorted(levels.items())), test


def gradient(model, examples, tokenizer, accelerator, n: float) -> list:
    """Of Σ ℓ_DCO^n over the examples: a tensor for each parameter."""
    model.zero_grad()  # and leaves the tensors returned before as they are
    lengths, left = [(len(one.prompt_ids), len(one.completion_ids)) for one in examples], [*range(len(examples))]
    while left:
        part = common.that_fit(left, lengths, 1 << 12, 1)
        left = left[len(part) :]
        batch = common.collate([examples[i] for i in part], common.pad_token_id(tokenizer), accelerator.device)
        common.dco_loss(common.completion_log_probs(model, batch), n).sum().backward()
    return [p.grad for p in model.parameters()]


def along_step(of_test: list, model, batch, tokenizer, accelerator) -> float:
    """∇_g of the loss whose gradient is `of_test`, along the step g = -Σ ∇ℓ_CE over the batch: their inner product."""
    step = gradient(model, batch, tokenizer, accelerator, 1)
    return -sum((a.float() * b.float()).sum().item() for a, b in zip(of_test, step, strict=True))


def figure_5(args, n: float = 256) -> list[dict]:
    """∇_g of the test loss Σ ℓ_DCO^n along a step of cross-entropy on unseen training data, by difficulty: below 0,
    such data lower the test loss. An example's share; mean and standard deviation over equally large batches."""
    panels = []
    for label, model, tokenizer, accelerator, levels, test in of_first_epoch(args):
        of_test, points = gradient(model, test, tokenizer, accelerator, n), []
        size = max(1, min(64, min(map(len, levels.values())) // 4))  # four batches or more, if there are four examples
        for level, unseen in levels.items():
            batches = [unseen[i : i + size] for i in range(0, len(unseen) - size + 1, size)][:16]
            found = [along_step(of_test, model, batch, tokenizer, accelerator) / size for batch in batches]
            mean, spread = float(np.mean(found)), float(np.std(found))
            points.append((level, mean, mean - spread, mean + spread))
        names = {"title": f"{label}, batches of {size}", "x": "difficulty level"}
        panels.append({**names, "y": rf"$\nabla_g$ of the test loss (N = {n:g})", "zero": True, "curves": {"": points}})
    return panels


def figure_13(args, n: float = 256) -> list[dict]:
    """Confidence and F by difficulty on unseen training data: the median and the quartiles."""
    panels = []
    for label, model, tokenizer, accelerator, levels, _ in of_first_epoch(args):
        found = {"p(y|x)": [], f"F({n:g}, p)": []}
        for level, unseen in levels.items():
            size = common.batch_that_fits(unseen, 1, tokenizer, 64)
            log_p = common.log_probs_of(model, unseen, accelerator, common.pad_token_id(tokenizer), size)
            for points, values in zip(found.values(), (log_p.exp(), common.dco_factor(log_p, n)), strict=True):
                low, median, high = values.quantile(values.new_tensor([0.25, 0.5, 0.75])).tolist()
                points.append((level, median, low, high))
        for name, points in found.items():
            names = {"title": label, "x": "difficulty level", "y": f"{name}: median and quartiles"}
            panels.append({**names, "y_scale": "log" if name == "p(y|x)" else "linear", "curves": {"": points}})
    return panels


FIGURES = {"2b": figure_2b, "4": figure_4, "5": figure_5, "11": figure_11, "13": figure_13}


if __name__ == "__main__":
    main()
