"""The checks that tests/gpu_check.py makes, one a process. Each is called with (args, numbers, folder), fills in
`numbers`, and returns in words what it has found, or raises: AssertionError, or `Skipped` where it cannot be made."""

import copy
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import common  # noqa: E402
import train_grpo  # noqa: E402
import train_lean_step  # noqa: E402

TINY, ARITHMETIC = str(ROOT / "examples/tiny_llama"), str(ROOT / "examples/arithmetic")
LR = 1e-4  # of the checks' steps
COVERAGES = ("pass@1", "pass@16", "pass@256", "pass@4096")
BENCH_ROWS = ["sft", "dco-accept", "logits-memory", "dco-over-ce", "grpo", "coverage", "micro-batch", "weight-sync"]


class Skipped(Exception):
    """A check that cannot be made here, and why."""


def demand(condition, why: str):
    if not condition:
        raise AssertionError(why)


def checks(args) -> dict:
    """{its name: the check}, in their order."""
    found = {"direct": check_direct, "cot": check_cot, "grpo": check_grpo, "lean": check_lean, "loss": check_loss}
    found |= {"padding": check_padding, "logits": check_logits}
    found |= {f"zero-{stage}": partial(check_zero, stage) for stage in (2, 3)}
    found |= {"vllm": check_vllm, "bench": check_bench}
    found |= {f"study-n{n:.15g}": partial(study_run, n) for n in args.study_n_primes}
    return found | {"study-figures": study_figures, "study-passn": study_passn}


# ---- What they share -------------------------------------------------------------------------------------------------
def start(folder: Path, *arguments):
    """Run a script as a user would; what it says goes to the check's log."""
    command = [sys.executable, *map(str, arguments)]
    print("\n$", shlex.join(command), flush=True)
    code = subprocess.run(command).returncode
    demand(code == 0, f"exit code {code}: {last_error(folder / 'log.txt')}")


def last_error(log: Path) -> str:
    """What a log says of how it came to its end."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", log.read_text(errors="replace")) if line.strip()]
    told = [line for line in lines if re.match(r"error: |[\w.]+(Error|Exception)\b", line)]
    return [*lines[-1:], *told][-1][:400] if lines else "it said nothing"


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def has_solution(row: dict) -> bool:
    return bool(row.get("solution", "").strip())


def write_data(folder: Path, train: list[dict], test=()) -> tuple[Path, list[dict]]:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        kept = [{name: row[name] for name in row if name not in ("id", "source")} for row in rows]
        common.write_whole(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in kept))
    return folder, train


def small_data(args) -> tuple[Path, list[dict]]:
    """192 rows to train on, none of them long, a quarter without a solution if there are such, and 8 to test."""
    rows = [r for r in common.load_problems(args.data, "train") if len(r["problem"] + r.get("solution", "")) < 1000]
    chosen = [*filter(has_solution, rows)][:144] + [row for row in rows if not has_solution(row)][:48]
    chosen.sort(key=lambda row: row["id"])
    return write_data(args.out / "small-data", chosen, common.load_problems(args.data, "test")[:8])


def two_steps(script: str, folder: Path, model, data, *flags, lr=LR, launcher=(), run="run") -> Path:
    how = ["--model", model, "--data", data, "--out", folder / run, "--max-steps", 2, "--save-every", 2]
    start(folder, *launcher, ROOT / script, *how, "--lr", lr, "--warmup-steps", 1, *flags)
    return folder / run


def weights_in(folder: Path) -> dict:
    return {name: w for path in sorted(folder.glob("model*.safetensors")) for name, w in load_file(path).items()}


def plain_log_probs(model, tokenizer, texts: list[tuple[str, str]], device) -> list[float]:
    """log p of each completion after its prompt, end of sequence included: one at a time, without padding, by
    transformers' own forward, with all logits."""
    found, model = [], model.to(device).eval()
    for prompt, completion in texts:
        prompt_ids = tokenizer(prompt).input_ids
        ids = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt_ids + ids], device=device)).logits[0, len(prompt_ids) - 1 : -1]
        found.append(logits.double().log_softmax(-1)[range(len(ids)), ids].sum().item())
    return found


def plain_dco(n: float, log_p: float) -> float:
    return -math.log(max(-math.expm1(n * math.log1p(-math.exp(log_p))), 1e-300))


