"""The whole run: every section, and the checks that span sections."""

import math
from pathlib import Path
from typing import Literal

from megatron_fipo.config.algorithm import AlgorithmConfig
from megatron_fipo.config.base import config_class, require
from megatron_fipo.config.checkpoint import CheckpointConfig
from megatron_fipo.config.data import DataConfig
from megatron_fipo.config.evaluation import EvaluationConfig
from megatron_fipo.config.metrics import MetricsConfig
from megatron_fipo.config.model import ModelConfig
from megatron_fipo.config.optimizer import OptimizerConfig
from megatron_fipo.config.parallelism import ParallelismConfig
from megatron_fipo.config.reward import RewardConfig
from megatron_fipo.config.rollout import RolloutConfig
from megatron_fipo.config.safeguards import SafeguardsConfig
from megatron_fipo.config.watchdog import WatchdogConfig
from megatron_fipo.config.weight_sync import PauseMode, WeightSyncConfig


@config_class
class RunConfig:
    """Everything `megatron-fipo train` needs to know."""

    output_dir: Path
    """Run directory; a new or empty one, or that of a run to go on with."""

    num_steps: int
    """Steps: each is one rollout batch and algorithm.updates_per_rollout optimizer steps."""

    seed: int = 1
    """Seed of prompt order, sampling and initialisation."""

    mode: Literal["train", "train_only", "rollout_only"] = "train"
    """"train" does everything, "train_only" trains on recorded rollouts, "rollout_only" records them."""

    recorded_rollouts: Path | None = None
    """Folder of recorded rollout batches, for train_only; rollout_only writes one, `rollouts/` in its run directory."""

    model: ModelConfig
    """The model."""

    data: DataConfig | None = None
    """Prompts; needed unless mode is train_only."""

    algorithm: AlgorithmConfig
    """Policy loss: fipo, dapo, grpo, dr_grpo, gspo, cispo, sapo or gmpo."""

    reward: RewardConfig = RewardConfig()
    """Scoring."""

    rollout: RolloutConfig = RolloutConfig()
    """Generation."""

    parallelism: ParallelismConfig = ParallelismConfig()
    """Process grid and micro-batches."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer."""

    weight_sync: WeightSyncConfig = WeightSyncConfig()
    """Weights to the engine."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out accuracy."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints and the export."""

    metrics: MetricsConfig = MetricsConfig()
    """Metrics and samples."""

    watchdog: WatchdogConfig = WatchdogConfig()
    """Signals, hangs and ranks that die."""

    safeguards: SafeguardsConfig = SafeguardsConfig()
    """Numerical faults and collapse."""

    def __post_init__(self) -> None:
        """Check what spans sections."""
        require(
            self.num_steps >= 1,
            field="num_steps",
            value=self.num_steps,
            rule="must be at least 1",
            way_out="give the number of steps",
        )
        require(
            (self.mode == "train_only") == (self.recorded_rollouts is not None),
            field="recorded_rollouts",
            value=self.recorded_rollouts,
            rule=f'must be given with mode = "train_only" and only then (mode is "{self.mode}")',
            way_out="name the folder that a rollout_only run wrote, or set mode",
        )
        # A recording has its own groups, which are checked when it is read.
        recorded = self.mode == "train_only"
        require(
            recorded or self.rollout.num_prompts_per_step % self.algorithm.updates_per_rollout == 0,
            field="rollout.num_prompts_per_step",
            value=self.rollout.num_prompts_per_step,
            rule=f"must be a multiple of algorithm.updates_per_rollout = {self.algorithm.updates_per_rollout}",
            way_out="change either, so that every mini-batch has the same number of groups",
        )
        require(
            recorded or self.rollout.group_size >= 2,
            field="rollout.group_size",
            value=self.rollout.group_size,
            rule="must be at least 2: advantages are relative to the group",
            way_out="8 or 16 are good values",
        )
        require(
            (self.model.dtype, self.checkpoint.export_dtype) != ("bfloat16", "float32"),
            field="checkpoint.export_dtype",
            value=self.checkpoint.export_dtype,
            rule='must be "bfloat16" with model.dtype = "bfloat16": the weights that are exported have that precision',
            way_out='set it to "bfloat16"',
        )
        require(
            not self.rollout.colocated or self.weight_sync.pause in ("auto", "abort"),
            field="weight_sync.pause",
            value=self.weight_sync.pause,
            rule='must be "abort" with rollout.colocated: servers give back the cache that running requests need',
            way_out='leave it at "auto"',
        )
        require(
            not self.rollout.colocated or self.weight_sync.transport != "distributed",
            field="weight_sync.transport",
            value=self.weight_sync.transport,
            rule='must not be "distributed" with rollout.colocated: NCCL takes no two ranks on one GPU',
            way_out='leave it at "auto"',
        )
        longest_start = self.rollout.sglang.start_timeout_s if self.rollout.engine == "sglang" else 0.0
        require(
            not self.watchdog.longest_s or self.watchdog.longest_s > longest_start,
            field="watchdog.long_stall_after_s",
            value=self.watchdog.long_stall_after_s,
            rule=f"must exceed rollout.sglang.start_timeout_s = {longest_start:g}: servers that start are no hang",
            way_out="raise it, or lower the other",
        )
        self._check_safeguards()
        if not recorded:
            self.reward.check_response_limit(self.rollout.max_response_tokens)
        if self.data is None:
            require(
                recorded,
                field="data",
                value=None,
                rule=f'must be given with mode = "{self.mode}"',
                way_out="name the training prompts under data.train",
            )
        else:
            self._check_lengths(self.data.max_prompt_tokens)

    @property
    def pause_mode(self) -> PauseMode:
        """What becomes of running requests while weights change."""
        if self.weight_sync.pause != "auto":
            return self.weight_sync.pause
        return "abort" if self.rollout.colocated or self.rollout.partial_rollouts else "retract"

    def _check_safeguards(self) -> None:
        """Refuse safeguards that could never act."""
        own, clamp = self.safeguards, self.algorithm.log_ratio_clamp
        require(
            own.on_exploding_ratio == "warn" or own.max_log_ratio < clamp or math.isinf(own.max_log_ratio),
            field="safeguards.max_log_ratio",
            value=own.max_log_ratio,
            rule=(
                f"must be below algorithm.log_ratio_clamp = {clamp:g}, the largest that is seen, where "
                f'on_exploding_ratio is not "warn"'
            ),
            way_out="lower it, or use .inf for no limit",
        )
        require(
            self.mode == "train_only" or own.dump_update <= self.algorithm.updates_per_rollout,
            field="safeguards.dump_update",
            value=own.dump_update,
            rule=f"a step has algorithm.updates_per_rollout = {self.algorithm.updates_per_rollout} updates",
            way_out="name one of them, from 1",
        )

    def _check_lengths(self, max_prompt_tokens: int) -> None:
        """Refuse prompts and responses that together exceed the token budget or the context."""
        longest = max_prompt_tokens + self.rollout.max_response_tokens
        multiple = self.parallelism.pack_multiple
        padded = -(-longest // multiple) * multiple
        require(
            padded <= self.parallelism.max_tokens_per_micro_batch,
            field="parallelism.max_tokens_per_micro_batch",
            value=self.parallelism.max_tokens_per_micro_batch,
            rule=(
                f"must hold the longest sequence: data.max_prompt_tokens = {max_prompt_tokens} + "
                f"rollout.max_response_tokens = {self.rollout.max_response_tokens}, padded to {padded}"
            ),
            way_out=f"raise it to at least {padded}, or shorten prompts or responses",
        )
        self.model.check_context_length(longest)
