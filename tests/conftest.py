"""The tests run the scripts as a user does, from a copy of nothing: the repository itself, on its embedded examples."""

import os
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models of this size are 10 to 30 times slower with more, under load
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may wait for a network
os.environ.pop("RAY_ADDRESS", None)  # engines of tests are started and ended here, not in someone's cluster


def run_script(*arguments, processes=1, code=0, cwd=ROOT, **environment):
    """Run `python arguments...` (or torchrun with several processes) and return its CompletedProcess."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--"] if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == code, f"exit {done.returncode}, not {code}\n{done.stdout}\n{done.stderr[-4000:]}"
    return done


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(autouse=True)
def signals_are_the_tests_own():
    """A run that is refused half-way leaves its handlers behind, which in a process of its own does not matter."""
    handlers, hook = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}, sys.excepthook
    yield
    signal.set_wakeup_fd(-1)
    sys.excepthook = hook
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tokenizer():
    import common

    return common.load_tokenizer(str(ROOT / "examples/tiny_llama"))


@pytest.fixture
def tiny_model(tokenizer):
    import common

    model, scratch = common.load_model(str(ROOT / "examples/tiny_llama"), tokenizer, seed=0)
    assert scratch
    return model


@pytest.fixture(scope="session")
def grader():
    """One set of grading processes for all tests that want the real judge; `one_grader` lends it to the scripts."""
    import common

    grader = common.Grader()
    close, grader.close = grader.close, lambda: None
    yield grader
    close()


@pytest.fixture
def one_grader(grader, monkeypatch):
    import common

    monkeypatch.setattr(common, "Grader", lambda *arguments: grader)
    return grader


@pytest.fixture(scope="session")
def engines(tokenizer, tmp_path_factory):
    """The one vLLM engine of the session, for the tiny model; who uses it gives it weights first."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    import common

    model, _ = common.load_model(str(ROOT / "examples/tiny_llama"), tokenizer, seed=0)
    logs, accelerator = tmp_path_factory.mktemp("engines"), common.make_accelerator()
    engines = common.VLLMEngines(accelerator, str(ROOT / "examples/tiny_llama"), tokenizer, 256, logs, model)
    yield engines
    engines.shut_down()


@pytest.fixture(scope="session")
def cross_entropy_run(tmp_path_factory):
    """A short run of train_direct.py that several tests look at: two epochs of cross-entropy."""
    out = tmp_path_factory.mktemp("runs") / "direct-n1"
    done = run_script("train_direct.py", "--n-prime", 1, "--epochs", 2, "--out", out, "--checkpoint-at", 0.11, 0.86)
    return out, done


# Lean
@pytest.fixture(scope="session")
def lean(tmp_path_factory):
    """{name: theorem} of the stand-in for Lean, which lean_dojo finds from here on. TRIES, where
    theorems remember that they have failed, is a folder of the session's."""
    from lean_stand_in import make_repository, running

    assert "lean_dojo" not in sys.modules, "lean_dojo reads where its cache is when it is imported"
    variables, theorems = make_repository(tmp_path_factory.mktemp("lean"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield theorems
    for pid in running(variables):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def ray_session(lean):
    """The one Ray of the session, whose workers find the stand-in for Lean."""
    import common

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, [ROOT, ROOT / "tests"])))
        patch.setenv("RAY_ENABLE_AUTO_CONNECT", "0")
        ray = common.start_ray()
        yield ray
        ray.shutdown()
