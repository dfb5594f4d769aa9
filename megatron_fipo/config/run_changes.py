"""How the configuration of a resumed run differs from the one that it began with, and which differences it may have."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_fipo.config.base import ConfigError, require

Rule = Literal["free", "ask", "keep"]
"""What becomes of a difference.

"free": it leaves what is learnt as it is, but for rounding. "ask": the run goes on as another one would, so it must be
named in `checkpoint.accept_changes`. "keep": what the checkpoint holds would not fit it.
"""

ACCEPTED = "checkpoint.accept_changes"
ABSENT = "(not there)"

# Fields and sections; the longest one that a field lies in counts, numbers of a list's items left out. All others are
# "ask".
_RULES: Mapping[str, Rule] = {
    "output_dir": "free",
    "num_steps": "free",
    "checkpoint": "free",
    "data": "keep",
    "data.epochs": "free",
    "data.evaluation": "ask",
    "data.evaluation.name": "free",
    "data.evaluation.path": "free",
    # `require_same_sources` looks at names, and the prompt stream at what the files hold.
    "data.train.name": "free",
    "data.train.path": "free",
    "evaluation.every_steps": "free",
    "metrics": "free",
    "model.log_prob_chunk_tokens": "free",
    "model.recompute_logits": "free",
    "parallelism": "free",
    "reward.max_workers": "free",
    "reward.worker_memory_gib": "free",
    "rollout.colocated": "free",
    "rollout.max_batch_sequences": "free",
    "rollout.max_requests_in_flight": "free",
    "rollout.sglang": "free",
    "safeguards": "free",
    "watchdog": "free",
    "weight_sync": "free",
    "mode": "keep",
    "model.dtype": "keep",
    "rollout.engine": "keep",
    "seed": "keep",
}


@dataclass(frozen=True, slots=True)
class Change:
    """A field that differs.

    Attributes:
        field: Its path, as "optimizer.learning_rate".
        before: What the run has had.
        now: What is asked for.
        rule: What becomes of it.
    """

    field: str
    before: Any
    now: Any
    rule: Rule

    def __str__(self) -> str:
        """One line."""
        return f"{self.field}: {self.before} → {self.now}"


def changes_between(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Every field that differs, in the order of the configuration.

    Args:
        before: The plain values that the run has had.
        now: Those that are asked for.
    """
    old, new = dict(_leaves(before)), dict(_leaves(now))
    # It is about the changes themselves.
    for leaves in (old, new):
        leaves.pop(ACCEPTED, None)
    fields = [*new, *(field for field in old if field not in new)]
    return [
        Change(field, old.get(field, ABSENT), new.get(field, ABSENT), rule_of(field))
        for field in fields
        if old.get(field, ABSENT) != new.get(field, ABSENT)
    ]


def touch_samples(changes: Iterable[Change]) -> bool:
    """Whether other samples would be generated after these differences, as far as the rules tell."""
    return any(change.rule == "ask" for change in changes)


def check_changes(changes: Sequence[Change], accepted: Sequence[str], known: Iterable[str]) -> None:
    """Refuse differences that a resumed run may not have.

    Args:
        changes: The differences.
        accepted: Fields and sections that may differ although they change what is learnt.
        known: Fields that there are.

    Raises:
        ConfigError: For the first difference that is refused, or a name that is none.
    """
    fields = set(known)
    for name in accepted:
        require(
            any(_lies_in(field, [name]) for field in fields),
            field=ACCEPTED,
            value=name,
            rule="must name fields or sections, and there is no such one",
            way_out="write it as in the configuration, such as optimizer.learning_rate",
        )
    for change in changes:
        if change.rule == "keep":
            raise ConfigError(
                field=change.field,
                value=change.now,
                rule=f"must stay {change.before}, as the run in output_dir has it{_reason(change.field)}",
                way_out="restore it, or choose another output_dir for a new run",
            )
    asked = [change for change in changes if change.rule == "ask" and not _lies_in(change.field, accepted)]
    if asked:
        names = ", ".join(change.field for change in asked)
        raise ConfigError(
            field=asked[0].field,
            value=asked[0].now,
            rule=f"the run in output_dir has {asked[0].before}, and what it learns depends on it",
            way_out=(
                f"restore it, choose another output_dir, or go on with what is new by --checkpoint.accept_changes "
                f'"[{names}]"'
            ),
        )


def require_same_sources(before: Sequence[str], now: Sequence[str]) -> None:
    """Refuse other names of training sources: prompts' ids, and so the seeds of their samples, are made with them.

    Args:
        before: Names that the run has had.
        now: Those that it is to have, each given or made from where the prompts come from.

    Raises:
        ConfigError: They differ.
    """
    require(
        list(now) == list(before) or (len(now) == len(before) and sorted(now) != sorted(before)),
        field="data.train",
        value=", ".join(now),
        rule=f"must stay the sources {', '.join(before)}, in this order{_reason('data.train')}",
        way_out="restore them, or choose another output_dir for a new run",
    )
    for place, (old, new) in enumerate(zip(before, now, strict=True)):
        field = "data.train.name" if len(now) == 1 else f"data.train.{place}.name"
        require(
            new == old,
            field=field,
            value=new,
            rule=f"must stay {old}, as the run in output_dir has it: prompts are known by their source's name, "
            "which is that of its file, or task and seed, where none is given",
            way_out=f"set {field} to {old}; what it comes from may have any name then",
        )


def field_names(values: Mapping[str, Any]) -> list[str]:
    """Paths of all fields of plain values."""
    return [field for field, _ in _leaves(values)]


def rule_of(field: str) -> Rule:
    """What becomes of a difference in a field."""
    keys = [key for key in field.split(".") if not key.isdecimal()]
    for length in range(len(keys), 0, -1):
        if (rule := _RULES.get(".".join(keys[:length]))) is not None:
            return rule
    return "ask"


def _lies_in(field: str, places: Sequence[str]) -> bool:
    return any(field == place or field.startswith(f"{place}.") for place in places)


def _reason(field: str) -> str:
    return ", because a run that goes on keeps its prompts and their order" if _lies_in(field, ["data"]) else ""


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, Sequence) and value and all(isinstance(item, Mapping) for item in value):
            yield from _leaves({str(number): item for number, item in enumerate(value)}, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
