"""Makes the pictures of docs/live_view.md from real runs.

torchrun --standalone --nproc-per-node 4 tools/screenshots.py live PICTURE.svg STEP CONFIG.yaml [--section.field value]
    runs the configuration and keeps the live view's screen in the middle of a step's updates.
python tools/screenshots.py inspect PICTURE.svg RUN STEP SAMPLE
    keeps what `megatron-fipo inspect RUN --step STEP --sample SAMPLE --show all` prints.
"""

import io
import sys
from pathlib import Path

from benchmark_live_view import run_watched
from rich.console import Console

from megatron_fipo.display.inspect import show_response
from megatron_fipo.display.live_view import LiveView
from megatron_fipo.display.run_files import RunFiles
from megatron_fipo.display.screen import recorded_svg
from megatron_fipo.display.token_view import READINGS

_WIDTH, _HEIGHT = 100, 28


class Photographed(LiveView):
    """A view that exports its screen once, in the middle of a step's updates.

    Args:
        console: Where it paints.
        path: The picture.
        step: The step.
    """

    def __init__(self, console: Console, path: Path, step: int) -> None:
        super().__init__(console)
        self._path, self._wanted = path, step

    def advance(self, done: int, total: int) -> None:
        """As the view, then perhaps export."""
        super().advance(done, total)
        view = self.view()
        if (view.phase, view.step, done) == ("update", self._wanted, (total + 1) // 2):
            self.export_svg(self._path, _WIDTH, _HEIGHT)


def main() -> None:
    """Make the picture that the words ask for."""
    kind, path, *words = sys.argv[1:]
    if kind == "live":
        step, config, *overrides = words
        run_watched(Path(config), overrides, lambda console: Photographed(console, Path(path), int(step)))
        return
    run, step, sample = words
    console = Console(record=True, file=io.StringIO(), width=_WIDTH, force_terminal=True, color_system="truecolor")
    show_response(console, RunFiles(Path(run)), int(step), int(sample), READINGS, with_table=False)
    title = f"megatron-fipo inspect {run} --step {step} --sample {sample} --show all"
    Path(path).write_text(recorded_svg(console, title), encoding="utf-8")


if __name__ == "__main__":
    main()
