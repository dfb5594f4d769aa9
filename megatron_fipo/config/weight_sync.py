"""How updated weights reach the rollout engine."""

import math
from pathlib import Path
from typing import Literal

from megatron_fipo.config.base import config_class, require

PauseMode = Literal["abort", "retract", "in_place"]


@config_class
class WeightSyncConfig:
    """The stream of weights from the actor to the engine. All but the bucket size concerns SGLang servers alone."""

    bucket_mib: int = 512
    """Weights sent at once, in MiB."""

    transport: Literal["auto", "distributed", "tensor", "disk"] = "auto"
    """"distributed" broadcasts into the servers' ranks (NCCL or gloo), "tensor" hands over memory of the same GPUs
    (CUDA IPC), "disk" writes safetensors that servers read. "auto" is "tensor" where the engine is colocated, else
    "distributed"."""

    folder: Path | None = None
    """Where "disk" writes, on a file system that every server sees; null is `weights/` in the run directory."""

    pause: Literal["auto", "abort", "retract", "in_place"] = "auto"
    """What becomes of running requests while weights change. "abort" ends them, and they begin again, or go on from
    their tokens with rollout.partial_rollouts. "retract" computes their KV cache anew, "in_place" keeps the old one.
    "auto" is "abort" with rollout.partial_rollouts or rollout.colocated, else "retract"."""

    timeout_s: float = 300.0
    """How long a server may take for one bucket, with "disk" for the whole model, in seconds; then it is restarted."""

    verify: bool = True
    """After every sync, ask each server for the log-probabilities of a fixed response and compare with the actor's."""

    canary_tolerance: float | None = None
    """Largest mean |Δ| of those log-probabilities, in nats; null is 1e-4 in float32 and 0.05 in bfloat16."""

    checksum_every: int = 100
    """Compare checksums of all servers' weights at the first sync, after restarts, and every so many syncs; 0 never."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            self.bucket_mib >= 1,
            field="bucket_mib",
            value=self.bucket_mib,
            rule="must be at least 1",
            way_out="512 is a good value",
        )
        require(
            0 < self.timeout_s <= 1200,
            field="timeout_s",
            value=self.timeout_s,
            rule="must lie in (0, 1200]: ranks wait that long in a collective, whose own limit is 30 minutes",
            way_out="give seconds",
        )
        require(
            self.canary_tolerance is None or 0 < self.canary_tolerance < math.inf,
            field="canary_tolerance",
            value=self.canary_tolerance,
            rule="must be finite and greater than 0, or null",
            way_out="set it to null",
        )
        require(
            self.checksum_every >= 0,
            field="checksum_every",
            value=self.checksum_every,
            rule="must not be negative",
            way_out="0 compares none",
        )
