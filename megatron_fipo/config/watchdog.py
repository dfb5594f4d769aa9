"""When a run is ended that hangs, or takes too long to end on request."""

import math

from megatron_fipo.config.base import config_class, require


@config_class
class WatchdogConfig:
    """The watchdog: it hears signals, and looks for ranks that have died and for a run that hangs."""

    stop_within_s: float = 240.0
    """Seconds that a run may take to come to an end after SIGTERM, SIGUSR1 or Ctrl-C. The step under way is finished
    when it is being trained on, and a checkpoint is written; what is not done by then is lost, and the run goes on from
    its last checkpoint. Choose less than the lead time of Slurm's --signal."""

    stall_after_s: float = 600.0
    """Seconds without progress on any rank, or without a sign of life from one, after which the run counts as hung: it
    writes what every rank does to `logs/stall_….txt` and ends, to go on from its last checkpoint. 0 waits for ever."""

    long_stall_after_s: float = 2400.0
    """The same during start-up, generation, evaluation, weight sync, checkpoints and export, where one piece of work
    may take long: a server's start, the first response, a large file. More than rollout.sglang.start_timeout_s. 0 waits
    for ever there."""

    @property
    def longest_s(self) -> float:
        """Seconds after which it ends a run that hangs, wherever it hangs; 0 where it may wait for ever."""
        return self.long_stall_after_s if self.stall_after_s else 0.0

    def __post_init__(self) -> None:
        """Check ranges."""
        require(
            0 < self.stop_within_s < math.inf,
            field="stop_within_s",
            value=self.stop_within_s,
            rule="must be a positive number of seconds",
            way_out="give the time that a step and a checkpoint need",
        )
        for field in ("stall_after_s", "long_stall_after_s"):
            value = getattr(self, field)
            require(
                0 <= value < math.inf,
                field=field,
                value=value,
                rule="must be a number of seconds",
                way_out="set it to 0 to wait for ever",
            )
        require(
            self.long_stall_after_s >= self.stall_after_s or self.long_stall_after_s == 0,
            field="long_stall_after_s",
            value=self.long_stall_after_s,
            rule=f"must not be less than stall_after_s = {self.stall_after_s:g}",
            way_out="raise it, or lower stall_after_s",
        )
