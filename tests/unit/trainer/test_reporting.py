import math
from typing import Any

import pytest

from megatron_fipo.actor.train_step import UpdateResult
from megatron_fipo.trainer.reporting import combine_updates, throughput


def update(loss: float, metrics: dict[str, float] | None = None, **values: Any) -> UpdateResult:
    fields = {"applied": True, "skip_reason": "", "is_finite": True}
    fields |= {"kept_tokens": 10, "denominator": 10.0, "grad_norm": 2 * loss}
    return UpdateResult(loss=loss, metrics=metrics or {}, learning_rate=loss / 10, **(fields | values))


SKIPPED = {"applied": False, "skip_reason": "nothing left", "kept_tokens": 0, "grad_norm": 0.0}


def test_a_step_is_the_mean_over_its_updates() -> None:
    combined = combine_updates(
        [
            update(1.0, {"train/policy_kl": 0.5, "train/ratio_max": 3.0, "fipo/influence_weight_min": 0.8}),
            update(3.0, {"train/policy_kl": 1.0, "train/ratio_max": 2.0, "fipo/influence_weight_min": 0.9}),
        ]
    )
    assert combined == {
        "train/updates": 2,
        "train/updates_skipped": 0,
        "train/loss": 2.0,
        "train/grad_norm": 4.0,
        "train/learning_rate": 0.3,
        "train/loss_by_update": [1.0, 3.0],
        "train/grad_norm_by_update": [2.0, 6.0],
        "train/policy_kl": 0.75,
        "train/ratio_max": 3.0,
        "fipo/influence_weight_min": 0.8,
    }


def test_dropped_sequences_are_summed() -> None:
    parts = [update(1.0, {"fipo/dropped_sequences": count}) for count in (2.0, 0.0, 3.0)]
    assert combine_updates(parts)["fipo/dropped_sequences"] == 5.0


def test_the_losses_own_mean_does_not_stand_in_for_the_reduced_loss() -> None:
    assert combine_updates([update(1.0, {"train/loss": 77.0})])["train/loss"] == 1.0


def test_a_metric_that_an_update_lacks_is_the_mean_of_the_others() -> None:
    parts = [update(1.0, {"train/policy_kl": 0.5}), update(1.0), update(1.0, {"train/policy_kl": 1.5})]
    assert combine_updates(parts)["train/policy_kl"] == 1.0


@pytest.mark.parametrize("denominator", [0.0, 16.0], ids=["token mean", "official: samples count"])
def test_an_update_without_tokens_counts_among_the_skipped_alone(denominator: float) -> None:
    combined = combine_updates([update(1.0), update(math.nan, **SKIPPED, denominator=denominator), update(3.0)])
    assert (combined["train/updates"], combined["train/updates_skipped"]) == (3, 1)
    assert (combined["train/loss"], combined["train/grad_norm"]) == (2.0, 4.0)
    assert combined["train/grad_norm_by_update"] == [2.0, 0.0, 6.0]
    assert math.isnan(combined["train/loss_by_update"][1])


def test_without_any_token_there_is_no_loss() -> None:
    combined = combine_updates([update(math.nan, **SKIPPED)])
    assert not {"train/loss", "train/grad_norm"} & set(combined)
    assert combined["train/updates_skipped"] == 1


def test_the_null_mini_batch_is_the_first_update() -> None:
    parts = [
        update(1.0, {"fipo/future_kl_mean": mean, "fipo/future_kl_square_mean": square})
        for mean, square in [(0.5, 0.25 + 0.09), (3.0, 100.0)]
    ]
    combined = combine_updates(parts)
    assert combined["fipo/null_future_kl_std"] == pytest.approx(0.3)
    assert combined["fipo/future_kl_mean"] == 1.75
    zero = update(1.0, {"fipo/future_kl_mean": 0.0, "fipo/future_kl_square_mean": 0.0})
    assert combine_updates([zero, parts[1]])["fipo/null_future_kl_std"] == 0.0


def test_rounding_of_the_spread_gives_no_imaginary_number() -> None:
    first = update(1.0, {"fipo/future_kl_mean": 0.1, "fipo/future_kl_square_mean": 0.1**2 - 1e-18})
    assert combine_updates([first])["fipo/null_future_kl_std"] == 0.0


def test_no_update_is_no_metric() -> None:
    assert combine_updates([]) == {}


def test_speed_of_generation_is_over_the_time_in_which_something_was_generated() -> None:
    times = {"time/rollout_s": 2.0, "time/update_s": 5.0}
    embedded = throughput(600, {"rollout/response_tokens_generated": 400}, times)
    assert embedded == {"perf/rollout_response_tokens_per_s": 200.0, "perf/update_tokens_per_s": 120.0}
    # The trainer waited for 2 s of these 8.
    ahead = throughput(600, {"rollout/response_tokens_generated": 400, "rollout/serving_s": 8.0}, times)
    assert ahead["perf/rollout_response_tokens_per_s"] == 50.0
    # All of the batch was there already.
    idle = throughput(600, {"rollout/response_tokens_generated": 0, "rollout/serving_s": 0.0}, times)
    assert "perf/rollout_response_tokens_per_s" not in idle
