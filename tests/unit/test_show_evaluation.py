"""tools/show_evaluation.py on a run that is still being written."""

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "show_evaluation.py"


def evaluation(step: int, accuracy: float, *sources: str) -> str:
    common = {"num_problems": 8.0, "response_length_mean": 3.0, "truncated_fraction": 0.0}
    line = {"step": step} | {f"eval/{name}": value for name, value in common.items()}
    for name in ("accuracy", *(f"{source}/avg_at_1" for source in sources)):
        line |= {f"eval/{name}": accuracy, f"eval/{name}_low": accuracy - 0.1, f"eval/{name}_high": accuracy + 0.1}
    line |= {f"eval/{source}/{name}": value for source in sources for name, value in common.items()}
    return json.dumps(line) + "\n"


def shown(run: Path, content: str) -> list[str]:
    (run / "metrics.jsonl").write_text(content)
    done = subprocess.run([sys.executable, TOOL, run], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_line_that_is_not_whole_is_not_there(tmp_path: Path) -> None:
    lines = shown(tmp_path, evaluation(0, 0.25, "own") + evaluation(4, 0.5, "own") + evaluation(8, 0.75, "own")[:-9])
    assert [line.split()[:2] for line in lines[2:]] == [["0", "0.250"], ["4", "0.500"], ["gain:", "+0.250"]]


def test_several_sources_are_told_apart(tmp_path: Path) -> None:
    lines = shown(tmp_path, evaluation(0, 0.25, "own", "other"))
    assert [line.split()[0] for line in lines[-3:]] == ["own", "other", "all"]
