"""A Hugging Face folder run by transformers, in the memory that there is."""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from megatron_fipo.conversion.hf_folder import check_weights
from megatron_fipo.conversion.model_files import read_architecture
from megatron_fipo.platform.device import compute_device, uses_cuda

# Of the memory that is free, what a model may take.
_FREE_SHARE = 0.8


class TransformersRun:
    """Runs a folder's model, whole or with each layer in memory only while it computes.

    Args:
        folder: The model.
        memory_bytes: What a model may take; None is most of what is free, of the device's memory where there is one.
        scratch: Where transformers may put layers that it has to change; None is the system's place for such.

    Raises:
        ConfigError: The folder is incomplete, or transformers does not know the architecture.
    """

    def __init__(self, folder: Path, memory_bytes: int | None = None, scratch: Path | None = None) -> None:
        self.folder = folder
        self.architecture = read_architecture(folder)
        self._num_parameters = sum(math.prod(shape) for shape in check_weights(folder).values())
        self._memory_bytes, self._scratch = memory_bytes or int(_FREE_SHARE * _free_bytes()), scratch

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether the whole model has room."""
        return self._num_parameters * dtype.itemsize <= self._memory_bytes

    def logits(
        self, sequences: Sequence[Sequence[int]], dtype: torch.dtype, outputs: dict[str, Tensor] | None = None
    ) -> list[Tensor]:
        """Logits [L, V] float32 of every sequence, on the host.

        Args:
            sequences: Token ids.
            dtype: Precision to compute in.
            outputs: Is given the outputs of the model's parts by their names, rows of all sequences [ΣL, hidden], and
                for each router (`is_router`) the experts that it chose, [ΣL, k].
        """
        disable_progress_bar()
        with self._placed(dtype) as place:
            model: Any = AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=dtype, local_files_only=True, trust_remote_code=False, **place
            )
            # Where layers stay on disk, the host computes.
            device = torch.device("cpu") if place else compute_device()
            model = model.eval() if place else model.to(device).eval()
            parts: dict[str, list[Tensor]] = {}
            for name, part in _parts(model.model) if outputs is not None else ():
                mine = parts.setdefault(name, [])
                rows = _chosen_experts if is_router(name) else _rows
                part.register_forward_hook(lambda _, __, output, mine=mine, rows=rows: mine.append(rows(output).cpu()))
            with torch.no_grad():
                inputs = [torch.tensor([ids], device=device) for ids in sequences]
                logits = [model(input_ids=ids, use_cache=False).logits[0].float().cpu() for ids in inputs]
            if not place:
                # Modules may refer to each other, and would keep their weights until the collector comes.
                model.to("meta")
        if outputs is not None:
            outputs.update({name: torch.cat(mine) for name, mine in parts.items()})
        return logits

    @contextmanager
    def _placed(self, dtype: torch.dtype) -> Iterator[Mapping[str, Any]]:
        """How transformers is told where the weights are: with each layer on disk until it is entered, or as usual."""
        if self.fits(dtype):
            yield {}
            return
        # Accelerate knows a tied matrix under one name alone, so that it stays in memory.
        ends = "cpu" if self.architecture.tie_word_embeddings else "disk"
        places = {"model.embed_tokens": ends, "lm_head": ends, "model.norm": "disk", "model.rotary_emb": "cpu"}
        places |= {f"model.layers.{layer}": "disk" for layer in range(self.architecture.num_hidden_layers)}
        # Transformers puts a layer's experts, which it stacks, into files of its own.
        with tempfile.TemporaryDirectory(dir=self._scratch, prefix=".offload_") as scratch:
            yield {"device_map": places, "offload_folder": scratch}


def first_of(output: Any) -> Tensor:
    """What a part hands to the next one, where it gives more than that."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def is_router(name: str) -> bool:
    """Whether a part, by its name, chooses experts."""
    return name.endswith(".mlp.gate")


def _rows(output: Any) -> Tensor:
    return first_of(output)[0]


def _chosen_experts(output: Any) -> Tensor:
    _, _, experts = output
    chosen: Tensor = experts
    return chosen


def _parts(model: Any) -> Iterator[tuple[str, Any]]:
    yield "model.embed_tokens", model.embed_tokens
    for number, layer in enumerate(model.layers):
        yield f"model.layers.{number}.self_attn", layer.self_attn
        if hasattr(layer.mlp, "gate"):
            yield f"model.layers.{number}.mlp.gate", layer.mlp.gate
        yield f"model.layers.{number}", layer
    yield "model.norm", model.norm


def _free_bytes() -> int:
    free: int = torch.cuda.mem_get_info()[0] if uses_cuda() else psutil.virtual_memory().available
    return free
