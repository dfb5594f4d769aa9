"""Where numbers are not finite: in which weight or gradient, on which token. Only for faults: none of it is quick."""

from collections.abc import Iterator, Sequence
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.actor.micro_batch import MicroBatch
from megatron_fipo.actor.model import unwrap
from megatron_fipo.parallel.collectives import gather_json

# Names that a text lists before it counts the others.
_NAMED = 3
_LAYERS = "decoder.layers."


def has_non_finite_weight(chunks: Sequence[Any]) -> bool:
    """Whether a weight of any rank is NaN or infinite; one pass over the weights, and collective over all ranks."""
    largest = torch._foreach_norm([each.detach() for chunk in chunks for each in chunk.parameters()], float("inf"))
    found = (~torch.stack(largest).isfinite()).any().float()
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


def trace_weights(chunks: Sequence[Any]) -> str:
    """Names of weights that are not finite and the ranks that hold them, or ""; collective over all ranks."""
    return _told([name for name, each in _named_parameters(chunks) if not _is_finite(each)])


def trace_gradients(chunks: Sequence[Any]) -> str:
    """The same of reduced gradients."""
    return _told([name for name, each in _named_parameters(chunks) if not _is_finite(each.main_grad)])


def _is_finite(values: Tensor) -> bool:
    return bool(values.detach().isfinite().all())


def _named_parameters(chunks: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Parameters that are trained, layers numbered as in the whole model."""
    for chunk in unwrap(list(chunks)):
        numbers = {str(place): str(layer.layer_number - 1) for place, layer in enumerate(chunk.decoder.layers)}
        for name, parameter in chunk.named_parameters():
            if not parameter.requires_grad:
                continue
            if name.startswith(_LAYERS):
                place, rest = name.removeprefix(_LAYERS).split(".", 1)
                name = f"{_LAYERS}{numbers[place]}.{rest}"
            yield name, parameter


def _told(names: list[str]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, each in enumerate(gather_json(names)):
        for name in each:
            ranks.setdefault(name, []).append(rank)
    shown = [f"{name} (rank {', '.join(map(str, ranks[name]))})" for name in list(ranks)[:_NAMED]]
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return ", ".join(shown) + more


def first_non_finite_token(micro_batch: MicroBatch, log_probs: Tensor) -> str:
    """The first response token of this rank's part of a micro-batch whose numbers are not finite, or "".

    Args:
        micro_batch: The micro-batch.
        log_probs: [t], what the actor gave.
    """
    columns = {
        "log_probs": log_probs,
        "old_log_probs": micro_batch.old_log_probs,
        "reference_log_probs": micro_batch.reference_log_probs,
        "rollout_log_probs": micro_batch.rollout_log_probs,
        "advantages": micro_batch.advantages,
    }
    positions = micro_batch.response_positions
    found = {name: values[positions].cpu() for name, values in columns.items() if values is not None}
    bad = {name: ~values.isfinite() for name, values in found.items()}
    anywhere = torch.stack(list(bad.values())).any(dim=0).nonzero()
    if not len(anywhere):
        return ""
    row = int(anywhere[0])
    position = int(positions[row])
    sequence = micro_batch.sequences[int(micro_batch.layout.local_sequence_ids[position])]
    numbers = ", ".join(f"{name} is {float(found[name][row])}" for name in bad if bad[name][row])
    return f"token {int(micro_batch.response_places[position])} of the response of sequence {sequence}: {numbers}"
