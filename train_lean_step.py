"""Fine-tune a model on (proof state, tactic) pairs with step-wise Direct Coverage Optimization (§5.3, App. B).

    python train_lean_step.py --n-eff 8                         # one process: without a GPU, the embedded model
    accelerate launch train_lean_step.py --n-eff 8              # the 8 GPUs of a node
    accelerate launch --num_machines 2 --num_processes 16 --machine_rank 0 --main_process_ip HOST \\
        --main_process_port 29500 train_lean_step.py --n-eff 8  # two nodes; --machine_rank 1 on the second one

It minimises, over the steps i of the traced proofs, from proof state x[i] by tactic y[i],

    ℓ_DCO^N_eff(x[i], y[i]) = -log(1 - (1 - p)^N_eff),   p = p̂(y[i]|x[i]),   with gradient   F(N_eff, p) ∇(-log p)

so that no tactic becomes much likelier than 1/N_eff: about the width of the search tree. --n-eff 1 is cross-entropy. A
step with F < --factor-threshold is replaced by the next one of the stream. --level proof is the naive form, for a whole
proof: F(N', Π_i p̂(y[i]|x[i])) times the proof's Σ_i -log p̂(y[i]|x[i]). In --out it writes args.json, metrics.jsonl (a
line a step), epochs.jsonl (a line an epoch) and epoch-<k>/, an ordinary Hugging Face checkpoint, for `prove.py`.
"""

import argparse
import math
import os
import statistics
import time
from collections import Counter
from pathlib import Path

# The settings of the embedded experiment, which take the place of the paper's when the model is one of examples/.
# Its models start from random weights and are small: they want a larger rate, more epochs and a smaller batch.
EXAMPLE_SETTINGS = {
    "epochs": 28,
    "batch_size": 16,
    "micro_batch_size": 16,
    "lr": 1e-3,
}


PAPERS = "Qwen/Qwen2.5-Math-1.5B", "leandojo_benchmark_4/random"  # --model and --data, where there is a GPU
EMBEDDED = "tiny_prover", "propositional"  # where there is none


