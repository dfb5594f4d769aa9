"""What generating needs beside an engine, in whichever process the controller lives."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_fipo.config.base import require
from megatron_fipo.config.data import DataConfig
from megatron_fipo.config.run import RunConfig
from megatron_fipo.data.evaluation import load_evaluation_prompts
from megatron_fipo.data.stream import PromptStream
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.rewards.check import check_prompts
from megatron_fipo.rewards.pool import RewardPool
from megatron_fipo.rollout.batch_recipe import BatchRecipe
from megatron_fipo.rollout.controller import RolloutController
from megatron_fipo.rollout.engine import RolloutEngine, SamplingParameters
from megatron_fipo.rollout.samples import Decode
from megatron_fipo.rollout.scoring import Scoring
from megatron_fipo.runtime.progress import Progress
from megatron_fipo.runtime.run_dir import RunDirectory
from megatron_fipo.runtime.seeding import derive_seed
from megatron_fipo.trainer.evaluation.held_out import HeldOutProblems
from megatron_fipo.trainer.evaluation.problems import select_prompts
from megatron_fipo.trainer.generation_inputs import check_positions, training_sampling
from megatron_fipo.types import Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A run's inputs for generating, loaded and checked.

    Attributes:
        config: The run.
        vocab_size: Tokens of the model.
        stream: Training prompts.
        held_out: Held-out problems.
        sampling: How tokens are drawn in training.
        decode: Token ids to text.
        pool: Grades responses.
    """

    config: RunConfig
    vocab_size: int
    stream: PromptStream
    held_out: HeldOutProblems
    sampling: SamplingParameters
    decode: Decode
    pool: RewardPool

    def controller(self, engine: RolloutEngine, progress: Progress) -> RolloutController:
        """The controller over an engine; there is one, since the prompts are drawn once."""
        config, directory = self.config, RunDirectory(self.config.output_dir)
        is_served = config.rollout.engine == "sglang"
        return RolloutController(
            engine=engine,
            scoring=Scoring(self.pool, config.reward.on_error),
            decode=self.decode,
            config=config.rollout,
            sampling=self.sampling,
            seed=config.seed,
            recipe=BatchRecipe(
                stream=self.stream,
                algorithm=config.algorithm,
                num_records=config.metrics.samples_per_step,
                # The embedded engine gives the same batch again, and without checkpoints no run goes on.
                journal=directory.journal if is_served and config.checkpoint.every_steps else None,
                routing=directory.rollouts if config.rollout.replay_routing else None,
            ),
            progress=progress,
        )


def prepare_generation(config: RunConfig, vocab_size: int, positions: int, resources: ExitStack) -> Generation:
    """Load tokenizer and prompts, and start grading.

    Args:
        config: The run.
        vocab_size: Tokens of the model.
        positions: Those that the model was made for, or `model.context_length`.
        resources: Where the grading processes are handed over to be closed.

    Raises:
        ConfigError: An input cannot be used.
        RunError: Grading did not start.
    """
    data = config.data
    assert data is not None, "RunConfig demands prompts of every mode that generates"
    check_positions(data.max_prompt_tokens, config.rollout, positions)
    tokenizer = load_tokenizer(config.model.path, vocab_size)
    stream = PromptStream(data, tokenizer, derive_seed(config.seed, "prompts"))
    check_prompts(config.reward, [prompt for first in stream.first_prompts.values() for prompt in first], "data.train")
    _check_epochs(config, data, stream)
    held_out = _load_held_out(config, data, tokenizer, stream)
    sampling = training_sampling(config.rollout, config.model.path, tokenizer)
    return Generation(
        config=config,
        vocab_size=vocab_size,
        stream=stream,
        held_out=HeldOutProblems(prompts=held_out, config=config.evaluation, seed=config.seed),
        sampling=sampling,
        decode=decoder(tokenizer),
        pool=resources.enter_context(RewardPool(config.reward, config.rollout.max_response_tokens)),
    )


def decoder(tokenizer: PreTrainedTokenizerBase) -> Decode:
    """Token ids to text, special tokens included."""
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)


def _check_epochs(config: RunConfig, data: DataConfig, stream: PromptStream) -> None:
    needed = config.num_steps * config.rollout.num_prompts_per_step
    require(
        needed <= stream.most_prompts,
        field="data.epochs",
        value=data.epochs,
        rule=f"gives at most {stream.most_prompts:,.0f} prompts, and num_steps = {config.num_steps} need {needed:,}",
        way_out="allow more epochs, or set it to null",
    )


def _load_held_out(
    config: RunConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase, stream: PromptStream
) -> Sequence[Prompt]:
    if not data.has_evaluation:
        return ()
    usable = load_evaluation_prompts(data, tokenizer, limit=config.evaluation.num_prompts, stream=stream)
    check_prompts(config.reward, usable, "data.evaluation")
    return select_prompts(usable, config.evaluation.num_prompts)
