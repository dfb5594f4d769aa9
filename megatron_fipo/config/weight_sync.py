"""How updated weights reach the rollout engine."""

from megatron_fipo.config.base import config_class, require


@config_class
class WeightSyncConfig:
    """The stream of weights from the actor to the engine."""

    bucket_mib: int = 512
    """Weights sent at once, in MiB."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            self.bucket_mib >= 1,
            field="bucket_mib",
            value=self.bucket_mib,
            rule="must be at least 1",
            way_out="512 is a good value",
        )
