"""What came of every problem of an evaluation, and the numbers of the whole."""

from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_fipo.config.evaluation import EvaluationConfig
from megatron_fipo.metrics.estimators import consensus_at_k, mean_interval, pass_at_k
from megatron_fipo.types import RolloutGroup, Sample

# Comparisons of two answers for one problem. The most frequent answers are compared first, so beyond the limit only
# rare spellings stay apart.
MAX_COMPARISONS = 256

SameAnswer = Callable[[Sequence[tuple[str, str]]], Awaitable[Sequence[bool]]]
"""Whether the two answers of each pair are verified to be equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerClass:
    """Samples of one problem with equal answers.

    Attributes:
        answer: The most frequent spelling, the first to appear among equally frequent ones.
        count: Samples.
        correct: Whether a sample of the class was scored as correct.
    """

    answer: str
    count: int
    correct: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemResult:
    """One line of problems.jsonl.

    Attributes:
        prompt_id: The problem.
        source: Its source.
        reference: Its reference answer.
        num_samples: n.
        num_correct: c.
        num_unscored: Samples without a score, because scoring failed; they count as wrong.
        num_truncated: Samples cut off by the token limit.
        response_length_mean: Tokens of a response, on average.
        answers: Classes of equal answers, the most frequent first. Samples without an answer are in none.
        majority_answer: The answer with the most samples, the first to appear among tied ones; None without any.
        consensus: Cons@n, a fraction where correct and wrong answers are tied.
        greedy_correct: Whether the greedy response is correct; None where none was taken.
        num_responses: Lines of responses.jsonl about the problem.
    """

    prompt_id: str
    source: str
    reference: str | None
    num_samples: int
    num_correct: int
    num_unscored: int
    num_truncated: int
    response_length_mean: float
    answers: tuple[AnswerClass, ...]
    majority_answer: str | None
    consensus: float
    greedy_correct: bool | None
    num_responses: int

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "ProblemResult":
        """What `to_json` gave."""
        return cls(**{**fields, "answers": tuple(AnswerClass(**each) for each in fields["answers"])})


async def problem_results(
    groups: Sequence[RolloutGroup], greedy: Sequence[RolloutGroup], num_samples: int, same_answer: SameAnswer
) -> list[ProblemResult]:
    """What came of every problem.

    Args:
        groups: The sampled responses of every problem; those that could not be scored are missing.
        greedy: The greedy response of every problem likewise, or nothing.
        num_samples: Responses sampled for each problem.
        same_answer: Compares answers.
    """
    classes = await _classes_of_equal_answers(groups, same_answer)
    responses: Sequence[Sequence[Sample] | None] = [group.samples for group in greedy] or [None] * len(groups)
    return [_result(*each, num_samples) for each in zip(groups, classes, responses, strict=True)]


def _result(
    group: RolloutGroup, answers: tuple[AnswerClass, ...], greedy: Sequence[Sample] | None, num_samples: int
) -> ProblemResult:
    samples = group.samples
    sizes, correct = [each.count for each in answers], [each.correct for each in answers]
    return ProblemResult(
        prompt_id=group.prompt.id,
        source=group.prompt.source,
        reference=group.prompt.answer,
        num_samples=num_samples,
        num_correct=sum(sample.is_correct for sample in samples),
        num_unscored=num_samples - len(samples),
        num_truncated=sum(sample.finish_reason == "length" for sample in samples),
        response_length_mean=sum(len(sample.response_token_ids) for sample in samples) / max(len(samples), 1),
        answers=answers,
        majority_answer=answers[0].answer if answers else None,
        consensus=consensus_at_k(sizes, correct, num_samples, num_samples),
        greedy_correct=None if greedy is None else any(sample.is_correct for sample in greedy),
        num_responses=len(samples) + len(greedy or ()),
    )


async def _classes_of_equal_answers(
    groups: Sequence[RolloutGroup], same_answer: SameAnswer
) -> list[tuple[AnswerClass, ...]]:
    spellings = [_spellings(group.samples) for group in groups]
    pairs = [_pairs_to_compare(list(counts)) for counts in spellings]
    # Problems share answers; each pair is compared once.
    distinct = list(dict.fromkeys(pair for of_problem in pairs for pair in of_problem))
    verdicts = dict(zip(distinct, await same_answer(distinct) if distinct else [], strict=True))
    return [
        _merge(group.samples, counts, [pair for pair in of_problem if verdicts[pair]])
        for group, counts, of_problem in zip(groups, spellings, pairs, strict=True)
    ]


def _spellings(samples: Sequence[Sample]) -> dict[str, int]:
    """How often each answer was given, the most frequent first, then in order of appearance."""
    return dict(Counter(sample.answer for sample in samples if sample.answer is not None).most_common())


def _pairs_to_compare(spellings: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [(first, second) for place, second in enumerate(spellings) for first in spellings[:place]]
    return pairs[:MAX_COMPARISONS]


def _merge(
    samples: Sequence[Sample], counts: Mapping[str, int], equal: Sequence[tuple[str, str]]
) -> tuple[AnswerClass, ...]:
    """Classes of spellings that a chain of equal pairs joins."""
    leader = {spelling: spelling for spelling in counts}
    for first, second in equal:
        joined, kept = leader[second], leader[first]
        leader = {spelling: kept if other == joined else other for spelling, other in leader.items()}
    right = {leader[sample.answer] for sample in samples if sample.answer is not None and sample.is_correct}
    sizes: Counter[str] = Counter()
    for spelling, count in counts.items():
        sizes[leader[spelling]] += count
    return tuple(AnswerClass(answer=name, count=count, correct=name in right) for name, count in sizes.most_common())


def response_records(groups: Sequence[RolloutGroup], greedy: Sequence[RolloutGroup]) -> list[dict[str, Any]]:
    """Lines of responses.jsonl: every problem's samples, then its greedy response where one was taken."""
    records = []
    for place, group in enumerate(groups):
        records += [_record(group, sample, greedy=False) for sample in group.samples]
        records += [_record(greedy[place], sample, greedy=True) for sample in greedy[place].samples] if greedy else []
    return records


