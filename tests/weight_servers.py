"""Stand-ins for SGLang servers as weight synchronisation sees them: real groups, real transfers, faults on request.

Like SGLang's scheduler, one thread does one command after the other, and an update outside a session is refused.
"""

import asyncio
import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from aiohttp import web
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_fipo.conversion.hf_folder import read_tensors
from megatron_fipo.rollout.engine import ServerAddress
from megatron_fipo.weight_sync.groups import join_group, leave_group
from tests.tiny_actors import bits


class Refusal(Exception):
    """Answered with status 400."""


@dataclass
class StandIn:
    """A stand-in server in a process of its own.

    Attributes:
        address: As weight synchronisation has it.
        process: The process.
    """

    address: ServerAddress
    process: Any

    def told(self) -> dict[str, Any]:
        """Its calls so far, the hash of every tensor that it has, its version, whether an update is open."""
        with urllib.request.urlopen(f"{self.address.url}/told", timeout=60) as answer:
            return json.loads(answer.read())

    def stop(self) -> None:
        """Freeze it, as a hung server."""
        os.kill(self.process.pid, signal.SIGSTOP)


@contextlib.contextmanager
def stand_ins(*faults: dict[str, int], model: Path | None = None) -> Iterator[list[StandIn]]:
    """Start one stand-in for each of the given faults, and end them all.

    A fault says at which update, counted from 0, something happens: {"hang": 1}, {"die": 1} or {"refuse": 1}. Others
    concern what it has afterwards: {"spoil": 0} adds to one element of a tensor, {"version": 3} stays at that version.
    `model` is the folder of a model whose log-probabilities the stand-ins give, with the weights that they were sent.
    """
    context = multiprocessing.get_context("fork")
    servers: list[StandIn] = []
    try:
        for number, fault in enumerate(faults):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, fault, model))
            process.start()
            there.close()
            url = f"http://127.0.0.1:{here.recv()}"
            address = ServerAddress(name=f"server-{number}", url=url, tensor_parallel_size=1, policy_version=-1)
            servers.append(StandIn(address, process))
        yield servers
    finally:
        for server in servers:
            server.process.kill()
            server.process.join()


def digest(tensor: Tensor) -> str:
    """Hash of a tensor's type, shape and bytes."""
    return hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + bits(tensor).numpy().tobytes()).hexdigest()


def _serve(parent: Connection, fault: dict[str, int], model: Path | None) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        asyncio.run(_Server(fault, model).run(parent))


