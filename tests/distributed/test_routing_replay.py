"""Tokens go to the experts that the engine chose, however model, batch and packs are cut."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_fipo.actor.model import unwrap
from megatron_fipo.actor.routing import RoutingReplay, require_replayable
from megatron_fipo.actor.shard import packing_rules, shard_micro_batches
from megatron_fipo.config.base import ConfigError
from megatron_fipo.data.routing_file import RoutingFileError, write_routing_file
from megatron_fipo.platform.device import compute_device
from megatron_fipo.types import TrainBatch
from tests.distributed_helpers import run_distributed
from tests.invariance.compare import deviation
from tests.invariance.updates import ALGORITHMS, BUDGETS, SEEDS, Outcome, ragged_batch, take_updates, write_model
from tests.tiny_actors import TinyActor, bits, tiny_actor

pytestmark = pytest.mark.distributed

BATCH = ragged_batch(SEEDS["moe"])
NUM_LAYERS, NUM_EXPERTS, TOP_K = 4, 4, 2

TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP = {"expert_model_parallel_size": 2}
PP = {"pipeline_model_parallel_size": 2}
VPP = {**PP, "virtual_pipeline_model_parallel_size": 2}
FULL = {"activation_recompute": "full"}
# Activations of the layers with experts are recomputed, and the router's choice with them.
EXPERTS_AGAIN = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
Layout = tuple[dict[str, Any], dict[str, Any]]
ON_2_RANKS: dict[str, Layout] = {
    "TP 2 + SP": (TP, {}),
    "TP 2 + SP, EP 2, recomputed layers": ({**TP, **EP, **FULL}, {}),
    "CP 2": ({"context_parallel_size": 2}, {}),
    "EP 2, null micro-batches": (EP, {}),
    "PP 2, recomputed experts": (PP, EXPERTS_AGAIN),
    "PP 2 × VPP 2, recomputed layers": ({**VPP, **FULL}, {}),
}
ON_4_RANKS: dict[str, Layout] = {
    "TP 2 + SP, CP 2, EP 2": ({**TP, **EP, "context_parallel_size": 2}, {}),
    "PP 2 × VPP 2, EP 2": ({**VPP, **EP}, EXPERTS_AGAIN),
}


def write_experts(path: Path, choices: list[np.ndarray | None]) -> Path:
    write_routing_file(path, BATCH.sequence_lengths, choices)
    return path


def foreign_choices() -> list[np.ndarray | None]:
    """Two different experts drawn for each token, as no router chose them; some tokens and one sequence have none."""
    draws = np.random.default_rng(5)
    choices: list[np.ndarray | None] = []
    for length in BATCH.sequence_lengths:
        ranks = draws.random((length - 1, NUM_LAYERS, NUM_EXPERTS)).argsort(axis=-1)
        experts = ranks[..., :TOP_K].astype(np.int16)
        experts[draws.random(length - 1) < 0.1] = -1
        choices.append(experts)
    choices[20] = None
    return choices


@contextmanager
def replaying(folder: Path, parallelism: dict[str, Any], overrides: dict[str, Any]) -> Iterator[TinyActor]:
    """An actor that replays, with several micro-batches an update."""
    torch.use_deterministic_algorithms(True)
    grid = {"use_distributed_optimizer": False, "max_tokens_per_micro_batch": BUDGETS["small"], **parallelism}
    with tiny_actor(folder, grid, transformer_config_overrides=overrides) as actor:
        actor.forward.routing = RoutingReplay(actor.chunks, actor.provider, actor.context)
        yield actor


def micro_batches(actor: TinyActor, path: Path | None, batch: TrainBatch = BATCH) -> list[list[Any]]:
    batch = dataclasses.replace(batch, routing_file=path)
    return shard_micro_batches(
        batch if actor.context.rank == 0 else None,
        packing_rules(actor.parallelism),
        actor.context,
        compute_device(),
        actor.forward.routing if path is not None else None,
    )


def update(folder: Path, path: Path, layouts: dict[str, Layout]) -> list[Outcome]:
    """Three updates under each layout."""
    outcomes = []
    for parallelism, overrides in layouts.values():
        with replaying(folder, parallelism, overrides) as actor:
            outcomes.append(take_updates(actor, "moe", ALGORITHMS["fipo"], micro_batches(actor, path)))
    return outcomes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("routing") / "moe"
    write_model(folder, "moe", SEEDS["moe"])
    return folder


@pytest.fixture(scope="module")
def foreign(folder: Path) -> Path:
    return write_experts(folder.with_name("foreign.routing"), foreign_choices())


@pytest.fixture(scope="module")
def on_one_rank(folder: Path, foreign: Path) -> Outcome:
    ((outcome,),) = run_distributed(update, 1, folder, foreign, {"one rank": ({}, {})})
    return outcome


@pytest.mark.parametrize(("world_size", "layouts"), [(2, ON_2_RANKS), (4, ON_4_RANKS)], ids=["2 ranks", "4 ranks"])
def test_every_layout_replays_the_same_choices(
    folder: Path, foreign: Path, on_one_rank: Outcome, world_size: int, layouts: dict[str, Layout]
) -> None:
    ranks = run_distributed(update, world_size, folder, foreign, layouts)
    for name, outcomes in zip(layouts, zip(*ranks, strict=True), strict=True):
        found = deviation(outcomes, on_one_rank)
        print(f"{name}: {found}")
        assert found.violations == [], name


def record_own(actor: TinyActor, batches: list[list[Any]]) -> list[np.ndarray]:
    """What the routers of a whole model choose by themselves for every sequence, by the number of the expert."""
    maps: list[Tensor] = []
    routers = [layer.mlp.router for chunk in unwrap(actor.chunks) for layer in chunk.decoder.layers]
    hooks = [router.register_forward_hook(lambda _, __, output: maps.append(output[1])) for router in routers]
    choices: dict[int, np.ndarray] = {}
    for micro_batch in (each for mini_batch in batches for each in mini_batch):
        maps.clear()
        actor.forward.log_probs([micro_batch])
        experts = torch.stack([each.nonzero()[:, 1].view(-1, TOP_K) for each in maps], dim=1).numpy().astype(np.int16)
        for place, index in enumerate(micro_batch.sequences):
            first = int(micro_batch.layout.cu_seqlens[place])
            choices[index] = experts[first : first + int(BATCH.sequence_lengths[index]) - 1]
    for hook in hooks:
        hook.remove()
    return [choices[index] for index in sorted(choices)]


def replay_own(folder: Path) -> tuple[list[Outcome], list[list[Tensor]]]:
    """The first update without replay, and with that of the actor's own choices; and the old log-probabilities."""
    outcomes, log_probs = [], []
    for replays in (False, True):
        with replaying(folder, {}, {}) as actor:
            batches = micro_batches(actor, None)
            if replays:
                path = write_experts(folder.with_name("own.routing"), record_own(actor, batches))
                batches = micro_batches(actor, path)
            outcomes.append(take_updates(actor, "moe", ALGORITHMS["fipo"], batches[1:2]))
            log_probs.append([each.old_log_probs for each in batches[1]])
    return outcomes, log_probs


