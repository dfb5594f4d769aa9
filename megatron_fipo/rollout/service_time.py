"""How long engines generate, and how much of it nobody waits for."""

import asyncio


class ServiceTime:
    """Adds up, from one batch to the next, the time in which anything is on its way."""

    def __init__(self) -> None:
        self._busy_s = self._hidden_s = 0.0
        self._since: float | None = None
        self._awaited_at: float | None = None

    def serve(self, is_busy: bool) -> None:
        """From now on something is on its way, or nothing."""
        now = _now()
        if self._since is not None:
            self._busy_s += now - self._since
        self._since = now if is_busy else None

    def await_batch(self) -> None:
        """From now on the trainer waits for the batch."""
        self.serve(self._since is not None)
        self._awaited_at, self._hidden_s = _now(), self._busy_s

    def metrics(self) -> dict[str, float]:
        """The batch is full: what it took, as metrics; the next one's time begins."""
        self.serve(self._since is not None)
        assert self._awaited_at is not None, "a batch is full only once it is awaited"
        metrics = {"rollout/wait_s": _now() - self._awaited_at, "rollout/serving_s": self._busy_s}
        if self._busy_s > 0:
            metrics["rollout/overlap_fraction"] = self._hidden_s / self._busy_s
        self._busy_s, self._awaited_at = 0.0, None
        return metrics


def _now() -> float:
    return asyncio.get_running_loop().time()
