"""Builds what `megatron-fipo evaluate` needs from its configuration."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from megatron_fipo.config.evaluate import EvaluateConfig
from megatron_fipo.conversion.hf_folder import (
    check_weights,
    fingerprint_folder,
    model_config_for,
    read_model_config,
)
from megatron_fipo.conversion.model_files import check_tied_output
from megatron_fipo.data.evaluation import load_sources
from megatron_fipo.data.tokenizer import load_tokenizer
from megatron_fipo.parallel.agreement import on_every_rank, on_main_rank
from megatron_fipo.platform.device import DTYPES
from megatron_fipo.rewards.check import check_prompts
from megatron_fipo.rewards.pool import RewardPool
from megatron_fipo.rollout.controller import RolloutController
from megatron_fipo.rollout.embedded import EmbeddedEngine
from megatron_fipo.rollout.engine import RolloutEngine, SamplingParameters
from megatron_fipo.rollout.samples import Decode
from megatron_fipo.rollout.scoring import Scoring
from megatron_fipo.rollout.servers.arguments import check_server_arguments
from megatron_fipo.rollout.sglang.request_router import check_router
from megatron_fipo.trainer.evaluation.directory import prepare_directory
from megatron_fipo.trainer.evaluation.problems import select_prompts
from megatron_fipo.trainer.evaluation.served import MakeController, ServedEvaluation
from megatron_fipo.trainer.generation import decoder
from megatron_fipo.trainer.generation_inputs import check_positions, training_sampling
from megatron_fipo.trainer.rollout_side import EmbeddedRollouts
from megatron_fipo.types import Prompt
from megatron_fipo.weight_sync.folder import FolderSync


@dataclass(frozen=True, slots=True, kw_only=True)
class Problems:
    """What is tried, on rank 0.

    Attributes:
        prompts: The problems.
        sampling: How tokens are drawn in training; the evaluation's own settings are put over it where it draws.
        decode: Token ids to text.
        fingerprints: Digest of each input's content, by the field that names the input.
    """

    prompts: tuple[Prompt, ...]
    sampling: SamplingParameters
    decode: Decode
    fingerprints: Mapping[str, str]


def prepare_problems(config: EvaluateConfig) -> Problems:
    """Check and load the inputs, and make the directory.

    Raises:
        ConfigError: An input cannot be used, or the directory holds another evaluation.
    """
    folder = config.model.path
    model = read_model_config(folder)
    check_weights(folder)
    check_tied_output(folder)
    positions = config.model.context_length or int(model["max_position_embeddings"])
    check_positions(config.data.max_prompt_tokens, config.rollout, positions)
    tokenizer = load_tokenizer(folder, int(model["vocab_size"]))
    check_server_arguments(config.rollout.sglang.server_arguments)
    check_router(config.rollout.sglang)
    usable = load_sources(config.data.evaluation, config.data, tokenizer, limit=config.evaluation.num_prompts)
    check_prompts(config.reward, usable, "data.evaluation")
    prompts = select_prompts(usable, config.evaluation.num_prompts)
    fingerprints = {"model.path": fingerprint_folder(folder), "data.evaluation": _fingerprint(prompts)}
    prepare_directory(config, fingerprints)
    return Problems(
        prompts=prompts,
        sampling=training_sampling(config.rollout, folder, tokenizer),
        decode=decoder(tokenizer),
        fingerprints=fingerprints,
    )


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    """Digest of ids, tokens, reference answers and what else scorers look at."""
    digest = hashlib.sha256()
    for prompt in prompts:
        others = (prompt.id, prompt.source, prompt.answer, sorted(prompt.metadata.items()))
        for content in (prompt.token_ids.astype("<i4").tobytes(), repr(others).encode(errors="backslashreplace")):
            digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


@contextmanager
def build_generation(
    config: EvaluateConfig, problems: Problems | None
) -> Iterator[EmbeddedRollouts | ServedEvaluation]:
    """Start grading, and an embedded engine, which is filled from the folder; collective over all ranks.

    Args:
        config: The evaluation.
        problems: On rank 0 alone.

    Raises:
        ConfigError: The model or the reward cannot be used; raised on every rank.
        RunError: Grading did not start; raised on every rank.
    """
    with ExitStack() as resources:
        pool = on_main_rank(
            lambda: resources.enter_context(RewardPool(config.reward, config.rollout.max_response_tokens))
        )
        make_controller = None
        if problems is not None and pool is not None:
            make_controller = partial(_make_controller, config, problems, pool)
        if config.rollout.engine == "sglang":
            yield ServedEvaluation(config=config, make_controller=make_controller)
        else:
            yield _fill_embedded(config, make_controller)


def _make_controller(
    config: EvaluateConfig, problems: Problems, pool: RewardPool, engine: RolloutEngine
) -> RolloutController:
    return RolloutController(
        engine=engine,
        scoring=Scoring(pool, config.reward.on_error),
        decode=problems.decode,
        config=config.rollout,
        sampling=problems.sampling,
        seed=config.seed,
    )


def _fill_embedded(config: EvaluateConfig, make_controller: MakeController | None) -> EmbeddedRollouts:
    engine = on_every_rank(lambda: _build_engine(config))
    sync = FolderSync(config.model.path, engine, config.weight_sync)
    on_every_rank(lambda: sync.push(0))
    controller = None if make_controller is None else make_controller(engine)
    return EmbeddedRollouts(engine=engine, weight_sync=sync, controller=controller)


def _build_engine(config: EvaluateConfig) -> EmbeddedEngine:
    model = config.model
    content = model_config_for(read_model_config(model.path), model.dtype, model.context_length, model.rope_base)
    return EmbeddedEngine(content, model.path, DTYPES[model.dtype], config.rollout.max_batch_sequences)
