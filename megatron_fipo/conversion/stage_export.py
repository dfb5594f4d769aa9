"""One pipeline stage's tensors under their Hugging Face names, gathered to one rank of the stage.

megatron-bridge's own export gives every tensor to every rank. Its mappings are used here with groups of one in place of
the pipeline and of expert parallelism, so that they gather over tensor parallelism alone; experts then travel from
their ranks to the sender by a gather of our own. Ranks whose tensors the sender has anyway take no part.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.config.base import ConfigError
from megatron_fipo.parallel.context import ParallelContext
from megatron_fipo.platform.host_memory import require_resident

_EXPERT = re.compile(r"experts\.(\d+)")


class _Alone:
    """Stands for a group of this rank alone, as far as megatron-bridge's mappings look at one."""

    def size(self) -> int:
        """One rank."""
        return 1

    def rank(self) -> int:
        """The first."""
        return 0


def is_stage_sender(context: ParallelContext) -> bool:
    """Whether this rank gets its stage's tensors: the first of every kind of parallelism but the pipeline's."""
    return context.tp_rank == 0 and context.dp_cp_group.rank() == 0


class StageExport:
    """The tensors of this rank's pipeline stage; what can be worked out once is worked out by all ranks together.

    Args:
        bridge: megatron-bridge's AutoBridge of the model folder.
        model: Model chunks of this rank, without data-parallel wrappers.
        context: This rank's place.
        trim: Takes off a tensor what Hugging Face has not: gets its name and the tensor.

    Raises:
        ConfigError: The checkpoint keeps a layer's experts in one tensor, of which no rank has the whole.
    """

    def __init__(
        self, bridge: Any, model: list[Any], context: ParallelContext, trim: Callable[[str, Tensor], Tensor]
    ) -> None:
        self.is_sender = is_stage_sender(context)
        self._trim = trim
        self._translation, self._source = bridge._model_bridge, bridge.hf_pretrained
        groups = context.groups
        # Experts are cut by a grid of their own, whose first rank is the stage's first rank too.
        self._gathers_dense = context.dp_cp_group.rank() == 0
        self._gathers_experts = groups.expt_dp.rank() == 0
        self._expert_group, self._expert_tp_rank = groups.ep, groups.expt_tp.rank()
        tasks = self._translation.build_conversion_tasks(self._source, model)
        self._tasks = [task for task in tasks if task is not None and task.param_weight is not None]
        self._experts_per_rank = (model[0].config.num_moe_experts or 0) // self._expert_group.size()
        config = model[0].config
        tied = self._translation._share_embeddings_and_output_weights(config)
        self._registry = self._translation.mapping_registry() if tied else None
        for task in self._tasks:
            if getattr(task.mapping, "is_grouped_export", False):
                raise ConfigError(
                    field="model.path",
                    value=str(task.mapping.hf_param),
                    rule="holds all experts of a layer in one tensor, which cannot be sent to servers",
                    way_out="choose an architecture whose checkpoint names every expert, such as Qwen3-MoE",
                )
            task.mapping.set_process_groups_from_pg_collection(SimpleNamespace(pp=_Alone(), ep=_Alone()))

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, full tensor) on the stage's sender, nothing elsewhere; collective over the stage.

        The stage's other ranks take part by exhausting it. The order is fixed, the type the parameters' own, padding
        rows of the vocabulary are trimmed. A tensor may be a view of a live parameter: copy it to keep it.

        Raises:
            RunError: The parameters are off the device.
        """
        require_resident((task.param_weight for task in self._tasks), "the actor's weights")
        for name, tensor in self._gather():
            yield name, self._trim(name, tensor).detach()

    def _gather(self) -> Iterator[tuple[str, Tensor]]:
        for task in self._tasks:
            is_expert = task.mapping.is_expert
            if not (self._gathers_experts if is_expert else self._gathers_dense):
                continue
            with torch.no_grad():
                tensors = task.mapping.megatron_to_hf(task.param_weight, task.megatron_module)
            tensors = self._translation.maybe_modify_converted_hf_weight(task, tensors, self._source.state)
            if is_expert:
                yield from self._gather_experts(tensors)
            elif self.is_sender:
                yield from tensors.items()
                yield from self._tied_output(task, tensors)

    def _gather_experts(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Bring what the ranks of the sender's expert group have in this place to the sender."""
        group, size = self._expert_group, self._expert_group.size()
        if self._expert_tp_rank != 0:
            return
        if size == 1:
            yield from tensors.items()
            return
        for name, tensor in tensors.items():
            parts = [torch.empty_like(tensor) for _ in range(size)] if self.is_sender else None
            dist.gather(tensor.contiguous(), parts, dst=dist.get_global_rank(group, 0), group=group)
            for rank, part in enumerate(parts or ()):
                yield self._name_on(rank, name), part

    def _name_on(self, expert_rank: int, name: str) -> str:
        """What the sender's expert is called in this place on another rank of its expert group."""
        return _EXPERT.sub(lambda match: f"experts.{int(match[1]) + expert_rank * self._experts_per_rank}", name)

    def _tied_output(self, task: Any, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The embedding once more, under the output matrix's name, where the folder has tied weights twice."""
        if self._registry is None:
            return
        name = self._translation._get_tied_output_hf_name(task, self._registry)
        if name is not None and name in self._source.state.source.get_all_keys():
            yield name, next(iter(tensors.values()))
