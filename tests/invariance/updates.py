"""Three updates of a tiny model on a fixed ragged batch, in any combination of `grid`."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.actor.micro_batch import MicroBatch, build_micro_batch
from megatron_fipo.actor.shard import packing_rules, shard_micro_batches
from megatron_fipo.actor.train_step import TrainStep, UpdateResult
from megatron_fipo.config.algorithm import AlgorithmConfig, FipoConfig
from megatron_fipo.config.baselines import DapoConfig, GspoConfig
from megatron_fipo.config.optimizer import OptimizerConfig
from megatron_fipo.parallel.layout import sequence_multiple
from megatron_fipo.parallel.packing import Pack, PackingRules, plan_packs
from megatron_fipo.platform.device import compute_device
from megatron_fipo.types import PER_TOKEN_FIELDS, TrainBatch
from tests.invariance.gradients import GradientRecorder, exported
from tests.invariance.grid import Combination
from tests.tiny_actors import TinyActor, bits, tiny_actor
from tests.tiny_models import VOCAB_SIZE, write_tiny_model

# Bounds far narrower than published ones, so that three steps of a tiny model reach each of them.
_BOUNDS: dict[str, Any] = {"updates_per_rollout": 3, "clip_low": 0.05, "clip_high": 0.055, "dual_clip": 1.065}
ALGORITHMS: dict[str, AlgorithmConfig] = {
    "fipo": FipoConfig.preset(
        "official-7b",
        aggregation="token_mean",
        safety_threshold=1.045,
        influence_clip_low=0.85,
        influence_clip_high=1.02,
        **_BOUNDS,
    ),
    "dapo": DapoConfig(**_BOUNDS),
    "gspo": GspoConfig(updates_per_rollout=3, clip_low=0.005, clip_high=0.004, dual_clip=1.0065),
}
# A large eps: parameters whose true gradient is 0 must not be moved by its rounding.
OPTIMIZERS = {
    model: OptimizerConfig(learning_rate=rate, warmup_steps=0, adam_eps=eps, weight_decay=0.01)
    for model, rate, eps in (("dense", 5e-3, 1e-3), ("moe", 5e-2, 1e-2))
}
BUDGETS = {"large": 640, "small": 96}
ARCHITECTURES = {"dense": "qwen2", "moe": "qwen3_moe"}
# Seeds at which every decision lies far from rounding (`python -m tests.invariance.choose_seeds`).
SEEDS = {"dense": 2, "moe": 9}
SCALES = {
    "dense": {"model.norm": 0.5, "norm": 1.0, "embed": 1.0, "q_proj": 1.0, "k_proj": 1.0, "": 0.2},
    "moe": {"norm": 1.0, "embed": 2.0, "q_proj": 2.0, "k_proj": 2.0, "lm_head": 1.0, "mlp.gate.": 20.0, "": 0.1},
}

NUM_UPDATES = 3
LONGEST = 64


def write_models(root: Path) -> None:
    """Write the suite's models under their names."""
    for model in ARCHITECTURES:
        write_model(root / model, model, SEEDS[model])


def write_model(folder: Path, model: str, seed: int) -> None:
    """Write one of them, with heads that tensor size 4 can cut.

    Small weights outside the embedding and the attention scores: every layer then adds little, and float32 noise does
    not grow from layer to layer.
    """
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4} | ({"head_dim": 8} if model == "moe" else {})
    write_tiny_model(folder, ARCHITECTURES[model], seed=seed, scales=SCALES[model], **heads)


