"""The error that lowering raises."""


class LowerError(ValueError):
    """A model that has no integer program; the message names the module or operation and what to do about it."""
