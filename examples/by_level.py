"""Confidence, F and the use of unseen data by level of difficulty (Figures 5 and 13, App. C).

    python train_direct.py --n-prime 1 --checkpoint-at 0.11 0.86
    python examples/by_level.py runs/direct-n1/epoch-0.11 runs/direct-n1/epoch-0.86

Writes figure-5 and figure-13, as .json and .png, to the folder that holds the checkpoints. Both are
of training data that a checkpoint within the first epoch has not seen:

    Figure 5     the derivative of the test loss along a step of cross-entropy on data of a level
    Figure 13    p(y|x) and F(N, p)
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import common
import eval_passn


def unseen_by_level(args):
    """For each checkpoint within the first epoch, yield (title, accelerator, model, {level:
    training examples that it has not seen}, test examples)."""
    accelerator = common.make_accelerator()
    for checkpoint in args.checkpoints:
        record = eval_passn.read_record(checkpoint, args)
        if "seen_ids" not in record:
            common.fail(f"{checkpoint} was not saved by train_direct.py --checkpoint-at")
        tokenizer, seen = common.load_tokenizer(checkpoint), set(record["seen_ids"])
        settings = tokenizer, common.load_config(checkpoint), "direct", record["prompt"]
        rows = common.load_problems(record["data"], "train")
        train, _ = common.encode(rows, *settings)
        test, _ = common.encode(common.load_problems(record["data"], "test"), *settings)
        levels = {}
        for example in sorted(train, key=lambda example: rows[example.id]["level"]):
            if example.id not in seen:
                levels.setdefault(rows[example.id]["level"], []).append(example)
        title = f"{Path(checkpoint).name}, {len(seen):,} of {len(rows):,} seen"
        yield title, accelerator, eval_passn.load(checkpoint, tokenizer, accelerator), levels, test


def level_panel(title, ylabel, points, **axes):
    """points: [(level, middle, low, high)]."""
    axes |= {"title": title, "xlabel": "difficulty level", "ylabel": ylabel}
    return {"axes": axes | {"xticks": [point[0] for point in points]}, "curves": {"": points}}


def gradient(model, examples, n, tokens):
    """Return the gradient of Σ ℓ_DCO^n over the examples: a tensor for each parameter."""
    model.zero_grad()  # the tensors returned before stay as they are
    for ids in common.make_rounds(range(len(examples)), lambda i: len(examples[i]), 1, tokens):
        log_p = common.log_probs(model, [examples[i] for i in ids])
        common.dco_loss(log_p, n).sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def along_step(test_gradient, model, batch, tokens):
    """Return the derivative of the test loss along a step of cross-entropy, g = -Σ ∇ℓ_CE."""
    step = gradient(model, batch, 1, tokens)
    products = [(a.float() * b.float()).sum() for a, b in zip(test_gradient, step, strict=True)]
    return -sum(products).item()


def figure_5(args, n=256):
    """∇_g of the test loss Σ ℓ_DCO^n along steps of cross-entropy on unseen data, by level. Where
    it is below 0, such data lower the test loss. Per example; mean ± deviation over batches."""
    panels, tokens = [], args.micro_batch_tokens
    for title, _, model, levels, test in unseen_by_level(args):
        test_gradient, points = gradient(model, test, n, tokens), []
        size = max(1, min(64, min(map(len, levels.values())) // 4))  # four batches or more
        for level, unseen in levels.items():
            starts = range(0, len(unseen) - size + 1, size)[:16]
            batches = [unseen[start : start + size] for start in starts]
            found = [along_step(test_gradient, model, batch, tokens) / size for batch in batches]
            mean, deviation = float(np.mean(found)), float(np.std(found))
            points.append((level, mean, mean - deviation, mean + deviation))
        ylabel = rf"$\nabla_g$ of the test loss, N = {n}"
        panels.append(level_panel(f"{title},\nbatches of {size}", ylabel, points))
    return panels


def figure_13(args, n=256):
    """Confidence and F by level on unseen training data: the median and the quartiles."""
    panels = []
    for title, accelerator, model, levels, _ in unseen_by_level(args):
        p, factor = [], []
        for level, unseen in levels.items():
            log_p = common.score(accelerator, model, unseen, args.micro_batch_tokens).cpu()
            for points, values in ((p, log_p.exp()), (factor, common.dco_factor(log_p, n))):
                points.append((level, *np.quantile(values, [0.5, 0.25, 0.75]).tolist()))
        panels.append(level_panel(title, "p(y|x), quartiles", p, yscale="log"))
        panels.append(level_panel(title, f"F({n}, p), quartiles", factor, ylim=(0, 1.02)))
    return panels


def main(argv=None):
    args = eval_passn.parse_args(argv)
    for name, figure in (("figure-5", figure_5), ("figure-13", figure_13)):
        panels = figure(args)
        path = args.out / f"{name}.json"
        path.write_text(json.dumps(panels) + "\n")
        print(f"wrote {path} and {eval_passn.draw(panels, path.with_suffix('.png'))}")


if __name__ == "__main__":
    main()
