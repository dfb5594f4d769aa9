"""What a checkpoint of the actor holds, read without an actor."""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner

from megatron_fipo.actor.checkpoint import RANDOM_STATES
from megatron_fipo.platform.checkpoint_reader import CheckpointReader, read_index
from tests.tiny_models import VOCAB_SIZE


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """Every whole tensor by its name, the vocabulary without padding, random states left out."""
    index = read_index(folder)
    tensors = {
        name: torch.empty(told.size, dtype=told.properties.dtype)
        for name, told in index.state_dict_metadata.items()
        if name != RANDOM_STATES
    }
    planner, reader = DefaultLoadPlanner(), CheckpointReader(folder, index)
    planner.set_up_planner(tensors, index, is_coordinator=True)
    reader.set_up_storage_reader(index, is_coordinator=True)
    reader.read_data(planner.finish_plan(planner.create_local_plan()), planner).wait()
    vocabulary = ("word_embeddings.weight", "output_layer.weight")
    return {name: tensor[:VOCAB_SIZE] if name.endswith(vocabulary) else tensor for name, tensor in tensors.items()}
