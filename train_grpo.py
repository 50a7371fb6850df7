"""Fine-tune a model by reinforcement learning with GRPO in the form of Dr. GRPO (§5.4, App. B), to compare DCOa with.

    python train_cot_dcoa.py --template r1-short --n-prime 1 --out runs/warm    # the embedded model: first the format,
    python train_grpo.py --model runs/warm/epoch-8                              # then the answers, in one process
    accelerate launch train_grpo.py                         # the 8 GPUs of a node, which vLLM shares
    accelerate launch --num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip HOST \\
        --main_process_port 29500 train_grpo.py             # two nodes, with RAY_ADDRESS as the README says

It descends along the gradient of the mean over a step's problems x, with N' roll-outs o_i of rewards r_i each, of

    -1/N' Σ_i Σ_t π(o_it | x, o_i<t) / stop_grad(π(o_it | x, o_i<t)) · A_i,   A_i = r_i - 1/N' Σ_j r_j

r is 1 for a right answer in exactly the format of the r1 template, else 0. Left out of GRPO: division by the rewards'
standard deviation, by a roll-out's length or by the tokens of the batch, the KL term, and clipping, since there is one
step a batch of roll-outs. Problems whose roll-outs are all right or all wrong have no gradient; they are replaced by
the next ones of the stream. In --out it writes args.json, metrics.jsonl (a line a step), epochs.jsonl (a line an epoch,
with pass@1/16/64 from samples), epoch-<k>/, for `eval_passn.py`, and engine-<i>.log.
"""

import argparse
import math
import os
import time
from collections import Counter
from pathlib import Path

# The settings of the embedded experiment, which take the place of the paper's when the model is one of examples/.
EXAMPLE_SETTINGS = {
    "epochs": 3,
    "batch_size": 32,
    "tokens_per_micro_batch": 8192,
    "lr": 1e-3,
    "warmup_steps": 5,
    "betas": (0.9, 0.98),
    "max_new_tokens": 160,
    "eval_problems": 100,
}


