"""Fine-tune a model on reasoning traces with approximate Direct Coverage Optimization, DCOa (§5.4, App. B).

    python train_cot_dcoa.py                                    # one process: without a GPU, the embedded model
    accelerate launch train_cot_dcoa.py                         # the 8 GPUs of a node, which vLLM shares
    accelerate launch --num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip HOST \\
        --main_process_port 29500 train_cot_dcoa.py             # two nodes, with RAY_ADDRESS as the README says

The probability p̂(y|x) of an answer is a sum over all traces that end in it, so the factor of Eq. 4 is taken at a
Monte-Carlo estimate of it. Over the problems x with golden traces c and answers y it descends along

    F(N', p̂) ∇(-log p̂(c, y|x)),   p̂ = share of N_MC sampled traces that end in the right answer

Problems with F < --factor-threshold are replaced by the next ones of the stream, so that each step averages over
--batch-size problems that matter. After each step the engines that sample get the new weights. --n-prime 1 is
cross-entropy on the same traces, without any sampling. In --out it writes args.json, metrics.jsonl (a line a step),
epochs.jsonl (a line an epoch, with pass@1/16/64 from samples), epoch-<k>/, for `eval_passn.py`, and engine-<i>.log.
"""

import argparse
import math
import os
import time
from collections import Counter
from pathlib import Path

