"""What a run leaves behind."""

from typing import Literal

from megatron_fipo.config.base import config_class, require


@config_class
class CheckpointConfig:
    """Checkpoints during a run, and the Hugging Face export at its end."""

    every_steps: int = 20
    """Steps between checkpoints; one more follows the last step. 0 writes none."""

    asynchronous: bool = True
    """Write a checkpoint from host memory while training goes on; false waits until it is on disk."""

    keep_last: int = 2
    """Newest checkpoints that are kept, at least 1."""

    keep_every: int = 0
    """Keep the checkpoints whose step is a multiple of this, too; 0 keeps none for that."""

    keep_best: int = 0
    """Keep so many checkpoints with the best best_metric, too."""

    best_metric: str = ""
    """Metric of metrics.jsonl that keep_best looks at, such as "eval/accuracy"; a step without it, as where no
    evaluation was due, has no rank. Where it changes, checkpoints ranked by the one before have none either."""

    best_is: Literal["highest", "lowest"] = "highest"
    """Which value of best_metric is the best."""

    on_failure: Literal["stop", "continue"] = "continue"
    """What becomes of the run when a checkpoint cannot be written, as on a full disk. "continue" warns and tries again
    when the next one is due, "stop" ends it."""

    verify_on_load: bool = True
    """Compare every byte with its SHA-256 before a checkpoint is loaded; false compares sizes alone."""

    resume: bool = True
    """Go on with the run that output_dir holds, from its newest checkpoint, or from the beginning where it has none;
    false refuses a directory that holds anything."""

    accept_changes: tuple[str, ...] = ()
    """Fields and sections, such as "optimizer.learning_rate", in which a run that goes on may differ from its
    beginning although what it learns depends on them. The others are told and accepted, or refused, by themselves."""

    export_at_end: bool = True
    """Write the trained model as a Hugging Face folder, `export/` in the run directory, after the last step."""

    export_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Precision of the exported weights."""

    verify_export: bool = True
    """Load the export in transformers and compare its logits with the actor's; a difference fails the run."""

    def __post_init__(self) -> None:
        """Check ranges and combinations."""
        for field, least in (("every_steps", 0), ("keep_last", 1), ("keep_every", 0), ("keep_best", 0)):
            value = getattr(self, field)
            require(
                value >= least,
                field=field,
                value=value,
                rule=f"must be at least {least}",
                way_out=f"set it to {least} or more",
            )
        require(
            (self.keep_best > 0) == bool(self.best_metric),
            field="best_metric",
            value=self.best_metric,
            rule=f"must be given with keep_best above 0 and only then (keep_best is {self.keep_best})",
            way_out="name a metric of metrics.jsonl, or set keep_best to 0",
        )
