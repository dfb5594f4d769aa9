"""The data that moves through a step: prompts, samples, groups, batches, and mergeable metrics.

The losses use the metrics and promise to need torch alone, so NumPy is imported only where an array is made.
"""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

type IntArray = npt.NDArray[np.int32]
type LongArray = npt.NDArray[np.int64]
type ExpertArray = npt.NDArray[np.int16]
type FloatArray = npt.NDArray[np.float32]
type BoolArray = npt.NDArray[np.bool_]

FinishReason = Literal["stop", "length", "abort"]

CORRECT_SCORE = 0.99
"""Score from which an answer counts as right; verifiable answers score 0 or 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One problem, already in tokens.

    Attributes:
        id: Stable name, unique in its source ("train:17"); keys the sampling seed.
        token_ids: [P] int32.
        text: The text the tokens came from, for logs.
        answer: Reference answer, where the reward needs one.
        source: Name of the source it comes from; metrics are told apart by it.
        metadata: What the source's own scorer needs (a reasoning-gym entry, for one).
    """

    id: str
    token_ids: IntArray
    text: str
    answer: str | None = None
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class Sample:
    """One response to a prompt, token ids as the engine emitted them (never re-tokenised).

    Attributes:
        prompt_id: The prompt's id.
        sample_index: Which of the group's samples, from 0.
        response_token_ids: [R] int32, the stop token included where one was produced.
        rollout_log_probs: [R] float32, the engine's log-probability of each token at sampling temperature.
        finish_reason: "stop" (stop token), "length" (token limit) or "abort".
        policy_version: Version of the weights that began it.
        policy_versions: [R] int32, version of the weights that gave each token; None where all are of the first.
        routed_experts: [P + R − 1, MoE layers, k] int16, experts that the engine chose for each position but the last;
            None where they are not replayed.
        response_text: Decoded response, stop token left out.
        reward: What the policy is trained on, shaping included; set once scored.
        score: The verdict on the answer alone, before weights and shaping; set once scored.
        reward_terms: Every named term of the reward, weighted; they add up to `reward`.
        answer: The answer found in the response, where the reward looks for one.
    """

    prompt_id: str
    sample_index: int
    response_token_ids: IntArray
    rollout_log_probs: FloatArray
    finish_reason: FinishReason
    policy_version: int
    policy_versions: IntArray | None = None
    routed_experts: ExpertArray | None = None
    response_text: str = ""
    reward: float = float("nan")
    score: float = float("nan")
    reward_terms: Mapping[str, float] = field(default_factory=dict)
    answer: str | None = None

    @property
    def token_versions(self) -> IntArray:
        """[R] int32, version of the weights that gave each token."""
        import numpy as np

        if self.policy_versions is not None:
            return self.policy_versions
        return np.full(len(self.response_token_ids), self.policy_version, dtype=np.int32)

    @property
    def is_correct(self) -> bool:
        """Whether the verdict is that the answer is right; false where there is no score."""
        return self.score >= CORRECT_SCORE


@dataclass(slots=True, kw_only=True)
class RolloutGroup:
    """All samples of one prompt."""

    prompt: Prompt
    samples: list[Sample]

    @property
    def rewards(self) -> FloatArray:
        """[G] float32."""
        import numpy as np

        return np.array([sample.reward for sample in self.samples], dtype=np.float32)

    @property
    def has_signal(self) -> bool:
        """Whether the rewards differ, so that group-relative advantages are not all zero."""
        rewards = self.rewards
        return bool(rewards.size) and bool(rewards.max() != rewards.min())


