"""Run train_direct.py several times, one run after the other, each in new processes that are told what torchrun tells
its own: forked.py '[[PROCESSES, [ARGUMENT, ...]], ...]'. They are forked from one that has imported all that
takes its time."""

import json
import os
import sys

from conftest import free_port

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed.runtime.zero.muon.original_muon
import deepspeed.runtime.zero.stage3  # noqa: F401
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

import common  # noqa: F401
import train_direct


def run(processes, arguments):
    port, children = free_port(), []
    for rank in range(processes):
        if not (child := os.fork()):
            os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"WORLD_SIZE": f"{processes}", "LOCAL_WORLD_SIZE": f"{processes}", "MASTER_PORT": f"{port}"}
            train_direct.main(arguments)
            raise SystemExit
        children.append(child)
    for child in children:
        if os.waitpid(child, 0)[1]:
            raise SystemExit(f"a process of {processes} failed: {arguments}")


if __name__ == "__main__":
    for processes, arguments in json.loads(sys.argv[1]):
        run(processes, arguments)
