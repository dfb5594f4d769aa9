"""Ways to cut the same update: all that are legal on up to eight ranks, and a small set in which every pair occurs."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.parallelism import ParallelismConfig

MAX_WORLD_SIZE = 8
ALGORITHMS = ("fipo", "dapo", "gspo")
Levels = dict[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Combination:
    """One way to run the updates of the suite; without arguments the one that all are compared with."""

    model: str = "dense"
    algorithm: str = "fipo"
    tensor: tuple[int, bool] = (1, False)
    pipeline: tuple[int, int] = (1, 1)
    context: int = 1
    data: int = 1
    expert: int = 1
    expert_tensor: int = 1
    distributed_optimizer: bool = False
    budget: str = "large"
    order: str = "recorded"
    padding: str = "least"

    @property
    def world_size(self) -> int:
        return self.tensor[0] * self.pipeline[0] * self.context * self.data

    @property
    def reference(self) -> "Combination":
        """The same updates in one process."""
        return Combination(model=self.model, algorithm=self.algorithm)

    @cached_property
    def parallelism(self) -> dict[str, Any]:
        """Fields of ParallelismConfig, the token budget left out."""
        return {
            "tensor_model_parallel_size": self.tensor[0],
            "sequence_parallel": self.tensor[1],
            "pipeline_model_parallel_size": self.pipeline[0],
            "virtual_pipeline_model_parallel_size": self.pipeline[1] if self.pipeline[1] > 1 else None,
            "context_parallel_size": self.context,
            "expert_model_parallel_size": self.expert,
            "expert_tensor_parallel_size": self.expert_tensor,
            "use_distributed_optimizer": self.distributed_optimizer,
        }

    @property
    def layout(self) -> str:
        """How model and batch are cut over ranks, in words."""
        (tensor, sequence), (pipeline, virtual) = self.tensor, self.pipeline
        parts = [
            (tensor > 1, f"TP {tensor}" + (" + SP" if sequence else "")),
            (pipeline > 1, f"PP {pipeline}" + (f" × VPP {virtual}" if virtual > 1 else "")),
            (self.context > 1, f"CP {self.context}"),
            (self.data > 1, f"DP {self.data}"),
            (self.expert > 1, f"EP {self.expert}"),
            (self.expert_tensor > 1, f"ETP {self.expert_tensor}"),
            (self.distributed_optimizer, "sharded optimizer"),
        ]
        return ", ".join(text for holds, text in parts if holds) or "1 rank"

    def __str__(self) -> str:
        others = [name for name in (self.budget, self.order, self.padding) if name not in _DEFAULTS]
        return " | ".join([self.model, self.algorithm, self.layout, *others])


_DEFAULTS = ("large", "recorded", "least")
ALL_LEVELS: Levels = {
    "model": ("dense", "moe"),
    "algorithm": ALGORITHMS,
    # Tensor-parallel size, and sequence parallelism.
    "tensor": ((1, False), (2, False), (2, True), (4, False), (4, True)),
    # Pipeline stages, and virtual stages of each rank.
    "pipeline": ((1, 1), (2, 1), (2, 2), (4, 1)),
    "context": (1, 2, 4, 8),
    "data": (1, 2, 4, 8),
    "expert": (1, 2, 4),
    "expert_tensor": (1, 2, 4),
    "distributed_optimizer": (False, True),
    "budget": ("large", "small"),
    "order": ("recorded", "shuffled"),
    "padding": ("least", "generous"),
}
# What every change is tested with: what larger sizes add costs minutes.
QUICK_LEVELS: Levels = ALL_LEVELS | {
    "tensor": ((1, False), (2, False), (2, True)),
    "pipeline": ((1, 1), (2, 1), (2, 2)),
    "context": (1, 2, 4),
    "data": (1, 2),
    "expert": (1, 2, 4),
    "expert_tensor": (1, 2),
}
_STRUCTURE = ("model", "tensor", "pipeline", "context", "data", "expert", "expert_tensor", "distributed_optimizer")
_NUISANCES = ("budget", "order", "padding")


def is_legal(combination: Combination) -> bool:
    """Whether the configuration, the model and the suite's bound on ranks allow it."""
    sharded = combination.distributed_optimizer and combination.data * combination.context == 1
    if combination.world_size > MAX_WORLD_SIZE or sharded:
        return False
    if combination.model == "dense":
        if combination.expert * combination.expert_tensor > 1:
            return False
    elif combination.tensor[0] > 1 and not combination.tensor[1]:
        return False
    try:
        ParallelismConfig(**combination.parallelism).check_world_size(combination.world_size)
    except ConfigError:
        return False
    return True


def structures(levels: Levels) -> list[Combination]:
    """Every legal way to cut model and batch over ranks, small worlds first."""
    choices = itertools.product(*(levels[name] for name in _STRUCTURE))
    every = (Combination(**dict(zip(_STRUCTURE, values, strict=True))) for values in choices)
    return sorted((each for each in every if is_legal(each)), key=lambda each: each.world_size)


def exhaustive() -> list[Combination]:
    """Every structure under every algorithm; budget, order and padding take turns."""
    nuisances = list(itertools.product(*(ALL_LEVELS[name] for name in _NUISANCES)))
    found = []
    for number, structure in enumerate(structures(ALL_LEVELS)):
        for place, algorithm in enumerate(ALGORITHMS):
            values = nuisances[(3 * number + place) % len(nuisances)]
            settings = dict(zip(_NUISANCES, values, strict=True))
            found.append(replace(structure, algorithm=algorithm, **settings))
    return [each for each in found if each != each.reference]


def every_combination(levels: Levels) -> Iterator[Combination]:
    """Structures × algorithms × budget × order × padding."""
    free = ("algorithm", *_NUISANCES)
    for structure in structures(levels):
        for values in itertools.product(*(levels[name] for name in free)):
            yield replace(structure, **dict(zip(free, values, strict=True)))


def pairwise(levels: Levels) -> list[Combination]:
    """Combinations in which every pair of levels occurs that occurs in any legal one.

    Greedy: the combination with the most pairs that are still missing for what its ranks cost, the first of equals.
    """
    candidates = list(every_combination(levels))
    numbers = _level_numbers(candidates, levels)
    cost = np.array([2.0 + candidate.world_size for candidate in candidates])
    first, second = np.triu_indices(numbers.shape[1], k=1)
    missing = np.zeros((numbers.max() + 1, numbers.max() + 1), dtype=bool)
    missing[numbers[:, first], numbers[:, second]] = True
    chosen = []
    while missing.any():
        gain = missing[numbers[:, first], numbers[:, second]].sum(axis=1)
        best = int(np.argmax(gain / cost))
        chosen.append(candidates[best])
        missing[numbers[best, first], numbers[best, second]] = False
    return sorted(chosen, key=lambda each: each.world_size)


def _level_numbers(combinations: Sequence[Combination], levels: Levels) -> np.ndarray:
    """[combinations, factors]: a number for every level of every factor."""
    numbers = {pair: place for place, pair in enumerate((name, level) for name in levels for level in levels[name])}
    names = [field.name for field in fields(Combination)]
    return np.array([[numbers[name, getattr(each, name)] for name in names] for each in combinations])
