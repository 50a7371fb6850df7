"""Print the gradient norm of a ZeRO step in bf16, alone and after a discarded gradient: discard_in_bf16.py {2,3}."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import common

config = common.zero_config
common.zero_config = lambda *arguments: config(*arguments) | {"bf16": {"enabled": True}}  # as it is on a GPU

tokenizer = common.load_tokenizer("examples/tiny_llama")
accelerator = common.make_accelerator(zero=int(sys.argv[1]), clip=1e9)
model, _ = common.load_model("examples/tiny_llama", tokenizer, torch.bfloat16, 0, accelerator)
optimizer = torch.optim.AdamW(model.parameters(), 0.0)
model, optimizer = accelerator.prepare(model, optimizer)
examples, _ = common.encode(common.load_problems("examples/arithmetic", "train"), tokenizer, "direct", 99)


def add_gradient(part, last):
    log_p = common.completion_log_probs(model, common.collate(part, 0))
    common.backward(accelerator, model, -log_p.mean(), last)


norms = []
for discarded in (False, True):
    if discarded:
        add_gradient(examples[8:16], last=False)
        common.discard_gradients(accelerator, optimizer)
    add_gradient(examples[:4], last=False)
    add_gradient(examples[4:8], last=True)
    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 1e9)))
accelerator.print(f"stage {sys.argv[1]}: {norms[0]:.6f} {norms[1]:.6f}")
common.end(accelerator)
