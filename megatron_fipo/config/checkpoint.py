"""What a run leaves behind."""

from typing import Literal

from megatron_fipo.config.base import config_class


@config_class
class CheckpointConfig:
    """The Hugging Face export at the end of a run."""

    export_at_end: bool = True
    """Write the trained model as a Hugging Face folder, `export/` in the run directory, after the last step."""

    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the exported weights."""

    verify_export: bool = True
    """Load the export in transformers and compare its logits with the actor's; a difference fails the run."""
