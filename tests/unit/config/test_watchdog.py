import re
from typing import Any

import pytest

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.sglang import SglangConfig
from megatron_fipo.config.watchdog import WatchdogConfig
from tests.unit.config.test_sections import run_config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stop_within_s": 0.0}, "stop_within_s = 0.0: must be a positive number of seconds"),
        ({"stall_after_s": -1.0}, "stall_after_s = -1.0: must be a number of seconds; set it to 0 to wait for ever"),
        ({"long_stall_after_s": float("inf")}, "long_stall_after_s = inf: must be a number of seconds"),
        (
            {"stall_after_s": 60.0, "long_stall_after_s": 30.0},
            "long_stall_after_s = 30.0: must not be less than stall_after_s = 60",
        ),
    ],
)
def test_times_that_mean_nothing_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        WatchdogConfig(**values)


def test_a_hang_takes_so_long_to_be_noticed_at_most() -> None:
    assert WatchdogConfig(stall_after_s=5.0, long_stall_after_s=7.0).longest_s == 7.0
    assert WatchdogConfig(stall_after_s=5.0, long_stall_after_s=0.0).longest_s == 0.0
    assert WatchdogConfig(stall_after_s=0.0).longest_s == 0.0


def test_servers_that_start_are_no_hang() -> None:
    sizes: dict[str, Any] = {"num_prompts_per_step": 8, "group_size": 4, "max_response_tokens": 156}
    run_config(rollout=RolloutConfig(engine="sglang", **sizes))
    served = RolloutConfig(engine="sglang", sglang=SglangConfig(start_timeout_s=900.0), **sizes)
    run_config(rollout=served, watchdog=WatchdogConfig(long_stall_after_s=901.0))
    run_config(rollout=served, watchdog=WatchdogConfig(stall_after_s=0.0, long_stall_after_s=1.0))
    with pytest.raises(ConfigError, match=r"_after_s = 900.0: must exceed rollout.sglang.start_timeout_s = 900"):
        run_config(rollout=served, watchdog=WatchdogConfig(long_stall_after_s=900.0))
