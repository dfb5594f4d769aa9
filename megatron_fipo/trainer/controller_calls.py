"""Requests to the controller process, which all ranks await together."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_fipo.parallel.agreement import on_every_rank, rebuild
from megatron_fipo.parallel.collectives import Arrays, broadcast_json
from megatron_fipo.runtime.progress import NO_PROGRESS, Progress
from megatron_fipo.runtime.stop_request import NO_STOP, StopRequest, StopRequested
from megatron_fipo.trainer.controller_link import ControllerEndedError, ControllerLink

WORD_EVERY_S = 20.0
"""Rank 0 says so often that it still waits: without a word the others would run into their collective's time limit."""

_WAIT, _PUSH, _DONE = "wait", "push", "done"

type Push = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, str]]
"""Sends the current weights to servers, collectively over all ranks; gives why some did not take them in, by name. An
error of it is raised on every rank."""


@dataclass(slots=True)
class ControllerCalls:
    """Rank 0 speaks to the controller process while the other ranks wait for its word.

    Attributes:
        link: The line to the process, on rank 0 alone.
        progress: Told of responses, on rank 0.
        word_every_s: See `WORD_EVERY_S`.
        stop: Whether the run shall end; looked at on rank 0.
    """

    link: ControllerLink | None
    progress: Progress = NO_PROGRESS
    word_every_s: float = WORD_EVERY_S
    stop: StopRequest = NO_STOP
    _num_requests: int = 0

    def ask(
        self, action: str, arguments: Mapping[str, Any], push: Push | None = None, may_stop: bool = False
    ) -> tuple[Any, Arrays]:
        """Have the controller do something, and wait for it; collective over all ranks.

        Args:
            action: What to do.
            arguments: Plain JSON values; read on rank 0 alone.
            push: What is done when servers need weights meanwhile; None where the weights are about to change.
            may_stop: Wait no longer once the run shall end; the controller's answer is then dropped.

        Returns:
            On rank 0 the answer's value and arrays; elsewhere None and nothing.

        Raises:
            ConfigError: From the controller; raised on every rank.
            RunError: From the controller, or it has ended; raised on every rank.
            StopRequested: With `may_stop`; raised on every rank.
        """
        if self.link is None:
            return on_every_rank(partial(self._follow, push))
        self._num_requests += 1
        request = {"request": self._num_requests, "do": action, "with": arguments}
        return on_every_rank(partial(self._lead, self.link, request, push, may_stop))

    def _lead(
        self, link: ControllerLink, request: Mapping[str, Any], push: Push | None, may_stop: bool
    ) -> tuple[Any, Arrays]:
        # Any other error was raised on every rank, or the ranks are out of step and a broadcast could wait for ever.
        try:
            link.send(request)
            while (answer := self._next_answer(link, push, may_stop))["answer"] != request["request"]:
                # Of a request that was given up.
                _take_arrays(link, answer)
            arrays = _take_arrays(link, answer)
        except (ControllerEndedError, StopRequested):
            broadcast_json((_DONE, None), 0)
            raise
        broadcast_json((_DONE, None), 0)
        if "error" in answer:
            raise rebuild(*answer["error"])
        return answer["value"], arrays

    def _next_answer(self, link: ControllerLink, push: Push | None, may_stop: bool) -> Mapping[str, Any]:
        """Take in news and requests until an answer comes."""
        last_word = time.monotonic()
        while True:
            if may_stop:
                self.stop.raise_if_asked()
            message = link.receive(
                max(last_word + self.word_every_s - time.monotonic(), 0.0), self.stop if may_stop else None
            )
            if message is None:
                broadcast_json((_WAIT, None), 0)
                last_word = time.monotonic()
            elif "push" in message:
                failed = None
                if push is not None:
                    broadcast_json((_PUSH, message["servers"]), 0)
                    failed = push(message["servers"])
                    last_word = time.monotonic()
                link.send({"pushed": message["push"], "failed": failed})
            elif "news" in message:
                self._take_in(message["news"], message["content"])
            else:
                return message

    def _follow(self, push: Push | None) -> tuple[Any, Arrays]:
        while True:
            word, content = broadcast_json(None, 0)
            if word == _PUSH:
                assert push is not None, "rank 0 has it too"
                push(content)
            elif word == _DONE:
                return None, {}

    def _take_in(self, news: str, content: Sequence[Any]) -> None:
        if news == "advance":
            self.progress.advance(*content)
        elif news == "show_queues":
            self.progress.show_queues(*content)
        else:
            self.progress.show_response(*content)


def _take_arrays(link: ControllerLink, answer: Mapping[str, Any]) -> Arrays:
    return link.receive_arrays(answer["layout"]) if answer.get("layout") else {}
