"""The environment of Python processes that this one starts."""

import os
from pathlib import Path

_PACKAGE_PARENT = Path(__file__).parents[2]


def child_environment(**changes: str) -> dict[str, str]:
    """This process's environment, with this package to be found whatever the working directory.

    Args:
        changes: Variables that differ.
    """
    paths = [str(_PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path), **changes}
