"""Experts of a rollout come back from a file as they were written, and nothing else is read."""

from pathlib import Path

import numpy as np
import pytest

from megatron_fipo.data.routing_file import RoutingFile, RoutingFileError, write_routing_file

LENGTHS = np.array([5, 3, 4], dtype=np.int32)
LAYERS, TOP_K = 3, 2


def experts_of(length: int, seed: int, largest: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, largest + 1, (length - 1, LAYERS, TOP_K)).astype(np.int16)


@pytest.mark.parametrize(("largest", "dtype"), [(255, np.uint8), (256, np.int16)])
def test_every_token_gets_its_experts_of_the_wanted_layers(tmp_path: Path, largest: int, dtype: type) -> None:
    routed = [experts_of(5, 0, largest), None, experts_of(4, 2, largest)]
    routed[0][0, 0, 0] = largest
    routed[2][1, 2, 0] = -1
    write_routing_file(tmp_path / "routing", LENGTHS, routed)
    file = RoutingFile(tmp_path / "routing")
    assert (file.num_layers, file.num_tokens, file.top_k) == (LAYERS, 12, TOP_K)
    # Out of order, with padding, a last token, a sequence without experts and a position without one.
    tokens = np.array([3, 0, -1, 4, 6, 8, 9, 10, 11])
    experts, recorded = file.read([2, 0], tokens)
    assert experts.dtype == dtype and experts.shape == (2, 9, TOP_K)
    assert recorded.tolist() == [True, True, False, False, False, True, False, True, False]
    for place, layer in enumerate([2, 0]):
        assert np.array_equal(experts[place, 0], routed[0][3, layer])
        assert np.array_equal(experts[place, 1], routed[0][0, layer])
        assert np.array_equal(experts[place, 5], routed[2][0, layer])
        assert np.array_equal(experts[place, 7], routed[2][2, layer])
        assert not experts[place, ~recorded].any()
    assert tokens[2] == -1, "the caller's array is left alone"


def test_a_file_is_as_large_as_its_experts(tmp_path: Path) -> None:
    lengths = np.full(20, 500, dtype=np.int32)
    write_routing_file(tmp_path / "routing", lengths, [experts_of(500, seed, 127) for seed in range(20)])
    tokens = int(lengths.sum())
    assert (tmp_path / "routing").stat().st_size == tokens * LAYERS * TOP_K + tokens + 2 * 128


@pytest.mark.parametrize(
    ("routed", "words"),
    [
        ([None, None, None], "does the engine return them"),
        ([experts_of(5, 0, 3), experts_of(3, 1, 3)[:, :2], None], "one model"),
        ([experts_of(5, 0, 3), None, experts_of(5, 0, 3)], "sequence 2 of 4 tokens has routed experts of 4"),
    ],
)
def test_experts_that_fit_no_batch_are_refused(tmp_path: Path, routed: list, words: str) -> None:
    with pytest.raises(RoutingFileError, match=words):
        write_routing_file(tmp_path / "routing", LENGTHS, routed)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_told_from_one_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "routing"
    with pytest.raises(RoutingFileError, match="No such file"):
        RoutingFile(path)
    write_routing_file(path, LENGTHS, [experts_of(5, 0, 3), experts_of(3, 1, 3), None])
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(RoutingFileError, match="cannot be read as routed experts"):
        RoutingFile(path)
