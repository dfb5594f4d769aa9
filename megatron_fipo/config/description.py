"""What a root section holds, in words: every field of every section, each variant of a section included."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from megatron_fipo.config.annotations import container_of, default_of, fields_of, members_of, sections_in
from megatron_fipo.config.base import ABSENT

_TYPES = {int: "INT", float: "FLOAT", bool: "true|false", str: "TEXT", Path: "PATH", NoneType: "null", Any: "ANY"}


@dataclass(frozen=True)
class FieldDescription:
    """A field that holds a value.

    Attributes:
        path: Keys from the root, with dots between them.
        type: What it takes, such as `INT|null`.
        default: Its default as it is written, or none where it is required.
        text: What it means.
    """

    path: str
    type: str
    default: str | None
    text: str


@dataclass(frozen=True)
class SectionDescription:
    """A section, or one variant of it.

    Attributes:
        cls: Its class.
        path: Keys from the root, with dots between them; empty for the root.
        kind: Value of `type` that selects this variant, or none where there is one only.
        text: What the field that holds it means; empty for the root.
        fields: Its own fields, without the sections below it.
    """

    cls: Any
    path: str
    kind: str | None
    text: str
    fields: tuple[FieldDescription, ...]

    @property
    def class_text(self) -> str:
        """What the section is by itself."""
        return " ".join((inspect.getdoc(self.cls) or "").split())


def describe(cls: Any) -> list[SectionDescription]:
    """Describe a root section and those below it, each followed by its own.

    A section that several variants share comes once, after the last of them.
    """
    sections = _describe_section(cls, (), None, "")
    last = {(section.cls, section.path): place for place, section in enumerate(sections)}
    return [section for place, section in enumerate(sections) if last[section.cls, section.path] == place]


def _describe_section(cls: Any, keys: tuple[str, ...], kind: str | None, section_text: str) -> list[SectionDescription]:
    fields: list[FieldDescription] = []
    below: list[SectionDescription] = []
    documentation = _field_documentation(cls)
    for field_name, (annotation, field) in fields_of(cls).items():
        path, text = (*keys, field_name), documentation.get(field_name, "")
        sections = sections_in(annotation)
        below += _describe_variants(sections, path, text)
        container = container_of(annotation)
        if container and not sections:
            below += _describe_variants(sections_in(container[1]), (*path, "KEY"), text)
        if not sections:
            fields.append(FieldDescription(".".join(path), _describe_type(annotation), _describe_default(field), text))
    return [SectionDescription(cls, ".".join(keys), kind, section_text, tuple(fields)), *below]


def _describe_variants(sections: list[Any], path: tuple[str, ...], text: str) -> list[SectionDescription]:
    """The sections that a field may hold, its variants one after the other."""
    found: list[SectionDescription] = []
    for section in sections:
        kind = get_args(fields_of(section)["type"][0])[0] if len(sections) > 1 else None
        found += _describe_section(section, path, kind, text)
    return found


def _describe_type(annotation: Any) -> str:
    words: list[str] = []
    for member in members_of(annotation):
        container = container_of(member)
        if dataclasses.is_dataclass(member):
            words += [] if "section" in words else ["section"]
        elif get_origin(member) is Literal:
            words.extend(str(choice) for choice in get_args(member))
        elif container:
            item = _describe_type(container[1])
            words.append(f"{{KEY: {item}, ...}}" if container[0] is dict else f"[{item}, ...]")
        else:
            words.append(_TYPES.get(member, str(getattr(member, "__name__", member))))
    return "|".join(words)


def _describe_default(field: Any) -> str | None:
    value = default_of(field)
    if value is ABSENT:
        return None
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, dict):
        return str({key: _describe_item(item) for key, item in value.items()})
    return str(list(value) if isinstance(value, tuple) else value)


def _describe_item(value: Any) -> object:
    return f"type {value.type}" if dataclasses.is_dataclass(value) and hasattr(value, "type") else value


def _field_documentation(cls: Any) -> dict[str, str]:
    """Text under each field, the nearest class's first."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in itertools.pairwise(body.body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                found[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return found
