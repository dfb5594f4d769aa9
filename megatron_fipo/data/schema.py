"""Where prompt and reference answer stand in a row: named by the configuration, or recognised."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from megatron_fipo.config.data import FilePrompts
from megatron_fipo.data.problem import Messages, UnusableRow

_GROUPED_NUMBER = re.compile(r"[-+$]*\d{1,3}(,\d{3})+(\.\d+)?")


class WrittenNumber(str):
    """A JSON number as it is written, so that "1.50" stays that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """Columns of a source, and how the reference is taken out of the answer column.

    Attributes:
        name: What it is called in the log.
        prompt_field: Column of the prompt; dots reach into nested columns.
        answer_field: Column of the answer, likewise.
        answer_pattern: Regular expression whose first group is the reference, the last match counting; None takes
            all of the text. A number is taken as it is.
        join_thousands: Whether "1,234" is the number 1234.
    """

    name: str
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    answer_pattern: str | None = None
    join_thousands: bool = False

    def find(self, content: Any) -> tuple[str | Messages, str]:
        """Prompt and reference answer of a row.

        Args:
            content: The row: column names and values.

        Raises:
            UnusableRow: One of them is missing, blank or of a wrong type.
        """
        if type(content) is not dict:
            raise UnusableRow("broken", "not an object with columns")
        prompt = look_up(content, self.prompt_field)
        if type(prompt) is not str or not prompt or prompt.isspace():
            self._check_prompt(prompt)
        return prompt, self._reference(look_up(content, self.answer_field))

    def _check_prompt(self, prompt: Any) -> None:
        key = self.prompt_field
        if prompt is None or prompt == []:
            raise UnusableRow("empty", f'no "{key}"')
        if type(prompt) is list:
            for turn in prompt:
                texts = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
                if not all(type(text) is str for text in texts):
                    raise UnusableRow("broken", f'"{key}" has a message without a text role and content')
            if prompt[-1]["role"] == "assistant":
                raise UnusableRow("broken", f'"{key}" ends with the assistant\'s turn')
            prompt = prompt[-1]["content"]
        if type(prompt) is not str:
            raise UnusableRow("broken", f'"{key}" is neither text nor a list of messages')
        if not prompt.strip():
            raise UnusableRow("empty", f'"{key}" is blank')

    def _reference(self, answer: Any) -> str:
        # A missing number in a table is "not a number".
        if answer is None or answer != answer:
            raise UnusableRow("no_answer", f'no "{self.answer_field}"')
        if not isinstance(answer, str):
            if isinstance(answer, bool) or not isinstance(answer, int | float | Decimal):
                raise UnusableRow("broken", f'"{self.answer_field}" is neither text nor a number')
            return str(answer)
        if not answer or answer.isspace():
            raise UnusableRow("no_answer", f'"{self.answer_field}" is blank')
        if self.answer_pattern is not None and type(answer) is str:
            answer = self._matched(answer)
        if self.join_thousands and _GROUPED_NUMBER.fullmatch(answer.strip()):
            answer = answer.replace(",", "")
        return str(answer)

    def _matched(self, answer: str) -> str:
        assert self.answer_pattern is not None
        reference = None
        for match in re.finditer(self.answer_pattern, answer):
            reference = match[1]
        if reference is None or not reference.strip():
            shown = answer if len(answer) <= 80 else f"...{answer[-80:]}"
            raise UnusableRow("no_answer", f'answer_pattern finds nothing in "{self.answer_field}": {shown!r}')
        return reference


def look_up(content: dict[str, Any], dotted: str) -> Any:
    """The value of a column; of a nested one where no column is called `dotted` itself; None where there is none."""
    if dotted in content:
        return content[dotted]
    value: Any = content
    for key in dotted.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


SIMPLE = Schema(name="prompt and answer")
DAPO = Schema(name="DAPO-Math-17k (prompt, reward_model.ground_truth)", answer_field="reward_model.ground_truth")
GSM8K = Schema(
    name="GSM8K (question, answer after ####)",
    prompt_field="question",
    answer_pattern=r"####\s*(\S.*)",
    join_thousands=True,
)


def choose_schema(source: FilePrompts, first_rows: Sequence[Any]) -> Schema:
    """The columns that the configuration names, or those of the known schema that most of the first rows follow.

    Args:
        source: Names of columns and pattern, or None to recognise them.
        first_rows: Some rows of the source.
    """
    if source.prompt_field is not None or source.answer_field is not None:
        prompt_field = source.prompt_field or SIMPLE.prompt_field
        answer_field = source.answer_field or SIMPLE.answer_field
        return Schema(
            name=f"{prompt_field} and {answer_field}, as configured",
            prompt_field=prompt_field,
            answer_field=answer_field,
            answer_pattern=source.answer_pattern,
        )
    fits = {schema: sum(_fits(schema, row) for row in first_rows) for schema in (SIMPLE, DAPO, GSM8K)}
    schema = max(fits, key=lambda each: fits[each])
    if source.answer_pattern is None:
        return schema
    return Schema(
        name=schema.name,
        prompt_field=schema.prompt_field,
        answer_field=schema.answer_field,
        answer_pattern=source.answer_pattern,
        join_thousands=schema.join_thousands,
    )


def _fits(schema: Schema, row: Any) -> bool:
    try:
        schema.find(row)
    except UnusableRow:
        return False
    return True
