"""What a run writes about itself."""

from typing import Literal

from megatron_fipo.config.base import config_class, require

LiveViewChoice = Literal["auto", "on", "off"]


@config_class
class WandbConfig:
    """A Weights & Biases run."""

    mode: Literal["off", "offline", "online"] = "off"
    """"off" has none, "offline" keeps it in wandb/ in the run directory for `wandb sync`, "online" uploads it."""

    project: str = "megatron-fipo"
    """Project."""

    entity: str | None = None
    """User or team that owns the project; null is the one logged in."""

    run_name: str | None = None
    """Name of the run; null is the name of the run directory."""


@config_class
class MetricsConfig:
    """Where metrics go beside metrics.jsonl, samples kept with them, and what a terminal shows."""

    quantiles: bool = True
    """Report exact quantiles of importance ratios and influence weights. They cost four small all-reduces an update."""

    tensorboard: bool = False
    """Also write event files for TensorBoard, to tensorboard/ in the run directory."""

    wandb: WandbConfig = WandbConfig()
    """Also log to Weights & Biases."""

    prometheus_port: int | None = None
    """Also serve the latest metrics to Prometheus, on this port of the loopback interface; 0 takes a free one. Requests
    need the bearer token in prometheus_token in the run directory; the URL is in prometheus_address."""

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
        require(
            self.prometheus_port is None or 0 <= self.prometheus_port < 65536,
            field="prometheus_port",
            value=self.prometheus_port,
            rule="must lie in [0, 65535]",
            way_out="0 takes a free port",
        )
