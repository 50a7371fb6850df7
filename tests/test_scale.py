"""train_direct.py on two processes makes the run of one."""

import pytest
from conftest import run_script
from small_runs import FLAGS, ROOT, assert_same_run

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


@pytest.fixture(scope="session", params=[0, 2, 3])
def two_processes(request, small_data, tmp_path_factory):
    """The reference run with ZeRO's stage as the parameter, in micro-batches of few tokens."""
    folder = tmp_path_factory.mktemp(f"zero-{request.param}")
    (folder / "script.py").write_text(SCRIPT)
    flags = [*FLAGS, "--zero", request.param, "--micro-batch-tokens", 128]
    flags += ["--data", small_data, "--out", folder / "run"]
    done = run_script(folder / "script.py", *flags, processes=2, PYTHONPATH=str(ROOT))
    assert done.stdout.count("2 processes") == 1
    return folder / "run"


def test_same_steps_metrics_and_checkpoints(two_processes, reference):
    assert_same_run(two_processes, reference)
