"""tests/bench.py: its rows run. A row fails where its two sides differ: in the loss of the first
step, in what is accepted, in the environment's calls. Times are never judged."""

import bench
import pytest

ROWS = ["sft", "packed", "dco-accept", "micro-batch", "grpo", "grading", "proof-search"]


@pytest.mark.slow
def test_every_row_measures_both_sides(capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main([*ROWS, "--quick"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert all(any(line.startswith(f"| {name}: ") for line in lines) for name in ROWS)
