"""Training checkpoints: which are whole, what made them, how long they are kept."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line that names it and says what is wrong."""
