"""Weights to the embedded engine, inside every trainer process."""

from typing import Any

from megatron_fipo.config.weight_sync import WeightSyncConfig
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.weight_sync.base import buckets


class InProcessSync:
    """Streams the actor's weights, under their Hugging Face names, into the engine of every rank.

    Args:
        bridge: Translates the actor's parameters.
        model: Bare model chunks of this rank.
        engine: This rank's engine.
        config: Bucket size.
    """

    def __init__(self, bridge: HfBridge, model: list[Any], engine: EmbeddedEngine, config: WeightSyncConfig) -> None:
        self.bridge, self.model, self.engine = bridge, model, engine
        self.max_bytes = config.bucket_mib * 1024**2

    def push(self, policy_version: int) -> None:
        """Make the engine generate with the actor's current weights; collective over all ranks."""
        for bucket in buckets(self.bridge.export(self.model), self.max_bytes, policy_version):
            self.engine.load(bucket)
