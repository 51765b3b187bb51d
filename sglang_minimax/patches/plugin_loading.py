"""Keep our own entry points out of SGLang's plugin filters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

DISTRIBUTION = "sglang-minimax"

Plugins = dict[str, tuple[Callable[[], Any], str | None]]


def always_load_ours(original: Callable[..., Plugins]) -> Callable[..., Plugins]:
    """Wrap `load_plugins_by_group(group, excluded_dists)` so that it never loses ours."""

    @functools.wraps(original)
    def load_plugins_by_group(group: str, excluded_dists: set[str] | None = None) -> Plugins:
        plugins = original(group, excluded_dists)
        for entry in entry_points(group=group):
            if entry.dist is not None and entry.dist.name == DISTRIBUTION:
                plugins.setdefault(entry.name, (entry.load(), DISTRIBUTION))
        return plugins

    return load_plugins_by_group
