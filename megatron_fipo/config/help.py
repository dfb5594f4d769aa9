"""The help text of a command: every field of every section, each variant of a section included."""

import textwrap
from typing import Any

from megatron_fipo.config.description import SectionDescription, describe


def help_text(cls: Any, usage: str, width: int = 100) -> str:
    """Describe every field of a root section and of those below it.

    Args:
        cls: Root section.
        usage: How the command is written.
        width: Columns of the text.
    """
    lines = [f"usage: {usage}"]
    for section in describe(cls):
        lines += ["", *_section_lines(section, width)]
    return "\n".join(lines) + "\n"


def _section_lines(section: SectionDescription, width: int) -> list[str]:
    kind = f" (type {section.kind})" if section.kind else ""
    title = f"{section.path}{kind}: {section.text} " if section.path else ""
    lines = textwrap.wrap(title + section.class_text, width)
    for field in section.fields:
        lines.append(f"  --{field.path} {field.type}")
        default = "required" if field.default is None else f"default: {field.default}"
        text = f"{field.text} ({default})"
        lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines
