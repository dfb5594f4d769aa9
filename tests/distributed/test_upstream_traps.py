"""What megatron-core does that this project is built around, so that a new release tells when it no longer does.

A failure here is no defect of this project: it says which of our own parts to reconsider.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron_fipo.platform.megatron  # noqa: F401  (patches before the first megatron import)

import megatron.core
import pytest
import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_fipo.actor.forward import LossFunction, Scores
from megatron_fipo.actor.micro_batch import MicroBatch
from megatron_fipo.actor.optimizer import ActorOptimizer
from megatron_fipo.actor.shard import packing_rules, shard_micro_batches
from megatron_fipo.config.optimizer import OptimizerConfig
from megatron_fipo.platform.device import compute_device
from tests.distributed_helpers import run_distributed
from tests.tiny_actors import TinyActor, random_batch, tiny_actor
from tests.tiny_models import write_tiny_model

pytestmark = pytest.mark.distributed

NUM_TOKENS, VOCAB_SIZE = 64, 300
# Half a unit in the last of bfloat16's eight digits, relative to the smallest number of a binade.
BFLOAT16_ROUNDING = 2.0**-8


def changed(what: str, reconsider: str) -> str:
    return f"megatron-core {megatron.core.__version__} no longer {what}: reconsider {reconsider}"


@dataclass(frozen=True)
class CrossEntropy:
    """What became of logits [n, 1, V / 2] in float32, one rank's half of the vocabulary."""

    overwritten: bool
    loss: Tensor
    gradient: Tensor


def cross_entropy(function: Any, logits: Tensor, targets: Tensor) -> CrossEntropy:
    leaf = logits.clone().requires_grad_()
    given = leaf * 1
    before = given.detach().clone()
    loss = function(given, targets, tp_group=dist.group.WORLD)
    loss.sum().backward()
    assert leaf.grad is not None
    return CrossEntropy(not torch.equal(given.detach(), before), loss.detach(), leaf.grad)


