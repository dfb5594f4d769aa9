"""What a run does when its numbers go wrong."""

from typing import Literal

from megatron_fipo.config.base import config_class, require


@config_class
class SafeguardsConfig:
    """Numerical faults and collapse: what counts as one, what becomes of the run, and what is kept to study it.

    "warn" tells it in the log and goes on, "skip" leaves the update out as if it had not been there, "stop" ends the
    run before the update is made.
    """

    on_non_finite: Literal["skip", "stop"] = "stop"
    """A loss or a gradient is NaN or infinite. Weights that are not finite always end the run."""

    max_log_ratio: float = 15.0
    """Largest |log π_θ − log π_old| (nats) of a response token that is no fault; algorithm.log_ratio_clamp, 20 by
    default, is the largest that is seen."""

    on_exploding_ratio: Literal["warn", "skip", "stop"] = "warn"
    """A token's log-ratio lies beyond max_log_ratio."""

    null_future_kl_budget: float = 0.01
    """Standard deviation of the Future-KL (nats) before a rollout's first applied update, where it must be 0, that is
    no fault yet. The influence weights' band [1, 1.2] is 0.18 nats wide."""

    on_null_noise: Literal["warn", "skip", "stop"] = "warn"
    """The standard deviation lies beyond null_future_kl_budget: numerical noise moves the influence weights."""

    max_consecutive_skips: int = 3
    """Faulty updates in a row that may be skipped; one more ends the run."""

    collapse_window_steps: int = 20
    """Steps that rewards and lengths are averaged over before they are judged; 0 judges neither."""

    max_reward_drop: float = 0.3
    """How far the window's mean reward may lie below the best window of the run, in units of the reward."""

    min_length_fraction: float = 0.25
    """Part of the longest window's mean response length below which the length has collapsed."""

    max_truncated_fraction: float = 0.9
    """Mean part of responses cut off by the token limit above which the length has exploded."""

    max_steps_without_signal: int = 5
    """Steps in a row whose groups all have equal rewards, so that nothing is learnt, that are no collapse yet."""

    on_collapse: Literal["warn", "stop"] = "warn"
    """Reward or response length has collapsed."""

    max_dumps: int = 2
    """Faulty updates, at most one a step, that are kept in dumps/ in the run directory for `megatron-fipo train
    --replay`; 0 keeps none. Faults that are warned of leave none."""

    dump_weights: bool = True
    """Keep the weights with the update, without which it cannot be run again."""

    dump_step: int | None = None
    """Also keep an update of this step, with or without a fault; it counts among max_dumps."""

    dump_update: int = 1
    """Which update of dump_step, from 1."""

    def __post_init__(self) -> None:
        """Check ranges."""
        limits = {
            "max_log_ratio": (self.max_log_ratio > 0, "must be positive", "use 15, or .inf for no limit"),
            "null_future_kl_budget": (
                self.null_future_kl_budget >= 0,
                "must not be negative",
                "use 0.01, or .inf for no limit",
            ),
            "max_reward_drop": (self.max_reward_drop > 0, "must be positive", "use .inf for no limit"),
            "min_length_fraction": (0 <= self.min_length_fraction < 1, "must lie in [0, 1)", "0 sets no limit"),
            "max_truncated_fraction": (0 < self.max_truncated_fraction <= 1, "must lie in (0, 1]", "1 sets no limit"),
            "max_consecutive_skips": (self.max_consecutive_skips >= 0, "must not be negative", "3 is usual"),
            "collapse_window_steps": (self.collapse_window_steps >= 0, "must not be negative", "0 judges nothing"),
            "max_steps_without_signal": (self.max_steps_without_signal >= 1, "must be at least 1", "5 is usual"),
            "max_dumps": (self.max_dumps >= 0, "must not be negative", "0 keeps none"),
            "dump_step": (self.dump_step is None or self.dump_step >= 1, "must be at least 1", "steps begin at 1"),
            "dump_update": (
                self.dump_update == 1 or (self.dump_update > 1 and self.dump_step is not None),
                "must be at least 1, and is of dump_step, which must be given with it",
                "updates are counted from 1; set dump_step, too",
            ),
        }
        for field, (holds, rule, way_out) in limits.items():
            require(holds, field=field, value=getattr(self, field), rule=rule, way_out=way_out)
