"""Run train_grpo.py, saying on stdout what it begins to wait for from its engines: announcing.py [...]."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import train_grpo

wait = common.VLLMEngines._wait


def announcing(engines, calls, doing):
    print(f"waiting: {doing}", flush=True)
    return wait(engines, calls, doing)


if __name__ == "__main__":
    common.VLLMEngines._wait = announcing
    train_grpo.main(sys.argv[1:])
