"""What a folder holds at any depth; `Path.rglob` leaves out what cannot be listed, as if it were not there."""

import os
from pathlib import Path


def contents(folder: Path) -> tuple[list[Path], list[Path]]:
    """Files and folders below a folder; links count as what they lead to, and are not followed.

    Raises:
        OSError: One of the folders cannot be listed.
    """
    files: list[Path] = []
    folders: list[Path] = []
    for place, folder_names, file_names in os.walk(folder, onerror=_pass_on):
        files += [Path(place, name) for name in file_names]
        folders += [Path(place, name) for name in folder_names]
    return files, folders


def _pass_on(error: OSError) -> None:
    raise error
