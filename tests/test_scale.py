"""train_direct.py on two processes: the run of one process."""

import os
import socket
import subprocess
import sys

import pytest
from small_runs import FLAGS, ROOT, assert_same_run, weights

# DeepSpeed keeps small weights whole on every process; with this, ZeRO-3 splits all of them.
SCRIPT = """
import common, train_direct
config = common.zero_config
def split_all(*arguments):
    settings = config(*arguments)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings
common.zero_config = split_all
train_direct.main()
"""
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ONE_NODE = ["--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="session", params=["two nodes", "ZeRO-2", "ZeRO-3"])
def launched(request, small_data, tmp_path_factory):
    """The reference run as two processes, in micro-batches of few tokens. Returns its folder."""
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    (folder / "script.py").write_text(SCRIPT)
    flags = [*FLAGS, "--micro-batch-tokens", "64", "--data", small_data, "--out", folder / "run"]
    if request.param == "two nodes":
        with socket.create_server(("127.0.0.1", 0)) as free:
            place = ["--master_addr", "127.0.0.1", "--master_port", str(free.getsockname()[1])]
        launches = [["--nnodes", "2", "--node_rank", str(node), *place] for node in (0, 1)]
        flags += ["--zero", "0"]
    else:
        launches = [ONE_NODE]
        flags += ["--zero", request.param[-1]]
    nodes = [
        subprocess.Popen(
            [*TORCHRUN, *launch, folder / "script.py", *flags],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for launch in launches
    ]
    outputs = [node.communicate(timeout=600)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0] * len(nodes), outputs[0][-4000:]
    assert outputs[0].count("2 processes") == 1
    return folder / "run"


def test_two_processes_make_the_steps_and_checkpoints_of_one(launched, reference):
    assert_same_run(launched, reference)


def test_checkpoints_hold_whole_weights(launched, reference):
    for epoch in range(1, 5):
        mine, others = (weights(run / f"epoch-{epoch}") for run in (launched, reference))
        assert {k: (v.shape, v.dtype) for k, v in mine.items()} == {
            k: (v.shape, v.dtype) for k, v in others.items()
        }
