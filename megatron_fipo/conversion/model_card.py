"""The README.md of an export: what was trained from what, how, and what the run measured."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import megatron_fipo

CARD_NAME = "README.md"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# Groups of metrics that say something of the model; times and memory say something of the machine.
_SHOWN = ("rollout/", "train/", "fipo/", "eval/")
_EVALUATION = ("eval/accuracy", "eval/accuracy_low", "eval/accuracy_high", "eval/num_problems")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What an export says of itself.

    Attributes:
        base_model: Name of the model that it was trained from; empty where it is not known.
        step: Finished steps.
        dtype: Precision of the weights.
        algorithm: The effective-algorithm card; empty where no run is known.
        metrics: Lines of metrics.jsonl up to the step.
        proof: What was compared, and how close it is, one line each.
    """

    base_model: str
    step: int
    dtype: str
    algorithm: str = ""
    metrics: Sequence[Mapping[str, Any]] = ()
    proof: Sequence[str] = field(default=())

    def text(self) -> str:
        """The card, with the front matter that the Hugging Face hub reads."""
        return "\n".join([*self._front_matter(), "", *self._body()]) + "\n"

    def _front_matter(self) -> Iterator[str]:
        yield "---"
        yield "library_name: transformers"
        yield "pipeline_tag: text-generation"
        # Of other names the hub knows nothing.
        if _HUB_NAME.fullmatch(self.base_model):
            yield f"base_model: {json.dumps(self.base_model)}"
        yield "tags:"
        kind = self.algorithm.partition(":")[0].strip()
        for tag in ("megatron-fipo", "reinforcement-learning", *([kind] if kind else [])):
            yield f"- {json.dumps(tag)}"
        yield "---"

    def _body(self) -> Iterator[str]:
        source = f"`{self.base_model}`" if self.base_model else "a model folder"
        steps = f", after {self.step} steps of training" if self.step else ""
        yield from (f"# {self.base_model or 'A model'}{steps}", "")
        if self.step:
            yield f"Trained from {source} with megatron-fipo {megatron_fipo.__version__}: {self.step} steps."
        else:
            yield f"The weights of {source}, converted by megatron-fipo {megatron_fipo.__version__}; no step was taken."
        yield f"Weights are {self.dtype}."
        if self.algorithm:
            yield from ("", "## Effective algorithm", "", "```text", self.algorithm.rstrip(), "```")
        yield from self._evaluations()
        yield from self._last_step()
        if self.proof:
            yield from ("", "## Compared with the checkpoint", "", *(f"- {line}" for line in self.proof))

    def _evaluations(self) -> Iterator[str]:
        measured = [line for line in self.metrics if "eval/accuracy" in line]
        if not measured:
            return
        yield from ("", "## Evaluations during training", "")
        yield "| step | accuracy | low | high | problems |"
        yield "|---|---|---|---|---|"
        for line in measured:
            yield f"| {line['step']} | " + " | ".join(_shown(line.get(key)) for key in _EVALUATION) + " |"

    def _last_step(self) -> Iterator[str]:
        trained = [line for line in self.metrics if any(key.startswith("train/") for key in line)]
        if not trained:
            return
        yield from ("", f"## Metrics of step {trained[-1]['step']}", "", "| metric | value |", "|---|---|")
        for key, value in trained[-1].items():
            if key.startswith(_SHOWN) and isinstance(value, int | float):
                yield f"| `{key}` | {_shown(value)} |"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
