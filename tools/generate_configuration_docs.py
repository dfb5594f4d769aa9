"""Writes docs/configuration.md from the configuration's classes: `python tools/generate_configuration_docs.py`."""

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.config.base import ABSENT, ConfigError
from megatron_fipo.config.description import FieldDescription, SectionDescription, describe
from megatron_fipo.config.evaluate import EvaluateConfig
from megatron_fipo.config.run import RunConfig

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration

<!-- Written by tools/generate_configuration_docs.py from megatron_fipo/config. -->

A run is one YAML file plus overrides on the command line: `--optimizer.learning_rate 1e-6` sets the field
`learning_rate` of the section `optimizer`. Unknown and repeated keys are refused.

| command | what it shows |
|---|---|
| `megatron-fipo train --help` | this list |
| `megatron-fipo train CONFIG.yaml --help` | every value that a file leads to |
| `megatron-fipo check CONFIG.yaml` | what is wrong with a file; `WORLD_SIZE=32` in front checks it for 32 ranks |

The resolved configuration of a run is `config.yaml` in its run directory.

Under **Type**, `|` separates what is possible, `[…]` is a list and `{…}` a mapping. A section with variants says by
`type` which one it is. The rules in italics are those that the section checks by itself; "…" in them stands for another
field's value.
"""
EVALUATE = """\
# `megatron-fipo evaluate`

Takes the sections above, but for these.
"""
COLUMNS = ["| Field | Type | Default | What |", "|---|---|---|---|"]


@dataclass(frozen=True)
class Rule:
    """What a section checks of a field.

    Attributes:
        section: The section that checks.
        path: The field, from the root.
        text: The rule, as its error tells it.
    """

    section: SectionDescription
    path: str
    text: str


def page() -> str:
    """The whole page."""
    run = describe(RunConfig)
    known = {section.cls for section in run}
    evaluate = [section for section in describe(EvaluateConfig) if section.cls not in known]
    return "\n".join([INTRODUCTION, *_sections(run), EVALUATE, *_sections(evaluate)])


def _sections(sections: list[SectionDescription]) -> Iterator[str]:
    rules = [rule for section in sections for rule in _rules_of(section)]
    shown: dict[Any, str] = {}
    for section in sections:
        name = _name(section)
        yield f"## {name}\n"
        yield f"{section.text} {section.class_text}".strip() + "\n"
        if section.cls in shown:
            yield f"Its fields are those of {shown[section.cls]}.\n"
        else:
            yield "\n".join([*COLUMNS, *(_row(section, field, rules) for field in section.fields), ""])
        shown.setdefault(section.cls, name)


def _name(section: SectionDescription) -> str:
    kind = f", type {section.kind}" if section.kind else ""
    return f"`{section.path}`{kind}" if section.path else "The run"


def _row(section: SectionDescription, field: FieldDescription, rules: list[Rule]) -> str:
    # Another variant's rules are not this one's; a section above may name a field by its path.
    texts = [
        rule.text
        for rule in rules
        if rule.path == field.path and (rule.section.path != section.path or rule.section.cls is section.cls)
    ]
    words = [f"*{text[0].upper()}{text[1:]}.*" for text in dict.fromkeys(texts)]
    default = "required" if field.default is None else f"`{field.default}`"
    cells = [f"`{field.path.rpartition('.')[2]}`", f"`{field.type}`", default, " ".join([field.text, *words])]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _rules_of(section: SectionDescription) -> Iterator[Rule]:
    """Read the rules in a section's own checks, as far as fields and rules are written out there."""
    for base in section.cls.__mro__[:-1]:
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        for called in ast.walk(tree):
            function = getattr(sys.modules[base.__module__], _called_name(called), None)
            # A check that several sections share is a function of the module.
            if inspect.isfunction(function) and function.__module__ == base.__module__:
                tree.body += ast.parse(inspect.getsource(function)).body
        for field, text in _checks(tree, {}):
            keys = section.path.split(".") if section.path else []
            yield Rule(section, ConfigError(field, ABSENT, text, "").within(keys).field, text)


def _checks(node: ast.AST, names: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """(field, rule) of every check below; `names` holds the values that a loop gives its variables."""
    if isinstance(node, ast.For):
        names = names | _loop_values(node)
    if _called_name(node) in ("require", "ConfigError"):
        assert isinstance(node, ast.Call)
        words = {keyword.arg: keyword.value for keyword in node.keywords}
        rule = _text(words.get("rule"))
        field = words.get("field")
        fields = names.get(field.id, []) if isinstance(field, ast.Name) else [_text(field)]
        yield from ((name, rule) for name in fields if name and rule)
    for child in ast.iter_child_nodes(node):
        yield from _checks(child, names)


def _called_name(node: ast.AST) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def _loop_values(loop: ast.For) -> dict[str, list[str]]:
    """Texts that the loop's variable takes, or the first of several variables, where they are written out."""
    target, first = loop.target, isinstance(loop.target, ast.Tuple)
    name = target.elts[0] if isinstance(target, ast.Tuple) else target
    items = loop.iter.elts if isinstance(loop.iter, ast.Tuple | ast.List) else []
    values = [item.elts[0] if first and isinstance(item, ast.Tuple) else item for item in items]
    return {name.id: [_text(value) for value in values]} if isinstance(name, ast.Name) else {}


def _text(node: ast.AST | None) -> str:
    """A text that is written out, "…" where it holds a value; empty for anything else."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else "…" for part in node.values)
    return ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
