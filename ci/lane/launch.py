"""From a lane to SGLang's command line and the folder of its model. Pure."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ci.lane import CONFIGS
from ci.lane.schema import Lane, Model, Options
from sglang_minimax import TINY_M2
from sglang_minimax.cli.local_server import PARSERS

ASSETS = TINY_M2.parent


@dataclass(frozen=True)
class Node:
    """Which node this machine is, and where node 0 is found; None for a lane of one node."""

    rank: int = 0
    address: str | None = None


def words(options: Options) -> Iterator[str]:
    """Options as words of a command line: true is a flag, false leaves an option out.

    >>> list(words({"tp-size": 8, "trust-remote-code": True, "ep-size": False}))
    ['--tp-size', '8', '--trust-remote-code']
    """
    for name, value in options.items():
        if value is False:
            continue
        yield f"--{name}"
        if isinstance(value, dict):
            yield json.dumps(value)
        elif isinstance(value, list):
            yield from map(str, value)
        elif value is not True:
            yield str(value)


def arguments(lane: Lane, variant: str, node: Node | None = None) -> list[str]:
    """SGLang's arguments of a variant, but for model, host, port and parsers."""
    node = node or Node()
    found = list(words(lane.options_of(variant)))
    if lane.draft is not None:
        found += ["--speculative-draft-model-path", weights(lane.draft)]
    if lane.hardware.nodes > 1:
        found += ["--nnodes", str(lane.hardware.nodes), "--node-rank", str(node.rank)]
        found += ["--dist-init-addr", node.address or "127.0.0.1:0"]
    return found


def arguments_to_check(lane: Lane, variant: str) -> list[str]:
    """The whole command line of a variant, on the config folder, which has no weights."""
    return [
        *("--model-path", str(config_folder(lane.model)), *PARSERS),
        *arguments(lane, variant),
        *([] if lane.model.bundled else ["--load-format", "dummy"]),
    ]


def config_folder(model: Model) -> Path:
    """The folder that `check` reads: its config.json has the published values."""
    return ASSETS / model.name if model.bundled else CONFIGS / (model.config or "")


def weights(model: Model, environment: Mapping[str, str] | None = None) -> str:
    """What the server is given as a model: a folder, or a name of the hub."""
    if model.bundled:
        return str(ASSETS / model.name)
    values = os.environ if environment is None else environment
    return (values.get(model.override) if model.override else None) or model.name