def parse_arguments(argv=None, settings=None):
    """argparse and the checks that need nothing but the arguments. settings: defaults in place of the paper's."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--flag VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is trained on what")
    what.add_argument("--model", help="folder or hub name (paper: meta-llama/Meta-Llama-3-8B)")
    what.add_argument("--data", help="folder with train.jsonl and test.jsonl, or hub name (paper: MATH, 12,000/500)")
    what.add_argument(
        "--template",
        choices=["cot", "r1", "r1-short"],
        help="default: the one that the checkpoint was trained with, or r1",
    )
    what.add_argument("--seed", type=int, default=0, help="order of the examples, samples, and weights from scratch")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--rollouts", type=int, default=8, help="N', of each problem (paper: 8)")
    sampling.add_argument("--max-new-tokens", type=int, default=1024, help="of a roll-out (paper: 1,024)")
    sampling.add_argument("--engine", default="auto", choices=["auto", "vllm", "transformers"], help="what samples")
    sampling.add_argument("--gpu-memory", type=float, default=0.3, help="vLLM's share of each GPU (paper: 0.3)")
    sampling.add_argument(
        "--gpus-per-engine", type=int, help="default: as many as its weights need, at most 8 (paper: 2)"
    )
    sampling.add_argument(
        "--eval-problems", type=int, help="of the test split, after each epoch (default: all; 0: none)"
    )
    sampling.add_argument("--eval-n", type=int, default=64, help="samples of each of them (paper: 64 and more)")
    how = parser.add_argument_group("optimization")
    how.add_argument("--epochs", type=int, default=5, help="passes over the data (paper: 5)")
    how.add_argument("--max-steps", type=int, help="stop after this many steps")
    how.add_argument("--batch-size", type=int, default=128, help="balanced problems a step, all processes (paper: 128)")
    how.add_argument(
        "--tokens-per-micro-batch",
        type=int,
        default=4096,
        help="prompts, roll-outs, padding that a process computes at once",
    )
    how.add_argument("--lr", type=float, default=1e-6, help="AdamW's, constant after the warm-up (paper: 1e-6)")
    how.add_argument("--warmup-steps", type=int, default=20, help="linear (paper: 20)")
    how.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95), help="AdamW's")
    how.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's")
    how.add_argument("--clip", type=float, default=1.0, help="largest norm of a step's gradient")
    how.add_argument("--zero", type=int, choices=[0, 2, 3], help="DeepSpeed ZeRO (default: 0, several GPUs 2 or 3)")
    how.add_argument("--offload", action="store_true", help="with ZeRO-3: optimizer states in the main memory")
    how.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more computing")
    where = parser.add_argument_group("what is written")
    where.add_argument("--out", type=Path, default=Path("runs/grpo"))
    where.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    where.add_argument("--resume", action="store_true", help="go on with the run that --out holds, if it holds one")
    where.add_argument("--save-every", type=int, default=20, help="steps from a state for --resume to the next")
    where.add_argument("--grace", type=float, default=20, help="seconds that a step may take after SIGTERM or Ctrl-C")
    where.add_argument("--patience", type=float, default=60, help="minutes to wait for other processes or an engine")
    where.add_argument("--dry-run", nargs="?", const="here", metavar="8x80", help="say what it would take, and stop")
    where.add_argument("--report-to", default="none", choices=["none", "tensorboard", "wandb"])
    where.add_argument("--show-every", type=int, default=10, help="print a roll-out every so many steps")
    parser.set_defaults(**settings or {})
    args = parser.parse_args(argv)
    positive = ("epochs", "max_steps", "batch_size", "tokens_per_micro_batch", "lr", "clip", "save_every", "patience")
    for name in (*positive, "show_every", "max_new_tokens", "gpu_memory", "gpus_per_engine", "eval_n"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    if args.rollouts < 2:
        parser.error(f"--rollouts must be 2 or more, not {args.rollouts}: one is never better than the others")
    if not all(0 <= beta < 1 for beta in args.betas) or args.weight_decay < 0:
        parser.error(f"--betas must lie in [0, 1) and --weight-decay be 0 or more: {args.betas}, {args.weight_decay}")
    if (args.eval_problems or 0) < 0 or args.gpu_memory >= 1:
        parser.error("--eval-problems must be 0 or more, and --gpu-memory under 1")
    return args


def grpo_loss(log_probs, advantages):
    """-Σ_i Σ_t ratio_it · A_i over some roll-outs, to be divided by N' and by the step's number of problems.

    log_probs: [R], Σ_t log π(o_it | x, o_i<t), with the graph; advantages: [R]. A ratio is 1 and has the gradient of
    its log π, so the sum of ratios has that of the sum of log π: what is returned has the gradient of the equation,
    -Σ_i A_i ∇ log π(o_i | x), and differs from it in value only."""
    return -(advantages * log_probs).sum()


def main(argv=None):
    args = parse_arguments(argv)

    import torch  # the heavy imports come after the arguments, so that --help and a typo are answered at once
    from tqdm import tqdm

    import common

    model_name, data_name = common.defaults_for_this_machine(args.model, args.data)
    if common.is_example(model_name):
        args = parse_arguments(argv, EXAMPLE_SETTINGS)
    args.model, args.data = model_name, data_name
    args.template = args.template or common.read_record(args.model).get("template", "r1")

    # Whatever can be refused is refused here, before any weights are loaded.
    common.check_out(args)
    args.engine = common.choose_engine(args.engine)
    rows = {"train": common.load_problems(args.data, "train"), "test": common.load_problems(args.data, "test", False)}
    tokenizer = common.load_tokenizer(args.model)
    max_length = common.longest_context(args.model)
    examples, dropped = {}, {}
    for split in rows:
        # The problems are there to be sampled: they need no solution.
        of_split = [row | {"solution": "-"} for row in rows[split]]
        examples[split], dropped[split] = common.encode(of_split, tokenizer, args.template, max_length)
    examples["test"] = examples["test"][: args.eval_problems]
    if not examples["train"]:
        common.refuse(
            f"--data {args.data}: no problem is left; dropped: {dropped['train']} (of {max_length} positions)"
        )
    longest = max(len(example.prompt_ids) for part in examples.values() for example in part) + args.max_new_tokens
    if longest > max_length:
        common.refuse(f"the longest prompt and --max-new-tokens make {longest} tokens; {args.model} has {max_length}")
    share_of_engine = 0.0 if args.engine == "transformers" else args.gpu_memory
    how = {"completion": args.max_new_tokens, "engine": share_of_engine}
    common.plan_memory(args, examples["train"], args.epochs, **how)
    common.check_resume(args, examples["train"])
    how = (args.zero, args.clip, 1, args.patience, args.offload)
    accelerator = common.make_accelerator(args.report_to, args.out, *how)
    processes, pad_id = accelerator.num_processes, common.pad_token_id(tokenizer)

    model, optimizer, about_model = common.prepare_training(args, tokenizer, accelerator)

    # What a checkpoint has to say about itself, for evaluation.
    record = {
        "template": args.template,
        "max_new_tokens": args.max_new_tokens,
        "data": os.path.abspath(args.data) if os.path.exists(args.data) else args.data,
        "base": common.base_of(args.model),
    }

    common.begin_run(
        args,
        accelerator,
        f"GRPO with {args.rollouts} roll-outs a problem",
        about_model,
        f"{len(examples['train']):,} to train on (dropped: {dropped['train'] or 'none'}), "
        f"{len(examples['test']):,} to test (dropped: {dropped['test'] or 'none'}), template {args.template}\n"
        f"  samples by {args.engine}, of up to {args.max_new_tokens} tokens; {args.eval_n} of each test problem",
        f"{args.batch_size} balanced problems",
        f"{args.tokens_per_micro_batch:,} tokens",
    )

    # Of the step under way: {position: (completions, answers, rewards)}, log π of the roll-outs, seconds by phase.
    groups, trainer_log_probs, seconds, calls = {}, {}, Counter(), Counter()

    def accept(mean_reward):
        """Batch balancing: a group that is all wrong or all right has no advantages."""
        return (mean_reward > 0) & (mean_reward < 1)

    def timed(phase, compute, *inputs):
        started = time.perf_counter()
        result = compute(*inputs)
        seconds[phase] += time.perf_counter() - started
        calls[phase] += 1
        return result

    def score(ids):
        """-> mean reward of each problem's roll-outs, sampled under the weights of this step."""
        chosen = [examples["train"][i] for i in ids]
        seeds = [common.seed_of(args.seed, "roll-outs", step, example.id) for example in chosen]
        prompts = [example.prompt_ids for example in chosen]
        found = timed("sampling", sampler.generate, prompts, args.rollouts, args.max_new_tokens, seeds)

        def rewards_of():
            read = [[common.read_answer(one.token_ids, tokenizer, args.template) for one in group] for group in found]
            golds = [rows["train"][example.id]["answer"] for example in chosen]
            right = grader.grade([(gold, answer) for gold, group in zip(golds, read, strict=True) for answer in group])
            return read, torch.tensor(right, dtype=torch.float64).view(len(found), -1)

        read, rewards = timed("grading", common.on_main, accelerator, rewards_of)
        groups.update({i: group for i, *group in zip(ids, found, read, rewards, strict=True)})
        return rewards.mean(1)

    def train(ids, room, count, chosen):
        """All of the step: adds the gradient of -1/count Σ 1/N' Σ_i Σ_t ratio · A_i over its problems `ids`."""
        rollouts = []  # (example, advantage)
        for i in ids:
            completions, _, rewards = groups[i]
            for one, advantage in zip(completions, (rewards - rewards.mean()).tolist(), strict=True):
                rollouts.append((common.Example(i, examples["train"][i].prompt_ids, one.token_ids), advantage))
        # Longest first: if memory does not suffice, it shows in the first micro-batch of the first step.
        order = sorted(range(len(rollouts)), key=lambda i: -len(rollouts[i][0]))
        while order:
            widest = max(len(rollouts[i][0].prompt_ids) for i in order)
            widest += max(len(rollouts[i][0].completion_ids) for i in order)
            part = order[: processes * max(1, min(args.tokens_that_fit, args.tokens_per_micro_batch) // widest)]
            order = order[len(part) :]
            share = common.split_evenly([rollouts[i][0] for i in part], accelerator)
            with accelerator.no_sync(model):
                mine = common.completion_log_probs(model, common.collate(share, pad_id, accelerator.device))
            log_probs = common.gather_in_order(mine, len(part), accelerator)
            if not log_probs.isfinite().all():
                stop(f"log π of a roll-out is {log_probs[~log_probs.isfinite()][0].item()}")
            # The share's last item may be a repetition, there for equal work only: it counts for nothing.
            advantages = torch.zeros_like(mine)
            own = [rollouts[i][1] for i in part][accelerator.process_index :: processes]
            advantages[: len(own)] = torch.tensor(own)
            # Gradients are averaged over the processes, hence the factor.
            loss = grpo_loss(mine, advantages) * processes / (count * args.rollouts)
            common.backward(accelerator, model, loss, last=not order)
            trainer_log_probs.update(zip(part, log_probs.tolist(), strict=True))

    def show(i):
        """One roll-out of a problem, right or wrong by turns of the steps, on the terminal."""
        completions, _, rewards = groups[i]
        wanted = step // args.show_every % 2 == 0
        one = next(one for one, reward in zip(completions, rewards, strict=True) if (reward == 1) == wanted)
        if accelerator.is_main_process:
            text = tokenizer.decode(examples["train"][i].prompt_ids[-200:] + one.token_ids)
            tqdm.write(f"--- step {step}, a {'right' if wanted else 'wrong'} roll-out\n{text}\n---")

    def stop(why):
        progress.close()
        common.refuse(
            f"step {step + 1}: {why}; stopped. Last checkpoint: {last_checkpoint}. A lower --lr or --clip may help"
        )

    refill = common.Refill(
        len(examples["train"]),
        args.batch_size,
        accept,
        args.seed,
        processes,
        args.batch_size,  # `train` gets all of a step at once, and cuts it by tokens
        backward_cost=None,  # roll-outs have to be sampled first: there is no training straight away
    )
    state = common.TrainingState(args, accelerator, refill)
    step, clipped, last_checkpoint = state.restore()
    # From here on, since the engines take over the weights as they are now.
    grader = common.Grader(min(os.cpu_count(), 8)) if accelerator.is_main_process else None
    sampler = common.spawn_engines(args, accelerator, tokenizer, longest, model)
    progress = tqdm(
        total=args.epochs * len(examples["train"]),
        unit="candidate",
        disable=not accelerator.is_local_main_process,
        mininterval=1,
    )
    for epoch in state.epochs():
        epoch_started = time.perf_counter()
        while args.max_steps is None or step < args.max_steps:
            step_started = time.perf_counter()
            lr = args.lr * min(1, (step + 1) / max(args.warmup_steps, 1))
            for group in optimizer.param_groups:
                group["lr"] = lr
            for measured in (groups, trainer_log_probs, seconds, calls):
                measured.clear()
            done = refill.next_step(score, train, None)
            if done is None:
                break
            grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), args.clip))
            if not math.isfinite(grad_norm):
                stop(f"the gradient's norm is {grad_norm}")
            optimizer.step()
            optimizer.zero_grad()
            timed("sync", sampler.update_weights, model)

            step, clipped = step + 1, clipped + (grad_norm > args.clip)
            seconds["all"] = time.perf_counter() - step_started
            seconds["training"] = 2 * seconds["all"] - seconds.total()
            seen = refill.order[refill.position - done.candidates : refill.position]
            drawn = [one for i in done.ids for one in groups[i][0]]
            sampled, ours = sum(len(one.token_ids) for one in drawn), sum(trainer_log_probs.values())
            theirs = None if drawn[0].log_prob is None else sum(one.log_prob for one in drawn)
            # The surrogate's value: each ratio is 1.
            loss = -sum(
                (groups[i][2] - groups[i][2].mean())
                @ torch.tensor([len(one.token_ids) for one in groups[i][0]]).double()
                for i in done.ids
            ).item() / (len(done.ids) * args.rollouts)
            answers = [answer for i in seen for answer in groups[i][1]]
            metrics = {
                "step": step,
                "epoch": epoch,
                "loss": loss,
                "accepted": len(done.ids),
                "candidates": done.candidates,
                "all_wrong": (done.values == 0).sum().item(),  # groups that were replaced
                "all_right": (done.values == 1).sum().item(),
                "reward": done.values.mean().item(),  # over all candidates, as is the format rate
                "format_rate": sum(answer is not None for answer in answers) / len(answers),
                "mean_length": sampled / len(drawn),
                "entropy": -ours / sampled,  # nats a token, estimated by the roll-outs' own log π
                "engine_to_trainer": None if theirs is None else theirs / ours,  # of log π: 1, or the weights are stale
                "lr": lr,
                "grad_norm": grad_norm,
                "clipped_share": clipped / step,
                "sampling_calls": calls["sampling"],
                **{f"seconds_{phase}": seconds[phase] for phase in ("sampling", "grading", "training", "sync")},
                "seconds": seconds["all"],
                "tokens_per_second": sampled / seconds["all"],
                "ids": [examples["train"][i].id for i in done.ids],
            }
            if accelerator.is_main_process:
                common.append_json(args.out / "metrics.jsonl", metrics)
            accelerator.log({name: value for name, value in metrics.items() if name != "ids"}, step=step)
            progress.set_postfix(
                reward=f"{metrics['reward']:.3f}",
                format=f"{metrics['format_rate']:.2f}",
                accept=f"{len(done.ids) / done.candidates:.2f}",
                sampling=f"{seconds['sampling'] / seconds['all']:.0%}",
                refresh=False,
            )
            if step % args.show_every == 1 or args.show_every == 1:
                show(done.ids[0])
            share_of_epoch = epoch - 1 + refill.position / len(refill.order)
            progress.update(round(share_of_epoch * len(examples["train"])) - progress.n)
            state.end_step(step, clipped, last_checkpoint)

        finished = refill.position == len(refill.order)
        state.end_epoch(step, clipped, last_checkpoint)
        last_checkpoint = args.out / (f"epoch-{epoch}" if finished else f"step-{step}")
        about = record | {"step": step, "epoch": epoch}
        common.save_checkpoint(accelerator, model, tokenizer, last_checkpoint, about)
        measured = {}
        if examples["test"]:
            golds = [rows["test"][example.id]["answer"] for example in examples["test"]]
            measured = common.sampled_summary(accelerator, sampler, tokenizer, grader, examples["test"], golds, args)
        common.end_epoch(args, accelerator, refill, step, epoch_started, measured)
        if not finished or step == args.max_steps:
            break
    progress.close()
    state.end_run()
    sampler.shut_down()
    if grader:
        grader.close()
    more = f" --n {max(args.eval_n, 256)}" + ("" if examples["test"] else " --data FOLDER")  # one with a test.jsonl
    accelerator.print(f"done. Measure and draw pass@N: python eval_passn.py {last_checkpoint}{more}")
    common.end(accelerator)


if __name__ == "__main__":
    main()
