import pytest
import torch.distributed as dist

from megatron_fipo.config.base import ConfigError
from megatron_fipo.parallel.agreement import on_every_rank, on_main_rank
from megatron_fipo.rewards.base import RewardError
from megatron_fipo.rollout.admission import NoSignalError
from megatron_fipo.rollout.batch import RecordedBatchError
from megatron_fipo.runtime.errors import NonFiniteError, RunError
from megatron_fipo.trainer.export import ExportError
from tests.distributed_helpers import run_distributed

pytestmark = pytest.mark.distributed

ERRORS = [
    ConfigError("model.path", 3, "must be text", "write a path"),
    RunError("the run stopped"),
    NoSignalError("nothing to learn"),
    RecordedBatchError("a damaged file"),
    RewardError("p1", "the scorer broke down"),
    NonFiniteError("no number"),
    ExportError("another one"),
]


def outcome(action: object) -> tuple[str, str]:
    try:
        return "result", str(action())
    except (ConfigError, RunError) as error:
        return type(error).__name__, str(error)


def fail_on(rank: int, error: Exception) -> int:
    if dist.get_rank() == rank:
        raise error
    return dist.get_rank()


def meet_errors() -> list[tuple[str, str]]:
    found = [outcome(lambda error=error: on_every_rank(lambda: fail_on(1, error))) for error in ERRORS]
    if dist.get_rank() == 2:
        kind = type("ForeignError", (RunError,), {})
    else:
        kind = RunError
    found.append(outcome(lambda: on_every_rank(lambda: fail_on(2, kind("it differs")))))
    # Several ranks fail at once: each tells its own.
    found.append(outcome(lambda: on_every_rank(lambda: fail_on(dist.get_rank(), RunError(f"of {dist.get_rank()}")))))
    found.append(outcome(lambda: on_main_rank(lambda: fail_on(0, ERRORS[0]))))
    found.append(outcome(lambda: on_main_rank(lambda: fail_on(1, ERRORS[0]))))
    found.append(outcome(lambda: on_every_rank(lambda: 10 * dist.get_rank())))
    return found


def test_an_error_on_one_rank_is_raised_on_all() -> None:
    ranks = run_distributed(meet_errors, 3)
    for rank, found in enumerate(ranks):
        assert found[:7] == [(type(error).__name__, str(error)) for error in ERRORS]
        # A kind that the other ranks do not know reaches them as its text.
        assert found[7] == ("ForeignError" if rank == 2 else "RunError", "it differs")
        assert found[8] == ("RunError", f"of {rank}")
        assert found[9] == ("ConfigError", str(ERRORS[0]))
        assert found[10] == ("result", "0" if rank == 0 else "None"), "other ranks do not act"
        assert found[11] == ("result", str(10 * rank))
