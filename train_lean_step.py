"""Fine-tune on (proof state, tactic) pairs with step-wise Direct Coverage Optimization (§5.3).

    python train_lean_step.py --n-eff 8               # laptop: the embedded model and theorems
    accelerate launch train_lean_step.py --n-eff 8    # 8 GPUs: Qwen2.5-Math-1.5B on LeanDojo
    accelerate launch --num_machines 2 --num_processes 16 ... train_lean_step.py --n-eff 8

Loss, over the steps i of traced proofs, from the proof state x[i] by the tactic y[i]:

    ℓ_DCO^N_eff(x[i], y[i]) = -log(1 - (1 - p)^N_eff),   p = p̂(y[i]|x[i])

with gradient F(N_eff, p) ∇(-log p): no tactic becomes much likelier than 1/N_eff, about the width
of the search tree. --n-eff 1 is cross-entropy. --level proof --n-prime 4096 is the naive form for
whole proofs, F(N', Π_i p̂(y[i]|x[i])) ∇(-Σ_i log p̂(y[i]|x[i])). Writes to --out what train_direct.py
does; prove.py reads the checkpoints.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

import common

PRESETS = {
    "paper": {  # App. B
        "model": "Qwen/Qwen2.5-Math-1.5B",
        "data": "leandojo_benchmark_4/random",
        "epochs": 3,
        "batch_size": 64,
        "micro_batch_tokens": 4096,
        "lr": 1e-5,
        "warmup_steps": 20,
        "betas": (0.9, 0.999),
        "weight_decay": 0.0,
    },
    "laptop": {  # a small model trained from scratch
        "model": "examples/tiny_prover",
        "data": "examples/propositional",
        "epochs": 28,
        "batch_size": 16,
        "micro_batch_tokens": 1024,
        "lr": 1e-3,
        "warmup_steps": 20,
        "betas": (0.9, 0.95),
        "weight_decay": 0.0,
    },
}
POSITIVE = ("epochs", "batch_size", "micro_batch_tokens", "lr", "clip", "save_every", "max_steps")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="default: paper with a GPU, laptop without")
    # model and data
    add("--model", help="folder or hub name")
    add("--data", help="folder with train.json and val.json as in LeanDojo's benchmark, or a file")
    add("--extra", type=Path, nargs="+", default=[], help="proofs.json that prove.py wrote")
    add("--max-length", type=int, default=2048, help="drop longer steps (tokens, with the tactic)")
    add("--prompt", help="instead of the template's, with {problem} in it: the proof state")
    add("--seed", type=int, default=0, help="order of the examples, weights from scratch")
    # loss
    add("--n-eff", type=float, default=8, help="N_eff of a step (paper: 1, 4, 8, 16, 32)")
    add("--level", default="step", choices=["step", "proof"], help="F of what (paper: step)")
    add("--n-prime", type=float, help="N' of a whole proof, with --level proof (paper: 4096)")
    add("--factor-threshold", type=float, default=0.3,
        help="replace F below it (ours; authors' code: 0.1, paper: not stated)")  # fmt: skip
    add("--nll", default="sum", choices=["sum", "mean"], help="over the tokens (Eq. 4: sum)")
    # optimization
    add("--epochs", type=int, help="passes over the data (paper: 3)")
    add("--max-steps", type=int, help="stop after this many steps")
    add("--batch-size", type=int, help="accepted examples per step, all processes (paper: 64)")
    add("--micro-batch-tokens", type=int, help="most tokens per process and forward")
    add("--lr", type=float, help="AdamW, constant after the warm-up (paper: 1e-5)")
    add("--warmup-steps", type=int, help="linear (paper: 20)")
    add("--betas", type=float, nargs=2, help="AdamW")
    add("--weight-decay", type=float, help="AdamW")
    add("--clip", type=float, default=1.0, help="maximum gradient norm")
    # systems
    add("--zero", type=int, choices=[0, 2, 3], help="DeepSpeed (default: 2 on several GPUs)")
    add("--offload", action="store_true", help="with --zero: optimizer states in CPU memory")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more computing")
    # output
    add("--out", type=Path, help="default: runs/lean-neff<N_eff> or runs/lean-proof-n<N'>")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--resume", action="store_true", help="continue the run in --out, if there is one")
    add("--save-every", type=int, default=100, help="steps between states for --resume")
    add("--report-to", default="none", choices=["none", "tensorboard", "wandb"])
    args = parser.parse_args(argv)
    if (args.level == "proof") != (args.n_prime is not None):
        parser.error("--level proof and --n-prime go together; a step has --n-eff")
    args.n_prime = args.n_prime if args.level == "proof" else args.n_eff
    if not 1 <= args.n_prime < math.inf:
        parser.error("--n-eff and --n-prime must be at least 1")
    if not 0 <= args.factor_threshold < 1:
        parser.error("--factor-threshold is a value of F and must lie in [0, 1)")
    if "{problem}" not in (args.prompt or "{problem}"):
        parser.error("--prompt must contain {problem}")
    for name in POSITIVE:
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    name = "lean-neff" if args.level == "step" else "lean-proof-n"
    args.out = args.out or Path(f"runs/{name}{args.n_prime:.15g}")
    args.preset = args.preset or ("paper" if torch.cuda.is_available() else "laptop")
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def load_steps(paths):
    """Read the traced proofs of LeanDojo's benchmark, JSON lists of theorems. Returns rows {"id",
    "source", "step", "proof": numbers, "problem": the proof state, "answer": the tactic}."""
    rows, proofs = [], 0
    for path in paths:
        try:
            for theorem in json.loads(path.read_text(encoding="utf-8")):
                source, proofs = f"{path}: {theorem['full_name']}", proofs + 1
                for step in theorem.get("traced_tactics", []):
                    row = {"id": len(rows), "source": source, "step": len(rows), "proof": proofs}
                    row |= {"problem": step["state_before"], "answer": step["tactic"]}
                    rows.append(row)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            common.fail(f"{path}: not a list of theorems as in LeanDojo's benchmark: {error!r}")
    return rows


def main(argv=None):
    args = parse_args(argv)

    # -------- data, model, optimizer
    common.check_out(args)
    tokenizer, config = common.load_tokenizer(args.model), common.load_config(args.model)
    folder = Path(args.data)
    rows = load_steps([folder / "train.json" if folder.is_dir() else folder, *args.extra])
    train, dropped = common.encode(rows, tokenizer, config, "lean", args.prompt, args.max_length)
    val = [folder / "val.json"] if (folder / "val.json").is_file() else []
    rows_to_test = load_steps(val)[:500]
    test, _ = common.encode(rows_to_test, tokenizer, config, "lean", args.prompt, args.max_length)
    # A candidate is a list of steps: one, or all of a proof of which no step was dropped.
    place, candidates = {example.id: i for i, example in enumerate(train)}, {}
    for row in rows:
        candidates.setdefault(row[args.level], []).append(place.get(row["id"]))
    candidates = [steps for steps in candidates.values() if None not in steps]
    if not candidates:
        common.fail(f"--data {args.data}: no usable steps (dropped: {dropped})")
    accelerator = common.make_accelerator(args)
    model, optimizer = common.prepare_training(args, tokenizer, accelerator, train)
    accelerator.print(
        f"preset {args.preset}: {args.model} on {args.data}, {len(candidates):,} {args.level}s "
        f"(dropped steps: {dropped or 'none'}); N' = {args.n_prime:g}, lr {args.lr:g}, "
        f"batch {args.batch_size}, {args.epochs} epochs, {accelerator.num_processes} processes "
        f"({accelerator.distributed_type.value}), output in {args.out}"
    )

    # -------- one micro-batch of steps: F(N_eff, p) of each, and its weighted gradient
    def with_factor(log_p):
        return torch.stack([log_p, common.dco_factor(log_p, args.n_prime)], dim=1)

    def forward(steps, factor=None):
        """factor: F of the steps' whole proofs; by default, of the steps."""
        examples = [train[i] for i in steps]
        mine, log_p = common.gathered_log_probs(accelerator, model, examples, grad=True)
        values = with_factor(log_p)
        factor = values[:, 1] if factor is None else factor

        def backward(weights, last):
            weights = weights.to(factor) * factor
            if args.nll == "mean":
                weights /= torch.tensor([len(e.completion_ids) for e in examples]).to(factor)
            common.backward(accelerator, model, mine, weights, last)

        return values, backward

    def score(steps):
        examples = [train[i] for i in steps]
        return with_factor(common.score(accelerator, model, examples, args.micro_batch_tokens))

    def accept(values):
        return values[:, 1] >= args.factor_threshold

    def rounds(steps):
        processes, tokens = accelerator.num_processes, args.micro_batch_tokens
        return common.make_rounds(steps, lambda i: len(train[i]), processes, tokens)

    # -------- whole proofs: F needs Σ log p over the steps before any gradient, so score first
    scored = {}  # proof: log p and F under the weights of this step

    def score_proofs(proofs):
        log_p = score([i for k in proofs for i in candidates[k]])[:, 0]
        log_p = log_p.split([len(candidates[k]) for k in proofs])
        values = with_factor(torch.stack([part.sum() for part in log_p]))
        scored.update(zip(proofs, values, strict=True))
        return values

    def forward_proofs(proofs):
        values = torch.stack([scored[k] for k in proofs])
        place = {i: j for j, k in enumerate(proofs) for i in candidates[k]}  # of a step's proof

        def backward(weights, last):
            parts = rounds([*place])
            for steps in parts:
                places = [place[i] for i in steps]
                _, backward_steps = forward(steps, values[places, 1])
                backward_steps(weights[places], last and steps is parts[-1])

        return values, backward

    # -------- batch refill: a step uses the first batch_size candidates with F >= threshold
    functions, split = (score, forward), rounds
    straight_above = 3 / 4 if args.gradient_checkpointing else 2 / 3
    if args.level == "proof":
        functions, split = (score_proofs, forward_proofs), lambda proofs: [proofs]
        straight_above = 1.0  # never
    refill = common.Refill(
        size=len(candidates),
        batch_size=args.batch_size,
        accept=accept,
        rounds=split,
        seed=args.seed,
        straight_above=straight_above,
        processes=accelerator.num_processes,
    )
    record = {  # what prove.py reads from a checkpoint
        "template": "lean",
        "prompt": args.prompt,
        "max_new_tokens": min(256, max(len(e.completion_ids) for e in [*train, *test])),
        "max_length": args.max_length,
        "n_prime": args.n_prime,
        "data": str(Path(args.data).resolve()) if Path(args.data).exists() else args.data,
    }

    # -------- training loop
    with common.Run(args, accelerator, model, tokenizer, refill, record) as run:
        total, quiet = args.epochs * len(candidates), not accelerator.is_local_main_process
        progress = tqdm(total=total, unit="candidate", disable=quiet, mininterval=1)
        for epoch in range(max(refill.epoch, 1), args.epochs + 1):
            if refill.epoch < epoch:  # a resumed run may be within it, or even at its end
                refill.start_epoch()
            epoch_started = time.perf_counter()
            while run.step != args.max_steps:
                started = time.perf_counter()
                lr = args.lr * min(1, (run.step + 1) / max(args.warmup_steps, 1))
                for group in optimizer.param_groups:
                    group["lr"] = lr
                step = run.next_step(*functions)
                if step is None:
                    break
                grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), args.clip))
                if not math.isfinite(grad_norm):
                    common.fail(f"step {run.step + 1}: the gradient norm is {grad_norm}")
                optimizer.step()
                optimizer.zero_grad()

                run.step, run.clipped = run.step + 1, run.clipped + (grad_norm > args.clip)
                log_p, factor = step.values.T
                used = accept(step.values)
                tokens = sum(len(train[i]) for k in step.seen for i in candidates[k])
                seconds = time.perf_counter() - started
                metrics = {
                    "step": run.step,
                    "epoch": epoch,
                    "loss": common.dco_loss(log_p[used], args.n_prime).mean().item(),
                    "accepted": len(step.ids),
                    "candidates": len(step.seen),
                    "mean_factor": factor.mean().item(),
                    "mean_p": log_p.exp().mean().item(),
                    "mean_ce": -log_p.mean().item(),
                    "lr": lr,
                    "grad_norm": grad_norm,
                    "clipped_share": run.clipped / run.step,
                    "seconds": seconds,
                    "tokens_per_second": tokens / seconds,
                    "ids": [train[candidates[k][0]].id for k in step.ids],  # of a proof, its first
                }
                share = f"{len(step.ids) / len(step.seen):.2f}"
                progress.set_postfix(loss=f"{metrics['loss']:.3f}", accept=share, refresh=False)
                progress.update((epoch - 1) * len(candidates) + refill.position - progress.n)
                run.end_step(metrics)

            # -------- end of an epoch, or of --max-steps
            name = run.save_epoch()
            summary = {"epoch": epoch, "step": run.step}
            if test:
                sizes = record["max_new_tokens"], args.micro_batch_tokens
                summary |= common.evaluate_exactly(
                    accelerator, model, tokenizer, test, *sizes, ns=(1, 4, 16, 64)
                )
            run.end_epoch(summary | {"seconds": time.perf_counter() - epoch_started})
            shown = "  ".join(f"{k} {v:.3f}" for k, v in summary.items() if "pass@" in k)
            write = accelerator.on_main_process(progress.write)
            write(f"epoch {epoch}/{args.epochs}, step {run.step}: {shown}")
            if run.step == args.max_steps:
                break
        progress.close()
        accelerator.print(f"done. Prove theorems: python prove.py --model {args.out}/{name}")


if __name__ == "__main__":
    main()
