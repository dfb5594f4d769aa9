"""How far the weights that generated a batch are behind those that it trains."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from megatron_fipo.rollout.admission import oldest_version
from megatron_fipo.types import RolloutGroup


def staleness_metrics(groups: Sequence[RolloutGroup], policy_version: int) -> dict[str, float]:
    """The exact distribution of lags, over groups by their oldest sample and over response tokens.

    Args:
        groups: The batch's groups; not empty.
        policy_version: Version of the weights that train on it.
    """
    of_groups = np.array([policy_version - oldest_version(group) for group in groups])
    versions = [sample.token_versions for group in groups for sample in group.samples]
    return {
        **_distribution("rollout/staleness", of_groups),
        **_distribution("rollout/token_staleness", policy_version - np.concatenate(versions)),
    }


def _distribution(name: str, lags: npt.NDArray[np.integer]) -> dict[str, float]:
    values, counts = np.unique(lags, return_counts=True)
    if not len(values):
        return {}
    return {
        f"{name}_mean": float((values * counts).sum() / counts.sum()),
        f"{name}_max": int(values[-1]),
        **{
            f"{name}_{lag}_fraction": count / len(lags)
            for lag, count in zip(values.tolist(), counts.tolist(), strict=True)
        },
    }
