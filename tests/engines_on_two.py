"""Two processes that share a model by ZeRO-3, and an engine: engines_on_two.py MODEL OUT. Writes OUT/<rank>.json."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import common

folder, out = sys.argv[1], Path(sys.argv[2])
tokenizer = common.load_tokenizer(folder)
accelerator = common.make_accelerator(zero=3, clip=1e9)
model, _ = common.load_model(folder, tokenizer, torch.float32, 0, accelerator)
optimizer = torch.optim.AdamW(model.parameters(), 0.02)
model, optimizer = accelerator.prepare(model, optimizer)
examples, _ = common.encode(common.load_problems("examples/arithmetic", "train")[:6], tokenizer, "cot", 999)
prompts, seeds = [example.prompt_ids for example in examples], list(range(0, 6 * 256, 256))


def said(found):
    return [[one.token_ids for one in completions] for completions in found]


engines = common.VLLMEngines(accelerator, folder, tokenizer, 128, out, model, patience_minutes=3)
live = common.LiveModel(accelerator, model, tokenizer, sequences=4)
result = {"before": said(engines.generate(prompts, 1, 16)), "split": hasattr(next(model.parameters()), "ds_id")}
for _ in range(2):  # a large step, so that stale weights say something else
    share = common.split_evenly(examples, accelerator)
    log_p = common.completion_log_probs(model, common.collate(share, 0))
    common.backward(accelerator, model, -log_p.mean(), last=True)
    optimizer.step()
    optimizer.zero_grad()
result["stale"] = said(engines.generate(prompts, 1, 16))
engines.update_weights(model)
result["engine"] = said(engines.generate(prompts, 1, 16))
result["live"] = said(live.generate(prompts, 1, 16))
sampled = engines.generate(prompts, 3, 16, seeds)
result["sampled"], result["log_probs"] = said(sampled), [one.log_prob for found in sampled for one in found]
drawn = [
    common.Example(0, prompt, one.token_ids) for prompt, found in zip(prompts, sampled, strict=True) for one in found
]
result["trainers"] = common.log_probs_of(model, drawn, accelerator, 0, 9).tolist()
result["live_sampled"] = said(live.generate(prompts, 6, 16, seeds))  # 6 are more than the 4 that fit
(out / f"{accelerator.process_index}.json").write_text(json.dumps(result))
engines.shut_down()
common.end(accelerator)
