"""Servers that generate with a model folder's own weights, which rank 0 drives while the other ranks wait."""

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import aiohttp

from megatron_fipo.config.base import ConfigError
from megatron_fipo.config.evaluate import EvaluateConfig
from megatron_fipo.conversion.hf_folder import read_model_config
from megatron_fipo.parallel.agreement import on_every_rank
from megatron_fipo.parallel.collectives import broadcast_json
from megatron_fipo.rollout.controller import RolloutController
from megatron_fipo.rollout.engine import RolloutEngine, ServerAddress
from megatron_fipo.rollout.servers.pool import TrainerRanks, open_pool
from megatron_fipo.rollout.sglang.client import ServerError, SglangServer, open_session
from megatron_fipo.rollout.sglang.engine import SglangEngine
from megatron_fipo.rollout.sglang.request_router import open_router
from megatron_fipo.runtime.background import running
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.run_dir import RunDirectory
from megatron_fipo.trainer.controller_calls import WORD_EVERY_S
from megatron_fipo.trainer.weight_supply import WeightSupply

_POLICY_VERSION = 0

type MakeController = Callable[[RolloutEngine], RolloutController]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedEvaluation:
    """Has problems tried by servers, in this process; servers have the folder's weights from the start.

    Attributes:
        config: The evaluation.
        make_controller: The controller over an engine; on rank 0 alone.
    """

    config: EvaluateConfig
    make_controller: MakeController | None

    def generate[T](self, drive: Callable[[RolloutController], Coroutine[Any, Any, T]]) -> T | None:
        """Start servers, let rank 0 drive them, and end them; collective over all ranks.

        Args:
            drive: What the controller is to do.

        Returns:
            What `drive` gives on rank 0, None elsewhere.

        Raises:
            ConfigError: Servers cannot be started this way; raised on every rank.
            RunError: From `drive`, or no server is left; raised on every rank.
        """
        return on_every_rank(lambda: self._take_part(drive))

    def _take_part[T](self, drive: Callable[[RolloutController], Coroutine[Any, Any, T]]) -> T | None:
        if self.make_controller is None:
            while broadcast_json(None, 0):
                pass
            return None
        # After any other error the ranks are out of step, and a broadcast could wait for ever.
        try:
            result = asyncio.run(self._drive(self.make_controller, drive))
        except (ConfigError, RunError):
            broadcast_json(False, 0)
            raise
        broadcast_json(False, 0)
        return result

    async def _drive[T](
        self, make_controller: MakeController, drive: Callable[[RolloutController], Coroutine[Any, Any, T]]
    ) -> T:
        config = self.config
        folder = RunDirectory(config.output_dir).servers
        vocab_size = int(read_model_config(config.model.path)["vocab_size"])
        # Only this rank speaks to servers.
        ranks = replace(TrainerRanks.of_launcher(os.environ), elsewhere=0)
        async with (
            running(_tell_others()),
            open_pool(config.model, config.rollout, folder, ranks) as pool,
            open_router(config.rollout, pool.api_key, folder) as router,
            SglangEngine(pool, config.rollout, vocab_size, router=router) as engine,
            open_session(pool.api_key, max_requests=1) as session,
        ):

            async def declare(servers: Sequence[ServerAddress]) -> Mapping[str, str]:
                return await _declare_version(servers, session)

            controller = make_controller(engine)
            # It pauses before the first request alone.
            supply = WeightSupply(controller, engine, pool, "abort", declare)
            try:
                await supply.resume(_POLICY_VERSION, await declare(await supply.pause()))
                async with running(supply.run()):
                    return await drive(controller)
            finally:
                await controller.close()


async def _declare_version(servers: Sequence[ServerAddress], session: aiohttp.ClientSession) -> dict[str, str]:
    """Call the folder's weights a version, without which a server gets no requests; gives why some did not agree."""
    failed = {}
    for server in servers:
        try:
            await SglangServer(server.url, session).update_weight_version(_POLICY_VERSION)
        except ServerError as error:
            failed[server.name] = str(error)
    return failed


async def _tell_others() -> None:
    """Let the other ranks know that rank 0 is still busy, before their collective's time limit."""
    while True:
        await asyncio.sleep(WORD_EVERY_S)
        broadcast_json(True, 0)
