"""Whether servers have the weights that they were sent."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import orjson

from megatron_fipo.config.weight_sync import WeightSyncConfig
from megatron_fipo.rollout.engine import ServerAddress
from megatron_fipo.rollout.sglang.client import ServerNonsenseError, SglangServer
from megatron_fipo.weight_sync.canary import Canary
from megatron_fipo.weight_sync.server_calls import ServerCalls, failures
from megatron_fipo.weight_sync.update import on_rank

DEFAULT_TOLERANCES = {"float32": 1e-4, "bfloat16": 0.05}


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationReport:
    """What became of one verification; the same on every rank.

    Attributes:
        failed: Why a server does not have the weights, by its name.
        mean_difference: Mean |Δ| of the canary's log-probabilities, the worst of all servers, in nats.
        max_difference: Largest |Δ| of all servers, in nats.
        checksums_compared: Whether this time parameters were compared one by one between servers.
        seconds: Time that it took, the actor's forward pass included.
    """

    failed: Mapping[str, str] = field(default_factory=dict)
    mean_difference: float = 0.0
    max_difference: float = 0.0
    checksums_compared: bool = False
    seconds: float = 0.0


class WeightVerification:
    """Compares servers with the actor, and now and then with each other.

    A check ends a server's pause, since a paused one answers nothing. Requests that it held go on then, before its
    weights are known to be right; those that it finishes in that moment count as of this version.

    Args:
        canary: The canary.
        config: Tolerance, deadlines, how often checksums are compared; with `verify` off, checks do nothing.
        dtype: The actor's precision by name.
        calls: Connections to the servers.
    """

    def __init__(self, canary: Canary, config: WeightSyncConfig, dtype: str, calls: ServerCalls) -> None:
        self.canary, self.config, self.calls = canary, config, calls
        self.tolerance = config.canary_tolerance or DEFAULT_TOLERANCES[dtype]
        self._expected: list[float] = []
        self._seconds = 0.0
        self._num_checks = 0
        self._compared: set[str] = set()

    def expect(self) -> None:
        """Have the actor compute what servers must answer, from weights that are where it computes; collective."""
        if self.config.verify:
            start = time.perf_counter()
            self._expected = self.canary.log_probs()
            self._seconds = time.perf_counter() - start

    def check(self, policy_version: int, servers: Sequence[ServerAddress]) -> VerificationReport:
        """Check servers that have taken in the version of the last `expect`; collective.

        Args:
            policy_version: The version.
            servers: Those that did not fail to take it in, with memory for a KV cache.
        """
        if not self.config.verify or not servers:
            return VerificationReport()
        start = time.perf_counter()
        told = on_rank(0, lambda: self._check(policy_version, servers))
        self._num_checks += 1
        return VerificationReport(**told, seconds=self._seconds + time.perf_counter() - start)

    def _check(self, policy_version: int, servers: Sequence[ServerAddress]) -> dict[str, Any]:
        async def check(server: SglangServer) -> tuple[float, float]:
            return await self._check_server(server, policy_version)

        replies = self.calls.start_all(servers, check)
        failed = failures(replies)
        differences = {name: reply.result() for name, reply in replies.items() if name not in failed}
        for name, (mean, largest) in differences.items():
            # Written so that NaN fails.
            if not mean <= self.tolerance:
                failed[name] = (
                    f"its log-probabilities of a fixed response differ from the actor's by {mean:.3g} nats on average, "
                    f"{largest:.3g} at most; weight_sync.canary_tolerance is {self.tolerance:g}"
                )
        sound = [server for server in servers if server.name not in failed]
        due = self._comparison_is_due(sound)
        if due:
            failed |= self._compare_checksums(sound)
        return {
            "failed": failed,
            "mean_difference": max((mean for mean, _ in differences.values()), default=0.0),
            "max_difference": max((largest for _, largest in differences.values()), default=0.0),
            "checksums_compared": due,
        }

    async def _check_server(self, server: SglangServer, policy_version: int) -> tuple[float, float]:
        """Mean and largest |Δ| of a server's canary.

        Raises:
            ServerError: It does not answer, or a worker has another version.
        """
        timeout_s = self.config.timeout_s
        await server.continue_generation(timeout_s)
        versions = (await server.info(timeout_s)).policy_versions
        if set(versions) != {policy_version}:
            raise ServerNonsenseError(
                server.url,
                "server_info",
                f"its workers have weights of versions {sorted(set(versions))}, not all of {policy_version}",
                "it has to take them in again",
            )
        found = await server.response_log_probs(self.canary.prompt_token_ids, self.canary.response_token_ids, timeout_s)
        delta = np.abs(found.astype(np.float64) - np.array(self._expected))
        return float(delta.mean()), float(delta.max())

    def _comparison_is_due(self, servers: Sequence[ServerAddress]) -> bool:
        if self.config.checksum_every == 0 or len(servers) < 2:
            return False
        is_new = any(server.name not in self._compared for server in servers)
        return is_new or self._num_checks % self.config.checksum_every == 0

    def _compare_checksums(self, servers: Sequence[ServerAddress]) -> dict[str, str]:
        """Servers whose parameters are not those that most servers have; all of them where there is no majority."""
        replies = self.calls.start_all(servers, lambda server: server.checksums(self.config.timeout_s))
        failed = failures(replies)
        found = {name: _digest(reply.result()) for name, reply in replies.items() if name not in failed}
        self._compared |= set(found)
        # Servers cut their parameters among their ranks, so only those with equally many can be compared.
        for size in {server.tensor_parallel_size for server in servers}:
            alike = {s.name: found[s.name] for s in servers if s.tensor_parallel_size == size and s.name in found}
            counts = Counter(alike.values()).most_common(2)
            if len(counts) < 2:
                continue
            usual = counts[0][0] if counts[0][1] > counts[1][1] else None
            failed |= {
                name: "its parameters are not those of the other servers, bit by bit"
                for name, digest in alike.items()
                if digest != usual
            }
        return failed


def _digest(checksums: list[dict[str, str]]) -> str:
    return sha256(orjson.dumps(checksums, option=orjson.OPT_SORT_KEYS)).hexdigest()
