"""Where a step's metrics go: metrics.jsonl, and the sinks that the configuration asks for."""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_fipo.config.metrics import MetricsConfig
from megatron_fipo.metrics.catalogue import CATALOGUE
from megatron_fipo.metrics.sinks.base import MetricSink, require_library
from megatron_fipo.metrics.sinks.prometheus import PrometheusSink, check_port
from megatron_fipo.metrics.sinks.tensorboard import TensorBoardSink
from megatron_fipo.metrics.sinks.weights_and_biases import WandbSink
from megatron_fipo.runtime.run_dir import RunDirectory

logger = logging.getLogger(__name__)


def check_sinks(config: MetricsConfig) -> None:
    """Refuse sinks that cannot work, before anything is built.

    Raises:
        ConfigError: A library is not installed, or a port is taken.
    """
    if config.tensorboard:
        require_library("tensorboard", "tensorboard", "metrics.tensorboard", config.tensorboard)
    if config.wandb.mode != "off":
        require_library("wandb", "wandb", "metrics.wandb.mode", config.wandb.mode)
    if config.prometheus_port is not None:
        require_library("prometheus_client", "prometheus-client", "metrics.prometheus_port", config.prometheus_port)
        check_port(config.prometheus_port)


def open_sinks(
    config: MetricsConfig, directory: Path, run_config: Mapping[str, Any], first_step: int = 0
) -> list[MetricSink]:
    """Open the configured sinks.

    Args:
        config: Which.
        directory: The run directory.
        run_config: The resolved configuration, as plain values.
        first_step: The first step whose metrics come; those of a run that went further before come again.

    Raises:
        ConfigError: A sink cannot be opened.
    """
    sinks: list[MetricSink] = []
    try:
        if config.tensorboard:
            sinks.append(TensorBoardSink(directory / "tensorboard", first_step))
        if config.prometheus_port is not None:
            sinks.append(PrometheusSink(config.prometheus_port, directory))
        if config.wandb.mode != "off":
            sinks.append(WandbSink(config.wandb, directory, run_config))
    except BaseException:
        for sink in sinks:
            sink.close()
        raise
    return sinks


class MetricsWriter:
    """Writes a step's metrics everywhere.

    metrics.jsonl is part of the run: where it cannot be written, the run stops. A sink that fails is reported once,
    tried again at every step, and never stops the run.

    Args:
        directory: The run directory.
        sinks: Sinks beside metrics.jsonl; closed with the writer.
    """

    def __init__(self, directory: RunDirectory, sinks: Sequence[MetricSink] = ()) -> None:
        self._directory, self._sinks = directory, list(sinks)
        self._failed: set[str] = set()
        self._undeclared: set[str] = set()

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Write the metrics of step `metrics["step"]`; sinks get those that are finite numbers."""
        undeclared = set(CATALOGUE.undeclared(metrics)) - self._undeclared
        if undeclared:
            logger.warning("metrics that are not in the catalogue: %s", ", ".join(sorted(undeclared)))
            self._undeclared |= undeclared
        self._directory.append_metrics(metrics)
        values = {
            key: float(value)
            for key, value in metrics.items()
            if key != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        for sink in self._sinks:
            self._write_to(sink, metrics["step"], values)

    def _write_to(self, sink: MetricSink, step: int, values: Mapping[str, float]) -> None:
        try:
            sink.write(step, values)
        except Exception as error:
            if sink.name not in self._failed:
                self._failed.add(sink.name)
                logger.warning(
                    "step %d: %s got no metrics (%s: %s); later failures are not reported, metrics.jsonl has all",
                    step,
                    sink.name,
                    type(error).__name__,
                    error,
                )

    def close(self) -> None:
        """Close all sinks."""
        for sink in self._sinks:
            with suppress(Exception):
                sink.close()
        self._sinks = []
