"""The collective that each process group of this rank saw last, from PyTorch's flight recorder (gloo's and NCCL's).

It records calls in a ring of `TORCH_FR_BUFFER_SIZE` entries as they are made, whoever makes them, and can be read from
any thread while a call hangs.
"""

import json
import os
from collections.abc import Iterable
from typing import Any

RING_ENTRIES = 512


def record_collectives() -> None:
    """Have collectives recorded; before the first process group is made."""
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RING_ENTRIES))


def last_collectives() -> list[dict[str, Any]]:
    """The newest entry of every process group, by group.

    Returns:
        `group` (its name), `what` (the call), `number` (of the group's calls), `sizes` of its inputs, `is_over`, and
        `is_p2p` for sends and receives, which are numbered and listed by themselves. Nothing where this PyTorch has no
        recorder.
    """
    # Imported here: these are PyTorch's own parts, which may go or be renamed.
    try:
        from torch._C import _distributed_c10d as c10d
    except ImportError:
        return []
    found: dict[str, dict[str, Any]] = {}
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):
        dump = getattr(c10d, name, None)
        if dump is not None:
            found |= _newest(json.loads(dump(includeCollectives=True, onlyActive=False)).get("entries", []))
    return [found[group] for group in sorted(found, key=lambda each: int(each.split()[0]))]


def _newest(entries: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    newest: dict[str, dict[str, Any]] = {}
    for entry in entries:
        number, description = entry["process_group"]
        group = f"{number} {description}".removesuffix(" undefined")
        newest[group + " p2p" * entry["is_p2p"]] = {
            "group": group,
            "what": entry["profiling_name"],
            "number": entry["p2p_seq_id" if entry["is_p2p"] else "collective_seq_id"],
            "sizes": entry["input_sizes"],
            "is_over": bool(entry["retired"]),
            "is_p2p": bool(entry["is_p2p"]),
        }
    return newest
