"""Settings for all tests: property tests draw the same examples every time, without a limit on their time."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
