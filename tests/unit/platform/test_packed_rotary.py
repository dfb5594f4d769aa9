"""The vectorised packed rotary embedding against upstream's loop over sequences."""

import importlib.util

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils

from megatron_fipo.platform.packed_rotary import apply_packed_rotary


class Place:
    """What both versions ask of a process group."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def upstream_loop() -> object:
    """Upstream's own function, from a fresh copy of its module: the imported one carries the patch."""
    spec = importlib.util.spec_from_file_location(rope_utils.__name__ + "_fresh", rope_utils.__file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module._apply_rotary_pos_emb_thd


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(8, 16, 40), (24,), (8, 8)])
@pytest.mark.parametrize("interleaved", [False, True])
def test_equals_upstream_on_every_rank(cp_size: int, lengths: tuple[int, ...], interleaved: bool) -> None:
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    freqs = torch.randn(max(lengths), 1, 1, 16)
    loop = upstream_loop()
    for rank in range(cp_size):
        tokens = torch.randn(sum(lengths) // cp_size, 3, 16, requires_grad=True)
        place = Place(rank, cp_size)
        mine = apply_packed_rotary(tokens, starts, freqs, rotary_interleaved=interleaved, cp_group=place)
        theirs = loop(tokens, starts, freqs, rotary_interleaved=interleaved, cp_group=place)  # type: ignore[operator]
        assert torch.equal(mine, theirs)
        upstream = torch.randn_like(mine)
        (my_gradient,) = torch.autograd.grad(mine, tokens, upstream)
        (their_gradient,) = torch.autograd.grad(theirs, tokens, upstream)
        assert torch.equal(my_gradient, their_gradient)
