"""Prints the held-out accuracies of a run: `python tools/show_evaluation.py RUN_DIRECTORY`."""

import json
import sys
from pathlib import Path


def main() -> None:
    """Print one line for every evaluation, and the gain from the first to the last."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    path = Path(sys.argv[1]) / "metrics.jsonl"
    if not path.is_file():
        sys.exit(f"{path}: there is no such file; name a run directory")
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    evaluations = [step for step in steps if "eval/accuracy" in step]
    if not evaluations:
        sys.exit(f"{path}: the run evaluated nothing")
    print(f"{path.parent}: {evaluations[0]['eval/num_problems']:.0f} held-out problems")
    print("after step   accuracy at sampling temperature (95 % interval)   greedy accuracy")
    for step in evaluations:
        interval = f"({step['eval/accuracy_low']:.3f} to {step['eval/accuracy_high']:.3f})"
        greedy = step.get("eval/greedy_accuracy")
        shown = "-" if greedy is None else f"{greedy:.3f}"
        print(f"{step['step']:>10}   {step['eval/accuracy']:>8.3f} {interval:<42}   {shown}")
    print(f"gain: {evaluations[-1]['eval/accuracy'] - evaluations[0]['eval/accuracy']:+.3f}")


if __name__ == "__main__":
    main()