# The settings of the embedded experiment, which take the place of the paper's when the model is one of examples/.
EXAMPLE_SETTINGS = {
    "epochs": 8,
    "batch_size": 32,
    "micro_batch_size": 32,
    "lr": 3e-3,
    "warmup_steps": 50,
    "betas": (0.9, 0.98),
    "weight_decay": 0.01,
    "nll": "mean",
    "max_new_tokens": 160,
    "n_mc": 16,
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
        "--template", default="cot", choices=["cot", "r1", "r1-short"], help="paper: cot; r1 to warm up for GRPO"
    )
    what.add_argument("--seed", type=int, default=0, help="order of the examples, samples, and weights from scratch")
    loss = parser.add_argument_group("the loss")
    loss.add_argument("--n-prime", type=float, default=64, help="N' (paper: 64; 1 = cross-entropy)")
    loss.add_argument(
        "--factor-threshold", type=float, default=0.01, help="replace problems with F below it (paper: 0.01)"
    )
    loss.add_argument("--n-mc", type=int, default=64, help="traces sampled a problem, to estimate p̂ (paper: 64)")
    loss.add_argument(
        "--unfiltered-steps",
        type=int,
        default=0,
        help="first steps that take F = 1 and do not sample (paper's code: 20)",
    )
    loss.add_argument("--nll", default="sum", choices=["sum", "mean"], help="over the trace's tokens (Eq. 4: sum)")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=int, default=1024, help="of a sampled trace (paper: 1,024)")
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
    how.add_argument("--batch-size", type=int, default=128, help="accepted problems a step, all processes (paper: 128)")
    how.add_argument("--micro-batch-size", type=int, default=4, help="traces a process computes at once")
    how.add_argument("--lr", type=float, default=2e-5, help="AdamW's, constant after the warm-up (paper: 2e-5)")
    how.add_argument("--warmup-steps", type=int, default=20, help="linear (paper: 20)")
    how.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95), help="AdamW's")
    how.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's")
    how.add_argument("--clip", type=float, default=1.0, help="largest norm of a step's gradient")
    how.add_argument("--zero", type=int, choices=[0, 2, 3], help="DeepSpeed ZeRO (default: 0, several GPUs 2 or 3)")
    how.add_argument("--offload", action="store_true", help="with ZeRO-3: optimizer states in the main memory")
    how.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more computing")
    where = parser.add_argument_group("what is written")
    where.add_argument("--out", type=Path, help="default: runs/cot-n<N'>")
    where.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    where.add_argument("--resume", action="store_true", help="go on with the run that --out holds, if it holds one")
    where.add_argument("--save-every", type=int, default=20, help="steps from a state for --resume to the next")
    where.add_argument("--grace", type=float, default=20, help="seconds that a step may take after SIGTERM or Ctrl-C")
    where.add_argument("--patience", type=float, default=60, help="minutes to wait for other processes or an engine")
    where.add_argument("--dry-run", nargs="?", const="here", metavar="8x80", help="say what it would take, and stop")
    where.add_argument("--report-to", default="none", choices=["none", "tensorboard", "wandb"])
    parser.set_defaults(**settings or {})
    args = parser.parse_args(argv)
    if not 1 <= args.n_prime < math.inf:
        parser.error(f"--n-prime must be a number from 1 up, not {args.n_prime}")
    if not 0 <= args.factor_threshold < 1:
        parser.error(f"--factor-threshold is a value of F and must lie in [0, 1), not {args.factor_threshold}")
    positive = ("epochs", "max_steps", "batch_size", "micro_batch_size", "lr", "clip", "save_every", "patience")
    for name in (*positive, "n_mc", "max_new_tokens", "gpu_memory", "gpus_per_engine", "eval_n"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    if not all(0 <= beta < 1 for beta in args.betas) or args.weight_decay < 0:
        parser.error(f"--betas must lie in [0, 1) and --weight-decay be 0 or more: {args.betas}, {args.weight_decay}")
    if min(args.unfiltered_steps, args.eval_problems or 0) < 0 or args.gpu_memory >= 1:
        parser.error("--unfiltered-steps and --eval-problems must be 0 or more, and --gpu-memory under 1")
    args.out = args.out or Path(f"runs/cot-n{args.n_prime:.15g}")
    return args


def plug_in_bias(p, n_prime, n_mc):
    """How much F(N', p̂) is off on average: E[F(N', k/n_mc)] - F(N', p), k binomial. p: float64 [M] -> [M].

    F is convex where p matters, so the bias is upwards for every N_MC. At p̂ in place of the unknown p, an estimate."""
    import torch

    import common

    p, k = p.unsqueeze(-1), torch.arange(n_mc + 1, dtype=torch.float64)
    ways = math.lgamma(n_mc + 1) - torch.lgamma(k + 1) - torch.lgamma(n_mc - k + 1)
    chances = (ways + torch.xlogy(k, p) + torch.special.xlog1py(n_mc - k, -p)).exp()  # [M, n_mc + 1]
    expected = (chances * common.dco_factor((k / n_mc).log(), n_prime)).sum(-1)
    return expected - common.dco_factor(p.squeeze(-1).log(), n_prime)


def main(argv=None):
    args = parse_arguments(argv)

    import torch  # the heavy imports come after the arguments, so that --help and a typo are answered at once
    from tqdm import tqdm

    import common

    model_name, data_name = common.defaults_for_this_machine(args.model, args.data)
    if common.is_example(model_name):
        args = parse_arguments(argv, EXAMPLE_SETTINGS)
    args.model, args.data = model_name, data_name

    # Whatever can be refused is refused here, before any weights are loaded.
    common.check_out(args)
    args.engine = common.choose_engine(args.engine)
    rows = {"train": common.load_problems(args.data, "train"), "test": common.load_problems(args.data, "test", False)}
    tokenizer = common.load_tokenizer(args.model)
    max_length = common.longest_context(args.model)
    examples, dropped = {}, {}
    for split in rows:
        # A test problem is there to be sampled, not to be trained on: it needs no solution.
        of_split = rows[split] if split == "train" else [row | {"solution": "-"} for row in rows[split]]
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
    common.plan_memory(args, examples["train"], args.epochs, engine=share_of_engine)
    lengths = [(len(example.prompt_ids), len(example.completion_ids)) for example in examples["train"]]
    common.check_resume(args, examples["train"])
    how = (args.zero, args.clip, args.micro_batch_size, args.patience, args.offload)
    accelerator = common.make_accelerator(args.report_to, args.out, *how)
    processes, pad_id = accelerator.num_processes, common.pad_token_id(tokenizer)

    model, optimizer, about_model = common.prepare_training(args, tokenizer, accelerator)

    # What a checkpoint has to say about itself, for evaluation.
    record = {
        "template": args.template,
        "max_new_tokens": args.max_new_tokens,
        "n_prime": args.n_prime,
        "data": os.path.abspath(args.data) if os.path.exists(args.data) else args.data,
        "base": common.base_of(args.model),
    }

    loss_name = "cross-entropy on traces, nothing sampled for it"
    if args.n_prime > 1:
        loss_name = f"DCOa with N' = {args.n_prime:g}, F >= {args.factor_threshold}, N_MC = {args.n_mc}"
    common.begin_run(
        args,
        accelerator,
        f"{loss_name}, NLL {args.nll} over the tokens",
        about_model,
        f"{len(examples['train']):,} to train on (dropped: {dropped['train'] or 'none'}), "
        f"{len(examples['test']):,} to test (dropped: {dropped['test'] or 'none'}), template {args.template}\n"
        f"  samples by {args.engine}, of up to {args.max_new_tokens} tokens; {args.eval_n} of each test problem",
        f"{args.batch_size} accepted problems",
        f"{args.micro_batch_size}",
    )

    # Of the step under way: {position: p̂}, [log p̂(c, y|x)], [parts of the loss], seconds and calls by phase.
    estimates, trace_log_probs, losses, seconds, calls = {}, [], [], Counter(), Counter()

    def accept(p_hat):
        return common.dco_factor(p_hat.log(), args.n_prime) >= args.factor_threshold

    def timed(phase, compute, *inputs):
        started = time.perf_counter()
        result = compute(*inputs)
        seconds[phase] += time.perf_counter() - started
        calls[phase] += 1
        return result

    def score(ids):
        """-> p̂ of each candidate, from N_MC samples under the weights of this step."""
        chosen = [examples["train"][i] for i in ids]
        seeds = [common.seed_of(args.seed, "p̂", step, example.id) for example in chosen]
        prompts = [example.prompt_ids for example in chosen]
        found = timed("sampling", sampler.generate, prompts, args.n_mc, args.max_new_tokens, seeds)

        def count_right():
            answers = [common.count_answers(completions, tokenizer, args.template) for completions in found]
            return grader.count_right([rows["train"][example.id]["answer"] for example in chosen], answers)

        right = timed("grading", common.on_main, accelerator, count_right)
        p_hat = torch.tensor(right, dtype=torch.float64) / args.n_mc
        estimates.update(zip(ids, p_hat.tolist(), strict=True))
        return p_hat

    def train(ids, room, count, chosen):
        """One micro-batch a process: adds the gradient of 1/count Σ F(N', p̂) · NLL of the golden traces."""
        share = common.split_evenly([examples["train"][i] for i in ids], accelerator)
        with accelerator.no_sync(model):
            mine = common.completion_log_probs(model, common.collate(share, pad_id, accelerator.device))
        log_p = common.gather_in_order(mine, len(ids), accelerator)
        if not log_p.isfinite().all():
            stop(f"log p of a trace is {log_p[~log_p.isfinite()][0].item()}")
        # Without an estimate (cross-entropy, the unfiltered steps) F = 1, as for p̂ = 0.
        p_hat = torch.tensor([estimates.get(i, 0.0) for i in ids], device=mine.device)
        weight = common.dco_factor(p_hat.log(), args.n_prime)
        if args.nll == "mean":
            weight = weight / torch.tensor(
                [len(examples["train"][i].completion_ids) for i in ids], device=weight.device
            )
        # The share's last item may be a repetition, there for equal work only: it counts for nothing.
        share = torch.zeros_like(mine)
        own = weight[accelerator.process_index :: processes]
        share[: len(own)] = own
        # Gradients are averaged over the processes, hence the factor.
        loss = (share * -mine).sum() * processes / count
        common.backward(accelerator, model, loss, last=len(ids) == room)
        trace_log_probs.append(log_p.detach())
        losses.append((weight * -log_p.detach()).sum().item() / count)
        return log_p

    def stop(why):
        progress.close()
        common.refuse(
            f"step {step + 1}: {why}; stopped. Last checkpoint: {last_checkpoint}. A lower --lr or --clip may help"
        )

    refill = common.Refill(
        len(examples["train"]),
        args.batch_size,
        None,
        args.seed,
        processes,
        args.micro_batch_size,
        backward_cost=None,  # p̂ comes from sampling: there is no training straight away
        lengths=lengths,
        tokens=args.tokens_that_fit,
    )
    state = common.TrainingState(args, accelerator, refill)
    step, clipped, last_checkpoint = state.restore()
    # From here on, since the engines take over the weights as they are now.
    grader = common.Grader(min(os.cpu_count(), 8)) if accelerator.is_main_process else None
    sampler = None
    if args.n_prime > 1 or examples["test"]:
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
            filtered = args.n_prime > 1 and step >= args.unfiltered_steps
            refill.accept = accept if filtered else None
            for measured in (estimates, trace_log_probs, losses, seconds, calls):
                measured.clear()
            done = refill.next_step(score, train, None)
            if done is None:
                break
            grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), args.clip))
            if not math.isfinite(grad_norm):
                stop(f"the gradient's norm is {grad_norm}")
            optimizer.step()
            optimizer.zero_grad()
            if args.n_prime > 1:
                timed("sync", sampler.update_weights, model)

            step, clipped = step + 1, clipped + (grad_norm > args.clip)
            seconds["all"] = time.perf_counter() - step_started
            seconds["training"] = 2 * seconds["all"] - seconds.total()
            seen = refill.order[refill.position - done.candidates : refill.position]
            metrics = {
                "step": step,
                "epoch": epoch,
                "loss": sum(losses),  # mean of F · NLL over the accepted
                "accepted": len(done.ids),
                "candidates": done.candidates,
                "discarded": done.candidates - len(done.ids),  # Figure 4
                "mean_ce": -torch.cat(trace_log_probs).mean().item(),  # of the accepted traces
                "lr": lr,
                "grad_norm": grad_norm,
                "clipped_share": clipped / step,
                "sampling_calls": calls["sampling"],
                **{f"seconds_{phase}": seconds[phase] for phase in ("sampling", "grading", "training", "sync")},
                "seconds": seconds["all"],
                "tokens_per_second": sum(len(examples["train"][i]) for i in seen) / seconds["all"],
                "ids": [examples["train"][i].id for i in done.ids],
            }
            if refill.accept:
                p_hat = done.values
                metrics |= {
                    "mean_factor": common.dco_factor(p_hat.log(), args.n_prime).mean().item(),
                    "mean_p": p_hat.mean().item(),
                    # Of mean_p with the problems fixed, from sampling alone; and by how much mean_factor is too large.
                    "mean_p_error": (p_hat * (1 - p_hat) / max(args.n_mc - 1, 1)).sum().sqrt().item() / len(p_hat),
                    "plug_in_bias": plug_in_bias(p_hat, args.n_prime, args.n_mc).mean().item(),
                }
            if accelerator.is_main_process:
                common.append_json(args.out / "metrics.jsonl", metrics)
            accelerator.log({name: value for name, value in metrics.items() if name != "ids"}, step=step)
            progress.set_postfix(
                loss=f"{sum(losses):.3f}",
                accept=f"{len(done.ids) / done.candidates:.2f}",
                p=f"{metrics.get('mean_p', math.nan):.3f}",
                sampling=f"{seconds['sampling'] / seconds['all']:.0%}",
                refresh=False,
            )
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
            if args.n_prime == 1:
                sampler.update_weights(model)
            golds = [rows["test"][example.id]["answer"] for example in examples["test"]]
            measured = common.sampled_summary(accelerator, sampler, tokenizer, grader, examples["test"], golds, args)
        common.end_epoch(args, accelerator, refill, step, epoch_started, measured)
        if not finished or step == args.max_steps:
            break
    progress.close()
    state.end_run()
    if sampler:
        sampler.shut_down()
    if grader:
        grader.close()
    more = f" --n {max(args.eval_n, 256)}" + ("" if examples["test"] else " --data FOLDER")  # one with a test.jsonl
    accelerator.print(f"done. Measure and draw pass@N: python eval_passn.py {last_checkpoint}{more}")
    common.end(accelerator)


if __name__ == "__main__":
    main()