def parse_arguments(argv=None, settings=None):
    """argparse and the checks that need nothing but the arguments. settings: defaults in place of the paper's."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--flag VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what is trained on what")
    what.add_argument("--model", help="folder or hub name (paper: Qwen/Qwen2.5-Math-1.5B)")
    what.add_argument(
        "--data", help="folder of LeanDojo Benchmark 4 (paper: its random split), or lines of state, tactic"
    )
    what.add_argument("--extra", type=Path, nargs="+", default=[], help="proofs that prove.py has found")
    what.add_argument("--max-length", type=int, default=2048, help="tokens of a state and its tactic; longer: dropped")
    what.add_argument("--seed", type=int, default=0, help="order of the examples, and weights made from scratch")
    loss = parser.add_argument_group("the loss")
    loss.add_argument("--n-eff", type=float, default=8, help="of a step (paper: 1 = cross-entropy, 4, 8, 16, 32)")
    loss.add_argument("--level", default="step", choices=["step", "proof"], help="what F is of (paper: step)")
    loss.add_argument("--n-prime", type=float, help="N' of a whole proof, with --level proof (paper: 4096)")
    loss.add_argument(
        "--factor-threshold", type=float, default=0.3, help="replace examples with F below it (paper: 0.3)"
    )
    loss.add_argument("--nll", default="sum", choices=["sum", "mean"], help="over a tactic's tokens (Eq. 4: sum)")
    how = parser.add_argument_group("optimization")
    how.add_argument("--epochs", type=int, default=3, help="passes over the data (paper: 3)")
    how.add_argument("--max-steps", type=int, help="stop after this many steps")
    how.add_argument("--batch-size", type=int, default=64, help="accepted examples a step, all processes (paper: 64)")
    how.add_argument("--micro-batch-size", type=int, default=8, help="examples a process computes at once")
    how.add_argument("--lr", type=float, default=1e-5, help="AdamW's, constant after the warm-up (paper: 1e-5)")
    how.add_argument("--warmup-steps", type=int, default=20, help="linear (paper: 20)")
    how.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.95), help="AdamW's")
    how.add_argument("--weight-decay", type=float, default=0.0, help="AdamW's")
    how.add_argument("--clip", type=float, default=1.0, help="largest norm of a step's gradient")
    how.add_argument("--zero", type=int, choices=[0, 2, 3], help="DeepSpeed ZeRO (default: 0, several GPUs 2 or 3)")
    how.add_argument("--offload", action="store_true", help="with ZeRO-3: optimizer states in the main memory")
    how.add_argument("--gradient-checkpointing", action="store_true", help="less memory, a third more computing")
    where = parser.add_argument_group("what is written")
    where.add_argument("--out", type=Path, help="default: runs/lean-neff<N_eff>, runs/lean-proof-n<N'>")
    where.add_argument("--overwrite", action="store_true", help="replace the run that --out holds")
    where.add_argument("--resume", action="store_true", help="go on with the run that --out holds, if it holds one")
    where.add_argument("--save-every", type=int, default=100, help="steps from a state for --resume to the next")
    where.add_argument("--grace", type=float, default=20, help="seconds that a step may take after SIGTERM or Ctrl-C")
    where.add_argument("--patience", type=float, default=60, help="minutes to wait for other processes or an engine")
    where.add_argument("--dry-run", nargs="?", const="here", metavar="8x80", help="say what it would take, and stop")
    where.add_argument("--report-to", default="none", choices=["none", "tensorboard", "wandb"])
    where.add_argument(
        "--checkpoint-at",
        type=float,
        nargs="+",
        default=[],
        metavar="SHARE",
        help="also save at these shares of the first epoch, with the ids seen by then (Figure 5: 0.11 0.86)",
    )
    where.add_argument("--eval-steps", type=int, default=500, help="steps of val.json to measure p on, each epoch")
    parser.set_defaults(**settings or {})
    args = parser.parse_args(argv)
    if (args.level == "proof") != (args.n_prime is not None):
        parser.error("--level proof and --n-prime (paper: 4096) go together; a step has --n-eff")
    args.n_prime = args.n_eff if args.level == "step" else args.n_prime
    if not 1 <= args.n_prime < math.inf:
        parser.error(f"--n-eff and --n-prime must be numbers from 1 up, not {args.n_prime}")
    if not 0 <= args.factor_threshold < 1:
        parser.error(f"--factor-threshold is a value of F and must lie in [0, 1), not {args.factor_threshold}")
    positive = ("epochs", "max_steps", "batch_size", "micro_batch_size", "lr", "clip", "save_every", "patience")
    for name in (*positive, "max_length"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    if not all(0 < share < 1 for share in args.checkpoint_at):
        parser.error(f"--checkpoint-at takes shares of the first epoch, in (0, 1), not {args.checkpoint_at}")
    if not all(0 <= beta < 1 for beta in args.betas) or args.weight_decay < 0:
        parser.error(f"--betas must lie in [0, 1) and --weight-decay be 0 or more: {args.betas}, {args.weight_decay}")
    name = "lean-neff" if args.level == "step" else "lean-proof-n"
    args.out = args.out or Path(f"runs/{name}{args.n_prime:.15g}")
    return args


def load_steps(path: Path, first_id: int = 0) -> list[dict]:
    """The steps of LeanDojo's theorems, or of JSON lines of state, tactic and perhaps proof (what its steps share).
    -> rows {"id", "source", "proof", "problem": the proof state, "answer": the tactic}."""
    import common

    lines = list(common.read_json_lines(path)) if path.suffix == ".jsonl" and path.is_file() else []
    if not lines or "full_name" in lines[0][1]:  # theorems
        lines = [
            (theorem["source"], {"state": step["state_before"], "tactic": step["tactic"], "proof": i})
            for i, theorem in enumerate(common.load_theorems(path))
            for step in theorem.get("traced_tactics", [])
        ]
    rows = []
    for source, line in lines:
        for field in ("state", "tactic"):
            if not isinstance(line.get(field), str) or not line[field].strip():
                common.refuse(f"{source}: field {field!r} is missing or empty; a step is a state and its tactic")
        if not isinstance(line.get("proof", source), str | int):
            common.refuse(f"{source}: field 'proof' must be a text or a whole number that the proof's steps share")
        proof = (str(path), line.get("proof", source))
        row = {"id": first_id + len(rows), "source": source, "proof": proof}
        rows.append(row | {"problem": line["state"], "answer": line["tactic"]})
    return rows


def main(argv=None):
    args = parse_arguments(argv)

    import torch  # the heavy imports come after the arguments, so that --help and a typo are answered at once
    from tqdm import tqdm

    import common

    model_name, data_name = common.defaults_for_this_machine(args.model, args.data, PAPERS, EMBEDDED)
    if common.is_example(model_name):
        args = parse_arguments(argv, EXAMPLE_SETTINGS)
    args.model, args.data = model_name, data_name

    # Whatever can be refused is refused here, before any weights are loaded.
    common.check_out(args)
    folder, rows = Path(args.data), {"train": [], "test": []}
    val = folder / "val.json" if folder.is_dir() else folder.with_name("val.json")
    for path in [folder / "train.json" if folder.is_dir() else folder, *args.extra]:
        rows["train"] += load_steps(path, len(rows["train"]))
    rows["test"] = load_steps(val)[: args.eval_steps] if val.is_file() and val != folder else []
    tokenizer = common.load_tokenizer(args.model)
    max_length = min(args.max_length, common.longest_context(args.model))
    examples, dropped = {}, {}
    for split in rows:
        examples[split], dropped[split] = common.encode(rows[split], tokenizer, "lean", max_length)
    # Candidates: the steps, each a list of its own; or the proofs, of which one that lost a step is dropped whole.
    kept, wholes = {example.id: i for i, example in enumerate(examples["train"])}, {}
    for row in rows["train"]:
        wholes.setdefault(row["proof"] if args.level == "proof" else row["id"], []).append(kept.get(row["id"]))
    candidates = [steps for steps in wholes.values() if None not in steps]
    if args.level == "proof" and len(candidates) < len(wholes):
        dropped["train"]["proofs that lost a step"] = len(wholes) - len(candidates)
    if not candidates:
        common.refuse(f"--data {args.data}: no step is left; dropped: {dropped['train']} (of {max_length} positions)")
    common.plan_memory(args, examples["train"], args.epochs + len(args.checkpoint_at), scored=4)
    lengths = [(len(example.prompt_ids), len(example.completion_ids)) for example in examples["train"]]
    common.check_resume(args, examples["train"])
    how = (args.zero, args.clip, args.micro_batch_size, args.patience, args.offload)
    accelerator = common.make_accelerator(args.report_to, args.out, *how)
    processes, pad_id = accelerator.num_processes, common.pad_token_id(tokenizer)

    model, optimizer, about_model = common.prepare_training(args, tokenizer, accelerator)

    # What a checkpoint has to say about itself, for evaluation: the longest answer of the data fits into a sample.
    max_new_tokens = min(256, max(len(example.completion_ids) for part in examples.values() for example in part))
    record = {
        "template": "lean",
        "max_new_tokens": max_new_tokens,
        "max_length": max_length,
        "n_prime": args.n_prime,
        "data": os.path.abspath(args.data) if os.path.exists(args.data) else args.data,
        "base": common.base_of(args.model),
    }

    of_proofs = [*Counter(row["proof"] for row in rows["train"]).values()]  # LeanDojo's: 4.2 on average, median 2
    unit, n_name = args.level, "N_eff" if args.level == "step" else "whole proofs, N'"
    loss_name = (
        "cross-entropy" if args.n_prime == 1 else f"DCO with {n_name} = {args.n_prime:g}, F >= {args.factor_threshold}"
    )
    common.begin_run(
        args,
        accelerator,
        f"{loss_name}, NLL {args.nll} over the tokens",
        about_model,
        f"{len(candidates):,} {unit}s to train on (dropped: {dropped['train'] or 'none'}), in proofs of "
        f"{statistics.mean(of_proofs):.1f} steps on average, median {statistics.median(of_proofs):g}; "
        f"{len(examples['test']):,} steps to test (dropped: {dropped['test'] or 'none'})",
        f"{args.batch_size} accepted {unit}s",
        f"{args.micro_batch_size}",
    )

    def accept(values):
        return values[:, 1] >= args.factor_threshold

    def with_factor(log_p):
        return torch.stack([log_p, common.dco_factor(log_p, args.n_prime)], 1)

    def log_probs(ids):
        """-> log p of this process's share of the examples, with the graph; log p and F of all, in stream order."""
        share = common.split_evenly([examples["train"][i] for i in ids], accelerator)
        mine = common.completion_log_probs(model, common.collate(share, pad_id, accelerator.device))
        log_p = common.gather_in_order(mine, len(ids), accelerator)
        if not log_p.isfinite().all():  # F of a NaN is below no threshold: the run would go on without any step
            stop(f"log p of a candidate is {log_p[~log_p.isfinite()][0].item()}")
        return mine, with_factor(log_p)  # [share], [n, 2]

    def stop(why):
        progress.close()
        common.refuse(
            f"step {step + 1}: {why}; stopped. Last checkpoint: {last_checkpoint}. A lower --lr or --clip may help"
        )

    def score(ids):
        with torch.no_grad():
            return log_probs(ids)[1]

    def train(ids, room, count, chosen, factor=None, last=None):
        """One micro-batch a process: adds the gradient of 1/count Σ F(N', p) · NLL, over `ids` if they are chosen
        already, else over the first `room` of them that are accepted. factor: F where it is that of whole proofs."""
        with accelerator.no_sync(model):
            mine, values = log_probs(ids)
        used = torch.ones(len(ids), dtype=torch.bool, device=mine.device) if chosen else accept(values)
        used &= used.cumsum(0) <= room
        if used.any():
            weight = (values[:, 1] if factor is None else factor) * used
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
            common.backward(accelerator, model, loss, last=bool(used.sum() == room) if last is None else last)
        return values

    scored = {}  # log p of whole proofs, under this step's weights

    def steps_of(proofs, together):
        """The proofs' steps, `together` micro-batches a process at once: (places of their proofs [n], ids [n])."""
        places, steps = zip(*((k, i) for k, proof in enumerate(proofs) for i in candidates[proof]), strict=True)
        rounds, start = [], 0
        while start < len(steps):
            ids = list(steps[start : start + together * args.micro_batch_size * processes])
            ids = common.that_fit(ids, lengths, together * args.tokens_that_fit, processes)
            rounds.append((places[start : start + len(ids)], ids))
            start += len(ids)
        return rounds

    def score_proofs(proofs):
        """-> log p (Σ over its steps) and F of whole proofs. F is of the whole, so this comes before any gradient."""
        log_p = torch.zeros(len(proofs), device=accelerator.device)
        for places, ids in steps_of(proofs, 4):
            log_p.index_add_(0, torch.tensor(places, device=log_p.device), score(ids)[:, 0])
        scored.update(zip(proofs, log_p, strict=True))
        return with_factor(log_p)

    def train_proofs(proofs, room, count, chosen):
        """As `train`, for chosen proofs: 1/count Σ F(N', Π p) · Σ NLL over the steps, with the F of scoring."""
        log_p = torch.zeros(len(proofs), device=accelerator.device)
        if args.n_prime > 1:  # F of cross-entropy is 1, whatever p
            log_p = torch.stack([scored[proof] for proof in proofs]) if refill.accept else score_proofs(proofs)[:, 0]
        factor, rounds = common.dco_factor(log_p, args.n_prime), steps_of(proofs, 1)
        found = torch.zeros_like(log_p)
        for k, (places, ids) in enumerate(rounds, 1):
            last, places = k == len(rounds) and len(proofs) == room, torch.tensor(places, device=factor.device)
            found.index_add_(0, places, train(ids, len(ids), count, True, factor[places], last)[:, 0])
        return with_factor(found)

    refill = common.Refill(
        len(candidates),
        args.batch_size,
        accept if args.n_prime > 1 and args.factor_threshold > 0 else None,  # F is never under 0, nor CE's under 1
        args.seed,
        processes,
        args.micro_batch_size,
        backward_cost=math.inf if unit == "proof" else 4 if args.gradient_checkpointing else 3,
        lengths=lengths if unit == "step" else None,
        tokens=args.tokens_that_fit,
    )
    state = common.TrainingState(args, accelerator, refill)
    step, clipped, last_checkpoint = state.restore()
    checkpoint_at = [share for share in sorted(args.checkpoint_at) if refill.position < share * len(candidates)]

    def save(name, **more):
        nonlocal last_checkpoint
        last_checkpoint = args.out / name
        common.save_checkpoint(accelerator, model, tokenizer, last_checkpoint, record | {"step": step} | more)

    def save_shares_of_first_epoch():
        while refill.epoch == 1 and checkpoint_at and refill.position >= checkpoint_at[0] * len(refill.order):
            seen_ids = [examples["train"][i].id for k in refill.order[: refill.position] for i in candidates[k]]
            save(f"epoch-{checkpoint_at.pop(0):g}", epoch=1, seen_ids=seen_ids)

    progress = tqdm(
        total=args.epochs * len(candidates),
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
            how = (score_proofs, train_proofs) if unit == "proof" else (score, train)
            done = refill.next_step(*how, lambda: common.discard_gradients(accelerator, optimizer))
            if done is None:
                break
            grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), args.clip))
            log_p, factor = done.values.T.contiguous()
            used = accept(done.values) if refill.accept else torch.ones_like(log_p, dtype=torch.bool)
            loss = common.dco_loss(log_p[used], args.n_prime).mean().item()
            if not math.isfinite(grad_norm):
                stop(f"the gradient's norm is {grad_norm} at a loss of {loss}")
            optimizer.step()
            optimizer.zero_grad()

            step, clipped = step + 1, clipped + (grad_norm > args.clip)
            seconds = time.perf_counter() - step_started
            seen = refill.order[refill.position - done.candidates : refill.position]
            metrics = {
                "step": step,
                "epoch": epoch,
                "loss": loss,
                "accepted": len(done.ids),
                "candidates": done.candidates,
                "mean_factor": factor.mean().item(),
                "mean_p": log_p.exp().mean().item(),
                "mean_ce": -log_p.mean().item(),
                "lr": lr,
                "grad_norm": grad_norm,
                "clipped_share": clipped / step,
                "seconds": seconds,
                "tokens_per_second": sum(len(examples["train"][i]) for k in seen for i in candidates[k]) / seconds,
                "ids": [examples["train"][candidates[k][0]].id for k in done.ids],  # of a proof, its first step
            }
            if accelerator.is_main_process:
                common.append_json(args.out / "metrics.jsonl", metrics)
            accelerator.log({name: value for name, value in metrics.items() if name != "ids"}, step=step)
            progress.set_postfix(
                loss=f"{loss:.3f}",
                accept=f"{len(done.ids) / done.candidates:.2f}",
                F=f"{metrics['mean_factor']:.2f}",
                refresh=False,
            )
            share_of_epoch = epoch - 1 + refill.position / len(refill.order)
            progress.update(round(share_of_epoch * len(candidates)) - progress.n)
            save_shares_of_first_epoch()
            state.end_step(step, clipped, last_checkpoint)

        finished = refill.position == len(refill.order)
        save_shares_of_first_epoch()
        state.end_epoch(step, clipped, last_checkpoint)
        save(f"epoch-{epoch}" if finished else f"step-{step}", epoch=epoch)
        measured = {}
        if examples["test"]:
            how = (accelerator, max_new_tokens, 8 * args.micro_batch_size, (1, 4, 16, 64))
            measured = common.exact_summary(model, tokenizer, examples["test"], *how)
        common.end_epoch(args, accelerator, refill, step, epoch_started, measured)
        if not finished or step == args.max_steps:
            break
    progress.close()
    state.end_run()
    accelerator.print(f"done. Prove theorems with it: python prove.py --model {last_checkpoint}")
    common.end(accelerator)


if __name__ == "__main__":
    main()
