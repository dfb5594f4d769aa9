"""An update's tokens as plain arrays of each rank, and back onto micro-batches of any process grid.

A token goes by its sequence in the rollout batch and by the position that predicts it, which no layout changes.
Integers and masks are the rollout batch's own and not among the arrays; numbers are, since it is they that go wrong.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import numpy as np
import numpy.typing as npt
import torch

from megatron_fipo.actor.micro_batch import MicroBatch, RoutedExperts
from megatron_fipo.actor.routing import RoutingReplay
from megatron_fipo.actor.train_step import Evidence, Seen
from megatron_fipo.parallel.collectives import Arrays
from megatron_fipo.types import LongArray

INPUTS = ("old_log_probs", "reference_log_probs", "rollout_log_probs", "advantages")
"""Numbers of response tokens that a loss reads."""

OUTPUTS = ("log_probs", "future_kl", "influence_weights", "kept", "dual_clipped")
"""What the actor and the loss made of them."""

# A sequence has fewer positions.
_POSITIONS = 2**32


class MissingTokens(LookupError):
    """Arrays that do not hold all the tokens that are asked for."""


def packs(evidence: Evidence) -> list[list[list[int]]]:
    """Sequences and padded lengths of every micro-batch."""
    return [[list(each.sequences), list(each.layout.padded_lengths)] for each in evidence.micro_batches]


def update_arrays(evidence: Evidence, routing: RoutingReplay | None) -> Arrays:
    """All that this rank has of an update.

    Args:
        evidence: Of the update.
        routing: Where tokens are sent to recorded experts.

    Returns:
        On the last pipeline stage "tokens" [n] int64 (see `token_keys`), with [n] of each of INPUTS and OUTPUTS that
        there is, "numerators" and "denominators" [micro-batches], and "dropped" [d] int64, sequences that were dropped;
        with routing "routed_tokens" [r], "routed_layers" [l], "routed_experts" [l, r, k] and "routed_recorded" [r].
    """
    arrays: Arrays = {}
    pairs = list(zip(evidence.micro_batches, evidence.seen, strict=False))
    if pairs:
        parts = [_columns(*each) for each in pairs]
        arrays |= {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        arrays["numerators"] = np.array([float(seen.output.numerator) for _, seen in pairs])
        arrays["denominators"] = np.array([float(seen.output.denominator) for _, seen in pairs])
        dropped = [each.sequence_numbers[seen.output.dropped].cpu().numpy() for each, seen in pairs]
        arrays["dropped"] = np.unique(np.concatenate(dropped).astype(np.int64))
    if routing is not None:
        arrays |= _routing(evidence.micro_batches, routing)
    return arrays


def _columns(micro_batch: MicroBatch, seen: Seen) -> Arrays:
    positions = micro_batch.response_positions
    output = seen.output
    columns = {name: getattr(micro_batch, name) for name in INPUTS} | {
        "log_probs": seen.log_probs,
        "future_kl": output.future_kl,
        "influence_weights": output.influence_weights,
        "kept": output.kept_mask,
        "dual_clipped": output.dual_clipped,
    }
    values = {name: each[positions].detach().cpu().numpy() for name, each in columns.items() if each is not None}
    return {"tokens": token_keys(micro_batch)[positions.cpu().numpy()], **values}


def token_keys(micro_batch: MicroBatch) -> LongArray:
    """Sequence · 2^32 + position of every token of this rank's part: [t] int64; −1 in a filler sequence."""
    layout = micro_batch.layout
    numbers = torch.full((layout.num_sequences,), -1, dtype=torch.int64)
    numbers[: len(micro_batch.sequences)] = torch.tensor(micro_batch.sequences, dtype=torch.int64)
    sequences = numbers[layout.local_sequence_ids]
    keys: LongArray = torch.where(sequences < 0, -1, sequences * _POSITIONS + layout.local_positions).numpy()
    return keys


def places_of(keys: LongArray) -> tuple[LongArray, LongArray]:
    """Sequences and positions that keys stand for."""
    return keys // _POSITIONS, keys % _POSITIONS


