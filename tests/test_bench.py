"""tests/bench.py: its rows run and its table says what happened. Times are never judged."""

import json

import bench
import pytest

pytestmark = pytest.mark.slow
QUICK = ["sft", "packed", "dco-accept", "micro-batch", "grpo", "grading", "proof-search"]


def run(*arguments):
    """Run bench.main in this process and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        bench.main([*map(str, arguments)])
    return ended.value.code


def test_every_row_measures_both_sides(tmp_path, capsys):
    """One turn of each. A row stops where the sides differ: in the loss of the first step, in what
    is accepted, in the environment's calls."""
    assert run(*QUICK, "--quick", "--out", tmp_path / "bench.json") == 0
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert list(dict.fromkeys(result["row"] for result in results)) == QUICK
    printed = capsys.readouterr().out
    for result in results:
        assert f"| {result['row']}: {result['what']}" in printed
        if result["row"] == "micro-batch":
            assert min(result["series"].values()) > 0
        else:
            assert min(result[name] for name in ("ours", "theirs", "low", "high")) > 0
