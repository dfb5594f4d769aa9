"""Rollouts from servers, which a controller process beside rank 0 drives."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_fipo.parallel.collectives import broadcast_json
from megatron_fipo.rollout.controller import Rollout
from megatron_fipo.rollout.engine import ServerAddress
from megatron_fipo.rollout.samples import Decode
from megatron_fipo.trainer.colocation import Colocation
from megatron_fipo.trainer.controller_calls import ControllerCalls
from megatron_fipo.trainer.rollout_message import unpack_rollout
from megatron_fipo.weight_sync.base import WeightTransport
from megatron_fipo.weight_sync.verification import WeightVerification

logger = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class ServedRollouts:
    """What generates where it is not this process.

    Attributes:
        calls: Speaks to the controller process.
        transport: Sends weights to its servers.
        verification: Finds out whether they have taken them in.
        decode: Token ids to text; on rank 0 alone.
        colocation: Hands memory to and fro where servers use the trainer's devices; None where they have their own.
        policy_version: Version of the weights that the servers have; −1 where they have none, or no memory for them.
    """

    calls: ControllerCalls
    transport: WeightTransport
    verification: WeightVerification
    decode: Decode | None
    colocation: Colocation | None = None
    policy_version: int = -1
    _weights: int = -1
    _metrics: dict[str, float] = field(default_factory=dict)

    def sync(self, policy_version: int) -> dict[str, float]:
        """Stop the servers where they are, send them the weights, and let them go on."""
        started = time.perf_counter()
        # At first it waits until there are servers.
        servers = self._pause(may_stop=True)
        self._count("perf/weight_sync_pause_s", time.perf_counter() - started)
        if self.colocation is not None and self._weights < 0:
            # Until now servers that have just started had all the memory.
            self.colocation.to_trainer(servers)
        self._weights = policy_version
        failed = self.colocation.to_servers(servers, self._push) if self.colocation else self._push(servers)
        failed |= self._check(servers, failed)
        self.calls.ask("resume", {"policy_version": policy_version, "failed": sorted(failed)})
        self.policy_version = policy_version
        metrics, self._metrics = self._metrics, {}
        return metrics | (self.colocation.drain() if self.colocation else {})

    def next_rollout(self, step: int, policy_version: int) -> Rollout | None:
        """A training batch."""
        arguments = {"step": step, "policy_version": policy_version}
        values, arrays = self.calls.ask("next_rollout", arguments, self._push_again, may_stop=True)
        self._to_trainer(lambda: self._pause(may_stop=True))
        return None if values is None else unpack_rollout(values, arrays)

    def evaluate(self, folder: Path | None) -> dict[str, float]:
        """Try the held-out problems."""
        metrics, _ = self.calls.ask("evaluate", {"folder": str(folder)}, self._push_again, may_stop=True)
        return metrics or {}

    def save(self, path: Path) -> None:
        """Have the controller write down where it stands."""
        self.calls.ask("save", {"path": str(path)})

    def restore(self, step: int, path: Path | None, anew: bool, without_journal: bool) -> None:
        """Have the controller go on where an earlier one stood."""
        place = None if path is None else str(path)
        self.calls.ask("restore", {"step": step, "path": place, "anew": anew, "without_journal": without_journal})

    def leave_devices(self) -> None:
        """Have servers that share the trainer's devices ended, where the run has started them."""
        self._to_trainer(lambda: self._stopped("end_servers"))

    def _to_trainer(self, stop_servers: Callable[[], list[ServerAddress]]) -> None:
        """Take the devices' memory from servers that share them."""
        if self.colocation is not None and self.policy_version >= 0:
            self.colocation.to_trainer(stop_servers())
            self.policy_version = -1

    def _pause(self, may_stop: bool = False) -> list[ServerAddress]:
        """Stop the servers; they stay so until the next sync."""
        return self._stopped("pause", may_stop)

    def _stopped(self, action: str, may_stop: bool = False) -> list[ServerAddress]:
        servers, _ = self.calls.ask(action, {}, may_stop=may_stop)
        return [ServerAddress(**each) for each in broadcast_json(servers, 0)]

    def _push_again(self, servers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """Send the current weights to servers that have come while others generate."""
        addresses = [ServerAddress(**each) for each in servers]
        failed = self.colocation.push_again(addresses, self._push) if self.colocation else self._push(addresses)
        return failed | self._check(addresses, failed)

    def _push(self, servers: Sequence[ServerAddress]) -> dict[str, str]:
        """Send the current weights; gives why servers did not take them in, by name."""
        # The one moment at which the actor's weights are on the device for certain.
        self.verification.expect()
        started = time.perf_counter()
        report = self.transport.push(self._weights, servers)
        seconds = time.perf_counter() - started
        self._count("perf/weight_sync_gib", report.num_bytes / 1024**3)
        self._count("perf/weight_sync_transfer_s", seconds)
        self._count("perf/weight_sync_servers", len(servers) - len(report.failed))
        return dict(report.failed)

    def _check(self, servers: Sequence[ServerAddress], failed: Mapping[str, str]) -> dict[str, str]:
        """Find out whether the servers that did not fail have the current weights; gives why others do not."""
        report = self.verification.check(self._weights, [each for each in servers if each.name not in failed])
        self._count("perf/weight_sync_verify_s", report.seconds)
        self._count("perf/weight_sync_servers_failed", len(failed) + len(report.failed))
        self._metrics["rollout/canary_mismatch_mean"] = report.mean_difference
        self._metrics["rollout/canary_mismatch_max"] = report.max_difference
        for name, problem in (dict(failed) | dict(report.failed)).items() if self.calls.link else ():
            logger.warning("server %s did not take in policy version %d: %s", name, self._weights, problem)
        return dict(report.failed)

    def _count(self, name: str, value: float) -> None:
        self._metrics[name] = self._metrics.get(name, 0.0) + value