def ragged_batch(seed: int) -> TrainBatch:
    """Three updates: one sequence, twenty (with more response tokens than bfloat16 can count), and ten.

    The first update's response is the last sixteenth of its sequence, so that all but one data- and context-parallel
    rank hold no response token. The others hold sequences too short for their chunks, tokens masked inside responses,
    and one response that is masked altogether.
    """
    draws = np.random.default_rng(seed)
    lengths = np.r_[LONGEST, 3, 40, draws.integers(4, 41, 28)].astype(np.int32)
    updates = np.r_[0, [1] * 20, [2] * 10].astype(np.int32)
    prompts = np.maximum(lengths // 4, 1).astype(np.int32)
    prompts[0] = LONGEST - LONGEST // 16
    starts = np.r_[0, np.cumsum(lengths)]
    places = np.arange(lengths.sum()) - np.repeat(starts[:-1], lengths)
    mask = places >= np.repeat(prompts, lengths)
    mask[starts[2] + 15 : starts[2] + 22] = False
    mask[starts[15] : starts[16]] = False
    count = len(lengths)
    signs = np.where(np.arange(count) % 2, -1.0, 1.0)
    return TrainBatch(
        token_ids=draws.integers(0, VOCAB_SIZE, lengths.sum()).astype(np.int32),
        sequence_lengths=lengths,
        prompt_lengths=prompts,
        response_mask=mask,
        rollout_log_probs=np.where(mask, -draws.uniform(4.0, 7.0, lengths.sum()), 0.0).astype(np.float32),
        rewards=np.zeros(count, dtype=np.float32),
        advantages=(signs * draws.uniform(0.5, 2.0, count)).astype(np.float32),
        group_ids=updates,
        mini_batch_ids=updates,
        policy_versions=np.where(places >= np.repeat(prompts, lengths), 0, -1).astype(np.int32),
        temperature=1.0,
    )


def shuffled(batch: TrainBatch) -> TrainBatch:
    """The batch with the sequences of every update in another order."""
    draws, starts = np.random.default_rng(7), batch.sequence_starts
    order = np.lexsort([draws.random(batch.num_sequences), batch.mini_batch_ids])
    tokens = np.concatenate([np.arange(starts[index], starts[index + 1]) for index in order])
    per_sequence = ("sequence_lengths", "prompt_lengths", "rewards", "advantages", "group_ids", "mini_batch_ids")
    return replace(
        batch,
        **{name: getattr(batch, name)[tokens] for name in PER_TOKEN_FIELDS},
        **{name: getattr(batch, name)[order] for name in per_sequence},
    )


@dataclass(frozen=True)
class Outcome:
    """What the updates did, as every rank reports it; tensors on rank 0 alone.

    Attributes:
        results: One an update.
        gradients: One dictionary an update, by Hugging Face name.
        weights: After the last update, by Hugging Face name.
        digest: Of the weights; the same on every rank.
        mean_advantage: Mean |A| of the batch, the scale of the loss.
    """

    results: list[UpdateResult]
    gradients: list[dict[str, Tensor]]
    weights: dict[str, Tensor]
    digest: str
    mean_advantage: float


def run_combinations(root: Path, combinations: Sequence[Combination]) -> list[Outcome]:
    """Run combinations of one world size, one after the other, on the models in `root`; collective over all ranks."""
    # Memory that was never written reads as NaN.
    torch.use_deterministic_algorithms(True)
    outcomes = []
    for combination in combinations:
        parallelism = combination.parallelism | {"max_tokens_per_micro_batch": BUDGETS[combination.budget]}
        with tiny_actor(root / combination.model, parallelism) as actor:
            outcomes.append(run_updates(actor, combination))
    return outcomes


def run_updates(actor: TinyActor, combination: Combination) -> Outcome:
    """All updates with an actor that has been cut as the combination says."""
    return take_updates(actor, combination.model, ALGORITHMS[combination.algorithm], micro_batches(actor, combination))


def take_updates(
    actor: TinyActor, model: str, algorithm: AlgorithmConfig, updates: Sequence[Sequence[MicroBatch]]
) -> Outcome:
    """One update for each list of micro-batches, of the model's ragged batch."""
    optimizer = GradientRecorder(actor, OPTIMIZERS[model], actor.provider.bf16)
    train_step = TrainStep(actor.forward, optimizer, algorithm, actor.context)
    for update in updates:
        for micro_batch, log_probs in zip(update, actor.forward.log_probs(update), strict=False):
            micro_batch.old_log_probs = log_probs
    results = [train_step.update(update) for update in updates]
    weights = exported(actor)
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(bits(weights[name]).numpy().tobytes())
    is_main = actor.context.rank == 0
    return Outcome(
        results=results,
        gradients=optimizer.gradients if is_main else [],
        weights=weights if is_main else {},
        digest=digest.hexdigest(),
        mean_advantage=float(np.abs(ragged_batch(SEEDS[model]).advantages).mean()),
    )


def micro_batches(actor: TinyActor, combination: Combination) -> list[list[MicroBatch]]:
    """This rank's micro-batches of every update."""
    batch = ragged_batch(SEEDS[combination.model])
    if combination.order == "shuffled":
        batch = shuffled(batch)
    rules, context, device = packing_rules(actor.parallelism), actor.context, compute_device()
    if combination.padding == "least":
        return shard_micro_batches(batch if context.rank == 0 else None, rules, context, device)
    return [
        [build_micro_batch(batch, pack, context, device) for pack in update[context.dp_rank]]
        for update in generously_padded(batch, rules, context.dp_size)
    ]


def generously_padded(batch: TrainBatch, rules: PackingRules, dp_size: int) -> list[list[list[Pack]]]:
    """A plan in which most sequences, and every pack, end in more padding than they need."""

    def pad(pack: Pack) -> Pack:
        multiple = sequence_multiple(rules.cp_size)
        lengths = [length + place % 3 * multiple for place, length in enumerate(pack.padded_lengths, start=1)]
        if len(lengths) > len(pack.sequences):
            lengths.pop()
        return Pack(pack.sequences, (*lengths, rules.pack_multiple * 2 - sum(lengths) % rules.pack_multiple))

    plan = plan_packs(batch.sequence_lengths.tolist(), batch.mini_batch_ids.tolist(), dp_size, rules)
    return [[[pad(pack) for pack in packs] for packs in update] for update in plan]
