"""Fine-tune by reinforcement learning: GRPO, or the policy gradient of pass@k (§5.4, App. B).

    python train_cot_dcoa.py --template r1-short --n-prime 1 --out runs/warm   # laptop: the format,
    python train_grpo.py --model runs/warm/epoch-8                             # then the answers
    accelerate launch train_grpo.py                 # 8 GPUs, which vLLM shares: Llama-3-8B on MATH
    accelerate launch --num_machines 2 --num_processes 16 ... train_grpo.py    # and RAY_ADDRESS

The loss of a step is the mean over its problems x, with roll-outs o_1 ... o_n of rewards r_i, of

    -1/n Σ_i Σ_t ratio_it A_i,   ratio_it = π(o_it | x, o_i<t) / stop_grad(π(o_it | x, o_i<t))

--pass-k 1: A_i = r_i - mean(r), Dr. GRPO. It climbs p.
--pass-k K: A_i = r_i K (1 - ρ(n-1, c-1, K-1)), with c roll-outs right and ρ(n, c, K) an estimate of
pass@K (Walder and Karkhanis, arXiv 2505.15201). It climbs C^K = 1 - (1-p)^K; DCO climbs log C^N.
A reward is 1 for a right answer in exactly the template's format, else 0. Problems without any
advantage are replaced by the next ones of the stream. Writes what train_cot_dcoa.py writes.
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
    "paper": {  # App. B
        "model": "meta-llama/Meta-Llama-3-8B",
        "data": "nlile/hendrycks-MATH-benchmark",
        "template": "r1",
        "max_new_tokens": 1024,
        "epochs": 5,
        "batch_size": 128,
        "micro_batch_tokens": 4096,
        "lr": 1e-6,
        "warmup_steps": 20,
        "betas": (0.9, 0.999),
    },
    "laptop": {  # a small model; give --model runs/warm/epoch-8
        "model": "examples/tiny_llama",
        "data": "examples/arithmetic",
        "template": "r1-short",
        "max_new_tokens": 160,
        "eval_problems": 100,
        "epochs": 3,
        "batch_size": 32,
        "micro_batch_tokens": 512,
        "lr": 1e-3,
        "warmup_steps": 5,
        "betas": (0.9, 0.98),
    },
}
POSITIVE = ("pass_k", "max_new_tokens", "eval_n", "epochs", "max_steps", "batch_size", "lr", "clip",
            "save_every")  # fmt: skip


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="default: paper with a GPU, laptop without")
    # model and data
    add("--model", help="folder or hub name")
    add("--data", help="folder with train.jsonl and test.jsonl, or hub name")
    add("--template", choices=["cot", "r1", "r1-short"], help="that of the warm start (paper: r1)")
    add("--prompt", help="instead of the template's, with {problem} in it")
    add("--seed", type=int, default=0, help="order of the examples, samples, weights from scratch")
    # sampling
    add("--rollouts", type=int, default=8, help="n, of each problem (paper: 8)")
    add("--pass-k", type=int, default=1, help="K: climb C^K (paper: GRPO, 1)")
    add("--max-new-tokens", type=int, help="of a roll-out")
    add("--engine", default="auto", choices=["auto", "vllm", "transformers"])
    add("--gpu-memory", type=float, default=0.3, help="vLLM's share of each GPU (paper: 0.3)")
    add("--gpus-per-engine", type=int, default=2, help="(paper: 2)")
    add("--eval-problems", type=int, help="of the test data, after each epoch (0: none)")
    add("--eval-n", type=int, default=64, help="samples of each of them (paper: 64)")
    # optimization
    add("--epochs", type=int, help="passes over the data (paper: 5)")
    add("--max-steps", type=int, help="stop after this many steps")
    add("--batch-size", type=int, help="balanced groups per step, all processes (paper: 128)")
    add("--micro-batch-tokens", type=int, help="most tokens per process and forward")
    add("--lr", type=float, help="AdamW, constant after the warm-up (paper: 1e-6)")
    add("--warmup-steps", type=int, help="linear (paper: 20)")
    add("--betas", type=float, nargs=2, help="AdamW")
    add("--weight-decay", type=float, default=0.0, help="AdamW")
    add("--clip", type=float, default=1.0, help="maximum gradient norm")
    # systems
    add("--zero", type=int, choices=[0, 2, 3], help="DeepSpeed (default: 2 on several GPUs)")
    add("--offload", action="store_true", help="with --zero: optimizer states in CPU memory")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more computing")
    # output
    add("--out", type=Path, default=Path("runs/grpo"))
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--resume", action="store_true", help="continue the run in --out, if there is one")
    add("--save-every", type=int, default=20, help="steps between states for --resume")
    add("--report-to", default="none", choices=["none", "tensorboard", "wandb"])
    args = parser.parse_args(argv)
    if not 2 <= args.rollouts >= args.pass_k:
        parser.error("--rollouts must be at least 2 and --pass-k")
    if "{problem}" not in (args.prompt or "{problem}"):
        parser.error("--prompt must contain {problem}")
    for name in POSITIVE:
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive")
    args.preset = args.preset or ("paper" if torch.cuda.is_available() else "laptop")
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def advantages(rewards, k):
    """A_i of the roll-outs of one problem, from their rewards of 0 or 1: float [n] -> [n]."""
    if k == 1:
        return rewards - rewards.mean()
    n, c = len(rewards), int(rewards.sum())
    return rewards * k * (1 - common.pass_at_n(n - 1, max(c - 1, 0), k - 1))


def main(argv=None):
    args = parse_args(argv)

    # -------- data, model, optimizer
    common.check_out(args)
    tokenizer, config = common.load_tokenizer(args.model), common.load_config(args.model)
    rows = common.load_problems(args.data, "train")
    train, dropped = common.encode(
        rows, tokenizer, config, args.template, args.prompt, prompts_only=True
    )
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
        f"{dropped or 'none'}), {len(test):,} test; {args.rollouts} roll-outs, K {args.pass_k}, lr "
        f"{args.lr:g}, batch {args.batch_size}, {args.epochs} epochs, {accelerator.num_processes} "
        f"processes ({accelerator.distributed_type.value}), output in {args.out}"
    )
    quiet = not accelerator.is_local_main_process
    progress = tqdm(total=args.epochs * len(train), unit="candidate", disable=quiet, mininterval=1)

    # -------- roll-outs of each candidate, and their gradient weighted by the advantages
    groups = {}  # position in train -> [(roll-out, A/n, the engine's log π)], without A = 0
    seconds, log_pi, counts = Counter(), Counter(), Counter()  # of the step, step and epoch

    def grade(ids, found):
        grades = []
        for i, completions in zip(ids, found, strict=True):
            counted = [common.count_answers([one], tokenizer, args.template) for one in completions]
            answers = [next(iter(answer)) for answer in counted]
            right = grader.grade([(rows[train[i].id]["answer"], answer) for answer in answers])
            grades.append([right, [answer is not None for answer in answers]])
        return torch.tensor(grades, dtype=torch.float64)  # [ids, 2, n]: right, in the format

    def score(ids):
        common.raise_if_stopped(accelerator)
        started = time.perf_counter()
        prompts = [train[i].prompt_ids for i in ids]
        seeds = [common.seed_of(args.seed, "roll-outs", run.step, train[i].id) for i in ids]
        found = sampler.generate(prompts, args.rollouts, args.max_new_tokens, seeds)
        sampled = time.perf_counter()
        grades = common.on_main(accelerator, grade, ids, found)
        seconds.update(sampling=sampled - started, grading=time.perf_counter() - sampled)
        for i, prompt, completions, rewards in zip(ids, prompts, found, grades[:, 0], strict=True):
            shares = (advantages(rewards, args.pass_k) / args.rollouts).tolist()
            groups[i] = [
                (common.Example(i, prompt, one.token_ids), share, one.log_prob)
                for one, share in zip(completions, shares, strict=True)
                if share != 0
            ]
        balanced = torch.tensor([len(groups[i]) > 0 for i in ids])
        counts.update(calls=1, sampled=len(ids), balanced=int(balanced.sum()))
        progress.set_postfix(sampled=counts["sampled"], balanced=counts["balanced"])
        return torch.cat([grades.mean(2), balanced[:, None]], dim=1)

    def forward(ids):
        rollouts = [rollout for i in ids for rollout in groups[i]]
        world = accelerator.num_processes
        rounds = common.make_rounds(rollouts, lambda r: len(r[0]), world, args.micro_batch_tokens)

        def backward(weights, last):
            for part in rounds:
                examples, shares, engine_log_pi = zip(*part, strict=True)
                mine, log_p = common.gathered_log_probs(accelerator, model, examples, grad=True)
                log_pi.update(trainer=log_p.sum().item(), engine=sum(engine_log_pi))
                shares = torch.tensor(shares) * weights[0]  # the same for all problems: 1/B
                common.backward(accelerator, model, mine, shares, last and part is rounds[-1])

        return None, backward

    # -------- batch refill: a step is the first batch_size groups with advantages
    refill = common.Refill(
        size=len(train),
        batch_size=args.batch_size,
        accept=lambda values: values[:, 2] > 0,  # balanced: some advantage is not 0
        rounds=lambda ids: [ids],  # `forward` splits them by roll-outs
        seed=args.seed,
        processes=accelerator.num_processes,
        spare=1.0,  # an engine is fastest if asked for all at once
    )
    record = {  # what evaluation reads from a checkpoint
        "template": args.template,
        "prompt": args.prompt,
        "max_new_tokens": args.max_new_tokens,
        "data": str(Path(args.data).resolve()) if Path(args.data).exists() else args.data,
    }

    # -------- training loop
    with common.Run(args, accelerator, model, tokenizer, refill, record) as run:
        grader = common.Grader(min(os.cpu_count(), 8)) if accelerator.is_main_process else None
        sampler = common.make_sampler(args, accelerator, args.model, tokenizer, longest, model)
        for epoch in range(max(refill.epoch, 1), args.epochs + 1):
            if refill.epoch < epoch:  # a resumed run may be within it, or even at its end
                refill.start_epoch()
            epoch_started = time.perf_counter()
            counts.clear()
            while run.step != args.max_steps:
                started, calls = time.perf_counter(), counts["calls"]
                for measured in (groups, seconds, log_pi):
                    measured.clear()
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
                sampler.update_weights(model)
                all_seconds = time.perf_counter() - started
                seconds["sync"] = all_seconds - sum(seconds.values())

                run.step += 1
                lengths = [len(one.completion_ids) for i in step.ids for one, _, _ in groups[i]]
                metrics = {
                    "step": run.step,
                    "epoch": epoch,
                    "reward": step.values[:, 0].mean().item(),  # of all candidates
                    "format_rate": step.values[:, 1].mean().item(),
                    "accepted": len(step.ids),
                    "candidates": len(step.seen),
                    "all_wrong": (step.values[:, 0] == 0).sum().item(),
                    "mean_length": sum(lengths) / len(lengths),
                    "entropy": -log_pi["trainer"] / sum(lengths),  # nats per token
                    "engine_to_trainer": log_pi["engine"] / log_pi["trainer"],  # 1: same weights
                    "lr": lr,
                    "grad_norm": grad_norm,
                    "sampling_calls": counts["calls"] - calls,
                    **{f"seconds_{phase}": value for phase, value in seconds.items()},
                    "seconds": all_seconds,
                    "tokens_per_second": sum(lengths) / all_seconds,
                    "ids": [train[i].id for i in step.ids],
                }
                progress.set_postfix(reward=metrics["reward"], refresh=False)
                progress.update((epoch - 1) * len(train) + refill.position - progress.n)
                run.end_step(metrics)

            # -------- end of an epoch, or of --max-steps
            if counts["calls"] and not run.step:
                progress.close()
                common.fail(
                    f"no group of {counts['sampled']:,} is balanced. Teach the model the format: "
                    f"train_cot_dcoa.py --n-prime 1 --template {args.template} --out runs/warm"
                )
            run.save_epoch()
            summary = {"epoch": epoch, "step": run.step}
            if test:
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
