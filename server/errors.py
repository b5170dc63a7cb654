"""What can stop a run at the coordinator."""


class RunError(RuntimeError):
    """A run cannot start or go on; the text says what to do."""


class QuorumError(RunError):
    """Fewer sites than the strategy's ``min-sites`` took part."""


class CheckpointError(RunError):
    """A checkpoint cannot be used for this run."""
