"""Fixtures that several test files share. All tests run from the repository, on its examples."""

import contextlib
import importlib.util
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models of this size are slower with more
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("RAY_ADDRESS", None)  # the tests start and end their own engines
os.environ |= {  # a busy machine may take ten times as long to start Ray, and fill its memory
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_gcs_server_port_wait_time_s": "300",
    "RAY_gcs_server_request_timeout_seconds": "600",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_health_check_timeout_ms": "100000",
}

from small_runs import TINY_LLAMA, reference, small_data, train, write_rows  # noqa: E402, F401

import common  # noqa: E402


def run_script(*arguments, processes=1):
    """Run `python arguments...`, or torchrun for several processes."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--"]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="session")
def tokenizer():
    return common.load_tokenizer(TINY_LLAMA)


@pytest.fixture
def tiny_model(tokenizer):
    return common.load_model(TINY_LLAMA, tokenizer, seed=0)


@pytest.fixture(scope="session")
def grader():
    """One set of grading processes for the session."""
    grader = common.Grader()
    close, grader.close = grader.close, lambda: None
    yield grader
    close()


@pytest.fixture
def one_grader(grader, monkeypatch):
    """The scripts grade with the session's grader."""
    monkeypatch.setattr(common, "Grader", lambda *arguments, **settings: grader)
    return grader


@pytest.fixture(scope="session")
def cross_entropy_run(tmp_path_factory):
    """Two epochs of cross-entropy on the embedded data. Returns (--out, what was printed)."""
    out = tmp_path_factory.mktemp("runs") / "direct-n1"
    flags = ["--n-prime", "1", "--epochs", "2", "--checkpoint-at", "0.11", "0.86"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train(*flags, "--out", out)
    return out, printed.getvalue()


# Lean
@pytest.fixture(scope="session")
def lean(tmp_path_factory):
    """{name: theorem} of the stand-in for Lean, which stand_in_dojo.py finds from here on."""
    from lean_stand_in import make_folder, running

    variables, theorems = make_folder(tmp_path_factory.mktemp("lean"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield theorems
    for pid in running(variables):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def ray_session(lean):
    """The one Ray of the session, whose workers find the stand-in for Lean."""
    import prove

    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, [ROOT, ROOT / "tests"])))
        ray = common.start_ray()
        ray.cloudpickle.register_pickle_by_value(prove)  # as a script's, workers import no torch
        signal.signal(signal.SIGHUP, handler)
        yield ray
        ray.shutdown()


# Engines
@pytest.fixture(scope="session")
def engines(tokenizer, ray_session, tmp_path_factory):
    """The vLLM engine of the session, for the tiny model; give it weights before you use it."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    out = tmp_path_factory.mktemp("engines")
    args = SimpleNamespace(out=out, gpu_memory=0.3, gpus_per_engine=1)
    accelerator, model = common.make_accelerator(), common.load_model(TINY_LLAMA, tokenizer)
    engines = common.VLLMEngines(args, accelerator, TINY_LLAMA, tokenizer, 256, model)
    yield engines
    engines.shut_down()


@pytest.fixture(scope="session")
def warm_start(tokenizer, tmp_path_factory):
    """A checkpoint with a tied head that has learnt the format of r1-short and some sums, and data
    of such sums."""
    import train_cot_dcoa

    folder = tmp_path_factory.mktemp("warm")
    config = common.load_config(TINY_LLAMA)
    config.tie_word_embeddings = True
    config.save_pretrained(folder / "tied")
    tokenizer.save_pretrained(folder / "tied")
    rows = [
        {"problem": f"{a}+{b}=", "answer": str(a + b), "solution": f"{a}+{b}={a + b}"}
        for a in range(6)
        for b in range(6)
    ]
    write_rows(folder / "often", train=rows * 60)
    flags = ["--model", folder / "tied", "--data", folder / "often", "--template", "r1-short"]
    flags += ["--n-prime", "1", "--epochs", "1", "--lr", "0.01", "--warmup-steps", "10"]
    flags += ["--batch-size", "36", "--out", folder / "run"]
    train_cot_dcoa.main([str(flag) for flag in flags])
    return folder / "run/epoch-1", write_rows(folder / "few", train=rows, test=rows[:4])
