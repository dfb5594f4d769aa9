"""The rollout controller as a process of its own, which rank 0 starts: `… -m THIS_MODULE LINE FILES`."""

import asyncio
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_fipo.config.load import config_from_values
from megatron_fipo.config.run import RunConfig
from megatron_fipo.rollout.controller import RolloutController
from megatron_fipo.rollout.controller_state import ControllerState, write_controller_state
from megatron_fipo.rollout.engine import ServerAddress
from megatron_fipo.rollout.servers.arguments import check_server_arguments
from megatron_fipo.rollout.servers.pool import TrainerRanks, open_pool
from megatron_fipo.rollout.sglang.engine import SglangEngine
from megatron_fipo.rollout.sglang.generate_responses import RoutingShape
from megatron_fipo.rollout.sglang.request_router import check_router, open_router
from megatron_fipo.runtime.background import running
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.runtime.logging import setup_logging
from megatron_fipo.runtime.progress import Progress
from megatron_fipo.runtime.run_dir import RunDirectory
from megatron_fipo.trainer.controller_service import Action, Answer, ControllerService
from megatron_fipo.trainer.generation import prepare_generation
from megatron_fipo.trainer.rollout_message import pack_rollout
from megatron_fipo.trainer.weight_supply import WeightSupply

logger = logging.getLogger(__name__)

_NEWS_EVERY_S = 0.25
_QUEUES_EVERY_S = 2.0
_ENDING_PATIENCE_S = 75.0


async def run_controller(line: int, files: int) -> None:
    """Serve rank 0 until it is gone, then end what was started.

    Args:
        line: Socket for messages.
        files: Socket for file descriptors of shared arrays.
    """
    service = await ControllerService.on_sockets(line, files)
    async with AsyncExitStack() as resources:
        await service.serve(ControllerActions(service, resources).by_name)


class ControllerActions:
    """What rank 0 can ask for.

    Args:
        service: The line to rank 0.
        resources: Where what has to be closed is handed over.
    """

    def __init__(self, service: ControllerService, resources: AsyncExitStack) -> None:
        self._service, self._resources = service, resources
        self._last_state: ControllerState | None = None

    @property
    def by_name(self) -> dict[str, Action]:
        """The actions, by the names that rank 0 asks for them."""
        starting = (self.prepare, self.start_servers, self.start_engine, self.restore)
        working = (self.pause, self.resume, self.next_rollout, self.evaluate, self.save, self.end_servers)
        return {action.__name__: action for action in (*starting, *working)}

    async def prepare(self, config: dict[str, Any], vocab_size: int, positions: int) -> Answer:
        """Check the inputs and start grading."""
        run = config_from_values(RunConfig, config)
        check_server_arguments(run.rollout.sglang.server_arguments)
        check_router(run.rollout.sglang)
        self._generation = prepare_generation(run, vocab_size, positions, self._resources.enter_context(ExitStack()))
        return Answer()

    async def start_servers(self, ranks: dict[str, int]) -> Answer:
        """Have servers started, which become ready while the trainer does other things."""
        run = self._generation.config
        folder = RunDirectory(run.output_dir).servers
        opened = open_pool(run.model, run.rollout, folder, TrainerRanks(**ranks))
        self._pool = await self._resources.enter_async_context(opened)
        return Answer()

    async def start_engine(self, routing: dict[str, Any] | None) -> Answer:
        """Drive the servers; gives the key that they ask for."""
        shape = None if routing is None else RoutingShape(**routing | {"moe_layers": tuple(routing["moe_layers"])})
        generation, pool, enter = self._generation, self._pool, self._resources.enter_async_context
        run = generation.config
        router = await enter(open_router(run.rollout, pool.api_key, RunDirectory(run.output_dir).servers))
        engine = await enter(SglangEngine(pool, run.rollout, generation.vocab_size, shape, router))
        news = NewsToRank0(self._service)
        self._controller = generation.controller(engine, news)
        self._resources.push_async_callback(self._controller.close)
        self._supply = WeightSupply(self._controller, engine, pool, run.pause_mode, self._request_push)
        await enter(running(self._supply.run()))
        await enter(running(_tell_queues(self._controller, news)))
        return Answer(value={"api_key": pool.api_key})

    async def restore(self, step: int, path: str | None, anew: bool, without_journal: bool) -> Answer:
        """Go on where an earlier controller stood."""
        self._controller.restore(step, None if path is None else Path(path), anew, without_journal)
        return Answer()

    async def save(self, path: str) -> Answer:
        """Write down where the controller stands."""
        if self._last_state is None:
            await self._controller.save(Path(path))
        else:
            await asyncio.to_thread(write_controller_state, self._last_state, Path(path))
        return Answer()

    async def end_servers(self) -> Answer:
        """Free the servers' devices; where things stand can be saved still.

        Returns:
            The addresses of servers that live on, stopped where they are: those that were not started from here. The
            others may be dead already, where a signal went to all processes of a job.
        """
        if self._generation.config.rollout.sglang.urls:
            return await self.pause()
        self._last_state = self._last_state or await self._controller.settled_state()
        try:
            await self._resources.aclose()
        except RunError as error:
            # Servers may have failed before; what is to be saved is there.
            logger.warning("the servers were ended, after %s", error)
        return Answer(value=[])

    async def pause(self) -> Answer:
        """Wait until there are servers, and stop them where they are; gives their addresses."""
        return Answer(value=[asdict(server) for server in await self._supply.pause()])

    async def resume(self, policy_version: int, failed: Sequence[str]) -> Answer:
        """Go on with the servers that have taken in a version."""
        await self._supply.resume(policy_version, failed)
        return Answer()

    async def next_rollout(self, step: int, policy_version: int) -> Answer:
        """A training batch."""
        values, arrays = pack_rollout(await self._controller.next_rollout(step, policy_version))
        return Answer(value=values, arrays=arrays)

    async def evaluate(self, folder: str) -> Answer:
        """Try the held-out problems."""
        return Answer(value=await self._generation.held_out.evaluate(self._controller, Path(folder)))

    async def _request_push(self, servers: Sequence[ServerAddress]) -> Mapping[str, str] | None:
        return await self._service.request_push([asdict(server) for server in servers])


