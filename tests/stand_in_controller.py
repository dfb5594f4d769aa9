"""A controller process that generates nothing: `python -m tests.stand_in_controller LINE FILES`."""

import asyncio
import os
import signal
import subprocess
import sys
from typing import Any

import numpy as np

from megatron_fipo.config.base import ConfigError
from megatron_fipo.data.stream import EndOfPrompts
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.trainer.controller_service import Answer, ControllerService

ERRORS = {
    "config": ConfigError("model.path", 3, "must be text", "write a path"),
    "end": EndOfPrompts("no more"),
    "run": RunError("it stopped"),
    "defect": ZeroDivisionError("by zero"),
}
SERVER = {"name": "node0.server0.life2", "url": "http://127.0.0.1:1", "tensor_parallel_size": 1, "policy_version": -1}


async def main(line: int, files: int) -> None:
    service = await ControllerService.on_sockets(line, files)

    async def echo(**arguments: Any) -> Answer:
        return Answer(value=arguments)

    async def count(size: int) -> Answer:
        return Answer(value="counted", arrays={"numbers": np.arange(size, dtype=np.int32), "none": np.zeros((0, 2))})

    async def take_time(seconds: float) -> Answer:
        service.tell("advance", 1, 2)
        await asyncio.sleep(seconds)
        service.tell("show_response", "1+1=", "2", 1.0)
        return Answer()

    async def count_late(size: int, seconds: float) -> Answer:
        await asyncio.sleep(seconds)
        return await count(size)

    async def fail(kind: str) -> Answer:
        raise ERRORS[kind]

    async def ask_for_weights() -> Answer:
        return Answer(value=await service.request_push([SERVER]))

    async def say(text: str) -> Answer:
        print(text, file=sys.stderr, flush=True)
        # A child of the controller speaks, too.
        await asyncio.to_thread(subprocess.run, [sys.executable, "-c", f"print('a child says {text}')"], check=True)
        return Answer()

    async def die() -> Answer:
        os.kill(os.getpid(), signal.SIGKILL)
        return Answer()

    await service.serve(
        {
            "echo": echo,
            "count": count,
            "take_time": take_time,
            "count_late": count_late,
            "fail": fail,
            "ask_for_weights": ask_for_weights,
            "say": say,
            "die": die,
        }
    )


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
