"""Prints the held-out accuracies of a run or of an evaluation: `python tools/show_evaluation.py DIRECTORY`."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_fipo.metrics.evaluation_table import evaluation_table
from megatron_fipo.runtime.files.json_files import read_whole_lines


def main() -> None:
    """Print one line for every evaluation, the gain from the first to the last, and the last one source by source."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = Path(sys.argv[1])
    if (folder / "evaluation.json").is_file():
        print("\n".join(evaluation_table(json.loads((folder / "evaluation.json").read_text())["metrics"])))
        return
    path = folder / "metrics.jsonl"
    if not path.is_file():
        sys.exit(f"{path}: there is no such file; name a run directory, or an evaluation's")
    evaluations = [step for step in read_whole_lines(path)[0] if "eval/accuracy" in step]
    if not evaluations:
        sys.exit(f"{path}: the run evaluated nothing")
    print("\n".join(_run_lines(folder, evaluations)))


def _run_lines(folder: Path, evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    first, last = evaluations[0], evaluations[-1]
    lines = [
        f"{folder}: {first['eval/num_problems']:.0f} held-out problems",
        "after step   accuracy at sampling temperature (interval)   greedy accuracy",
    ]
    for step in evaluations:
        interval = f"({step['eval/accuracy_low']:.3f} to {step['eval/accuracy_high']:.3f})"
        greedy = step.get("eval/greedy_accuracy")
        shown = "-" if greedy is None else f"{greedy:.3f}"
        lines.append(f"{step['step']:>10}   {step['eval/accuracy']:>8.3f} {interval:<35}   {shown}")
    lines.append(f"gain: {last['eval/accuracy'] - first['eval/accuracy']:+.3f}")
    sources = [key for key in last if re.fullmatch("eval/.+/num_problems", key)]
    several_samples = any("/pass_at_" in key for key in last)
    if len(sources) > 1 or several_samples:
        lines += ["", f"after step {last['step']}, by source:", *evaluation_table(last)]
    return lines


if __name__ == "__main__":
    main()
