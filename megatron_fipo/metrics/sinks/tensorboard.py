"""Metrics for TensorBoard: event files in the run directory."""

from collections.abc import Mapping
from pathlib import Path


class TensorBoardSink:
    """Writes `tensorboard/` in the run directory.

    Args:
        folder: Where the event files go.
        first_step: First step that comes; TensorBoard leaves out what earlier event files have of it and later ones.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        # Slow to import, and needed by some runs only.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step if folder.exists() else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to every metric's curve; it is on disk when this returns."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
