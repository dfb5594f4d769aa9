"""Ends of a run that are the run's own, not a defect of the program."""


class RunError(RuntimeError):
    """The run cannot go on; the text says where, why, and what to do. Raised on every rank."""


class NonFiniteError(RunError):
    """A log-probability, a loss, a gradient or a weight was not finite.

    The weights are those before it, but where an optimizer step has made them so, which the text says.
    """


class SafeguardError(RunError):
    """A limit of the configuration's safeguards was passed. The weights are those before the update that passed it."""


class CheckpointError(RunError):
    """A checkpoint cannot be written or read. What was complete on disk before still is."""


class BreakdownError(RunError):
    """A process that the run needs is gone, and none takes its place; started again, the run goes on."""
