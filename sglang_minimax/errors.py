"""Errors whose message is written for the person who started the server.

Each message is one sentence: what is wrong, the numbers, and the nearest setting that works.
Callers print the message alone; a stack trace adds nothing for a mistake in a configuration or a
checkpoint.
"""


class MinimaxError(Exception):
    """Base of every error that this package raises for a user to read.

    is_told_elsewhere: whether another rank prints it, so that this one need not. is_of_all_ranks:
    whether all ranks that look for it have the same one, so that no number of a rank need be told.
    """

    is_told_elsewhere = False
    is_of_all_ranks = False


class ConfigError(MinimaxError):
    """The model configuration is not a MiniMax-M2 that we can run."""


class TopologyError(MinimaxError):
    """The model cannot be divided over the requested ranks."""


class PathError(MinimaxError):
    """The environment asks for a kernel that does not run, or not for the same one on all ranks.

    Raised from what was gathered over the group, so all its ranks say the same.
    """

    is_of_all_ranks = True


class LoadError(MinimaxError):
    """The checkpoint does not fill the model exactly once."""
