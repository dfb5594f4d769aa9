"""The prompts that training draws: an endless, resumable sequence over weighted sources."""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from megatron_fipo.config.base import require
from megatron_fipo.config.data import DataConfig
from megatron_fipo.data.duplicates import skip_duplicates
from megatron_fipo.data.held_out import HeldOut
from megatron_fipo.data.problem import UnusableRow
from megatron_fipo.data.row_index import SHOWN_ROWS
from megatron_fipo.data.source import Source, open_sources
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.types import Prompt

FIRST_PROMPTS = 1000
"""Prompts of each source that are turned into tokens before a run starts."""

logger = logging.getLogger(__name__)


class EndOfPrompts(RunError):
    """A source's prompts have been drawn `data.epochs` times."""


class Course:
    """The way through one source: epoch after epoch, each in an order that depends on seed, epoch and number alone.

    Args:
        source: The source.
        number: Its number among the sources.
        seed: Seed of the order.
        shuffle: Draw in a new random order each epoch; else in the source's order.

    Attributes:
        epoch: Whole passes so far.
        num_drawn: Prompts drawn so far.
        skipped: Rows of the first pass that turned out unusable when drawn, by reason.
    """

    def __init__(self, source: Source, number: int, seed: int, shuffle: bool) -> None:
        self.source = source
        self._number = number
        self.epoch = 0
        self.num_drawn = 0
        self.skipped: Counter[str] = Counter()
        self._seed = seed
        self._shuffle = shuffle
        self._position = 0
        self._order = self._order_of(0)

    def draw(self, epochs: int | None) -> Prompt:
        """The next prompt; rows that turn out unusable are passed over.

        Raises:
            EndOfPrompts: All have been drawn `epochs` times.
        """
        while epochs is None or self.epoch < epochs:
            place = int(self._order[self._position])
            try:
                prompt = self.source.prompt(place)
            except UnusableRow as error:
                self._pass_over(place, error)
                self._advance()
                continue
            self._advance()
            self.num_drawn += 1
            return prompt
        raise EndOfPrompts(
            f"data.epochs = {epochs}: the prompts of {self.source.origin} have been drawn that often; allow more "
            "epochs, or end the run earlier with num_steps"
        )

    def state_dict(self) -> dict[str, Any]:
        """Where it stands; plain JSON values."""
        return {
            "epoch": self.epoch,
            "position": self._position,
            "num_drawn": self.num_drawn,
            "skipped": dict(self.skipped),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.epoch, self._position = state["epoch"], state["position"]
        self.num_drawn, self.skipped = state["num_drawn"], Counter(state["skipped"])
        self._order = self._order_of(self.epoch)

    def _advance(self) -> None:
        self._position += 1
        if self._position == len(self._order):
            self.epoch, self._position = self.epoch + 1, 0
            self._order = self._order_of(self.epoch)

    def _pass_over(self, place: int, error: UnusableRow) -> None:
        # A later pass meets the same rows again.
        if self.epoch > 0:
            return
        self.skipped[error.reason] += 1
        if self.skipped[error.reason] <= SHOWN_ROWS:
            row = self.source.row_number(place)
            last = "; more are only counted" if self.skipped[error.reason] == SHOWN_ROWS else ""
            logger.warning("%s: skipped %s row %d, %s%s", self.source.origin, error.reason, row, error.detail, last)

    def _order_of(self, epoch: int) -> npt.NDArray[np.int64]:
        if not self._shuffle:
            return self.source.places
        generator = np.random.default_rng(np.random.SeedSequence([self._seed, epoch, self._number]))
        return generator.permutation(self.source.places)


class PromptStream:
    """Draws training prompts, one source after the other in proportion to their weights.

    Each draw goes to the source that is furthest behind its share; nothing about it is random. Within a source every
    epoch draws each prompt once. What the next draw gives depends on the numbers of draws so far alone, never on how
    they were asked for.

    A row that turns out unusable only when it is drawn, because it has too few or too many tokens or the chat template
    refuses it, is passed over, counted and, for the first few, reported.

    Args:
        config: Sources, and how prompts become tokens.
        tokenizer: The model's tokenizer.
        seed: Seed of the order.

    Attributes:
        first_prompts: The first prompts of each source, by its name, to check a reward with.
        held_out: The prompts that are never drawn; None without data.held_out.

    Raises:
        ConfigError: A source cannot be read, has no usable prompt, or cannot spare what is held out.
    """

    def __init__(self, config: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._sources = open_sources(config.train, config, tokenizer, "data.train")
        if config.deduplicate:
            skip_duplicates(self._sources)
        for source in self._sources:
            source.report()
        # This also makes sure that no source is passed over for ever.
        self.first_prompts = {source.name: source.first_prompts(FIRST_PROMPTS) for source in self._sources}
        self.held_out = None if config.held_out is None else HeldOut(self._sources, config.held_out)
        self._courses = [Course(source, number, seed, config.shuffle) for number, source in enumerate(self._sources)]
        self._fingerprint = self._make_fingerprint()
        weights = [source.config.weight for source in self._sources]
        self._shares = [weight / sum(weights) for weight in weights]

    @property
    def epoch(self) -> int:
        """Whole passes over every source so far."""
        return min(course.epoch for course in self._courses)

    @property
    def num_prompts(self) -> int:
        """Prompts of all sources, less those whose length turns out wrong when they are drawn."""
        return sum(len(source.places) for source in self._sources)

    @property
    def most_prompts(self) -> float:
        """How many prompts can be drawn at most; infinite without a bound on epochs."""
        if self._config.epochs is None:
            return float("inf")
        sizes = [len(source.places) * self._config.epochs for source in self._sources]
        return min(size / share for size, share in zip(sizes, self._shares, strict=True))

    def next(self, n: int) -> list[Prompt]:
        """Draw the next `n` prompts; one may come again where they reach into the next epoch.

        Raises:
            EndOfPrompts: A source's prompts have been drawn `data.epochs` times.
            RunError: A file has changed since the run began.
        """
        return [self._next_course().draw(self._config.epochs) for _ in range(n)]

    def count_shared(self, ranks: npt.NDArray[np.uint64]) -> int:
        """How many of the `Source.ranks` of other prompts are also those of prompts that are drawn here."""
        return int(np.isin(ranks, np.concatenate([source.ranks for source in self._sources])).sum())

    def counters(self) -> dict[str, float]:
        """Draws and epochs of each source, and rows skipped for each reason, since the run's first step."""
        counters: dict[str, float] = {}
        skipped: Counter[str] = Counter()
        for course in self._courses:
            counters[f"data/{course.source.name}/drawn"] = float(course.num_drawn)
            counters[f"data/{course.source.name}/epoch"] = float(course.epoch)
            skipped.update(course.skipped)
            skipped.update({reason: rows.count for reason, rows in course.source.rows.index.skipped.items()})
        return counters | {f"data/skipped_{reason}": float(count) for reason, count in skipped.items()}

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here; plain JSON values, a few for each source."""
        courses = {course.source.name: course.state_dict() for course in self._courses}
        return {"fingerprint": self._fingerprint, "sources": courses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the stream that wrote `state` stood.

        Raises:
            ConfigError: It read other prompts, or in another order.
        """
        written = state["fingerprint"]
        for field, value in self._fingerprint.items():
            require(
                field in written and written[field] == value,
                field=field,
                value=value,
                rule=f"the checkpoint was written with {written.get(field)}, and a resumed run keeps its prompts",
                way_out="restore it, or start a new run from the checkpoint's weights",
            )
        for course in self._courses:
            course.load_state_dict(state["sources"][course.source.name])

    def _next_course(self) -> Course:
        """The source that is furthest behind its share; the first of equals."""
        total = sum(course.num_drawn for course in self._courses) + 1
        behind = [share * total - course.num_drawn for share, course in zip(self._shares, self._courses, strict=True)]
        return self._courses[behind.index(max(behind))]

    def _make_fingerprint(self) -> dict[str, Any]:
        """What the order and the content of the prompts depend on, by field of the configuration."""
        config = self._config
        return {
            "data.train": [f"{source.name}: {self._digest_of(source)}" for source in self._sources],
            "data.held_out": config.held_out,
            "data.deduplicate": config.deduplicate,
            "data.shuffle": config.shuffle,
            "data.min_prompt_tokens": config.min_prompt_tokens,
            "data.max_prompt_tokens": config.max_prompt_tokens,
            "seed": self._seed,
        }

    def _digest_of(self, source: Source) -> str:
        """Digest of a source's content and weight, and of the tokens that its first prompts become."""
        digest = hashlib.sha256(repr((source.rows.digest, source.rows.description, source.config.weight)).encode())
        for prompt in self.first_prompts[source.name]:
            digest.update(repr((prompt.id, prompt.token_ids.tolist(), prompt.answer)).encode(errors="backslashreplace"))
        return digest.hexdigest()[:16]