def test_replaying_the_actors_own_choices_changes_no_bit(folder: Path) -> None:
    (((without, own), (log_probs, own_log_probs)),) = run_distributed(replay_own, 1, folder)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(log_probs, own_log_probs, strict=True))
    assert own.results[0].loss == without.results[0].loss
    for name, gradient in without.gradients[0].items():
        assert torch.equal(bits(own.gradients[0][name]), bits(gradient)), name
    assert "train/routing_mismatch_fraction" not in without.results[0].metrics
    assert own.results[0].metrics["train/routing_mismatch_fraction"] == 0.0


def forced_model(folder: Path) -> tuple[Any, dict[int, Tensor]]:
    """The folder's model in float64, whose routers take their choice from a dictionary by layer; −1 is their own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    forced: dict[int, Tensor] = {}
    for number, layer in enumerate(model.model.layers):

        def gate(hidden: Tensor, gate: Any = layer.mlp.gate, number: int = number) -> tuple[Tensor, Tensor, Tensor]:
            logits = F.linear(hidden, gate.weight)
            own = logits.topk(TOP_K, dim=-1).indices
            chosen = torch.where(forced[number] < 0, own, forced[number])
            return logits, logits.gather(1, chosen).softmax(dim=-1), chosen

        layer.mlp.gate.forward = gate
    return model, forced


def test_replayed_choices_weigh_as_in_a_plain_model_with_forced_choices(folder: Path, on_one_rank: Outcome) -> None:
    """The first update of one sequence is REINFORCE: ratios and influence weights are 1."""
    model, forced = forced_model(folder)
    (index,) = np.flatnonzero(BATCH.mini_batch_ids == 0)
    starts = BATCH.sequence_starts
    tokens = torch.from_numpy(BATCH.token_ids[starts[index] : starts[index + 1]]).long()
    mask = torch.from_numpy(BATCH.response_mask[starts[index] : starts[index + 1]])[1:]
    choices = torch.from_numpy(foreign_choices()[index]).long()
    for layer in range(NUM_LAYERS):
        forced[layer] = torch.cat([choices[:, layer], torch.full((1, TOP_K), -1)])
    log_probs = model(tokens[None]).logits[0, :-1].log_softmax(dim=-1).gather(1, tokens[1:, None])[:, 0]
    (-float(BATCH.advantages[index]) * log_probs[mask].mean()).backward()
    compared = 0
    gradients = on_one_rank.gradients[0]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("experts.gate_up_proj"):
            expected = dict(zip(("gate_proj", "up_proj"), parameter.grad.chunk(2, dim=1), strict=True))
        elif name.endswith("experts.down_proj"):
            expected = {"down_proj": parameter.grad}
        else:
            assert distance(gradients[name], parameter.grad) < 1e-5, name
            compared += 1
            continue
        for part, stacked in expected.items():
            for expert, gradient in enumerate(stacked):
                own_name = f"{name.rsplit('.', 1)[0]}.{expert}.{part}.weight"
                assert distance(gradients[own_name], gradient) < 1e-5, own_name
                compared += 1
    assert compared == len(gradients)


def distance(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-12))


def test_the_share_of_choices_that_replay_changes_is_reported(on_one_rank: Outcome) -> None:
    """Of two experts drawn from four, 5 in 6 are another pair than the router's."""
    fractions = [result.metrics["train/routing_mismatch_fraction"] for result in on_one_rank.results]
    assert all(0.7 < fraction < 0.95 for fraction in fractions), fractions


