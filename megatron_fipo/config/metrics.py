"""What a run writes about itself."""

from typing import Literal

from megatron_fipo.config.base import config_class, require

LiveViewChoice = Literal["auto", "on", "off"]


@config_class
class MetricsConfig:
    """Samples kept beside the metrics, and what a terminal shows."""

    samples_per_step: int = 4
    """Responses written to samples.jsonl each step, with their rewards, and token by token to tokens/."""

    live_view: LiveViewChoice = "auto"
    """One screen instead of log lines: "auto" where stdout is a terminal, "on" always, "off" never."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            self.samples_per_step >= 0,
            field="samples_per_step",
            value=self.samples_per_step,
            rule="must not be negative",
            way_out="0 writes none",
        )
