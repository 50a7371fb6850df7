"""Run train_direct.py and say what each process holds while a checkpoint is made: gathering.py OUT [...]. Writes
OUT-<rank>.json: the tensors that `get_state_dict` gave, the parameters that were whole before, at each gathering and
after; and OUT-<rank>.pt: this process's shares of the parameters."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import accelerate
import torch
from deepspeed.runtime.zero import partition_parameters

import common
import train_direct

config, get_state_dict = common.zero_config, accelerate.Accelerator.get_state_dict
enter = partition_parameters.GatheredParameters.__enter__
found = {"whole": []}


def without_thresholds(*arguments):
    """In a model as small as this one, ZeRO-3 would keep everything whole."""
    settings = config(*arguments)
    settings["zero_optimization"] |= dict.fromkeys(
        ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"), 0
    )
    return settings


def watched(accelerator, model):
    names = {p.ds_id: name for name, p in model.named_parameters()}

    def whole():
        return [names[p.ds_id] for p in model.parameters() if p.ds_status.name != "NOT_AVAILABLE"]

    def counting(gathered):
        result = enter(gathered)
        found["whole"].append(whole())
        return result

    rank, found["before"] = accelerator.process_index, whole()
    torch.save({name: p.ds_tensor.clone() for name, p in model.named_parameters()}, f"{out}-{rank}.pt")
    partition_parameters.GatheredParameters.__enter__ = counting
    state = get_state_dict(accelerator, model)
    partition_parameters.GatheredParameters.__enter__ = enter
    found["after"], found["given"] = whole(), sorted(state or {})
    Path(f"{out}-{rank}.json").write_text(json.dumps(found))
    return state


out = sys.argv[1]
common.zero_config, accelerate.Accelerator.get_state_dict = without_thresholds, watched
train_direct.main(["--out", *sys.argv[1:]])