def _routing(micro_batches: Sequence[MicroBatch], routing: RoutingReplay) -> Arrays:
    routed = [each.routed_experts for each in micro_batches if each.routed_experts is not None]
    if len(routed) < len(micro_batches):
        return {}
    return {
        "routed_tokens": np.concatenate([routing.part(token_keys(each)) for each in micro_batches]),
        "routed_layers": np.array(routing.layers, dtype=np.int64),
        "routed_experts": np.concatenate([each.experts.cpu().numpy().astype(np.int16) for each in routed], axis=1),
        "routed_recorded": np.concatenate([each.recorded.cpu().numpy() for each in routed]),
    }


def restore_inputs(
    micro_batch: MicroBatch, files: Callable[[], Iterable[Arrays]], routing: RoutingReplay | None, has_scores: bool
) -> None:
    """Give a micro-batch the numbers that arrays hold of its tokens.

    Args:
        micro_batch: Of the same rollout batch.
        files: Arrays of ranks that saw the update, the likeliest first; as many are read as are needed.
        routing: Where tokens are to be sent to recorded experts.
        has_scores: Whether this rank is on the last pipeline stage.

    Raises:
        MissingTokens: A token is in none of the arrays.
    """
    positions = micro_batch.response_positions
    if has_scores:
        wanted = token_keys(micro_batch)[positions.cpu().numpy()]
        for name, column in find_columns(wanted, files(), INPUTS).items():
            values, whole = torch.from_numpy(column).to(positions.device), getattr(micro_batch, name)
            # Nothing outside of responses is read.
            if whole is None:
                whole = torch.zeros(len(micro_batch.response_mask), dtype=values.dtype, device=positions.device)
            setattr(micro_batch, name, whole.index_copy(0, positions, values))
    if routing is not None:
        micro_batch.routed_experts = _find_routing(routing.part(token_keys(micro_batch)), files(), routing.layers)


def find_columns(wanted: LongArray, files: Iterable[Arrays], names: Sequence[str]) -> Arrays:
    """Columns of the wanted tokens ([n] of `token_keys`), as far as the files have them.

    Raises:
        MissingTokens: A token is in none of the files.
    """
    found: dict[str, npt.NDArray[Any]] = {}
    missing = np.ones(len(wanted), dtype=np.bool_)
    for arrays in files:
        if not missing.any() and found:
            break
        if "tokens" not in arrays:
            continue
        rows, here = _rows(arrays["tokens"], wanted)
        for name in (name for name in names if name in arrays):
            column = found.setdefault(name, np.zeros(len(wanted), dtype=arrays[name].dtype))
            column[here] = arrays[name][rows[here]]
        missing &= ~here
    if missing.any():
        raise MissingTokens(f"{int(missing.sum())} tokens are in no rank's file")
    return found


def _find_routing(wanted: LongArray, files: Iterable[Arrays], layers: Sequence[int]) -> RoutedExperts:
    """Experts of the wanted tokens in some layers; padding, which differs between grids, has none."""
    experts: npt.NDArray[Any] | None = None
    recorded = np.zeros(len(wanted), dtype=np.bool_)
    missing = np.tile(wanted >= 0, (len(layers), 1))
    for arrays in files:
        if "routed_tokens" not in arrays:
            continue
        if experts is None:
            experts = np.zeros((len(layers), len(wanted), arrays["routed_experts"].shape[2]), dtype=np.int16)
        rows, here = _rows(arrays["routed_tokens"], wanted)
        for number, layer in enumerate(arrays["routed_layers"].tolist()):
            if layer in layers:
                place = layers.index(layer)
                experts[place, here] = arrays["routed_experts"][number, rows[here]]
                missing[place, here] = False
        recorded[here] = arrays["routed_recorded"][rows[here]]
        if not missing.any():
            break
    if experts is None or missing[:, recorded].any():
        raise MissingTokens("experts of some tokens are in no rank's file")
    return RoutedExperts(torch.from_numpy(experts), torch.from_numpy(recorded))


def _rows(keys: LongArray, wanted: LongArray) -> tuple[LongArray, npt.NDArray[np.bool_]]:
    """Row of every wanted key among the keys, and whether it is there."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64), np.zeros(len(wanted), dtype=np.bool_)
    order = np.argsort(keys, kind="stable")
    places = np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)
    rows: LongArray = order[places]
    return rows, (keys[rows] == wanted) & (wanted >= 0)
