"""How the model and the batch are cut over ranks."""

import math

from megatron_fipo.config.base import ConfigError, config_class, require


@config_class
class ParallelismConfig:
    """Sizes of the process grid; data parallelism is what remains of the world."""

    tensor_model_parallel_size: int = 1
    """Ranks that share every weight matrix."""

    sequence_parallel: bool = False
    """Cut activations between tensor-parallel regions over the tensor-parallel ranks. Needs a tensor size above 1."""

    pipeline_model_parallel_size: int = 1
    """Ranks that hold consecutive groups of layers."""

    virtual_pipeline_model_parallel_size: int | None = None
    """Groups of layers that each pipeline rank holds (interleaved schedule); null for the plain schedule."""

    batch_p2p_comm: bool = False
    """Send and receive between pipeline stages in one batched call. Refused together with PP 2 and virtual stages."""

    context_parallel_size: int = 1
    """Ranks that share every sequence, in zigzag chunks."""

    expert_model_parallel_size: int = 1
    """Ranks that share the experts of a mixture-of-experts layer."""

    expert_tensor_parallel_size: int = 1
    """Ranks that share every expert's weight matrices."""

    max_tokens_per_micro_batch: int = 16384
    """Token budget of one pack, over all context-parallel ranks, padding included."""

    activation_recompute: str = "none"
    """Activations kept for the backward pass: "none" recomputed, "selective" (attention), or "full" (every layer)."""

    use_distributed_optimizer: bool = True
    """Shard optimizer state and gradients over data-parallel ranks."""

    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        for field in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
            "max_tokens_per_micro_batch",
        ):
            value = getattr(self, field)
            require(value >= 1, field=field, value=value, rule="must be at least 1", way_out="set it to 1 or more")
        require(
            self.activation_recompute in ("none", "selective", "full"),
            field="activation_recompute",
            value=self.activation_recompute,
            rule='must be "none", "selective" or "full"',
            way_out="choose one of the three",
        )
        require(
            not (self.sequence_parallel and self.tensor_model_parallel_size == 1),
            field="sequence_parallel",
            value=self.sequence_parallel,
            rule="needs tensor_model_parallel_size > 1",
            way_out="set sequence_parallel to false, or raise tensor_model_parallel_size",
        )
        self._check_virtual_stages()

    def _check_virtual_stages(self) -> None:
        stages = self.virtual_pipeline_model_parallel_size
        if stages is None:
            return
        field = "virtual_pipeline_model_parallel_size"
        require(
            stages >= 2,
            field=field,
            value=stages,
            rule="must be at least 2, or null",
            way_out="set it to null for the plain schedule",
        )
        require(
            self.pipeline_model_parallel_size >= 2,
            field=field,
            value=stages,
            rule=f"needs pipeline_model_parallel_size >= 2 (it is {self.pipeline_model_parallel_size})",
            way_out="raise pipeline_model_parallel_size or set this to null",
        )
        require(
            not (self.batch_p2p_comm and self.pipeline_model_parallel_size == 2),
            field="batch_p2p_comm",
            value=self.batch_p2p_comm,
            rule=(
                "gives silently wrong gradients with pipeline_model_parallel_size = 2 and virtual stages: both "
                "directions join the same two ranks in one batch (megatron-core)"
            ),
            way_out="set batch_p2p_comm to false",
        )

    @property
    def model_parallel_size(self) -> int:
        """Ranks of one replica: tensor × context × pipeline."""
        return self.tensor_model_parallel_size * self.context_parallel_size * self.pipeline_model_parallel_size

    @property
    def pack_multiple(self) -> int:
        """Tokens that every pack is padded to a multiple of, so that each tensor-parallel rank gets whole tokens."""
        tp, cp = self.tensor_model_parallel_size, self.context_parallel_size
        return math.lcm(2 * cp if cp > 1 else 1, tp * cp)

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas in a world of this size.

        Raises:
            ConfigError: See `check_world_size`.
        """
        self.check_world_size(world_size)
        return world_size // self.model_parallel_size

    def check_world_size(self, world_size: int) -> None:
        """Refuse a world that the sizes do not divide.

        Raises:
            ConfigError: The replica, or an expert-parallel block, does not divide the world.
        """
        tp, cp, pp = (
            self.tensor_model_parallel_size,
            self.context_parallel_size,
            self.pipeline_model_parallel_size,
        )
        if world_size % self.model_parallel_size:
            raise ConfigError(
                field="parallelism",
                value=f"tensor {tp} × context {cp} × pipeline {pp} = {self.model_parallel_size}",
                rule=(
                    f"must divide the world: world size {world_size} = tensor {tp} × context {cp} × pipeline {pp} "
                    f"× data, and {world_size} / {self.model_parallel_size} is not a whole number"
                ),
                way_out=f"start a multiple of {self.model_parallel_size} ranks, or change a size",
            )
        ep, etp = self.expert_model_parallel_size, self.expert_tensor_parallel_size
        if world_size % (ep * etp * pp):
            raise ConfigError(
                field="parallelism.expert_model_parallel_size",
                value=ep,
                rule=(
                    f"must divide the world: world size {world_size} = expert tensor {etp} × expert {ep} × pipeline "
                    f"{pp} × expert data, and {world_size} / {ep * etp * pp} is not a whole number"
                ),
                way_out=f"start a multiple of {ep * etp * pp} ranks, or change a size",
            )
