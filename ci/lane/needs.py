"""What a lane needs and this machine lacks, one sentence each, before anything is started."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from ci.lane import hub, suites
from ci.lane.launch import Node, weights
from ci.lane.machine import Device, Devices
from ci.lane.schema import Hardware, Lane, Model
from sglang_minimax.accuracy import gsm8k_data
from sglang_minimax.errors import MinimaxError


def missing(
    lane: Lane, chosen: list[str], node: Node, port: int | None, devices: Devices
) -> list[str]:
    """Every reason why the lane could not run here.

    chosen: its suites that are to run, which they do on node 0. port: of the server, None for any.
    devices: of this machine.
    """
    chosen = [] if node.rank else chosen
    return [
        *_devices(lane.hardware, devices),
        *_model(lane.model, "model"),
        *(_model(lane.draft, "draft") if lane.draft else ()),
        *_packages(lane, chosen),
        *dict.fromkeys(said for suite in chosen for said in _data(lane, suite)),
        *_places(lane, node, port),
    ]


def _devices(wanted: Hardware, found: Devices) -> Iterator[str]:
    if wanted.kind == "cpu":
        return
    here = f"{len(found.devices)} of {found.kind}" if found.kind else "none"
    if found.kind != wanted.kind or len(found.devices) < wanted.per_node:
        yield f"the lane needs {wanted.per_node} {wanted.kind} devices a node; here are {here}."
        return
    for said in dict.fromkeys(_unlike(wanted, device) for device in found.devices):
        if said is not None:
            yield said


def _unlike(wanted: Hardware, device: Device) -> str | None:
    """Why a device is not the lane's, None where it is."""
    names = [wanted.device, *wanted.also]
    if not any(is_called(name, device.name) for name in names):
        return f"the lane is for {' or '.join(names)}; here is {device.name}."
    if wanted.capability is not None and device.version != wanted.capability:
        return (
            f"the lane is for compute capability {wanted.capability / 10}; {device.name} has "
            f"{'none' if device.version is None else device.version / 10}."
        )
    if wanted.gfx is not None and device.gfx != wanted.gfx:
        return f"the lane is for {wanted.gfx}; {device.name} is {device.gfx}."
    if device.nbytes < wanted.memory_gb * 1e9:
        return (
            f"the lane counts on {wanted.memory_gb:g} GB a device; {device.name} has "
            f"{device.nbytes / 1e9:.0f} GB here."
        )
    return None


def is_called(wanted: str, name: str) -> bool:
    """Whether a driver's name has the wanted one as a word.

    >>> is_called("H200", "NVIDIA H200 NVL"), is_called("H200", "NVIDIA GH200 480GB")
    (True, False)
    """
    pattern = rf"(?<![A-Za-z0-9]){re.escape(wanted)}(?![A-Za-z0-9])"
    return re.search(pattern, name, re.IGNORECASE) is not None


def _model(model: Model, what: str) -> Iterator[str]:
    where = weights(model)
    named = model.override if model.override and os.environ.get(model.override) else None
    if model.bundled or named:
        if why := hub.folder_obstacle(Path(where)):
            said = f"{named}={where}" if named else where
            yield f"the {what} folder {said} cannot be served: {why}; give a checkpoint folder."
    elif why := hub.model_obstacle(where):
        local = f"; set {model.override} to a local folder" if model.override else ""
        yield f"the {what} {where} {why}{local}."


def _data(lane: Lane, suite: str) -> Iterator[str]:
    """The questions that a suite asks."""
    settings = suites.settings_here(lane, suite)
    data, shots = settings.get("data"), settings.get("shots", 5 if suite == "gsm8k" else 0)
    if data is None:
        return
    try:
        splits = gsm8k_data.load(data, shots)
    except MinimaxError as error:
        yield f"the suite {suite} cannot ask: {error}"
        return
    if splits is None and (why := hub.data_obstacle(data)):
        yield (
            f"the questions {data} {why}; set {suites.DATA} to a folder with test.jsonl and "
            "train.jsonl."
        )


def _packages(lane: Lane, chosen: list[str]) -> Iterator[str]:
    if not any(importlib.metadata.distributions(name="sglang-minimax")):
        yield (
            "sglang-minimax is not installed, so that SGLang would not load it; run "
            f"`{sys.executable} -m pip install -e .` in the checkout."
        )
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
