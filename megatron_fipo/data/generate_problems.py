"""Program that makes reasoning-gym problems; `data.reasoning_gym` runs it in a process of its own.

A process of its own, because some tasks walk over sets of strings: their problems depend on the interpreter's
hash seed, which is fixed only before an interpreter starts, and a resumed run must find the problems it began
with. Others draw from Python's global generator, or seed NumPy's.

It reads a JSON object with task, size, seed and parameters from standard input, and pickles one dictionary to
standard output: `problems`, or what is wrong under `field`, `rule` and `way_out`.
"""

import dataclasses
import difflib
import json
import os
import pickle
import random
import sys
from typing import Any

Reply = dict[str, Any]


def generate(task: str, size: int, seed: int, parameters: dict[str, Any]) -> Reply:
    """Make a set of problems, or say which field is wrong."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        rule = f"needs the package reasoning-gym, which cannot be imported ({error})"
        return {"field": "type", "rule": rule, "way_out": "install reasoning-gym"}
    unknown = _unknown_task(task, DATASETS)
    if unknown:
        return unknown
    try:
        if task == "composite":
            parameters = parameters | {"datasets": _composite_parts(parameters.get("datasets"))}
        dataset = reasoning_gym.create_dataset(task, size=size, seed=seed, **parameters)
    except Exception as error:
        fields = ", ".join(sorted(_parameter_names(DATASETS[task][1])))
        return {
            "field": "parameters",
            "rule": f"the task {task} refuses them ({type(error).__name__}: {error})",
            "way_out": f"its parameters are {fields}",
        }
    parts = {part.name: part.config for part in parameters["datasets"]} if task == "composite" else {}
    return {"problems": [_problem(dataset, index, task, parameters, parts) for index in range(size)]}


def _unknown_task(task: str, known: dict[str, Any]) -> Reply | None:
    if task in known:
        return None
    close = difflib.get_close_matches(task, known, n=3)
    way_out = f"did you mean {' or '.join(close)}?" if close else f"use one of {', '.join(sorted(known))}"
    return {"field": "task", "rule": "reasoning-gym has no such task", "way_out": way_out}


def _composite_parts(parts: Any) -> list[Any]:
    from reasoning_gym.composite import DatasetSpec

    return [DatasetSpec(**{"weight": 1.0, "config": {}, **part}) for part in parts or []]


def _parameter_names(config_class: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)} - {"size", "seed"}


def _problem(dataset: Any, index: int, task: str, parameters: dict[str, Any], parts: dict[str, Any]) -> Reply:
    """One problem with the task that scores it; a mixture's problems are scored by their own tasks."""
    random.seed(dataset.seed + index)
    try:
        entry = dataset[index]
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    if not parts:
        return {"task": task, "parameters": parameters, "entry": entry}
    source = entry["metadata"]["source_dataset"]
    own = {name: value for name, value in parts[source].items() if name not in ("size", "seed")}
    return {"task": source, "parameters": own, "entry": entry}


def main() -> None:
    """Answer the request on standard input."""
    reply_file = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # Whatever a task prints must not end up in the reply.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with reply_file:
        pickle.dump(generate(**json.load(sys.stdin)), reply_file)


if __name__ == "__main__":
    main()
