"""The help text of a command: every field of every section, each variant of a section included."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from megatron_fipo.config.annotations import container_of, default_of, fields_of, members_of, sections_in
from megatron_fipo.config.base import ABSENT

_TYPES = {int: "INT", float: "FLOAT", bool: "true|false", str: "TEXT", Path: "PATH", NoneType: "null", Any: "ANY"}


def help_text(cls: Any, usage: str, width: int = 100) -> str:
    """Describe every field of a root section and of those below it.

    Args:
        cls: Root section.
        usage: How the command is written.
        width: Columns of the text.
    """
    return "\n".join([f"usage: {usage}", "", *_section_lines(cls, (), "", width)]) + "\n"


def _section_lines(cls: Any, keys: tuple[str, ...], title: str, width: int) -> list[str]:
    """A section's own fields, then the sections below it."""
    lines = textwrap.wrap(" ".join(f"{title} {inspect.getdoc(cls)}".split()), width)
    below: list[str] = []
    documentation = _field_documentation(cls)
    for field_name, (annotation, field) in fields_of(cls).items():
        path, text = (*keys, field_name), documentation.get(field_name, "")
        sections = sections_in(annotation)
        below += _lines_below(sections, path, text, width)
        container = container_of(annotation)
        if container and not sections:
            below += _lines_below(sections_in(container[1]), (*path, "KEY"), text, width)
        if not sections:
            lines.append(f"  --{'.'.join(path)} {_describe_type(annotation)}")
            text = f"{text} ({_describe_default(field)})"
            lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines + below


def _lines_below(sections: list[Any], path: tuple[str, ...], text: str, width: int) -> list[str]:
    """The sections that a field may hold, its variants one after the other."""
    lines: list[str] = []
    for section in sections:
        kind = get_args(fields_of(section)["type"][0])[0] if len(sections) > 1 else None
        name = ".".join(path) + (f" (type {kind})" if kind else "")
        lines += ["", *_section_lines(section, path, f"{name}: {text}", width)]
    return lines


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


def _describe_default(field: Any) -> str:
    value = default_of(field)
    if value is ABSENT:
        return "required"
    if value is None or isinstance(value, bool):
        return f"default: {'null' if value is None else str(value).lower()}"
    if isinstance(value, dict):
        value = {key: f"type {each.type}" if dataclasses.is_dataclass(each) else each for key, each in value.items()}
    return f"default: {list(value) if isinstance(value, tuple) else value}"


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
