"""What a sink of metrics is."""

import importlib.util
from collections.abc import Mapping
from typing import Protocol

from megatron_fipo.config.base import require


class MetricSink(Protocol):
    """Shows metrics somewhere, beside metrics.jsonl. It may fail at any time without harm to the run."""

    @property
    def name(self) -> str:
        """What log lines call it."""
        ...

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Show a step's numbers, all finite."""
        ...

    def close(self) -> None:
        """Finish writing; nothing is written afterwards."""
        ...


def require_library(module: str, package: str, field: str, value: object) -> None:
    """Refuse a sink whose library is not installed.

    Args:
        module: What is imported.
        package: What is installed.
        field: The configuration field that asks for the sink.
        value: Its value.

    Raises:
        ConfigError: The library is not installed.
    """
    require(
        importlib.util.find_spec(module) is not None,
        field=field,
        value=value,
        rule=f"needs the package {package}, which is not installed",
        way_out=f"run `pip install {package}`, or leave the setting out",
    )
