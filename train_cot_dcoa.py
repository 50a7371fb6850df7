"""Fine-tune on reasoning traces with approximate Direct Coverage Optimization, DCOa (§5.4, App. B).

    python train_cot_dcoa.py                        # laptop: the embedded model and data
    accelerate launch train_cot_dcoa.py             # 8 GPUs, which vLLM shares: Llama-3-8B on MATH
    accelerate launch --num_machines 2 --num_processes 16 ... train_cot_dcoa.py    # and RAY_ADDRESS

Many traces end in the answer y of a problem x, so p̂(y|x) is estimated from samples. The gradient
is the mean over problems, with golden traces c, of

    F(N', p̂) ∇(-log p̂(c, y|x)),   p̂ = share of --n-mc sampled traces that end in the right answer

--n-prime 1 is cross-entropy on the same traces, without sampling. Problems with F below
--factor-threshold are replaced by the next ones of the stream. F at p̂ is biased: for N' = 64 and
p = 0.02, where F is 0.494, its mean is 0.573 with 64 traces and 0.740 with 16. Writes to --out
what train_direct.py writes, and engine-<i>.log.
"""

import argparse
import math
import os
import time
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import common

PRESETS = {
    "paper": {  # §5.4, App. B
        "model": "meta-llama/Meta-Llama-3-8B",
        "data": "nlile/hendrycks-MATH-benchmark",
        "n_mc": 64,
        "max_new_tokens": 1024,
        "epochs": 5,
        "batch_size": 128,
        "micro_batch_tokens": 4096,
        "lr": 2e-5,
        "warmup_steps": 20,
        "betas": (0.9, 0.999),
        "weight_decay": 0.0,
    },
    "laptop": {  # a small model trained from scratch
        "model": "examples/tiny_llama",
        "data": "examples/arithmetic",
        "n_mc": 16,
        "max_new_tokens": 160,
        "eval_problems": 100,
        "epochs": 8,
        "batch_size": 32,
        "micro_batch_tokens": 512,
        "lr": 3e-3,
        "warmup_steps": 50,
        "betas": (0.9, 0.98),
        "weight_decay": 0.01,
    },
}
POSITIVE = ("n_mc", "max_new_tokens", "eval_n", "epochs", "max_steps", "batch_size", "lr", "clip",
            "save_every")  # fmt: skip


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="default: paper with a GPU, laptop without")
    # model and data
    add("--model", help="folder or hub name")
    add("--data", help="folder with train.jsonl and test.jsonl, or hub name")
    add("--template", default="cot", choices=["cot", "r1", "r1-short"], help="r1: before GRPO")
    add("--prompt", help="instead of the template's, with {problem} in it")
    add("--seed", type=int, default=0, help="order of the examples, samples, weights from scratch")
    # loss
    add("--n-prime", type=float, default=64, help="N' (paper: 64; 1: cross-entropy)")
    add("--n-mc", type=int, help="traces sampled per problem, to estimate p̂ (paper: 64)")
    add("--factor-threshold", type=float, default=0.01, help="replace F below it (paper: 0.01)")
    add("--filter-only", action="store_true", help="F = 1 for those that are not replaced")
    add("--unfiltered-steps", type=int, default=0, help="first steps, with F = 1 and no sampling")
    add("--nll", default="sum", choices=["sum", "mean"], help="over the tokens (Eq. 4: sum)")
    # sampling
    add("--max-new-tokens", type=int, help="of a sampled trace")
    add("--engine", default="auto", choices=["auto", "vllm", "transformers"])
    add("--gpu-memory", type=float, default=0.3, help="vLLM's share of each GPU (paper: 0.3)")
    add("--gpus-per-engine", type=int, default=2, help="(paper: 2)")
    add("--eval-problems", type=int, help="of the test data, after each epoch (0: none)")
    add("--eval-n", type=int, default=64, help="samples of each of them (paper: 64)")
    # optimization
    add("--epochs", type=int, help="passes over the data (paper: 5)")
    add("--max-steps", type=int, help="stop after this many steps")
    add("--batch-size", type=int, help="accepted problems per step, all processes (paper: 128)")
    add("--micro-batch-tokens", type=int, help="most tokens per process and forward")
    add("--lr", type=float, help="AdamW, constant after the warm-up (paper: 2e-5)")
    add("--warmup-steps", type=int, help="linear (paper: 20)")
    add("--betas", type=float, nargs=2, help="AdamW")
    add("--weight-decay", type=float, help="AdamW")
    add("--clip", type=float, default=1.0, help="maximum gradient norm")
    # systems
    add("--zero", type=int, choices=[0, 2, 3], help="DeepSpeed (default: 2 on several GPUs)")
    add("--offload", action="store_true", help="with --zero: optimizer states in CPU memory")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more computing")
    # output
    add("--out", type=Path, help="default: runs/cot-n<N'>")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--resume", action="store_true", help="continue the run in --out, if there is one")
    add("--save-every", type=int, default=20, help="steps between states for --resume")
    add("--report-to", default="none", choices=["none", "tensorboard", "wandb"])
    args = parser.parse_args(argv)
    if not 1 <= args.n_prime < math.inf:
        parser.error("--n-prime must be at least 1")
    if not 0 <= args.factor_threshold < 1:
        parser.error("--factor-threshold is a value of F and must lie in [0, 1)")
    if "{problem}" not in (args.prompt or "{problem}"):
        parser.error("--prompt must contain {problem}")
    for name in POSITIVE:
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    args.out = args.out or Path(f"runs/cot-n{args.n_prime:.15g}")
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
    test_rows = common.load_problems(args.data, "test", required=False)[: args.eval_problems]
    test, _ = common.encode(
        test_rows, tokenizer, config, args.template, args.prompt, prompts_only=True
    )
    if not train:
        common.fail(f"--data {args.data}: no usable examples (dropped: {dropped})")
    longest = max(len(example.prompt_ids) for example in [*train, *test]) + args.max_new_tokens
    if longest > getattr(config, "max_position_embeddings", math.inf):
        common.fail(f"prompt and --max-new-tokens make {longest}, too many for {args.model}")
    accelerator = common.make_accelerator(args)
    model, optimizer = common.prepare_training(args, tokenizer, accelerator, train)
    accelerator.print(
        f"preset {args.preset}: {args.model} on {args.data}, {len(train):,} train (dropped: "
        f"{dropped or 'none'}), {len(test):,} test; N' = {args.n_prime:g}, {args.n_mc} traces, lr "
        f"{args.lr:g}, batch {args.batch_size}, {args.epochs} epochs, {accelerator.num_processes} "
        f"processes ({accelerator.distributed_type.value}), output in {args.out}"
    )
    quiet = not accelerator.is_local_main_process
    progress = tqdm(total=args.epochs * len(train), unit="candidate", disable=quiet, mininterval=1)

    # -------- p̂ of each candidate from samples, and the weighted gradient of its golden trace
    weight, log_p = {}, {}  # F and log p̂(c, y|x), by position in train
    seconds, counts = Counter(), Counter()  # of the step; of the epoch
    first_sampled = args.unfiltered_steps if args.n_prime > 1 else math.inf  # step

    def factor(p):
        return torch.ones_like(p) if args.filter_only else common.dco_factor(p.log(), args.n_prime)

    def accept(p):
        return common.dco_factor(p.log(), args.n_prime) >= args.factor_threshold

    def estimate(ids, found):
        shares = []
        for i, completions in zip(ids, found, strict=True):
            answers = common.count_answers(completions, tokenizer, args.template)
            right = grader.grade([(rows[train[i].id]["answer"], answer) for answer in answers])
            shares.append(sum(n for n, ok in zip(answers.values(), right, strict=True) if ok))
        return torch.tensor(shares, dtype=torch.float64) / args.n_mc

    def score(ids):
        p = torch.zeros(len(ids), dtype=torch.float64)  # F = 1
        if run.step >= first_sampled:
            common.raise_if_stopped(accelerator)
            started = time.perf_counter()
            prompts = [train[i].prompt_ids for i in ids]
            seeds = [common.seed_of(args.seed, "p", run.step, train[i].id) for i in ids]
            found = sampler.generate(prompts, args.n_mc, args.max_new_tokens, seeds)
            sampled = time.perf_counter()
            p = common.on_main(accelerator, estimate, ids, found)
            seconds.update(sampling=sampled - started, grading=time.perf_counter() - sampled)
            counts.update(calls=1, sampled=len(ids), accepted=int(accept(p).sum()))
            progress.set_postfix(sampled=counts["sampled"], accepted=counts["accepted"])
        weight.update(zip(ids, factor(p).tolist(), strict=True))
        return p

    def forward(ids):
        examples = [train[i] for i in ids]
        mine, new_log_p = common.gathered_log_probs(accelerator, model, examples, grad=True)
        log_p.update(zip(ids, new_log_p.tolist(), strict=True))

        def backward(weights, last):
            weights = weights * torch.tensor([weight[i] for i in ids])
            if args.nll == "mean":
                weights /= torch.tensor([len(e.completion_ids) for e in examples])
            common.backward(accelerator, model, mine, weights, last)

        return new_log_p, backward

    # -------- batch refill: a step is the first batch_size candidates with F >= threshold
    refill = common.Refill(
        size=len(train),
        batch_size=args.batch_size,
        accept=accept,
        rounds=lambda ids: common.make_rounds(
            ids, lambda i: len(train[i]), accelerator.num_processes, args.micro_batch_tokens
        ),
        seed=args.seed,
        processes=accelerator.num_processes,
        spare=1.0,  # an engine is fastest if asked for all at once
    )
    record = {  # what evaluation reads from a checkpoint
        "template": args.template,
        "prompt": args.prompt,
        "max_new_tokens": args.max_new_tokens,
        "n_prime": args.n_prime,
        "data": str(Path(args.data).resolve()) if Path(args.data).exists() else args.data,
    }

    # -------- training loop
    with common.Run(args, accelerator, model, tokenizer, refill, record) as run:
        if args.n_prime > 1 or test:
            grader = common.Grader(min(os.cpu_count(), 8)) if accelerator.is_main_process else None
            sampler = common.make_sampler(args, accelerator, args.model, tokenizer, longest, model)
        for epoch in range(max(refill.epoch, 1), args.epochs + 1):
            if refill.epoch < epoch:  # a resumed run may be within it, or even at its end
                refill.start_epoch()
            epoch_started = time.perf_counter()
            counts.clear()
            while run.step != args.max_steps:
                started, calls = time.perf_counter(), counts["calls"]
                seconds.clear()
                lr = args.lr * min(1, (run.step + 1) / max(args.warmup_steps, 1))
                for group in optimizer.param_groups:
                    group["lr"] = lr
                step = run.next_step(score, forward)
                if step is None:
                    break
                grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), args.clip))
                if not math.isfinite(grad_norm):
                    common.fail(f"step {run.step + 1}: the gradient norm is {grad_norm}")
                optimizer.step()
                optimizer.zero_grad()
                seconds["training"] = time.perf_counter() - started - sum(seconds.values())
                if run.step + 1 >= first_sampled:
                    sampler.update_weights(model)
                all_seconds = time.perf_counter() - started
                seconds["sync"] = all_seconds - sum(seconds.values())

                run.step += 1
                metrics = {
                    "step": run.step,
                    "epoch": epoch,
                    "loss": -sum(weight[i] * log_p[i] for i in step.ids) / len(step.ids),
                    "accepted": len(step.ids),
                    "candidates": len(step.seen),
                    "mean_ce": -sum(log_p[i] for i in step.ids) / len(step.ids),
                    "lr": lr,
                    "grad_norm": grad_norm,
                    "sampling_calls": counts["calls"] - calls,
                    **{f"seconds_{phase}": value for phase, value in seconds.items()},
                    "seconds": all_seconds,
                    "tokens_per_second": sum(len(train[i]) for i in step.seen) / all_seconds,
                    "ids": [train[i].id for i in step.ids],
                }
                if counts["calls"] > calls:
                    metrics["mean_factor"] = factor(step.values).mean().item()
                    metrics["mean_p"] = step.values.mean().item()
                    metrics["never_right"] = (step.values == 0).sum().item()  # there F = 1
                progress.set_postfix(loss=metrics["loss"], refresh=False)
                progress.update((epoch - 1) * len(train) + refill.position - progress.n)
                run.end_step(metrics)

            # -------- end of an epoch, or of --max-steps
            run.save_epoch()
            summary = {"epoch": epoch, "step": run.step}
            if test:
                sampler.update_weights(model)
                golds = [test_rows[example.id]["answer"] for example in test]
                found = common.evaluate_by_sampling(sampler, grader, tokenizer, test, golds, args)
                summary |= found or {}  # it is the main process's
            run.end_epoch(summary | {"seconds": time.perf_counter() - epoch_started})
            shown = "  ".join(f"{k} {v:.3f}" for k, v in summary.items() if "pass@" in k)
            write = accelerator.on_main_process(progress.write)
            write(f"epoch {epoch}/{args.epochs}, step {run.step}: {shown}")
            if run.step == args.max_steps:
                break
        progress.close()
        accelerator.print(f"done. Measure pass@N: python eval_passn.py {args.out}/epoch-* --n 256")


if __name__ == "__main__":
    main()
