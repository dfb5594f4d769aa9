import asyncio
import socket
from typing import Any

import numpy as np

from megatron_fipo.runtime.messages import encode_message, read_message
from megatron_fipo.trainer.controller_service import Answer, ControllerService
from megatron_fipo.trainer.shared_arrays import map_arrays

NUMBERS = {"numbers": np.arange(3)}
ANSWERS = {
    "good": Answer(value=[1], arrays=NUMBERS),
    "no_json": Answer(value=np.float32(1.0), arrays=NUMBERS),
    "no_memory": Answer(arrays={"cannot be shared": np.array([object()])}),
}


async def ask(*requests: str, lose_files: bool = False) -> tuple[list[Any], socket.socket]:
    """The answers to requests, each asked once the one before it has been answered."""
    line, far_line = socket.socketpair()
    files, far_files = socket.socketpair()
    line.setblocking(False)
    service = await ControllerService.on_sockets(far_line.detach(), far_files.detach())

    def action(name: str) -> Any:
        async def give() -> Answer:
            return ANSWERS[name]

        return give

    serving = asyncio.create_task(service.serve({name: action(name) for name in ANSWERS}))
    reader, writer = await asyncio.open_connection(sock=line)
    if lose_files:
        files.close()
    answers = []
    for number, name in enumerate(requests):
        writer.write(encode_message({"request": number, "do": name, "with": {}}))
        answers.append(await asyncio.wait_for(read_message(reader), 30))
        assert answers[-1]["answer"] == number
    writer.close()
    await serving
    return answers, files


def test_an_answer_that_cannot_be_sent_is_an_error_and_leaves_the_line_in_order() -> None:
    (no_json, no_memory, good), files = asyncio.run(ask("no_json", "no_memory", "good"))
    with files:
        assert "TypeError" in no_json["error"][1][0] and "ValueError" in no_memory["error"][1][0]
        _, descriptors, _, _ = socket.recv_fds(files, 2, 2)
        assert good["value"] == [1] and len(descriptors) == 1
        assert map_arrays(descriptors[0], good["layout"])["numbers"].tolist() == [0, 1, 2]


def test_arrays_that_cannot_be_handed_over_are_an_error() -> None:
    (answer,), _ = asyncio.run(ask("good", lose_files=True))
    assert "BrokenPipeError" in answer["error"][1][0]