async def _tell_queues(controller: RolloutController, news: Progress) -> None:
    while True:
        await asyncio.sleep(_QUEUES_EVERY_S)
        news.show_queues(controller.queue_depths)


class NewsToRank0(Progress):
    """Tells rank 0's watcher of responses, a few times a second at most.

    Args:
        service: The line to rank 0.
    """

    def __init__(self, service: ControllerService) -> None:
        self._service = service
        self._told = {"advance": 0.0, "show_response": 0.0, "show_queues": 0.0}

    def advance(self, done: int, total: int) -> None:
        """Tell the count; its beginning and end always."""
        self._tell("advance", done in (0, total), done, total)

    def show_response(self, prompt: str, response: str, reward: float) -> None:
        """Tell a response."""
        self._tell("show_response", False, prompt, response, reward)

    def show_queues(self, depths: Mapping[str, int]) -> None:
        """Tell the depths."""
        self._tell("show_queues", True, depths)

    def _tell(self, news: str, always: bool, *content: Any) -> None:
        now = time.monotonic()
        if always or now - self._told[news] >= _NEWS_EVERY_S:
            self._told[news] = now
            self._service.tell(news, *content)


def _end_after_rank_0(files: int) -> None:
    """End this process a while after rank 0, should it be stuck; what it started ends with it."""
    poll = select.poll()
    # Without a mask, only the other end's closing is told.
    poll.register(files, 0)
    poll.poll()
    time.sleep(_ENDING_PATIENCE_S)
    os._exit(1)


def main(line: int, files: int) -> None:
    """Be the controller."""
    threading.Thread(target=_end_after_rank_0, args=(os.dup(files),), daemon=True).start()
    # Sent to the whole job, they ask rank 0 to come to an end; this process ends with the line.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    setup_logging("controller")
    asyncio.run(run_controller(line, files))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
