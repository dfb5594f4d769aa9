"""What a run writes about itself."""

from megatron_fipo.config.base import config_class, require


@config_class
class MetricsConfig:
    """Samples kept beside the metrics."""

    samples_per_step: int = 4
    """Responses written to samples.jsonl each step, with their rewards."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            self.samples_per_step >= 0,
            field="samples_per_step",
            value=self.samples_per_step,
            rule="must not be negative",
            way_out="0 writes none",
        )
