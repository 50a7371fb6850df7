"""Fine-tune on direct answers with cross-entropy or Direct Coverage Optimization (§4, §5.1, §5.2).

    python train_direct.py --n-prime 64               # laptop: the embedded model and data
    accelerate launch train_direct.py --n-prime 64    # 8 GPUs: Llama-3-8B on MATH, as in the paper
    accelerate launch --num_machines 2 --num_processes 16 ... train_direct.py --n-prime 64

Loss, over problems x with answers y (Eq. 3, 4):

    ℓ_DCO^N'(x, y) = -log(1 - (1 - p)^N'),   p = p̂(y|x),   with gradient   F(N', p) ∇(-log p)

--n-prime 1 is cross-entropy. Examples with F < --factor-threshold are replaced by the next ones of
the stream, so that every step averages over --batch-size examples that matter. Writes to --out:
args.json, metrics.jsonl (a line per step), epochs.jsonl, checkpoints epoch-<k>/ and state/.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

import common

PRESETS = {
    "paper": {  # App. B
        "model": "meta-llama/Meta-Llama-3-8B",
        "data": "nlile/hendrycks-MATH-benchmark",
        "epochs": 4,
        "batch_size": 64,
        "micro_batch_tokens": 4096,
        "lr": 2e-5,
        "warmup_steps": 20,
        "betas": (0.9, 0.999),
        "weight_decay": 0.0,
    },
    "laptop": {  # a small model trained from scratch
        "model": "examples/tiny_llama",
        "data": "examples/arithmetic",
        "epochs": 24,
        "batch_size": 32,
        "micro_batch_tokens": 512,
        "lr": 3e-3,
        "warmup_steps": 50,
        "betas": (0.9, 0.98),
        "weight_decay": 0.01,
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
    add("--data", help="folder with train.jsonl and test.jsonl, or hub name")
    add("--template", default="direct", choices=["direct", "cot", "r1", "r1-short"])
    add("--prompt", help="instead of the template's, with {problem} in it")
    add("--seed", type=int, default=0, help="order of the examples, weights from scratch")
    # loss
    add("--n-prime", type=float, default=256, help="N' (paper: 1, 256, 4096)")
    add("--factor-threshold", type=float, default=0.3, help="replace F below it (paper: 0.3)")
    add(
        "--nll",
        default="sum",
        choices=["sum", "mean"],
        help="over the answer's tokens (Eq. 4: sum)",
    )
    # optimization
    add("--epochs", type=int, help="passes over the data (paper: 4)")
    add("--max-steps", type=int, help="stop after this many steps")
    add("--batch-size", type=int, help="accepted examples per step, all processes (paper: 64)")
    add("--micro-batch-tokens", type=int, help="most tokens per process and forward")
    add("--lr", type=float, help="AdamW, constant after the warm-up (paper: 2e-5)")
    add("--warmup-steps", type=int, help="linear (paper: 20)")
    add("--betas", type=float, nargs=2, help="AdamW")
    add("--weight-decay", type=float, help="AdamW")
    add("--clip", type=float, default=1.0, help="maximum gradient norm")
    # systems
    add(
        "--zero", type=int, choices=[0, 2, 3], help="DeepSpeed (default: 2 on several GPUs, else 0)"
    )
    add("--offload", action="store_true", help="with --zero: optimizer states in CPU memory")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more computing")
    # output
    add("--out", type=Path, help="default: runs/direct-n<N'>")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--resume", action="store_true", help="continue the run in --out, if there is one")
    add("--save-every", type=int, default=100, help="steps between states for --resume")
    add("--checkpoint-at", type=float, nargs="+", default=[], metavar="SHARE",
        help="also save at these shares of the first epoch (Figure 5: 0.11 0.86)")  # fmt: skip
    add("--report-to", default="none", choices=["none", "tensorboard", "wandb"])
    args = parser.parse_args(argv)
    if not 1 <= args.n_prime < math.inf:
        parser.error("--n-prime must be at least 1")
    if not 0 <= args.factor_threshold < 1:
        parser.error("--factor-threshold is a value of F and must lie in [0, 1)")
    if not all(0 < share < 1 for share in args.checkpoint_at):
        parser.error("--checkpoint-at takes shares in (0, 1)")
    if "{problem}" not in (args.prompt or "{problem}"):
        parser.error("--prompt must contain {problem}")
    for name in POSITIVE:
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    args.out = args.out or Path(f"runs/direct-n{args.n_prime:.15g}")
    args.preset = args.preset or ("paper" if torch.cuda.is_available() else "laptop")
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main(argv=None):
    args = parse_args(argv)

    # -------- data, model, optimizer
    common.check_out(args)
    tokenizer, config = common.load_tokenizer(args.model), common.load_config(args.model)
    rows = common.load_problems(args.data, "train")
    train, dropped = common.encode(rows, tokenizer, config, args.template, args.prompt)
    rows = common.load_problems(args.data, "test", required=False)
    test, _ = common.encode(rows, tokenizer, config, args.template, args.prompt)
    if not train:
        common.fail(f"--data {args.data}: no usable examples (dropped: {dropped})")
    accelerator = common.make_accelerator(args)
    model, optimizer = common.prepare_training(args, tokenizer, accelerator, train)
    accelerator.print(
        f"preset {args.preset}: {args.model} on {args.data}, {len(train):,} train (dropped: "
        f"{dropped or 'none'}), {len(test):,} test; N' = {args.n_prime:g}, lr {args.lr:g}, "
        f"batch {args.batch_size}, {args.epochs} epochs, {accelerator.num_processes} processes "
        f"({accelerator.distributed_type.value}), output in {args.out}"
    )

    # -------- one micro-batch: F(N', p) of each candidate, and its weighted gradient
    def forward(ids):
        examples = [train[i] for i in ids]
        mine, log_p = common.gathered_log_probs(accelerator, model, examples, grad=True)
        factor = common.dco_factor(log_p, args.n_prime)

        def backward(weights, last):
            weights = weights.to(factor) * factor
            if args.nll == "mean":
                weights /= torch.tensor([len(e.completion_ids) for e in examples]).to(factor)
            common.backward(accelerator, model, mine, weights, last)

        return torch.stack([log_p, factor], dim=1), backward

    def score(ids):
        examples = [train[i] for i in ids]
        log_p = common.score(accelerator, model, examples, args.micro_batch_tokens)
        return torch.stack([log_p, common.dco_factor(log_p, args.n_prime)], dim=1)

    def accept(values):
        return values[:, 1] >= args.factor_threshold

    def rounds(ids):
        return common.make_rounds(
            ids,
            length=lambda i: len(train[i]),
            processes=accelerator.num_processes,
            tokens=args.micro_batch_tokens,
        )

    # -------- batch refill: a step is the first batch_size candidates with F >= threshold
    refill = common.Refill(
        size=len(train),
        batch_size=args.batch_size,
        accept=accept,
        rounds=rounds,
        seed=args.seed,
        straight_above=3 / 4 if args.gradient_checkpointing else 2 / 3,
        processes=accelerator.num_processes,
    )
    longest = max(len(example.completion_ids) for example in [*train, *test])
    record = {  # what evaluation reads from a checkpoint
        "template": args.template,
        "prompt": args.prompt,
        "max_new_tokens": longest if args.template == "direct" else min(longest, 1024),
        "n_prime": args.n_prime,
        "data": str(Path(args.data).resolve()) if Path(args.data).exists() else args.data,
    }

    # -------- training loop
    with common.Run(args, accelerator, model, tokenizer, refill, record) as run:
        progress = tqdm(
            total=args.epochs * len(train),
            unit="candidate",
            disable=not accelerator.is_local_main_process,
            mininterval=1,
        )
        shares = [s for s in sorted(args.checkpoint_at) if refill.position < s * len(train)]
        for epoch in range(max(refill.epoch, 1), args.epochs + 1):
            if refill.epoch < epoch:  # a resumed run may be within it, or even at its end
                refill.start_epoch()
            epoch_started = time.perf_counter()
            while run.step != args.max_steps:
                started = time.perf_counter()
                lr = args.lr * min(1, (run.step + 1) / max(args.warmup_steps, 1))
                for group in optimizer.param_groups:
                    group["lr"] = lr
                step = run.next_step(score, forward)
                if step is None:
                    break
                grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), args.clip))
                if not math.isfinite(grad_norm):
                    common.fail(f"the gradient norm is {grad_norm}: training diverged. Lower --lr")
                optimizer.step()
                optimizer.zero_grad()

                run.step, run.clipped = run.step + 1, run.clipped + (grad_norm > args.clip)
                log_p, factor = step.values.T
                used = accept(step.values)
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
                    "tokens_per_second": sum(len(train[i]) for i in step.seen) / seconds,
                    "ids": [train[i].id for i in step.ids],
                }
                progress.set_postfix(
                    loss=f"{metrics['loss']:.3f}", F=f"{metrics['mean_factor']:.2f}", refresh=False
                )
                progress.update((epoch - 1) * len(train) + refill.position - progress.n)
                while epoch == 1 and shares and refill.position >= shares[0] * len(train):
                    seen_ids = [train[i].id for i in refill.order[: refill.position]]
                    run.save_checkpoint(f"epoch-{shares.pop(0):g}", seen_ids=seen_ids)
                run.end_step(metrics)

            # -------- end of an epoch, or of --max-steps
            run.save_epoch()
            summary = {"epoch": epoch, "step": run.step}
            if test and args.template == "direct":  # p of a solution is not p of its answer
                summary |= common.evaluate_exactly(
                    accelerator,
                    model,
                    tokenizer,
                    test,
                    max_new_tokens=longest,
                    tokens=args.micro_batch_tokens,
                    ns=(1, 16, 256, 4096),
                )
            run.end_epoch(summary | {"seconds": time.perf_counter() - epoch_started})
            shown = "  ".join(f"{k} {v:.3f}" for k, v in summary.items() if "pass@" in k)
            write = accelerator.on_main_process(progress.write)
            write(f"epoch {epoch}/{args.epochs}, step {run.step}: {shown}")
            if run.step == args.max_steps:
                break
        progress.close()
        accelerator.print(f"done. Measure and plot pass@N: python eval_passn.py {args.out}/epoch-*")


if __name__ == "__main__":
    main()