def _record(group: RolloutGroup, sample: Sample, greedy: bool) -> dict[str, Any]:
    return {
        "prompt_id": group.prompt.id,
        "source": group.prompt.source,
        "sample_index": sample.sample_index,
        "greedy": greedy,
        "answer": sample.answer,
        "score": float(sample.score),
        "finish_reason": sample.finish_reason,
        "response_tokens": len(sample.response_token_ids),
        "response": sample.response_text,
    }


def evaluation_metrics(results: Sequence[ProblemResult], config: EvaluationConfig, seed: int) -> dict[str, float]:
    """All numbers of an evaluation, by the names they are logged under.

    Args:
        results: At least one.
        config: Which k, and how intervals are made.
        seed: Of the intervals.

    Returns:
        `eval/accuracy` (Avg@k over all problems) and others of the whole, and `eval/<source>/avg_at_k` and others of
        every source that has a name.
    """
    metrics = {
        "eval/num_problems": float(len(results)),
        "eval/num_unscored": float(sum(result.num_unscored for result in results)),
    }
    metrics |= _with_interval("eval/accuracy", _averages(results), config, seed, samples=config.samples_per_problem)
    metrics |= _common(results, "eval", config, seed)
    for source in dict.fromkeys(result.source for result in results if result.source):
        own = [result for result in results if result.source == source]
        metrics |= _source_metrics(own, f"eval/{source}", config, seed)
    return metrics


def _source_metrics(
    results: Sequence[ProblemResult], prefix: str, config: EvaluationConfig, seed: int
) -> dict[str, float]:
    k = config.samples_per_problem
    metrics = {f"{prefix}/num_problems": float(len(results))}
    metrics |= _with_interval(f"{prefix}/avg_at_{k}", _averages(results), config, seed, samples=k)
    metrics |= _common(results, prefix, config, seed)
    if k == 1:
        # One sample agrees with itself: all three are the same number.
        return metrics
    for size in sorted({*config.consensus_at, k}):
        values = [
            consensus_at_k([each.count for each in result.answers], [each.correct for each in result.answers], k, size)
            for result in results
        ]
        metrics |= _with_interval(f"{prefix}/cons_at_{size}", values, config, seed)
    correct = [result.num_correct for result in results]
    for size in sorted({*config.pass_at, k}):
        values = pass_at_k([k] * len(results), correct, size).tolist()
        metrics |= _with_interval(f"{prefix}/pass_at_{size}", values, config, seed)
    return metrics


def _common(results: Sequence[ProblemResult], prefix: str, config: EvaluationConfig, seed: int) -> dict[str, float]:
    count = len(results)
    metrics = {
        f"{prefix}/response_length_mean": sum(result.response_length_mean for result in results) / count,
        f"{prefix}/truncated_fraction": sum(result.num_truncated / result.num_samples for result in results) / count,
    }
    greedy = [float(result.greedy_correct) for result in results if result.greedy_correct is not None]
    return metrics | (_with_interval(f"{prefix}/greedy_accuracy", greedy, config, seed) if greedy else {})


def _averages(results: Sequence[ProblemResult]) -> list[float]:
    return [result.num_correct / result.num_samples for result in results]


def _with_interval(
    name: str, values: Sequence[float], config: EvaluationConfig, seed: int, samples: int | None = None
) -> dict[str, float]:
    """A mean over problems and its limits; `samples` where the values are shares of so many samples."""
    nested = samples if config.interval == "problems_and_samples" else None
    low, high = mean_interval(values, confidence=config.confidence, seed=seed, samples_per_problem=nested)
    return {name: sum(values) / len(values), f"{name}_low": low, f"{name}_high": high}