def inspect(args, run: Path, model, numbers: dict, texts=None, value=None, of="loss"):
    """Demand of a run's two steps what must hold on any device. texts(id): a prompt and its completion; value: of their
    log p, whose mean over the first step's examples its metrics call `of`. -> the steps, in words."""
    cuda, steps = args.device == "cuda", read_lines(run / "metrics.jsonl")
    demand(len(steps) == 2, f"{len(steps)} steps were made, not 2")
    numbers |= {name: [step[name] for step in steps] for name in ("loss", "grad_norm", "seconds", "candidates")}
    for step in steps:
        demand(math.isfinite(step["loss"]), f"the loss of step {step['step']} is {step['loss']}")
        norm = step["grad_norm"]
        demand(math.isfinite(norm) and norm > 0, f"the gradient's norm in step {step['step']} is {norm}")
    tokenizer = common.load_tokenizer(str(model))
    before = common.load_model(str(model), tokenizer, seed=0)[0]
    own, trained = before.state_dict(), weights_in(run / "state/step-2")
    moved = max((trained[name] - own[name]).abs().max().item() for name in trained)
    numbers["largest_change"] = moved
    demand(0.5 * LR <= moved <= 2.2 * LR, f"the weights moved by up to {moved:.2g}, not by lr = {LR:g} a step")
    loaded = AutoModelForCausalLM.from_pretrained(run / "step-2").state_dict()
    for name, weight in trained.items():
        expected = weight.to(torch.bfloat16 if cuda else torch.float32)
        whole = loaded[name].dtype == expected.dtype and torch.equal(loaded[name], expected)
        demand(whole, f"the checkpoint's {name} is not the trained one in {expected.dtype}")
    told = f"loss {steps[0]['loss']:.4g}, {steps[1]['loss']:.4g}; {steps[1]['seconds']:.2g} s the second step"
    if texts:
        log_p = plain_log_probs(before, tokenizer, [texts(i) for i in steps[0]["ids"]], args.device)
        expected = sum(map(value, log_p)) / len(log_p)
        off, allowed = abs(steps[0][of] - expected), abs(expected) / 100 + 0.1 if cuda else abs(expected) / 10000
        numbers |= {"plain_forward": expected, "off": off, "allowed": allowed}
        demand(off <= allowed, f"{of} is {steps[0][of]:.4f}, by a plain float32 forward {expected:.4f}: off {off:.2g}")
        told += f"; {of} off a float32 forward by {off:.1g} of {expected:.4g} (allowed {allowed:.1g})"
    return steps, told


def sampled_by(run: Path) -> str:
    engine = json.loads((run / "args.json").read_text())["engine"]
    return f"sampled by {engine}" + ("" if find_spec("vllm") else ", since vLLM is not installed")


# ---- A step of each script -------------------------------------------------------------------------------------------
def check_direct(args, numbers, folder):
    data, rows = small_data(args)
    size = ["--batch-size", 64, "--micro-batch-size", 32] if args.device == "cuda" else ["--batch-size", 16]
    run = two_steps("train_direct.py", folder, args.model, data, "--n-prime", 64, *size)

    def texts(i):
        return rows[i]["problem"] + "\n", rows[i]["answer"]

    steps, told = inspect(args, run, args.model, numbers, texts, partial(plain_dco, 64))
    numbers["seconds_a_candidate"] = steps[1]["seconds"] / steps[1]["candidates"]
    return told


def check_cot(args, numbers, folder):
    data, rows = small_data(args)
    flags = ["--n-mc", 8, "--max-new-tokens", 64, "--batch-size", 16, "--micro-batch-size", 4, "--engine", args.engine]
    run = two_steps("train_cot_dcoa.py", folder, args.model, data, *flags, "--eval-problems", 4, "--eval-n", 8)
    counted = re.search(r"'without a solution': (\d+)", (folder / "log.txt").read_text())
    without, dropped = sum(not has_solution(row) for row in rows), int(counted[1]) if counted else 0
    demand(dropped == without, f"{without} rows have no solution, and {dropped} dropped out")

    def texts(i):
        demand(has_solution(rows[i]), f"row {i} has no solution and was trained on")
        return rows[i]["problem"] + "\n", rows[i]["solution"]

    steps, told = inspect(args, run, args.model, numbers, texts, lambda log_p: -log_p, "mean_ce")
    shutil.rmtree(run / "state")
    numbers["seconds_sampling"] = [step["seconds_sampling"] for step in steps]
    return f"{told}; {dropped} rows without a solution dropped out; {sampled_by(run)}"