def refusals(folder: Path, paths: list[Path]) -> list[str]:
    """What the ranks say of files that are of another model or hold no choices."""
    texts = []
    with replaying(folder, EP, {}) as actor:
        for path in paths:
            with pytest.raises(RoutingFileError) as caught:
                micro_batches(actor, path)
            texts.append(str(caught.value))
        with pytest.raises(RoutingFileError) as caught:
            shard_micro_batches(
                BATCH if actor.context.rank == 0 else None,
                packing_rules(actor.parallelism),
                actor.context,
                compute_device(),
                actor.forward.routing,
            )
        texts.append(str(caught.value))
    return texts


def test_all_ranks_refuse_experts_that_cannot_be_replayed(folder: Path, tmp_path: Path) -> None:
    def of(shape: tuple[int, ...], value: int) -> list[np.ndarray | None]:
        return [np.full((length - 1, *shape), value, dtype=np.int16) for length in BATCH.sequence_lengths]

    zeros = write_experts(tmp_path / "zeros", of((NUM_LAYERS, TOP_K), 0))
    beyond = foreign_choices()
    # Only one replica reads this sequence.
    beyond[0][3, 1, 0] = NUM_EXPERTS
    beyond[0][3, 1, 1] = 0
    paths = [zeros, write_experts(tmp_path / "beyond", beyond), write_experts(tmp_path / "3", of((3, TOP_K), 1))]
    paths.append(write_experts(tmp_path / "k", of((NUM_LAYERS, 3), 1)))
    mine, others = run_distributed(refusals, 2, folder, paths)
    assert mine == others
    assert "names an expert twice" in mine[0] and "names an expert twice" in mine[1]
    assert "holds 2 experts a token in 3 layers, the actor has 2 in 4: they are different models" in mine[2]
    assert "holds 3 experts a token in 4 layers" in mine[3]
    assert "rollout.replay_routing asks for them" in mine[4]


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"num_moe_experts": None}, "rollout.replay_routing", "must be false for a dense model"),
        (
            {"moe_router_load_balancing_type": "sinkhorn"},
            "model.transformer_config_overrides.moe_router_load_balancing_type",
            "one micro-batch at a time",
        ),
        (
            {"overlap_moe_expert_parallel_comm": True},
            "model.transformer_config_overrides.overlap_moe_expert_parallel_comm",
            "one micro-batch at a time",
        ),
        (
            {"cuda_graph_impl": "local"},
            "model.transformer_config_overrides.cuda_graph_impl",
            "one micro-batch at a time",
        ),
    ],
)
def test_models_whose_routing_cannot_be_replayed_are_refused(fields: dict[str, Any], field: str, words: str) -> None:
    config = TransformerConfig(num_layers=2, hidden_size=8, num_attention_heads=1, num_moe_experts=4)
    require_replayable(config)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=words) as caught:
        require_replayable(config)
    assert caught.value.field == field
