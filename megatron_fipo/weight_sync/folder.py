"""Weights of a model folder to the embedded engine, without an actor."""

from pathlib import Path

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.weight_sync import WeightSyncConfig
from megatron_fipo.conversion.hf_folder import read_tensors
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.weight_sync.base import buckets


class FolderSync:
    """Streams a folder's safetensors into this rank's engine, bucket by bucket.

    Every rank reads the files by itself: the ranks of a node share them in the page cache.

    Args:
        folder: Hugging Face model folder.
        engine: This rank's engine.
        config: Bucket size.
    """

    def __init__(self, folder: Path, engine: EmbeddedEngine, config: WeightSyncConfig) -> None:
        self.folder, self.engine = folder, engine
        self.max_bytes = config.bucket_mib * 1024**2

    def push(self, policy_version: int) -> None:
        """Make the engine generate with the folder's weights.

        Raises:
            ConfigError: The folder's tensors are not those of its config.json.
        """
        for bucket in buckets(read_tensors(self.folder), self.max_bytes, policy_version):
            try:
                self.engine.load(bucket)
            except (KeyError, RuntimeError) as error:
                problem = f"has a tensor {error} that its model lacks" if isinstance(error, KeyError) else str(error)
                raise ConfigError(
                    field="model.path",
                    value=str(self.folder),
                    rule=f"its weights do not fit its config.json: {problem}",
                    way_out="fetch the model's files again, config.json and weights from one place",
                ) from error