def check_grpo(args, numbers, folder):
    """A model that never writes the format has no reward and makes no step, so here it is one that surely does."""
    rows = sorted(common.load_problems(ARITHMETIC, "train"), key=lambda row: len(row["problem"] + row["solution"]))
    data, _ = write_data(folder / "data", rows[:32])
    how = ["--model", TINY, "--data", data, "--template", "r1-short", "--n-prime", 1, "--eval-problems", 0]
    start(folder, ROOT / "train_cot_dcoa.py", *how, "--epochs", 40, "--warmup-steps", 5, "--out", folder / "warm")
    flags = ["--rollouts", 8, "--batch-size", 4, "--max-new-tokens", 64, "--eval-problems", 0, "--engine", args.engine]
    warm = folder / "warm/epoch-40"
    run = two_steps("train_grpo.py", folder, warm, data, *flags)
    steps, told = inspect(args, run, warm, numbers)
    numbers |= {name: [step[name] for step in steps] for name in ("reward", "accepted", "engine_to_trainer")}
    for step in steps:
        ratio, allowed = step["engine_to_trainer"], 0.05 if args.device == "cuda" else 1e-3
        demand(ratio is None or abs(ratio - 1) <= allowed, f"log π of the engine is {ratio} of the trainer's")
    return f"{told}; reward {steps[0]['reward']:.2f}, with the embedded model and data; {sampled_by(run)}"


def check_lean(args, numbers, folder):
    data, prover = ROOT / "examples/propositional", ROOT / "examples/tiny_prover"
    run = two_steps("train_lean_step.py", folder, prover, data, "--n-eff", 8, "--eval-steps", 32)
    rows = train_lean_step.load_steps(data / "train.json")

    def texts(i):
        return rows[i]["problem"] + "\n---\n", rows[i]["answer"]

    return inspect(args, run, prover, numbers, texts, partial(plain_dco, 8))[1]


# ---- The loss and its memory -----------------------------------------------------------------------------------------
def check_loss(args, numbers, folder):
    """Answers cut to 0 to 5 tokens and closed, so that Np is far above 1 for some and far below for others."""
    model = common.load_model(TINY, tokenizer := common.load_tokenizer(TINY), seed=0)[0]
    cut = common.encode(common.load_problems(ARITHMETIC, "train")[:24], tokenizer, "cot", 999)[0]
    examples = [common.Example(i, e.prompt_ids, e.completion_ids[: i % 6] + [2]) for i, e in enumerate(cut)]
    advantages = [(-1) ** i * (0.5 + i % 3) for i in range(len(examples))]

    def reference(kind):
        """-> the sum of the losses, that of their sizes, the gradient: an example at a time, from the equations."""
        double.zero_grad()
        losses = []
        for example, advantage in zip(examples, advantages, strict=True):
            ids, size = torch.tensor([example.prompt_ids + example.completion_ids]), len(example.completion_ids)
            p = double(ids).logits[0, -size - 1 : -1].log_softmax(-1)[range(size), example.completion_ids].sum().exp()
            losses.append(-advantage * p.log() if kind == "GRPO" else -(-torch.expm1(kind * torch.log1p(-p))).log())
            losses[-1].backward()
        return sum(losses).item(), sum(map(abs, losses)).item(), gradient(double)

    def computed(kind, autocast):
        """-> the sum of the losses and the gradient, by the functions and in the way of the scripts."""
        model.zero_grad()
        with torch.autocast(args.device, torch.bfloat16) if autocast else nullcontext():
            log_p = common.completion_log_probs(model, common.collate(examples, 0, args.device))
        if kind == "GRPO":
            value = trained = train_grpo.grpo_loss(log_p, torch.tensor(advantages, device=log_p.device))
        else:
            value = common.dco_loss(log_p, kind).sum()
            trained = (common.dco_factor(log_p.detach(), kind) * -log_p).sum()
        trained.backward()
        return value.item(), gradient(model)

    def gradient(model):
        return torch.cat([p.grad.flatten() for p in model.parameters()]).double().cpu()

    double, model, worst = copy.deepcopy(model).double(), model.to(args.device), {}
    limits = {"float32": (1e-5, 1e-7, 1e-4), "bf16": (2e-3, 2e-3, 2e-2)}  # ten times a CPU's, or more
    for kind in (1, 64, 4096, "GRPO"):
        expected, sizes, wanted = reference(kind)
        for how, limit in limits.items():
            value, found = computed(kind, how == "bf16")
            cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=0).item()
            offs = abs(value - expected) / sizes, 1 - cosine, abs((found.norm() / wanted.norm()).item() - 1)
            for name, off, allowed in zip(("loss", "1 - cosine", "norm"), offs, limit, strict=True):
                numbers[f"{kind} {how} {name}"] = off
                demand(off <= allowed, f"N' or kind {kind}, {how}: {name} is off by {off:.2g}, allowed {allowed:g}")
                worst[how, name] = max(off, worst.get((how, name), 0))
    return "at most off, relatively: " + ", ".join(f"{how} {name} {off:.1g}" for (how, name), off in worst.items())


