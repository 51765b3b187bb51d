"""What a lane needs and this machine lacks, one sentence each, before anything is started."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ci.lane import suites
from ci.lane.launch import Node, weights
from ci.lane.schema import Hardware, Lane, Model

#: Seconds to ask for devices, or for the hub.
PATIENCE = 120.0
HUB_PATIENCE = 10.0

# In a process of its own: asking for names would leave a context on the first device.
_DEVICES = """
import json, torch
kind = None
if torch.cuda.is_available():
    kind = "rocm" if torch.version.hip is not None else "cuda"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
elif hasattr(torch, "npu") and torch.npu.is_available():
    kind, names = "npu", [torch.npu.get_device_name(i) for i in range(torch.npu.device_count())]
print(json.dumps({"kind": kind, "names": names if kind else []}))
"""


def missing(lane: Lane, chosen: list[str], node: Node, port: int | None) -> list[str]:
    """Every reason why the lane could not run here.

    chosen: its suites that are to run, which they do on node 0. port: of the server, None for any.
    """
    return [
        *_devices(lane.hardware),
        *_model(lane.model, "model"),
        *(_model(lane.draft, "draft") if lane.draft else ()),
        *_packages(lane, [] if node.rank else chosen),
        *_places(lane, node, port),
    ]


def devices() -> tuple[str | None, list[str]]:
    """(kind, names) of this machine's devices; None and nothing on one without."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DEVICES], capture_output=True, text=True, timeout=PATIENCE
        )
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return None, []
    return found["kind"], found["names"]


def _devices(wanted: Hardware) -> Iterator[str]:
    if wanted.kind == "cpu":
        return
    kind, names = devices()
    here = f"{len(names)} of {kind}" if kind else "none"
    if kind != wanted.kind or len(names) < wanted.per_node:
        yield f"the lane needs {wanted.per_node} {wanted.kind} devices a node; here are {here}."
    elif others := sorted({name for name in names if wanted.device not in name}):
        yield f"the lane is for {wanted.device}; here is {', '.join(others)}."


def _model(model: Model, what: str) -> Iterator[str]:
    where = weights(model)
    folder = Path(where)
    from_override = model.override is not None and os.environ.get(model.override)
    if model.bundled or from_override:
        if not (folder / "config.json").is_file():
            said = f"{model.override}={where}" if from_override else where
            yield f"the {what} folder {said} has no config.json; give a checkpoint folder."
    elif reason := _hub_refuses(where):
        local = f"; set {model.override} to a local folder" if model.override else ""
        yield f"the {what} {where} is not in the hub's cache, and {reason}{local}."


def _hub_refuses(name: str) -> str | None:
    """Why a model cannot be had from the hub, as a clause; None where it can."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return None
    try:
        HfApi().model_info(name, timeout=HUB_PATIENCE)
    except Exception as error:  # whatever the network and the hub can come up with
        return f"the hub does not give it ({type(error).__name__})"
    return None


def _packages(lane: Lane, chosen: list[str]) -> Iterator[str]:
    for package in lane.hardware.packages:
        if importlib.util.find_spec(package) is None:
            yield f"the lane needs the Python package {package}, which is not installed."
    for suite in chosen:
        if sentence := suites.missing(suite):
            yield sentence


def _places(lane: Lane, node: Node, port: int | None) -> Iterator[str]:
    if port is not None and not _is_free("127.0.0.1", port):
        yield f"port {port} of 127.0.0.1 is taken; choose another with --port."
    if lane.hardware.nodes == 1:
        return
    if node.address is None:
        yield (
            f"the lane has {lane.hardware.nodes} nodes; give --node-rank and --dist-init-addr "
            "HOST:PORT of node 0."
        )
        return
    if not 0 <= node.rank < lane.hardware.nodes:
        yield f"there is no node {node.rank}; the lane has nodes 0 to {lane.hardware.nodes - 1}."
    host, _, number = node.address.rpartition(":")
    if not host or not number.isdigit():
        yield f"--dist-init-addr {node.address} is not HOST:PORT."
    elif node.rank == 0 and not _is_free(host.strip("[]"), int(number)):
        yield f"{node.address} cannot be opened here; give an address of node 0 with a free port."


def _is_free(host: str, port: int) -> bool:
    try:
        with socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        ):
            return True
    except OSError:
        return False
