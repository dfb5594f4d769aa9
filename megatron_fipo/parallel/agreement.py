"""What ends a run, made known to every rank: a rank that did not hear would wait in the next collective."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch.distributed as dist

from megatron_fipo.config.base import ConfigError
from megatron_fipo.parallel.collectives import gather_json
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.stop_request import StopRequest, StopRequested

type RunEnd = ConfigError | RunError | StopRequested


def on_every_rank[T](action: Callable[[], T]) -> T:
    """Do something on every rank; collective.

    Raises:
        ConfigError: A rank met one; raised on all of them.
        RunError: The same.
        StopRequested: The same.
    """
    caught: RunEnd | None = None
    try:
        result = action()
    except (ConfigError, RunError, StopRequested) as error:
        caught = error
    problems = gather_json(None if caught is None else describe(caught))
    if caught is not None:
        raise caught
    for problem in problems:
        if problem is not None:
            raise rebuild(*problem)
    return result


def on_main_rank[T](action: Callable[[], T]) -> T | None:
    """Do something on rank 0 alone, as `on_every_rank`; None elsewhere."""
    return on_every_rank(action if dist.get_rank() == 0 else lambda: None)


@contextmanager
def stop_comes_first(stop: StopRequest) -> Iterator[None]:
    """Take an error for a stop, where one is asked for: the same signal may have ended servers.

    Args:
        stop: Looked at on rank 0.

    Raises:
        StopRequested: Instead of an error that every rank has met; raised on all of them.
    """
    try:
        yield
    except RunError:
        on_main_rank(stop.raise_if_asked)
        raise


def describe(error: RunEnd) -> tuple[str, list[str], str]:
    """Kind, arguments and text, from which another process can `rebuild` the error."""
    return type(error).__name__, [str(each) for each in error.args], str(error)


def rebuild(kind: str, arguments: Sequence[str], text: str) -> RunEnd:
    """The error that another process described; a RunError where its kind is not known here."""
    known: list[type[RunEnd]] = [ConfigError, RunError, StopRequested]
    for each in known:
        if each.__name__ == kind:
            return each(*arguments)
        known += each.__subclasses__()
    return RunError(text)
