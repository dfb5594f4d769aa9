"""Problems from reasoning-gym's task generators."""

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.data import PROBLEMS_PER_SEED, ReasoningGymPrompts
from megatron_fipo.data.content_key import content_key
from megatron_fipo.data.problem import Problem, UnusableRow
from megatron_fipo.data.row_index import RowIndex, RowScan

_PROGRAM = Path(__file__).with_name("generate_problems.py")


class ReasoningGymRows:
    """The problems of a task, in memory; the same on every machine and in every process.

    A generator's problem i depends on its seed + i alone, so neighbouring seeds would share all but one
    problem. The source's seeds are therefore `PROBLEMS_PER_SEED` apart.

    Each problem's metadata holds `entry` (reasoning-gym's own record of it), and `task` and `parameters`,
    whose scorer the entry needs.

    Args:
        source: Task, size, seed and parameters.
        field: Where the source lies in the configuration, such as data.train.

    Attributes:
        index: The verdict on every problem; the first is number 0.
        description: How the problems are made, for the log.
        columns: None; there are no columns to name.
        digest: Digest of questions and answers.

    Raises:
        ConfigError: There is no such task, or it refuses the parameters.
    """

    def __init__(self, source: ReasoningGymPrompts, field: str) -> None:
        self._problems = _make_problems(source, field)
        self.columns: tuple[str, ...] = ()
        self.description = f"reasoning-gym task {source.task}"
        scan, digest = RowScan(), hashlib.sha256()
        for problem in self._problems:
            if isinstance(problem, UnusableRow):
                scan.add_unusable(problem.reason, problem.detail)
            else:
                scan.add_usable(content_key(problem.prompt))
                digest.update(repr((problem.prompt, problem.answer)).encode(errors="backslashreplace"))
        self.index = RowIndex(scan, first_number=0)
        self.digest = digest.hexdigest()

    def read(self, place: int) -> Problem:
        """The problem at a place, from 0, which the index calls usable."""
        problem = self._problems[place]
        assert isinstance(problem, Problem)
        return problem


def _make_problems(source: ReasoningGymPrompts, field: str) -> list[Problem | UnusableRow]:
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
    return [_read_problem(problem, source) for problem in reply["problems"]]


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


def _read_problem(problem: dict[str, Any], source: ReasoningGymPrompts) -> Problem | UnusableRow:
    if "error" in problem:
        return UnusableRow("broken", f"the generator failed ({problem['error']})")
    question, answer = problem["entry"]["question"], problem["entry"]["answer"]
    if not question.strip():
        return UnusableRow("empty", "the question is blank")
    if source.question_pattern is not None:
        found = re.search(source.question_pattern, question)
        if found is None or found[1] is None:
            return UnusableRow("broken", f"question_pattern does not match {question[:80]!r}")
        question = found[1]
    return Problem(
        prompt=source.question_template.replace("{question}", question),
        answer=None if answer is None else str(answer),
        metadata=problem,
    )