PER_TOKEN_FIELDS = ("token_ids", "response_mask", "rollout_log_probs", "policy_versions")
"""Arrays of a batch with an entry for each token; the others have one for each sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """One rollout batch as whole packed arrays: N sequences (prompt then response), T tokens in all.

    Sequences are ordered group by group; `mini_batch_ids` cuts them into the rollout's optimizer steps.

    Attributes:
        token_ids: [T] int32, sequences end to end, without padding.
        sequence_lengths: [N] int32, prompt plus response.
        prompt_lengths: [N] int32.
        response_mask: [T] bool, true on response tokens that count.
        rollout_log_probs: [T] float32, the engine's, zero outside the response.
        rewards: [N] float32.
        advantages: [N] float32, one per sequence.
        group_ids: [N] int32, which prompt of the batch.
        mini_batch_ids: [N] int32 in [0, number of updates).
        policy_versions: [T] int32, version of the weights that gave each response token; −1 on prompts.
        temperature: Sampling temperature that log-probabilities are taken at.
        routing_file: File with the experts that the engine chose for the T tokens, seen by all trainer nodes
            (`data/routing_file.py`); None where they are not replayed.
    """

    token_ids: IntArray
    sequence_lengths: IntArray
    prompt_lengths: IntArray
    response_mask: BoolArray
    rollout_log_probs: FloatArray
    rewards: FloatArray
    advantages: FloatArray
    group_ids: IntArray
    mini_batch_ids: IntArray
    policy_versions: IntArray
    temperature: float
    routing_file: Path | None = None

    @property
    def num_sequences(self) -> int:
        """N."""
        return len(self.sequence_lengths)

    @property
    def num_mini_batches(self) -> int:
        """Optimizer steps this batch is cut into."""
        return int(self.mini_batch_ids.max()) + 1 if self.num_sequences else 0

    @property
    def sequence_starts(self) -> LongArray:
        """[N + 1] int64: where every sequence starts, and the end."""
        import numpy as np

        return np.concatenate([[0], np.cumsum(self.sequence_lengths, dtype=np.int64)])


ReductionKind = Literal["mean", "sum", "max", "min"]
_EXTREME_OF_NOTHING = {"max": -math.inf, "min": math.inf}


@dataclass(frozen=True, slots=True)
class Accumulator:
    """A metric that merges exactly over micro-batches and ranks.

    Attributes:
        kind: "mean" renders total / count; the others render total.
        total: 0-dim float64: a sum, or the extreme for "max" and "min".
        count: 0-dim float64: what a mean divides by; 1 for the others. A mean with count 0 is left out when rendered.
    """

    kind: ReductionKind
    total: Tensor
    count: Tensor

    @classmethod
    def mean(cls, values: Tensor, mask: Tensor | None = None) -> "Accumulator":
        """Mean of `values`, where `mask` (same shape, bool) is true if there is one."""
        total = _sum(values, mask)
        return cls("mean", total, torch.full_like(total, values.numel()) if mask is None else _sum(mask))

    @classmethod
    def ratio(cls, numerators: Tensor, denominators: Tensor, mask: Tensor | None = None) -> "Accumulator":
        """Σ `numerators` / Σ `denominators`, where `mask` is true if there is one; rendered as a "mean"."""
        return cls("mean", _sum(numerators, mask), _sum(denominators, mask))

    @classmethod
    def sum(cls, values: Tensor) -> "Accumulator":
        """Sum of `values`."""
        total = _sum(values)
        return cls("sum", total, torch.ones_like(total))

    @classmethod
    def max(cls, values: Tensor, mask: Tensor | None = None) -> "Accumulator":
        """Largest of `values`, or of those where `mask` is true (−inf where nothing is)."""
        return cls._extreme("max", values, mask, float("-inf"))

    @classmethod
    def min(cls, values: Tensor, mask: Tensor | None = None) -> "Accumulator":
        """Smallest of `values`, or of those where `mask` is true (+inf where nothing is)."""
        return cls._extreme("min", values, mask, float("inf"))

    @classmethod
    def _extreme(cls, kind: Literal["max", "min"], values: Tensor, mask: Tensor | None, fill: float) -> "Accumulator":
        if values.numel() == 0:
            total = torch.tensor(fill, dtype=torch.float64, device=values.device)
        else:
            filled = values.detach() if mask is None else torch.where(mask, values.detach(), fill)
            total = (filled.amax() if kind == "max" else filled.amin()).double()
        return cls(kind, total, torch.ones_like(total))

    def merge(self, other: "Accumulator") -> "Accumulator":
        """The accumulator of both parts together."""
        if self.kind != other.kind:
            raise ValueError(f"kind = {other.kind}: cannot merge into {self.kind}")
        if self.kind == "max":
            return Accumulator("max", torch.maximum(self.total, other.total), self.count)
        if self.kind == "min":
            return Accumulator("min", torch.minimum(self.total, other.total), self.count)
        count = self.count if self.kind == "sum" else self.count + other.count
        return Accumulator(self.kind, self.total + other.total, count)


def _sum(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum in float64, over `mask` where there is one; booleans are counted."""
    if values.dtype == torch.bool:
        return (values if mask is None else values & mask).count_nonzero().double()
    values = values.detach() if mask is None else torch.where(mask, values.detach(), 0.0)
    return values.sum(dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Values whose quantiles are wanted; merges exactly over micro-batches and ranks.

    The quantile at level q of n values is the ⌈q·n⌉-th smallest (nearest rank), so it is one of the values and the same
    however they are cut. A NaN does not count.

    Attributes:
        parts: [n] float32 each, NaN where a value does not count.
        levels: Wanted quantiles, in thousandths.
    """

    parts: tuple[Tensor, ...]
    levels: tuple[int, ...]

    @classmethod
    def of(cls, values: Tensor, mask: Tensor | None, levels: tuple[int, ...]) -> "Distribution":
        """Quantiles of `values`, rounded to float32, where `mask` (if any) is true; −0 counts as 0."""
        values = values.detach().float() + 0.0
        return cls(((values if mask is None else torch.where(mask, values, math.nan)).reshape(-1),), levels)

    def merge(self, other: "Distribution") -> "Distribution":
        """The values of both parts together."""
        if self.levels != other.levels:
            raise ValueError(f"levels = {other.levels}: cannot merge into {self.levels}")
        return Distribution(self.parts + other.parts, self.levels)

    def accumulators(self, name: str, quantiles: Tensor, count: Tensor) -> dict[str, Accumulator]:
        """Computed quantiles ([levels]) of `count` values under the names that they are reported by."""
        counted = (count > 0).double()
        return {
            f"{name}_{quantile_suffix(level)}": Accumulator(
                "mean", torch.where(count > 0, value.double(), 0.0), counted
            )
            for level, value in zip(self.levels, quantiles, strict=True)
        }

    def local_accumulators(self, name: str) -> dict[str, Accumulator]:
        """Quantiles of this part alone."""
        keys = self.sorted_keys()
        count = torch.searchsorted(keys, keys.new_tensor([FIRST_NAN_KEY])).squeeze(0)
        levels = torch.tensor(self.levels, device=keys.device)
        last = max(keys.numel() - 1, 0)
        places = nearest_rank(levels, count).clamp(max=last)
        quantiles = numbers_of(keys[places]) if keys.numel() else torch.zeros(len(self.levels), device=keys.device)
        return self.accumulators(name, quantiles, count)

    def sorted_keys(self) -> Tensor:
        """The values as integers in the order of the numbers, ascending, NaN last: [n] int32.

        They are the bits of a float32 with the magnitude bits of negative numbers flipped; integers sort faster.
        """
        return _sort(_flip_negative(torch.cat(self.parts).view(torch.int32)))


FIRST_NAN_KEY = 0x7F800001
"""Keys from here on are no numbers."""


def numbers_of(keys: Tensor) -> Tensor:
    """The float32 numbers that keys stand for."""
    return _flip_negative(keys.int()).view(torch.float32)


def _flip_negative(bits: Tensor) -> Tensor:
    """Flip the magnitude bits of what has the sign bit set."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _sort(keys: Tensor) -> Tensor:
    """Keys in ascending order. On the CPU by NumPy where it is installed, which is about ten times as fast."""
    if keys.device.type == "cpu" and importlib.util.find_spec("numpy"):
        import numpy as np

        return torch.from_numpy(np.sort(keys.numpy()))
    return keys.sort().values


def nearest_rank(levels: Tensor, counts: Tensor) -> Tensor:
    """Places from 0, in ascending order of `counts` values, of the quantiles at `levels` thousandths; 0 of nothing."""
    return ((levels * counts + 999) // 1000 - 1).clamp(min=0)


def quantile_suffix(level: int) -> str:
    """Ending of the name of the quantile at `level` thousandths: "p50", "p995", "p01"."""
    digits = f"{level:03d}".rstrip("0")
    return f"p{digits:0<2}"


Metrics = dict[str, Accumulator | Distribution]


def merge_metrics(parts: list[Metrics]) -> Metrics:
    """All parts merged key by key."""
    merged: Metrics = {}
    for part in parts:
        for key, value in part.items():
            merged[key] = merged[key].merge(value) if key in merged else value  # type: ignore[arg-type]
    return merged


def render_metrics(metrics: Mapping[str, Accumulator | Distribution]) -> dict[str, float]:
    """Numbers of all metrics that have one, fetched at once; what is taken over nothing is left out."""
    scalars: dict[str, Accumulator] = {}
    for key, value in metrics.items():
        scalars |= value.local_accumulators(key) if isinstance(value, Distribution) else {key: value}
    keys = sorted(scalars)
    if not keys:
        return {}
    values = torch.stack([torch.stack([scalars[key].total, scalars[key].count]) for key in keys]).tolist()
    rendered = {}
    for key, (total, count) in zip(keys, values, strict=True):
        kind = scalars[key].kind
        if kind == "mean":
            if count:
                rendered[key] = total / count
        elif total != _EXTREME_OF_NOTHING.get(kind):
            rendered[key] = total
    return rendered
