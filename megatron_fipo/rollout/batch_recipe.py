"""What training batches are made of, and a batch's groups."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_fipo.config.algorithm import AlgorithmConfig
from megatron_fipo.data.stream import PromptStream
from megatron_fipo.rollout.ledger import OpenPrompt, Settled
from megatron_fipo.types import RolloutGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecipe:
    """What training batches are made of, and into what.

    Attributes:
        stream: The training prompts.
        algorithm: Says whether groups without a signal are set aside, how advantages are taken, and how many updates
            share a batch.
        num_records: Samples of a batch that are kept for people to read.
        journal: Folder where every batch of a served engine is written down before it is used; None writes none.
        routing: Folder for the experts that a served engine chose, where they are replayed; all trainer nodes see it.
    """

    stream: PromptStream
    algorithm: AlgorithmConfig
    num_records: int
    journal: Path | None = None
    routing: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectedGroups:
    """A full batch of scored groups.

    Attributes:
        groups: As many as the step wants, in the order they were drawn.
        metrics: Counters of the rollout.
        num_drawn: How many prompts have been drawn so far; of served engines.
        settled: What became of prompts since the batch before; of served engines.
        open_prompts: Prompts that were drawn and have come to no end yet; of served engines.
    """

    groups: list[RolloutGroup]
    metrics: dict[str, float]
    num_drawn: int = 0
    settled: Sequence[Settled] = ()
    open_prompts: Sequence[OpenPrompt] = ()
