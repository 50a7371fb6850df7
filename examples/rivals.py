"""Other ways to limit confidence, on the same data, optimizer and evaluation as train_direct.py.

    python examples/rivals.py --rival focal --strength 2      # and any flag of train_direct.py

All are cross-entropy (N' = 1) but for one term. With y_t the reference token, π the distribution
over the vocabulary at its place, p the probability of the whole answer:

    focal      weights an example by (1 - p)^γ, which falls to 0 as p -> 1, but not by N
    smoothing  (1 - α) log π(y_t) + α/V Σ_v log π(v), label smoothing over V tokens
    entropy    log π(y_t) + λ H(π), a bonus for the entropy H
    gem        log π(y_t) - Σ_v q(v) log π(v), q ~ π^(1/β): GEM (Li et al., arXiv 2408.16673)

γ, α, λ, β: --strength. α = 0, λ = 0, γ = 0 and β = 1 have the gradient of cross-entropy.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import train_direct


def focal_weight(log_p, n, strength):
    """In place of F(N, p): log_p [B] -> [B]."""
    return (1 - log_p.exp()) ** strength


def smoothing(log_pi, chosen, strength):
    return (1 - strength) * chosen + strength * log_pi.mean(-1)


def entropy(log_pi, chosen, strength):
    return chosen - strength * (log_pi.exp() * log_pi).sum(-1)


def gem(log_pi, chosen, strength):
    q = (log_pi.detach() / strength).softmax(-1)
    return chosen - (q * log_pi).sum(-1)


OBJECTIVES = {"smoothing": smoothing, "entropy": entropy, "gem": gem}  # of a token: maximized


def token_log_probs(logits, targets, objective, strength):
    """The value of log π(y_t), with the gradient of the objective: [K, V], [K] -> [K]."""
    log_pi = logits.log_softmax(-1)
    chosen = log_pi.gather(-1, targets[:, None]).squeeze(-1)
    value = objective(log_pi, chosen, strength)
    return chosen.detach() + value - value.detach()


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rival", required=True, choices=["focal", *OBJECTIVES])
    parser.add_argument("--strength", required=True, type=float)
    args, flags = parser.parse_known_args(argv)
    out = f"runs/rival-{args.rival}-{args.strength:g}"
    flags = ["--n-prime", "1", "--factor-threshold", "0", "--out", out, *flags]
    if args.rival == "focal":
        common.dco_factor = partial(focal_weight, strength=args.strength)
    else:
        objective = OBJECTIVES[args.rival]
        settings = {"objective": objective, "strength": args.strength}
        common.token_log_probs = partial(token_log_probs, **settings)
    train_direct.main(flags)


if __name__ == "__main__":
    main()
