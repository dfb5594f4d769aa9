"""`megatron-fipo convert`, on every rank of its process group."""

from pathlib import Path

from megatron_fipo.config.base import ConfigError
from megatron_fipo.parallel.agreement import on_every_rank, on_main_rank
from megatron_fipo.trainer.convert.proof import prove
from megatron_fipo.trainer.convert.source import open_checkpoint
from megatron_fipo.trainer.convert.target import check_target
from megatron_fipo.trainer.convert.to_hf import to_hf
from megatron_fipo.trainer.convert.to_megatron import to_megatron
from megatron_fipo.trainer.convert.words import Conversion


def convert(conversion: Conversion) -> None:
    """Do what the words say; collective over all ranks.

    Raises:
        ConfigError: Something that is named cannot be used.
        CheckpointError: A checkpoint is damaged.
        ConversionError: A folder cannot be written, or two things differ that should not.
    """
    try:
        _convert(conversion)
    except ConfigError as error:
        if error.field != "model.path":
            raise
        # As a run's configuration calls a model folder.
        word = conversion.word_for(Path(str(error.value)))
        raise ConfigError(word, error.value, error.rule, error.way_out) from error


def _convert(conversion: Conversion) -> None:
    if conversion.direction != "verify":
        on_main_rank(lambda: check_target(conversion.target))
    if conversion.direction == "to-hf":
        to_hf(conversion.source, conversion.target, conversion.options)
    elif conversion.direction == "to-megatron":
        to_megatron(conversion.source, conversion.target, conversion.options)
    else:
        source = open_checkpoint(conversion.source, conversion.options)
        weights = on_every_rank(source.weights)
        prove(source, weights, conversion.target, conversion.options)
