"""Problems from reasoning-gym's task generators."""

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.data import PROBLEMS_PER_SEED, ReasoningGymPrompts
from megatron_fipo.data.problem import BadRow, Problem

_PROGRAM = Path(__file__).with_name("generate_problems.py")


def make_problems(source: ReasoningGymPrompts, field: str) -> Iterator[Problem | BadRow]:
    """Make the problems of a task; the same on every machine and in every process.

    A generator's problem i depends on its seed + i alone, so neighbouring seeds would share all but one
    problem. The source's seeds are therefore `PROBLEMS_PER_SEED` apart.

    Each problem's metadata holds `entry` (reasoning-gym's own record of it), and `task` and `parameters`,
    whose scorer the entry needs.

    Args:
        source: Task, size, seed and parameters.
        field: Where the source lies in the configuration, such as data.train.

    Raises:
        ConfigError: There is no such task, or it refuses the parameters.
    """
    request = {
        "task": source.task,
        "size": source.size,
        "seed": source.seed * PROBLEMS_PER_SEED,
        "parameters": source.parameters,
    }
    try:
        text = json.dumps(request)
    except TypeError as error:
        rule = f"must be made of text, numbers, booleans, lists and mappings ({error})"
        raise ConfigError(f"{field}.parameters", source.parameters, rule, "use those only") from error
    reply = _run(text)
    if "problems" not in reply:
        value = getattr(source, reply["field"])
        raise ConfigError(f"{field}.{reply['field']}", value, reply["rule"], reply["way_out"])
    for row, problem in enumerate(reply["problems"]):
        yield _read_problem(row, problem, source)


def _run(request: str) -> dict[str, Any]:
    # -P keeps this folder's module names out of the program's imports.
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", str(_PROGRAM)],
        input=request.encode(),
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    if done.returncode != 0:
        last_words = done.stderr.decode(errors="replace").strip()[-2000:]
        raise RuntimeError(f"{_PROGRAM.name} ended with exit status {done.returncode}:\n{last_words}")
    return pickle.loads(done.stdout)


def _read_problem(row: int, problem: dict[str, Any], source: ReasoningGymPrompts) -> Problem | BadRow:
    if "error" in problem:
        return BadRow(row, "broken", f"the generator failed ({problem['error']})")
    question, answer = problem["entry"]["question"], problem["entry"]["answer"]
    if not question.strip():
        return BadRow(row, "empty", "the question is blank")
    if source.question_pattern is not None:
        found = re.search(source.question_pattern, question)
        if found is None or found[1] is None:
            return BadRow(row, "broken", f"question_pattern does not match {question[:80]!r}")
        question = found[1]
    return Problem(
        row=row,
        prompt=source.question_template.replace("{question}", question),
        answer=None if answer is None else str(answer),
        metadata=problem,
    )
