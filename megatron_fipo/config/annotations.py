"""What the types of a section's fields say: unions, sections, containers, defaults."""

import dataclasses
import functools
import operator
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any, TypeAliasType, Union, get_args, get_origin, get_type_hints

from megatron_fipo.config.base import ABSENT


def members_of(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type itself, with type aliases resolved."""
    if isinstance(annotation, TypeAliasType):
        return members_of(annotation.__value__)
    if get_origin(annotation) in (Union, UnionType):
        return tuple(member for part in get_args(annotation) for member in members_of(part))
    return (annotation,)


def union_of(members: Iterable[Any]) -> Any:
    """The union of some types."""
    return functools.reduce(operator.or_, members)


def sections_in(annotation: Any) -> list[Any]:
    """The sections among the members."""
    return [member for member in members_of(annotation) if dataclasses.is_dataclass(member)]


def container_of(annotation: Any) -> tuple[type, Any] | None:
    """(container, item type) of the tuple, list or mapping among the members, or None."""
    for member in members_of(annotation):
        origin, items = get_origin(member), get_args(member)
        if isinstance(origin, type) and issubclass(origin, list | tuple):
            return origin, union_of(item for item in items if item is not Ellipsis)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return dict, items[1]
    return None


def fields_of(cls: Any) -> dict[str, tuple[Any, Any]]:
    """(type, dataclass field) of each field of a section."""
    hints = get_type_hints(cls)
    return {field.name: (hints[field.name], field) for field in dataclasses.fields(cls) if field.init}


def default_of(field: Any) -> object:
    """A dataclass field's default, or `ABSENT`."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return ABSENT if field.default is dataclasses.MISSING else field.default
