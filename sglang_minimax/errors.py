"""Errors whose message is written for the person who started the server.

Each message is one sentence: what is wrong, the numbers, and the nearest setting that works.
Callers print the message alone; a stack trace adds nothing for a mistake in a configuration or a
checkpoint.
"""


class MinimaxError(Exception):
    """Base of every error that this package raises for a user to read.

    is_told_elsewhere: whether another rank prints it, so that this one need not. is_of_all_ranks:
    whether every rank has the same one.
    """

    is_told_elsewhere = False
    is_of_all_ranks = False


class ConfigError(MinimaxError):
    """The model configuration is not a MiniMax-M2 that we can run."""


class TopologyError(MinimaxError):
    """The model cannot be divided over the requested ranks."""


class PathError(MinimaxError):
    """The kernel that the environment asks for does not run here; all ranks say the same."""

    is_of_all_ranks = True


class LoadError(MinimaxError):
    """The checkpoint does not fill the model exactly once."""
