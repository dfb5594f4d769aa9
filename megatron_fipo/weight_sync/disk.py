"""Weights through a file system that trainer and servers share."""

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_fipo.config.weight_sync import WeightSyncConfig
from megatron_fipo.conversion.bridge import HfBridge
from megatron_fipo.conversion.hf_folder import INDEX_NAME, save_tensors
from megatron_fipo.parallel.collectives import gather_json
from megatron_fipo.parallel.context import ParallelContext
from megatron_fipo.rollout.engine import ServerAddress
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.weight_sync.base import PushReport, buckets
from megatron_fipo.weight_sync.server_calls import ServerCalls
from megatron_fipo.weight_sync.update import WeightUpdate, on_rank

logger = logging.getLogger(__name__)


class DiskTransport:
    """Writes each version as a model folder, which the servers then read.

    The senders of all pipeline stages write at once, each its own files, into `version_N.partial`, which is renamed to
    `version_N` when it is whole. The version before is removed once a server has the new one; what others have put into
    the folder stays.

    No update session surrounds the reading: SGLang makes weights ready as soon as it has read them, and the end of a
    session would do that once more. Only the beginning of a session unpacks what a quantised method has packed, so
    servers with such a method need another transport.

    Args:
        bridge: Translates the actor's parameters.
        model: Bare model chunks of this rank.
        context: This rank's place.
        folder: Where versions lie; on a file system that every server and every sender sees.
        config: Size of a file, deadlines.
        calls: Connections to the servers.
    """

    def __init__(
        self,
        bridge: HfBridge,
        model: list[Any],
        context: ParallelContext,
        folder: Path,
        config: WeightSyncConfig,
        calls: ServerCalls,
    ) -> None:
        self.context = context
        self.folder, self.config, self.calls = folder.absolute(), config, calls
        self._written: set[Path] = set()
        self._export = bridge.stage_export(model, context)
        self._model_config = bridge.export_config(next(model[0].parameters()).dtype)

    def push(self, policy_version: int, servers: Sequence[ServerAddress]) -> PushReport:
        """Give every server the actor's current weights; collective over all ranks.

        Raises:
            RunError: The weights cannot be written; raised on every rank.
        """
        target = self.folder / f"version_{policy_version}"
        num_bytes = self._write(target)
        update = WeightUpdate(self.calls, servers, self.config)
        update.ask_all(lambda server: server.update_weights_from_disk(str(target), self.config.timeout_s))
        update.publish(policy_version)
        if update.alive:
            on_rank(0, lambda: self._remove_others(target))
        return PushReport(num_bytes=num_bytes, failed=update.failed)

    def _remove_others(self, newest: Path) -> None:
        """Remove the versions that this transport wrote before."""
        for other in self._written - {newest}:
            try:
                shutil.rmtree(other)
            except OSError as error:
                logger.warning("weights that no server needs any more stay at %s: %s", other, error)
        self._written = {newest}

    def _write(self, target: Path) -> int:
        """Write the folder; its size in bytes, on every rank."""
        partial = target.with_name(f"{target.name}.partial")
        self._on_main(lambda: _make_empty(partial))
        stages = gather_json(self._write_stage(partial))
        self._raise_first(problem for _, _, problem in stages)
        num_bytes = sum(stage_bytes for _, stage_bytes, _ in stages)
        weight_map = {name: file for stage, _, _ in stages for name, file in stage.items()}

        def commit() -> None:
            _write_json(partial / INDEX_NAME, {"metadata": {"total_size": num_bytes}, "weight_map": weight_map})
            _write_json(partial / "config.json", self._model_config)
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
            self._written.add(target)

        self._on_main(commit)
        return num_bytes

    def _write_stage(self, partial: Path) -> tuple[dict[str, str], int, str | None]:
        """Write this stage's tensors where this rank is its sender: the file of each, their bytes, what went wrong.

        After an error the stream still runs to its end, because other ranks take part in it.
        """
        weight_map: dict[str, str] = {}
        num_bytes, problem = 0, None
        max_bytes = self.config.bucket_mib * 1024**2
        for number, bucket in enumerate(buckets(self._export.stream(), max_bytes, policy_version=0)):
            if not bucket.tensors or problem is not None:
                continue
            file = f"model-stage-{self.context.pp_rank:03d}-{number:05d}.safetensors"
            tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in bucket.tensors.items()}
            weight_map |= dict.fromkeys(tensors, file)
            num_bytes += sum(tensor.nbytes for tensor in tensors.values())
            try:
                save_tensors(tensors, partial / file)
            except OSError as error:
                problem = str(error)
        return weight_map, num_bytes, problem

    def _on_main(self, action: Callable[[], None]) -> None:
        """Do something with files on rank 0; what goes wrong is raised on every rank."""

        def attempt() -> str | None:
            try:
                action()
            except OSError as error:
                return str(error)
            return None

        self._raise_first([on_rank(0, attempt)])

    def _raise_first(self, problems: Iterable[str | None]) -> None:
        for problem in problems:
            if problem is not None:
                raise RunError(
                    f"weight_sync.folder = {self.folder}: cannot hold the weights ({problem}); free space there or "
                    "mend its permissions, or set weight_sync.folder to another place that trainer and servers share"
                )


def _make_empty(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
