"""The trained model as a Hugging Face folder, put in place only after its logits matched the actor's."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from megatron_fipo.actor.micro_batch import build_micro_batch
from megatron_fipo.actor.model import unwrap
from megatron_fipo.actor.shard import packing_rules
from megatron_fipo.config.algorithm_card import CARD_FILE, effective_algorithm
from megatron_fipo.conversion.hf_folder import HfFolderWriter
from megatron_fipo.parallel.collectives import broadcast_json, gather_json
from megatron_fipo.parallel.packing import plan_packs
from megatron_fipo.platform.device import DTYPES, compute_device
from megatron_fipo.runtime.errors import RunError
from megatron_fipo.trainer.state import Run
from megatron_fipo.types import TrainBatch

logger = logging.getLogger(__name__)

# Largest difference of any logit, float32 against float32.
FLOAT32_TOLERANCE = 1e-4
# ‖a − b‖ / ‖b‖ where the actor computes in bfloat16.
BFLOAT16_TOLERANCE = 2e-2
_PROBE_LENGTHS = (33, 64, 17, 48)


class ExportError(RunError):
    """An export whose logits differ from the actor's. Its folder was not put in place."""


def export_when_done(run: Run) -> None:
    """Write and verify the export after the last step; collective over all ranks.

    Raises:
        ExportError: The exported model's logits differ from the actor's.
    """
    config = run.config.checkpoint
    if not config.export_at_end or run.actor.train_step is None:
        return
    if any(gather_json(run.directory is not None and run.directory.export.exists())):
        # Of a run that had come to its end before.
        return
    dtype = DTYPES[config.export_dtype]
    if run.rollout is not None:
        run.rollout.yield_devices()
    with run.timer.phase("export"):
        writer, partial = _write(run, dtype)
        if config.verify_export:
            _verify(run, Path(partial), dtype)
        if writer is not None:
            writer.commit()
            logger.info("exported the model to %s", writer.target)


def _write(run: Run, dtype: torch.dtype) -> tuple[HfFolderWriter | None, str]:
    """Write the partial folder on rank 0 while all ranks feed the stream; returns its path on all."""
    bridge, chunks = run.actor.bridge, unwrap(run.actor.chunks)
    stream = bridge.export(chunks, dtype)
    writer, partial = None, ""
    if run.directory is not None:
        writer = HfFolderWriter(run.directory.export, bridge.folder, bridge.export_config(dtype))
        folder = writer.write(stream)
        (folder / CARD_FILE).write_text(effective_algorithm(run.config.algorithm) + "\n", encoding="utf-8")
        partial = str(folder)
    else:
        for _ in stream:
            pass
    return writer, broadcast_json(partial, 0)


def _verify(run: Run, folder: Path, dtype: torch.dtype) -> None:
    """Compare logits on a probe; the rank that ends the first replica's pipeline judges."""
    context = run.context
    with _weights_rounded_to(dtype, unwrap(run.actor.chunks)):
        sequences, logits = _probe_logits(run)
    judges = gather_json(context.is_pipeline_last_stage and not (context.tp_rank or context.cp_rank or context.dp_rank))
    judge = judges.index(True)
    verdict = _compare(folder, sequences, logits, run) if context.rank == judge else None
    verdict = broadcast_json(verdict, judge)
    if not verdict["matches"]:
        raise ExportError(
            f"{folder}: its logits differ from the actor's ({verdict['text']}); the folder was left for inspection"
        )
    logger.info("the export's logits match the actor's: %s", verdict["text"])


def _compare(folder: Path, sequences: list[Tensor], logits: list[Tensor], run: Run) -> dict[str, Any]:
    disable_progress_bar()
    dtype = run.actor.forward.provider.params_dtype
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    model = model.to(compute_device()).eval()
    with torch.no_grad():
        expected = [model(input_ids=ids[None]).logits[0].float() for ids in sequences]
    actual, wanted = torch.cat(logits), torch.cat(expected)
    largest = float((actual - wanted).abs().max())
    relative = float((actual - wanted).norm() / wanted.norm())
    scale = float(wanted.abs().max())
    text = f"largest difference {largest:.2e} at logits up to {scale:.1f}, relative norm {relative:.2e}"
    matches = largest <= FLOAT32_TOLERANCE if dtype == torch.float32 else relative <= BFLOAT16_TOLERANCE
    return {"matches": matches, "text": text}


def _probe_logits(run: Run) -> tuple[list[Tensor], list[Tensor]]:
    """Token ids and the actor's logits of every probe sequence, whole, on the last pipeline stage."""
    batch, context = _probe_batch(run.actor.bridge.vocab_size), run.context
    rules = packing_rules(run.config.parallelism)
    # The probe's lengths are its own; the run's budget may be below them.
    rules = dataclasses.replace(rules, max_tokens=max(rules.max_tokens, sum(_PROBE_LENGTHS) + rules.pack_multiple))
    plan = plan_packs(batch.sequence_lengths.tolist(), [0] * batch.num_sequences, 1, rules)
    packs = plan[0][0]
    micro_batches = [build_micro_batch(batch, pack, context, compute_device()) for pack in packs]
    sequences: list[Tensor] = []
    logits: list[Tensor] = []
    for pack, micro_batch, local in zip(packs, micro_batches, run.actor.forward.logits(micro_batches), strict=False):
        shards = [torch.empty_like(local) for _ in range(context.cp_size)]
        dist.all_gather(shards, local.contiguous(), group=context.cp_group)
        whole = micro_batch.layout.unshard(shards)
        for place, index in enumerate(pack.sequences):
            first = int(micro_batch.layout.cu_seqlens[place])
            length = int(batch.sequence_lengths[index])
            source = int(batch.sequence_starts[index])
            ids = torch.from_numpy(batch.token_ids[source : source + length]).long()
            sequences.append(ids.to(whole.device))
            logits.append(whole[first : first + length])
    return sequences, logits


def _probe_batch(vocab_size: int) -> TrainBatch:
    """A few sequences of random tokens."""
    lengths = np.array(_PROBE_LENGTHS, dtype=np.int32)
    total, count = int(lengths.sum()), len(lengths)
    token_ids = np.random.default_rng(0).integers(0, vocab_size, total).astype(np.int32)
    zeros = np.zeros(count, dtype=np.int32)
    return TrainBatch(
        token_ids=token_ids,
        sequence_lengths=lengths,
        prompt_lengths=np.ones(count, dtype=np.int32),
        response_mask=np.zeros(total, dtype=bool),
        rollout_log_probs=np.zeros(total, dtype=np.float32),
        rewards=np.zeros(count, dtype=np.float32),
        advantages=np.zeros(count, dtype=np.float32),
        group_ids=zeros,
        mini_batch_ids=zeros,
        policy_versions=np.full(total, -1, dtype=np.int32),
        temperature=1.0,
    )


@contextmanager
def _weights_rounded_to(dtype: torch.dtype, chunks: list[Any]) -> Iterator[None]:
    """Round the actor's weights to `dtype` for the time being, as the export did."""
    saved: list[tuple[Tensor, Tensor]] = []
    for chunk in chunks:
        for parameter in chunk.parameters():
            if parameter.dtype != dtype and parameter.dtype == torch.float32:
                saved.append((parameter.data, parameter.data.clone()))
                parameter.data.copy_(parameter.data.to(dtype))
    try:
        yield
    finally:
        for live, original in saved:
            live.copy_(original)
