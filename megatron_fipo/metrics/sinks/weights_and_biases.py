"""Metrics for Weights & Biases, online or into a folder that `wandb sync` uploads later."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.metrics import WandbConfig
from megatron_fipo.runtime.files.whole_file import whole_file


class WandbSink:
    """Logs into one W&B run; its files lie in `wandb/` in the run directory.

    A run that goes on logs into the same one, whose id is in `wandb_run_id`. W&B drops steps that it has already.

    Args:
        config: Project, mode and names.
        directory: The run directory.
        run_config: The resolved configuration, shown beside the curves.

    Raises:
        ConfigError: The run cannot be started (no network or no login, in mode "online").
    """

    name = "W&B"

    def __init__(self, config: WandbConfig, directory: Path, run_config: Mapping[str, Any]) -> None:
        import wandb

        id_file = directory / "wandb_run_id"
        run_id = id_file.read_text(encoding="ascii").strip() if id_file.exists() else None
        assert config.mode != "off", "without a run there is no sink"
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                id=run_id,
                resume="allow",
                name=config.run_name or directory.name,
                mode=config.mode,
                dir=directory,
                config=dict(run_config),
                settings=wandb.Settings(console="off", silent=True, disable_code=True, disable_git=True),
            )
        except Exception as error:
            raise ConfigError(
                field="metrics.wandb.mode",
                value=config.mode,
                rule=f"W&B could not start a run ({error})",
                way_out='run `wandb login`, or set it to "offline" and upload with `wandb sync` afterwards',
            ) from error
        with whole_file(id_file) as file:
            file.write(f"{self._run.id}\n".encode("ascii"))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log a step's numbers."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Finish the run, waiting for uploads and for the file of an offline run."""
        import wandb

        self._run.finish()
        # Offline, `finish` does not wait for W&B's own process, which writes the file.
        wandb.teardown()
