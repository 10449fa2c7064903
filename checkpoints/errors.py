"""The one exception for anything wrong with a checkpoint."""


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names the file, tensor, shape or value and what to do."""
