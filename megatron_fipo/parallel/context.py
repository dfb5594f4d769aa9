"""This rank's place in the process grid: sizes, ranks and groups, built once."""

from dataclasses import dataclass

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.parallel.collectives import gather_json


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelContext:
    """Sizes, ranks and groups of one rank.

    Attributes:
        rank: Global rank.
        world_size: Number of ranks.
        tp_size, tp_rank, tp_group: Tensor parallelism.
        cp_size, cp_rank, cp_group: Context parallelism.
        dp_size, dp_rank, dp_group: Data parallelism, context parallelism not included.
        dp_cp_group: Data and context parallelism together.
        pp_size, pp_rank, pp_group: Pipeline parallelism.
        vpp_size: Virtual pipeline stages a rank holds, 1 without them.
        model_parallel_group: Ranks that share a data-parallel rank: tensor × context × pipeline.
        replica_leaders: Global rank of every replica's leader, by data-parallel rank.
        groups: All groups in megatron-core's own collection.
    """

    rank: int
    world_size: int
    tp_size: int
    tp_rank: int
    tp_group: dist.ProcessGroup
    cp_size: int
    cp_rank: int
    cp_group: dist.ProcessGroup
    dp_size: int
    dp_rank: int
    dp_group: dist.ProcessGroup
    dp_cp_group: dist.ProcessGroup
    pp_size: int
    pp_rank: int
    pp_group: dist.ProcessGroup
    vpp_size: int
    model_parallel_group: dist.ProcessGroup
    replica_leaders: tuple[int, ...]
    groups: ProcessGroupCollection

    @property
    def is_pipeline_last_stage(self) -> bool:
        """Whether this rank ends the pipeline, where log-probabilities exist."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_replica_leader(self) -> bool:
        """Whether this rank receives its replica's share of a batch."""
        return self.replica_leaders[self.dp_rank] == self.rank


def build_parallel_context(config: ParallelismConfig, seed: int) -> ParallelContext:
    """Create every process group and seed the random states.

    Args:
        config: Parallel sizes; checked against the world before any group is made.
        seed: Seed of the model-parallel random states.

    Raises:
        ConfigError: The sizes do not divide the world.
    """
    config.check_world_size(dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_parallel_size,
    )
    model_parallel_cuda_manual_seed(seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    replicas = _replicas(groups.dp)
    leaders = tuple(min(ranks) for ranks in replicas)
    return ParallelContext(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_size=groups.tp.size(),
        tp_rank=groups.tp.rank(),
        tp_group=groups.tp,
        cp_size=groups.cp.size(),
        cp_rank=groups.cp.rank(),
        cp_group=groups.cp,
        dp_size=groups.dp.size(),
        dp_rank=groups.dp.rank(),
        dp_group=groups.dp,
        dp_cp_group=groups.dp_cp,
        pp_size=groups.pp.size(),
        pp_rank=groups.pp.rank(),
        pp_group=groups.pp,
        vpp_size=config.virtual_pipeline_model_parallel_size or 1,
        model_parallel_group=_model_parallel_group(replicas),
        replica_leaders=leaders,
        groups=groups,
    )


def _replicas(dp_group: dist.ProcessGroup) -> list[list[int]]:
    """Global ranks of every replica, by data-parallel rank."""
    places = gather_json(dp_group.rank())
    return [[rank for rank, place in enumerate(places) if place == replica] for replica in range(dp_group.size())]


def _model_parallel_group(replicas: list[list[int]]) -> dist.ProcessGroup:
    """Group of this rank's replica.

    megatron-core's own model-parallel group leaves context parallelism out, so this one is made here. Every rank takes
    part in making every group, in the same order.
    """
    groups = [dist.new_group(ranks) for ranks in replicas]
    mine: dist.ProcessGroup = next(
        group for group, ranks in zip(groups, replicas, strict=True) if dist.get_rank() in ranks
    )
    return mine


def destroy_parallel_context() -> None:
    """Drop megatron-core's global groups, so that another context can be built in the same process."""
    parallel_state.destroy_model_parallel()
