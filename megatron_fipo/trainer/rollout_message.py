"""A rollout on its way to another process: plain JSON values, and the arrays of its batch as they are."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from megatron_fipo.parallel.collectives import Arrays
from megatron_fipo.rollout.controller import Rollout
from megatron_fipo.types import TrainBatch


def pack_rollout(rollout: Rollout) -> tuple[dict[str, Any], Arrays]:
    """The JSON values and the arrays of a rollout."""
    fields = {field.name: getattr(rollout.batch, field.name) for field in dataclasses.fields(rollout.batch)}
    arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    others = {name: value for name, value in fields.items() if name not in arrays}
    if rollout.batch.routing_file is not None:
        others["routing_file"] = str(rollout.batch.routing_file)
    return {"metrics": rollout.metrics, "records": rollout.records, "batch": others}, arrays


def unpack_rollout(values: Mapping[str, Any], arrays: Arrays) -> Rollout:
    """The rollout that was packed."""
    fields: dict[str, Any] = {**values["batch"], **arrays}
    if fields["routing_file"] is not None:
        fields["routing_file"] = Path(fields["routing_file"])
    return Rollout(batch=TrainBatch(**fields), metrics=values["metrics"], records=values["records"])
