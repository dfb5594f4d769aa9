"""`megatron-fipo convert`, on every rank of its process group."""

from megatron_fipo.trainer.agreement import on_every_rank
from megatron_fipo.trainer.convert.proof import prove
from megatron_fipo.trainer.convert.source import open_checkpoint
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
    if conversion.direction == "to-hf":
        to_hf(conversion.source, conversion.target, conversion.options)
    elif conversion.direction == "to-megatron":
        to_megatron(conversion.source, conversion.target, conversion.options)
    else:
        source = open_checkpoint(conversion.source, conversion.options)
        weights = on_every_rank(source.weights)
        prove(source, weights, conversion.target, conversion.options)
