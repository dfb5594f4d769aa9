"""What every configuration section is made of: the class decorator, the error, and the check."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import dataclass_transform

_PYDANTIC_SETTINGS = "__pydantic_config__"


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def config_class[T](cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass with slots.

    A section checks its own values in `__post_init__`, so that YAML, the command line and Python run the same
    checks. A pydantic `TypeAdapter` over the class refuses unknown keys.
    """
    decorated = dataclass(frozen=True, kw_only=True, slots=True)(cls)
    setattr(decorated, _PYDANTIC_SETTINGS, {"extra": "forbid"})
    return decorated


class Absent:
    """Stands for a value that was not given, in error texts."""

    def __str__(self) -> str:
        return "(not given)"

    def __repr__(self) -> str:
        return "ABSENT"

    def __reduce__(self) -> str:
        return "ABSENT"


ABSENT = Absent()


class ConfigError(ValueError):
    """A configuration value that cannot be used, told as `field = value: rule; way out`.

    Attributes:
        field: Dotted path of the field. A section names its own fields; the path to the section is put in
            front of them while a file or a command line is read.
        value: What was given.
        rule: What the value breaks.
        way_out: What to write instead.
    """

    def __init__(self, field: str, value: object, rule: str, way_out: str) -> None:
        super().__init__(field, value, rule, way_out)
        self.field = field
        self.value = value
        self.rule = rule
        self.way_out = way_out

    def __str__(self) -> str:
        shown = "''" if self.value == "" else str(self.value)
        return f"{self.field} = {shown}: {self.rule}; {self.way_out}"

    def within(self, path: Sequence[str]) -> "ConfigError":
        """Return this error with its field seen from the root.

        Args:
            path: Keys from the root to the section that raised the error. Trailing keys that the field
                already starts with are not repeated: a section may write its field with its name in front.
        """
        keys = tuple(self.field.split("."))
        own = max(size for size in range(len(path) + 1) if keys[:size] == tuple(path[len(path) - size :]))
        field = ".".join((*path[: len(path) - own], *keys))
        return ConfigError(field, self.value, self.rule, self.way_out)


def require(condition: bool, *, field: str, value: object, rule: str, way_out: str) -> None:
    """Raise `ConfigError` unless `condition` holds.

    Write the condition as what must be true (`value > 0`, not `not value <= 0`): then it also refuses nan.

    Args:
        condition: Whether the value can be used.
        field: Name of the field, dotted where it lies deeper.
        value: What was given.
        rule: What an unusable value breaks, e.g. "must be positive".
        way_out: What to write instead, e.g. "use 1e-6 or more".

    Raises:
        ConfigError: The condition does not hold.
    """
    if not condition:
        raise ConfigError(field, value, rule, way_out)


def require_pattern(pattern: str, *, field: str, group_holds: str) -> None:
    """Raise `ConfigError` unless `pattern` is a regular expression with a group.

    Args:
        pattern: What was given.
        field: Name of the field.
        group_holds: What the group is there for, as in "the answer".

    Raises:
        ConfigError: The pattern cannot be compiled or has no group.
    """
    try:
        groups, problem = re.compile(pattern).groups, f"must have a group that holds {group_holds}"
    except re.error as error:
        groups, problem = 0, f"must be a regular expression ({error})"
    way_out = f'write the part with {group_holds} in parentheses, such as "#(\\d+)"'
    require(groups >= 1, field=field, value=pattern, rule=problem, way_out=way_out)