def cross_entropies() -> dict[str, CrossEntropy]:
    """On two tensor-parallel ranks."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(NUM_TOKENS, 1, VOCAB_SIZE, generator=generator)
    targets = torch.randint(VOCAB_SIZE, (NUM_TOKENS, 1), generator=generator)
    mine = logits.chunk(2, dim=-1)[dist.get_rank()]
    return {
        "plain": cross_entropy(vocab_parallel_cross_entropy, mine, targets),
        "float64": cross_entropy(vocab_parallel_cross_entropy, mine.double(), targets),
        "padded": cross_entropy(vocab_parallel_cross_entropy, torch.nn.functional.pad(mine, (0, 50)), targets % 150),
        "not padded": cross_entropy(vocab_parallel_cross_entropy, mine, targets % 150),
        "fused": cross_entropy(fused_vocab_parallel_cross_entropy, mine, targets),
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, CrossEntropy]]:
    return run_distributed(cross_entropies, 2)


def test_cross_entropy_overwrites_its_logits(ranks):
    for rank in ranks:
        assert rank["plain"].overwritten, changed(
            "overwrites the logits that vocab_parallel_cross_entropy is given",
            "who may read them afterwards; actor/log_probs.py overwrites its own copy for the same reason, memory",
        )


def test_cross_entropy_gives_padding_rows_probability(ranks):
    for rank in ranks:
        more = rank["padded"].loss - rank["not padded"].loss
        assert (more > 0).all(), changed(
            "gives the vocabulary's padding rows probability in vocab_parallel_cross_entropy",
            "VocabularyShard.vocab_size of actor/log_probs.py, which keeps them out",
        )


def test_cross_entropy_answers_float64_in_float32(ranks):
    for rank in ranks:
        assert rank["float64"].loss.dtype == torch.float32, changed(
            "rounds log-probabilities to float32 in vocab_parallel_cross_entropy",
            "whether actor/log_probs.py has to compute its own, which are float64",
        )


def test_fused_cross_entropy_rounds_its_gradient_to_bfloat16(ranks):
    """Its backward pass ends in `grad_input.to(torch.bfloat16)`, whatever the logits were."""
    for rank in ranks:
        exact, fused = rank["plain"].gradient, rank["fused"].gradient
        worst = float(((fused - exact).abs() / exact.abs()).max())
        print(f"largest relative error of an entry: {worst:.1e}")
        what = changed(
            "rounds the gradient of fused_vocab_parallel_cross_entropy to bfloat16",
            "cross_entropy_loss_fusion = False in actor/model.py",
        )
        assert fused.dtype == torch.float32
        assert torch.equal(fused, exact.bfloat16().float()), what
        assert BFLOAT16_ROUNDING / 2 < worst <= BFLOAT16_ROUNDING, what


def test_the_default_dispatcher_refuses_packs_of_different_lengths():
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "variable_seq_lengths": True}
    with pytest.raises(ValueError, match="does not support variable sequence length"):
        TransformerConfig(**sizes)
        pytest.fail(changed("refuses a dense model", "moe_token_dispatcher_type = 'alltoall' in actor/model.py"))


# Sequences of one length, so that packs taken for one another fit.
BATCH = random_batch([32] * 8)


def micro_batches_of(actor: TinyActor) -> list[MicroBatch]:
    batch = BATCH if actor.context.rank == 0 else None
    (mini_batch,) = shard_micro_batches(batch, packing_rules(actor.parallelism), actor.context, compute_device())
    return mini_batch


def sum_of_log_probs(count: Any) -> Any:
    """Loss functions that return the sum of log-probabilities, and `count` of the response mask."""

    def loss_function(micro_batch: MicroBatch) -> LossFunction:
        def loss(scores: Scores) -> tuple[Tensor, Tensor, float]:
            total = scores["log_probs"].sum()
            return total, count(micro_batch.response_mask.sum()), float(total.detach())

        return loss

    return loss_function


def gradients(actor: TinyActor) -> list[Tensor]:
    return [parameter.main_grad.clone() for chunk in actor.chunks for parameter in chunk.parameters()]


def reduced_gradient(actor: TinyActor, count: int | None) -> float:
    """A gradient of 6 on every rank after its reduction with `count` tokens on every rank."""
    for chunk in actor.chunks:
        chunk.zero_grad_buffer()
        for parameter in chunk.parameters():
            parameter.main_grad.fill_(6.0)
    finalize_model_grads(actor.chunks, None if count is None else torch.tensor(count, dtype=torch.int))
    (value,) = {float(gradient.view(-1)[0]) for gradient in gradients(actor)}
    return value


def refusal_of_a_count(actor: TinyActor) -> str:
    try:
        actor.forward.run(micro_batches_of(actor), sum_of_log_probs(torch.Tensor.double), forward_only=False)
    except RuntimeError as error:
        return str(error)
    return "none"


def decay_without_gradient(actor: TinyActor) -> bool:
    """Whether a step with a zero gradient moves the weights, by their decay alone."""
    optimizer = ActorOptimizer(
        actor.chunks, OptimizerConfig(warmup_steps=0, learning_rate=0.1, weight_decay=0.1), False
    )
    before = [parameter.detach().clone() for parameter in actor.chunks[0].parameters()]
    optimizer.zero_grad()
    optimizer.step()
    return any(not torch.equal(*pair) for pair in zip(before, actor.chunks[0].parameters(), strict=True))


def data_parallel_facts(folder: Path) -> dict[str, Any]:
    with tiny_actor(folder, {"use_distributed_optimizer": False, "max_tokens_per_micro_batch": 64}) as actor:
        return {
            "no counts": reduced_gradient(actor, None),
            "counts of 2": reduced_gradient(actor, 2),
            "counts of 0": reduced_gradient(actor, 0),
            "float count": refusal_of_a_count(actor),
            "decays": decay_without_gradient(actor),
        }


def virtual_stages(folder: Path) -> dict[bool, tuple[list[float], list[Tensor]]]:
    """Losses and gradients on two stages of two chunks each; true for sends in batches."""
    parallelism = {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "max_tokens_per_micro_batch": 64,
    }
    found = {}
    for batched in (False, True):
        with tiny_actor(folder, parallelism) as actor:
            # The configuration refuses this pair.
            actor.provider.batch_p2p_comm, actor.provider.overlap_p2p_comm = batched, not batched
            losses = actor.forward.run(micro_batches_of(actor), sum_of_log_probs(torch.Tensor.int), forward_only=False)
            found[batched] = losses, gradients(actor)
    return found


def all_facts(folder: Path) -> tuple[dict[str, Any], dict[bool, tuple[list[float], list[Tensor]]]]:
    return data_parallel_facts(folder), virtual_stages(folder)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = write_tiny_model(tmp_path_factory.mktemp("traps") / "model")
    return run_distributed(all_facts, 2, folder)


def test_without_a_count_gradients_are_summed_over_ranks(facts):
    for here, _ in facts:
        assert here["no counts"] == 12.0, changed(
            "sums gradients over ranks without dividing them by anything, where there is no count",
            "TrainStep._finalize_gradients, which divides that sum by D",
        )
        assert here["counts of 2"] == 3.0, changed(
            "divides gradients by the count summed over ranks", "why TrainStep._finalize_gradients gives it none"
        )


def test_a_count_of_zero_is_taken_for_one(facts):
    for here, _ in facts:
        assert here["counts of 0"] == 12.0, changed(
            "takes a count of zero for one", "whether TrainStep._finalize_gradients has to divide by D itself"
        )


def test_schedules_refuse_a_count_that_is_no_integer(facts):
    for here, _ in facts:
        assert "can't be cast to the desired output type Int" in here["float count"], changed(
            "adds counts up in an integer", "whether TrainStep has to add up D itself, which may be a sum of weights"
        )


def test_a_step_without_gradient_decays_the_weights(facts):
    for here, _ in facts:
        assert here["decays"], changed("decays weights that have no gradient", "why TrainStep skips such a step")


def test_batched_sends_between_two_stages_of_two_chunks_are_wrong(facts):
    (_, first), (_, last) = facts
    what = changed(
        "mixes up micro-batches with two pipeline stages, virtual stages and batched sends",
        "the refusal of batch_p2p_comm in config/parallelism.py",
    )
    assert last[True][0] != last[False][0], what
    for stage in (first, last):
        errors = [
            float((wrong - right).norm() / right.norm())
            for right, wrong in zip(stage[False][1], stage[True][1], strict=True)
        ]
        assert max(errors) > 0.1, what