def check_padding(args, numbers, folder):
    """Batches as the scripts compute them, padded on the left, of lengths around multiples of a kernel's tiles: log p
    and gradient are those of the examples one at a time. What cuDNN's attention makes of them is told, not demanded."""
    accelerator, tokenizer = common.make_accelerator(), common.load_tokenizer(args.model)
    model = common.load_model(args.model, tokenizer, seed=0)[0].to(accelerator.device)
    ids, answer = [3 + i % (len(tokenizer) - 3) for i in range(7, 7000, 7)], 8
    cuda, longest = args.device == "cuda", common.longest_context(args.model) - answer
    worst, allowed = {"log p": 0.0, "1 - cosine": 0.0}, 2e-2 if cuda else 1e-5

    def computed(batches):
        """-> log p of each example, and the gradient of their sum."""
        model.zero_grad()
        found = []
        for examples in batches:
            with accelerator.autocast():
                found.append(common.completion_log_probs(model, common.collate(examples, 0, accelerator.device)))
            found[-1].sum().backward()
        return torch.cat(found).detach(), torch.cat([p.grad.flatten() for p in model.parameters()]).double()

    numbers["not finite with cuDNN"] = {}
    for width in (64, 65, 100, 128, 192, 320) if cuda else (64,):
        lengths = [width - answer - cut for cut in (0, 1, 20, width // 2)]
        if lengths[0] > longest:
            continue
        examples = [common.Example(i, ids[i : i + n], ids[-answer:]) for i, n in enumerate(lengths)]
        log_p, gradient = computed([examples])
        broken = (~gradient.isfinite()).sum().item()
        demand(broken == 0, f"{width} columns: {broken:,} numbers of the gradient are not finite")
        expected, wanted = computed([[example] for example in examples])
        offs = ((log_p - expected).abs() / expected.abs()).max(), 1 - torch.cosine_similarity(gradient, wanted, dim=0)
        for name, off in zip(worst, offs, strict=True):
            demand(off <= allowed, f"{width} columns: {name} is off by {off:.2g}, allowed {allowed:g}")
            worst[name] = max(worst[name], off.item())
        if cuda:
            torch.backends.cuda.enable_cudnn_sdp(True)
            numbers["not finite with cuDNN"][width] = (~computed([examples])[1].isfinite()).sum().item()
            torch.backends.cuda.enable_cudnn_sdp(False)
    lost = [width for width, count in numbers["not finite with cuDNN"].items() if count]
    told = f"; by cuDNN's attention the gradient of {lost} columns would not be finite" if lost else ""
    return "at most off, relatively: " + ", ".join(f"{name} {off:.1g}" for name, off in worst.items()) + told


def check_logits(args, numbers, folder):
    cuda, vocabulary, prompt, answer = args.device == "cuda", 128256, 200, 10
    config, rows = common.load_config(TINY), 8 if cuda else 1
    config.vocab_size = vocabulary
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(args.device)
    ids = torch.randint(3, vocabulary, (rows, prompt + answer)).tolist()
    batch = common.collate([common.Example(0, one[:prompt], one[prompt:]) for one in ids], 0, args.device)

    def of_all(model, batch):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        log_p = model(**inputs, use_cache=False).logits.float().log_softmax(-1)[:, prompt - 1 : -1]
        return log_p.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1).sum(-1)

    def measure(compute):
        """-> log p, and the bytes that it takes with its gradient; on a CPU, those that are kept for the gradient."""
        before, kept = torch.cuda.memory_allocated() if cuda else 0, {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with torch.autocast("cuda", torch.bfloat16) if cuda else hooks:
            log_p = compute(model, batch)
        saved = sum(kept.values()) - sum(kept.get(p.untyped_storage().data_ptr(), 0) for p in model.parameters())
        log_p.sum().backward()
        return log_p.detach(), torch.cuda.max_memory_allocated() - before if cuda else saved

    found = []
    for compute in (common.completion_log_probs, of_all):
        measure(compute)  # from here on the gradients are there
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        found.append(measure(compute))
    (log_p, used), (of_all_log_p, of_all_used) = found
    numbers |= {"bytes": used, "bytes_with_all_logits": of_all_used}
    same = torch.allclose(log_p, of_all_log_p, rtol=1e-2 if cuda else 1e-5)
    demand(same, f"log p is {log_p[0]:.4f}, and with all logits {of_all_log_p[0]:.4f}")
    demand(used < 0.2 * of_all_used, f"{used:,} bytes, and with all logits {of_all_used:,}")
    # What `plan_memory` counts on: 20 bytes a logit. Beside it, two large matrices' gradients before they are added.
    planned = 20 * rows * (answer + 1) * vocabulary + 8 * sum(p.numel() for p in model.parameters())
    demand(used < planned, f"{used:,} bytes, and planned were {planned:,}")
    how = "at the peak" if cuda else "kept for the gradient (a CPU has no peak to ask for)"
    return f"{common.size_text(used)} {how}, with all logits {common.size_text(of_all_used)}"


# ---- DeepSpeed, vLLM, throughput -------------------------------------------------------------------------------------
def check_zero(stage, args, numbers, folder):
    """The updates are compared, not the weights: ZeRO's are bf16 from the start."""
    if find_spec("deepspeed") is None:
        raise Skipped("DeepSpeed is not installed")
    cuda, data, flags = args.device == "cuda", small_data(args)[0], ["--n-prime", 64, "--batch-size", 16]
    flags += ["--factor-threshold", 0]  # or rounding would decide which examples the second step is made of
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 1]
    how = {"lr": 10 * LR}  # so large that bf16 shows the update
    plain = args.out / "zero-2/plain"
    if stage == 2 or not (plain / "step-2").exists():
        plain = two_steps("train_direct.py", folder, args.model, data, *flags, **how, run="plain")
    how |= {"launcher": launcher, "run": "zero"}
    zero = two_steps("train_direct.py", folder, args.model, data, *flags, "--zero", stage, **how)
    for run in (plain, zero):  # 12 bytes a parameter and more, of no use here
        shutil.rmtree(run / "state", ignore_errors=True)
    told = json.loads((zero / "args.json").read_text())["zero"]
    demand(told == stage, f"args.json says ZeRO-{told}")
    one, other = read_lines(plain / "metrics.jsonl"), read_lines(zero / "metrics.jsonl")
    demand([a["ids"] for a in one] == [b["ids"] for b in other], "the steps are made of other examples")
    for name, allowed in (("loss", 0.02 if cuda else 1e-3), ("grad_norm", 0.1 if cuda else 1e-2)):
        numbers[name] = pairs = [(a[name], b[name]) for a, b in zip(one, other, strict=True)]
        same = [abs(a - b) <= allowed * abs(a) for a, b in pairs]
        # With bf16 the second step of a large rate is another one: the first update magnifies what rounding differs.
        demand(all(same[:1] if cuda else same), f"{name} of plain steps and ZeRO's: {pairs}")
    before, *after = (
        common.load_model(str(one), common.load_tokenizer(args.model))[0].state_dict()
        for one in (args.model, plain / "step-2", zero / "step-2")
    )
    dots = torch.zeros(3, dtype=torch.float64)
    for name in before:
        a, b = ((weights[name] - before[name]).double().flatten() for weights in after)
        dots += torch.stack([a @ a, b @ b, a @ b])
    cosine, ratio = (dots[2] / (dots[0] * dots[1]).sqrt()).item(), (dots[1] / dots[0]).sqrt().item()
    least = 0.7 if cuda else 0.99
    numbers |= {"cosine_of_updates": cosine, "ratio_of_updates": ratio}
    demand(cosine >= least and abs(ratio - 1) < 0.1, f"the updates have cosine {cosine:.4f} and ratio {ratio:.3f}")
    losses = ", ".join(f"{a:.4f} and {b:.4f}" for a, b in numbers["loss"])
    return f"losses {losses}; the updates' cosine is {cosine:.4f} (at least {least:g})"


def check_vllm(args, numbers, folder):
    if find_spec("vllm") is None:
        raise Skipped("vLLM is not installed")
    cuda, new, share = args.device == "cuda", 32, 0.3
    allowed = 0.75 if cuda else 1e-3  # so far may logits be apart where the engine's choice is not the trainer's
    tokenizer, accelerator = common.load_tokenizer(args.model), common.make_accelerator()
    rows, most = common.load_problems(args.data, "train")[:64], min(400, common.longest_context(args.model) - new)
    prompts = [example.prompt_ids for example in common.encode(rows, tokenizer, "direct", most)[0][:16]]
    model = accelerator.prepare(common.load_model(args.model, tokenizer, seed=0)[0])

    def gaps(found):
        """Of each token that the engine chose: by how much the trainer's logit of it is under its largest."""
        every = []
        for prompt, (one,) in zip(prompts, found, strict=True):
            ids = torch.tensor([prompt + one.token_ids], device=accelerator.device)
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
            chosen = logits.gather(-1, ids[0, len(prompt) :, None])[:, 0]
            every += (logits.max(-1).values - chosen).tolist()
        return every

    def of_others(phase):
        """GiB of the GPU that are not this process's tensors."""
        if cuda:
            free, total = torch.cuda.mem_get_info()
            numbers[f"GiB_{phase}"] = round((total - free - torch.cuda.memory_reserved()) / 2**30, 2)
        return numbers.get(f"GiB_{phase}", 0)

    gaps([[common.Completion([2] * new, None)] for _ in prompts])  # CUDA and its libraries take theirs first
    before, found, told = of_others("before"), None, []
    how = {"max_length": max(map(len, prompts)) + new, "logs": folder, "memory": share, "patience_minutes": 4}
    engines = common.VLLMEngines(accelerator, args.model, tokenizer, model=model, **how)
    during = of_others("with_engine")
    for phase in ("first", "updated"):
        if found:
            torch.manual_seed(0)
            with torch.no_grad():
                for weight in model.parameters():
                    weight += 0.2 * weight.std() * torch.randn_like(weight)
            numbers["stale_beyond"] = sum(gap > allowed for gap in gaps(found))
            began = time.perf_counter()
            engines.update_weights(model)
            numbers["seconds_update"] = time.perf_counter() - began
        found = engines.generate(prompts, 1, new)
        apart = gaps(found)
        same, beyond = sum(gap == 0 for gap in apart), sum(gap > allowed for gap in apart)
        numbers[phase] = {"tokens": len(apart), "same": same, "beyond": beyond, "largest_gap": max(apart)}
        told.append(f"{same} of {len(apart)} the same, {len(apart) - same - beyond} near ties, {beyond} beyond")
        demand(beyond == 0, f"greedy tokens, {phase} weights: {told[-1]} a gap of {allowed:g}, up to {max(apart):.2g}")
    demand(numbers["stale_beyond"] > 0.1 * len(apart), "the update is too small for old weights to be noticed")
    of_others("updated")
    engines.shut_down()
    until = time.monotonic() + 20
    while (after := of_others("after")) > before + 0.5 and time.monotonic() < until:
        time.sleep(0.5)
    whole = torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else math.inf
    demand(during - before < share * whole + 3, f"the engine took {during - before:.1f} of {whole:.1f} GiB")
    demand(after - before < 0.5, f"{after - before:.1f} GiB of the GPU did not come back")
    memory = f"; GiB of others before, with, after: {before}, {during}, {after}" if cuda else ""
    return f"greedy tokens: {told[0]}; after an update {told[1]} {allowed:g}{memory}"


def check_bench(args, numbers, folder):
    how = ["--device", args.device, "--model", args.model, "--data", args.data, "--out", folder / "bench.json"]
    how += ["--repeat", 3] if args.device == "cuda" else ["--quick"]
    try:
        start(folder, ROOT / "tests/bench.py", *BENCH_ROWS, *how)
    finally:  # also of a run in which a row has failed
        if (folder / "bench.json").exists():
            numbers["rows"] = json.loads((folder / "bench.json").read_text())["results"]
    ratios = [f"{one['row']} {one['ratio']:.2f}x" for one in numbers["rows"] if "ratio" in one]
    missing = [f"{one['row']} skipped: {one['skipped']}" for one in numbers["rows"] if "skipped" in one]
    return "; ".join([", ".join(ratios), *missing])


# ---- The study -------------------------------------------------------------------------------------------------------
def study_run(n, args, numbers, folder):
    flags = ["--model", args.model, "--data", args.data, "--n-prime", f"{n:.15g}", "--epochs", args.study_epochs]
    flags += [] if common.is_example(args.model) else ["--micro-batch-size", 32]
    flags += ["--lr", args.study_lr] if args.study_lr else []
    start(folder, ROOT / "train_direct.py", *flags, "--out", folder / "run", "--resume")
    numbers["epochs"] = epochs = read_lines(folder / "run/epochs.jsonl")
    demand(len(epochs) == args.study_epochs, f"{len(epochs)} epochs, not {args.study_epochs}")
    for epoch in epochs:
        found = [epoch[name] for name in COVERAGES]
        demand(found == sorted(found) and found[0] >= 0 and found[-1] <= 1, f"epoch {epoch['epoch']}: {found}")
    shutil.rmtree(folder / "run/state")
    return ", ".join(f"{name} {100 * epochs[-1][name]:.1f}" for name in COVERAGES)


def study_so_far(args) -> dict[float, list[dict]]:
    """{N': the lines of its epochs}, of what has been trained."""
    found = {n: read_lines(args.out / f"study-n{n:.15g}/run/epochs.jsonl") for n in sorted(args.study_n_primes)}
    if not any(found.values()):
        raise Skipped("no epoch of the study is done")
    return {n: epochs for n, epochs in found.items() if epochs}


def study_figures(args, numbers, folder):
    """study.md, study-epochs.png."""
    found, columns, panels = study_so_far(args), [*COVERAGES, "greedy_confidence"], []
    table = ["| N' | epoch | " + " | ".join(columns).replace("_", " ") + " |", "|---" * (2 + len(columns)) + "|"]
    for n, epochs in found.items():
        for epoch in epochs:
            cells = [f"{n:g}", str(epoch["epoch"]), *(f"{100 * epoch[name]:.1f}" for name in COVERAGES)]
            table.append("| " + " | ".join([*cells, f"{epoch['greedy_confidence']:.3f}"]) + " |")
    for name in columns:
        unit, y = (100, f"{name} (%)") if name in COVERAGES else (1, "greedy confidence")
        points = {n: [(epoch["epoch"], unit * epoch[name], None, None) for epoch in found[n]] for n in found}
        panels.append({"x": "epoch", "y": y, "curves": {f"N' = {n:g}": curve for n, curve in points.items()}})
    common.write_whole(args.out / "study.md", "\n".join(table) + "\n")
    common.draw_panels(panels, args.out / "study-epochs.png")
    numbers["table"] = table
    return f"study-epochs.png, study.md: N' = {', '.join(f'{n:g}' for n in found)}"


def study_passn(args, numbers, folder):
    """eval_passn.py of each run's last checkpoint."""
    runs = [args.out / f"study-n{n:.15g}/run" for n in study_so_far(args)]
    last = [max(run.glob("epoch-*[0-9]"), key=lambda path: int(path.name[6:])) for run in runs]
    start(folder, ROOT / "eval_passn.py", *last, "--data", args.data, "--out", folder)
    drawn = [path.name for path in sorted(folder.glob("*.png"))]
    demand(any("passn" in name for name in drawn), f"eval_passn.py has drawn {drawn}")
    return f"{', '.join(drawn)} in {folder}, of {', '.join(str(path.relative_to(args.out)) for path in last)}"
