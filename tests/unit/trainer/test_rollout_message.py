import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_fipo.config.baselines import DapoConfig
from megatron_fipo.rollout.batch import build_train_batch
from megatron_fipo.rollout.controller import Rollout
from megatron_fipo.trainer.rollout_message import pack_rollout, unpack_rollout
from megatron_fipo.types import Prompt, RolloutGroup, Sample


def rollout() -> Rollout:
    samples = [
        Sample(
            prompt_id="p",
            sample_index=index,
            response_token_ids=np.arange(index + 1, dtype=np.int32),
            rollout_log_probs=np.full(index + 1, -0.1, dtype=np.float32),
            finish_reason="stop",
            policy_version=3,
            reward=float(index),
        )
        for index in range(2)
    ]
    group = RolloutGroup(prompt=Prompt(id="p", token_ids=np.array([5, 6], dtype=np.int32), text="56"), samples=samples)
    batch = build_train_batch([group], DapoConfig(updates_per_rollout=1), temperature=0.7)
    return Rollout(batch=batch, metrics={"rollout/epoch": 0.1}, records=[{"response": "a\ud800"}])


@pytest.mark.parametrize("routing_file", [None, Path("routing/step_1.bin")])
def test_a_rollout_comes_out_as_it_went_in(routing_file: Path | None) -> None:
    sent = rollout()
    sent = dataclasses.replace(sent, batch=dataclasses.replace(sent.batch, routing_file=routing_file))
    values, arrays = pack_rollout(sent)
    received = unpack_rollout(json.loads(json.dumps(values)), arrays)
    assert (received.metrics, received.records) == (sent.metrics, sent.records)
    for field in dataclasses.fields(sent.batch):
        mine, theirs = getattr(sent.batch, field.name), getattr(received.batch, field.name)
        np.testing.assert_array_equal(theirs, mine, err_msg=field.name)
        assert type(theirs) is type(mine), field.name


def test_no_array_travels_as_json() -> None:
    values, arrays = pack_rollout(rollout())
    assert values["batch"] == {"temperature": 0.7, "routing_file": None}
    assert "token_ids" in arrays
