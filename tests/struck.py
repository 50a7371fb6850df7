"""Run a training script that something happens to: struck.py SCRIPT [...], or struck.py for a server of such runs.

STRIKE="what, point, count" in the environment: `what` of `STRIKES` happens at the count-th passage of a point of
`POINTS`, in the process with the rank STRIKE_RANK (0), which says so on stderr. The server has imported all there is
to import, and forks a process for each line of its stdin: a run then takes no longer than its training does.
"""

import ctypes
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import accelerate.checkpointing
import torch
import transformers

import common


def send(number, process=os.getpid):
    return lambda: os.kill(process(), number)


def wait_for_ever():
    """In a call that never returns to Python, not even for a signal: it waits for a lock that it holds."""
    mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    for _ in range(2):
        libc.pthread_mutex_lock(mutex)


STRIKES = {
    "kill": send(signal.SIGKILL),
    "stop": send(signal.SIGSTOP),
    "SIGTERM": send(signal.SIGTERM),
    "SIGINT": send(signal.SIGINT),
    "Ctrl-C": lambda: os.killpg(0, signal.SIGINT),  # as a terminal sends it, to the grading processes as well
    # The launcher passes it on; meanwhile no step may end the run.
    "SIGTERM to the launcher": lambda: (send(signal.SIGTERM, os.getppid)(), time.sleep(3)),
    "SIGTERM and a slow step": lambda: (send(signal.SIGTERM)(), time.sleep(100)),
    "SIGTERM and a stuck step": lambda: (send(signal.SIGTERM)(), wait_for_ever()),
    "full": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY)),
}


def whole(call, *inputs, **settings):
    return call(*inputs, **settings)


def nothing(call, *inputs, **settings):
    pass


def half_line(call, path, line):
    text = json.dumps(line)
    with open(path, "a") as file:
        file.write(text[: len(text) // 2])


def half_of_the_files(call, folder, **settings):
    files = sorted(filter(Path.is_file, folder.rglob("*")))
    for path in files[: len(files) // 2]:
        path.unlink()


def of_kind(pattern):
    return lambda path, *inputs, **settings: Path(path).match(pattern)


def any_call(*inputs, **settings):
    return True


STATE, CHECKPOINT, LEFT = of_kind("state/step-*.partial"), of_kind("epoch-*.partial"), of_kind("state/step-*[0-9]")
# Point: a function, which calls of it are meant, how much of the call is made before the strike.
POINTS = {
    "before args.json": (Path, "rename", of_kind("args.json.partial"), nothing),
    "after args.json": (Path, "rename", of_kind("args.json.partial"), whole),
    "step": (common.Refill, "next_step", any_call, nothing),
    "after a step": (common.Refill, "next_step", any_call, whole),
    "half a line of metrics": (common, "append_json", of_kind("metrics.jsonl"), half_line),
    "after a line of metrics": (common, "append_json", of_kind("metrics.jsonl"), whole),
    "before a state": (accelerate.Accelerator, "save_state", any_call, nothing),
    "first file of a state": (accelerate.checkpointing, "save", any_call, whole),
    "pickle of a state": (torch, "save", any_call, whole),
    "before a state's renaming": (Path, "rename", STATE, nothing),
    "after a state's renaming": (Path, "rename", STATE, whole),
    "half of the older state removed": (shutil, "rmtree", LEFT, half_of_the_files),
    "before a checkpoint": (transformers.PreTrainedModel, "save_pretrained", any_call, nothing),
    "weights of a checkpoint": (transformers.PreTrainedModel, "save_pretrained", any_call, whole),
    "before a checkpoint's renaming": (Path, "rename", CHECKPOINT, nothing),
    "after a checkpoint's renaming": (Path, "rename", CHECKPOINT, whole),
    "evaluation": (common, "exact_summary", any_call, nothing),
    "half a line of epochs": (common, "append_json", of_kind("epochs.jsonl"), half_line),
    "after a line of epochs": (common, "append_json", of_kind("epochs.jsonl"), whole),
    "metrics being cut": (Path, "rename", of_kind("metrics.jsonl.partial"), nothing),
    "metrics cut but not epochs": (Path, "rename", of_kind("metrics.jsonl.partial"), whole),
    "end": (common, "end", any_call, nothing),
}


def prepare():
    if "STRIKE" not in os.environ or os.environ.get("STRIKE_RANK", "0") != os.environ.get("RANK", "0"):
        return
    what, point, count = os.environ["STRIKE"].split(", ")
    owner, name, meant, made_first = POINTS[point]
    real, left = getattr(owner, name), int(count)

    def struck(*inputs, **settings):
        nonlocal left
        left -= meant(*inputs, **settings)
        if left or not meant(*inputs, **settings):
            return real(*inputs, **settings)
        result = made_first(real, *inputs, **settings)
        left = -1
        print(f"struck by {what}: {point}, at {time.monotonic()}", file=sys.stderr, flush=True)
        STRIKES[what]()
        return result if made_first is whole else real(*inputs, **settings)

    setattr(owner, name, struck)


def serve():
    """Fork for each line, which says with what; answer with the process's id, or the exit codes of those that ended.
    The forked process returns from here and goes on as any script does."""
    model = str(common.EXAMPLES / "tiny_llama")
    common.load_model(model, common.load_tokenizer(model))
    for name in ("train_direct", "train_lean_step", "train_cot_dcoa", "train_grpo", "math_verify", "pebble"):
        importlib.import_module(name)
    # What DeepSpeed imports when it starts.
    lazy = ["deepspeed.ops.op_builder.all_ops", "deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.zero.muon"]
    lazy += ["torch.utils.cpp_extension", "torch._inductor.codecache", "torch._functorch._aot_autograd.graph_compile"]
    for name in ("deepspeed", *lazy):
        with suppress(ImportError):
            importlib.import_module(name)
    common.bytes_of_activations = lambda *inputs: 0  # the plan of the memory is not what is at stake
    gc.freeze()  # or each process would copy all of that when it ends
    running, ended = set(), {}
    while line := sys.stdin.readline():
        if asked := json.loads(line):
            if not (pid := os.fork()):
                return begin(**asked)
            running.add(pid)
        for one in list(running):
            found, status = os.waitpid(one, os.WNOHANG)
            if found:
                running.remove(one)
                ended[one] = os.waitstatus_to_exitcode(status)
        print(json.dumps(pid if asked else ended), file=answers, flush=True)
    os._exit(0)


def begin(arguments, environment, folder):
    os.setsid()
    os.environ.update(environment)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    answers.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is off where the tests are a background job
    return arguments


if __name__ == "__main__":
    # DeepSpeed prints as it is imported: the answers have a pipe of their own.
    answers = os.fdopen(int(os.environ["ANSWERS"]), "w") if len(sys.argv) == 1 else None
    script, *arguments = sys.argv[1:] or serve()
    prepare()
    importlib.import_module(script).main(arguments)