class _Server:
    def __init__(self, fault: dict[str, int], model: Path | None) -> None:
        self.fault, self.model = fault, model
        self.calls: list[str] = []
        self.tensors: dict[str, Tensor] = {}
        self.groups: dict[str, dist.ProcessGroup] = {}
        self.version, self.in_update, self.num_updates = "default", False, 0
        self.scheduler = ThreadPoolExecutor(1)

    async def run(self, parent: Connection) -> None:
        app = web.Application(client_max_size=1024**3)
        app.router.add_get("/told", self.tell)
        app.router.add_get("/{call}", self.answer)
        app.router.add_post("/{call}", self.answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        parent.send(site._server.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    async def tell(self, _: web.Request) -> web.Response:
        hashes = {name: digest(tensor) for name, tensor in self.tensors.items()}
        told = {"calls": self.calls, "tensors": hashes, "version": self.version, "in_update": self.in_update}
        return web.json_response(told | {"groups": list(self.groups)})

    async def answer(self, request: web.Request) -> web.Response:
        call, body = request.match_info["call"], await request.json() if request.can_read_body else {}
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self.scheduler, getattr(self, call), body)
        except (Refusal, RuntimeError) as error:
            return web.json_response({"success": False, "message": str(error)}, status=400)
        return web.json_response({"success": True, "message": ""} | (found or {}))

    def begin_weight_update(self, _: dict[str, Any]) -> None:
        if self.in_update:
            raise Refusal("a weight-update session is already open")
        self.calls.append("begin")
        self.in_update = True

    def end_weight_update(self, _: dict[str, Any]) -> None:
        if not self.in_update:
            raise Refusal("no weight-update session is open")
        self.calls.append("end")
        self.in_update = False
        if "spoil" in self.fault:
            self.tensors["model.norm.weight"][self.fault["spoil"]] += 4.0

    def init_weights_update_group(self, body: dict[str, Any]) -> None:
        self.calls.append("init group")
        address, name = (body["master_address"], body["master_port"]), body["group_name"]
        world = (body["rank_offset"], body["world_size"], body["backend"])
        self.groups[name] = join_group(address, name, *world, timedelta(seconds=600))

    def destroy_weights_update_group(self, body: dict[str, Any]) -> None:
        self.calls.append("destroy group")
        leave_group(self.groups.pop(body["group_name"]))

    def update_weights_from_distributed(self, body: dict[str, Any]) -> None:
        self.strike()
        assert body["load_format"] == "flattened_bucket"
        dtypes = [getattr(torch, name) for name in body["dtypes"]]
        empty = [torch.empty(shape, dtype=dtype) for shape, dtype in zip(body["shapes"], dtypes, strict=True)]
        buffer = torch.empty(sum(tensor.nbytes for tensor in empty), dtype=torch.uint8)
        dist.broadcast(buffer, group_src=0, group=self.groups[body["group_name"]])
        start = 0
        for name, tensor in zip(body["names"], empty, strict=True):
            part = buffer[start : start + tensor.nbytes]
            # SGLang's own view fails where a tensor is not aligned.
            self.tensors[name] = part.view(tensor.dtype).reshape(tensor.shape).clone()
            start += tensor.nbytes
        self.calls.append(f"update {len(empty)}")

    def update_weights_from_disk(self, body: dict[str, Any]) -> None:
        self.tensors = dict(read_tensors(Path(body["model_path"])))
        self.calls.append(f"disk {body['model_path']}")

    def flush_cache(self, _: dict[str, Any]) -> None:
        self.calls.append("flush")

    def update_weight_version(self, body: dict[str, Any]) -> None:
        self.calls.append("version")
        self.version = str(self.fault.get("version", body["new_version"]))

    def continue_generation(self, _: dict[str, Any]) -> None:
        self.calls.append("continue")

    def model_info(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"weight_version": self.version}

    def server_info(self, _: dict[str, Any]) -> dict[str, Any]:
        sizes = {"tp_size": 1, "base_gpu_id": 0, "max_req_input_len": 250}
        flags = {"enable_deterministic_inference": False, "enable_return_routed_experts": False}
        return sizes | flags | {"internal_states": [{"weight_version": self.version}], "version": "0.5.21"}

    def weights_checker(self, _: dict[str, Any]) -> dict[str, Any]:
        self.calls.append("checksum")
        return {"ranks": [{"checksums": {name: digest(tensor) for name, tensor in self.tensors.items()}}]}

    @torch.no_grad()
    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        """Log-probabilities of what was sent, by transformers."""
        assert self.model is not None, "this stand-in was started without a model"
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.model), dtype=torch.float32).eval()
        model.load_state_dict(self.tensors, strict=False)
        token_ids, first = body["input_ids"], body["logprob_start_len"]
        log_probs = model(torch.tensor([token_ids])).logits[0].log_softmax(-1)
        places = range(first + 1, len(token_ids))
        entries = [[float(log_probs[place - 1, token_ids[place]]), token_ids[place], None] for place in places]
        return {"meta_info": {"input_token_logprobs": [[None, token_ids[first], None], *entries]}}

    def strike(self) -> None:
        """Do what the fault says, if it is time."""
        number, self.num_updates = self.num_updates, self.num_updates + 1
        if not self.in_update:
            raise Refusal("must run between begin_weight_update() and end_weight_update()")
        if self.fault.get("die") == number:
            os._exit(1)
        if self.fault.get("hang") == number:
            threading.Event().wait()
        if self.fault.get("refuse") == number:
            raise Refusal("shape mismatch")
