"""Settings for all tests: property tests draw the same examples every time, without a limit on their time."""

import logging

import pytest
from hypothesis import settings

from megatron_fipo.runtime.logging import own_logger
from tests.sglang_servers import sglang_server  # noqa: F401

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def log_as_if_first() -> None:
    """Undo what a run in this process did to the package's logger, so that `caplog` sees its warnings."""
    own = own_logger()
    own.handlers.clear()
    own.setLevel(logging.WARNING)
    own.propagate = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests that end what others share behind these."""
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)
