"""Two hosts on one machine: namespaces of their own, joined by a pair of virtual interfaces.

Each host has its own network, host name, System V memory and `/dev/shm`, so that its ranks can
reach those of the other host by network only. Linux, as root.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from sglang_minimax.validation.engine_process import (
    EngineFailed,
    EngineProcess,
    preload,
    quiet_child,
)

#: Addresses for documentation (RFC 5737): nothing outside of the namespaces can be meant.
ADDRESSES = ("192.0.2.1", "192.0.2.2")
INTERFACES = ("m2-host0", "m2-host1")
#: Free, because nothing else runs in the namespaces.
RENDEZVOUS_PORT = 29_500

_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC, _CLONE_NEWNET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x40000000,
)
_Before = Callable[[], None]


def reason_not_to() -> str | None:
    """Why two hosts cannot be made here, in one sentence; None when they can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root."
    for tool in ("ip", "mount"):
        if shutil.which(tool) is None:
            return f"network namespaces need the command `{tool}`."
    probe = multiprocessing.get_context("fork").Process(target=_try)
    probe.start()
    probe.join(10)
    if probe.exitcode != 0:
        return "this system does not allow new network namespaces."
    return None


@contextlib.contextmanager
def two_hosts(
    *, before: _Before | None = None, timeout: float = 180.0, **arguments: Any
) -> Iterator[EngineProcess]:
    """An engine whose ranks live on two hosts; yields node 0, which answers requests.

    before: called on each host before its engine is built. arguments: as for `EngineProcess`,
    without the nodes and their address. Raises EngineFailed as it does.
    """
    preload()
    common = {
        **arguments,
        "nnodes": 2,
        "dist_init_addr": f"{ADDRESSES[0]}:{RENDEZVOUS_PORT}",
    }
    with tempfile.NamedTemporaryFile(prefix="node-1-", suffix=".log") as log:
        # Node 1 first: node 0 puts one end of the cable into its namespace.
        worker = multiprocessing.get_context("fork").Process(
            target=_serve_node_1, args=(log.name, before, {**common, "node_rank": 1})
        )
        worker.start()
        try:
            with EngineProcess(
                before=partial(_enter_host_0, _pid(worker), before),
                timeout=timeout,
                **common,
                node_rank=0,
            ) as engine:
                yield engine
        except EngineFailed as error:
            output = Path(log.name).read_text(errors="replace")
            raise EngineFailed(f"{error}\nnode 1: {output[-3000:]}", error.log) from error
        finally:
            _kill_family(worker)


def _pid(process: Any) -> int:
    assert process.pid is not None, "it has been started"
    return process.pid


def _try() -> None:
    """Exit 0 where a namespace can be made and has an interface."""
    _unshare()
    _ip("link", "set", "lo", "up")


def _serve_node_1(log: str, before: _Before | None, arguments: dict[str, Any]) -> None:
    quiet_child(log)
    _unshare()
    deadline = time.monotonic() + 30
    while INTERFACES[1] not in psutil.net_if_addrs():
        if time.monotonic() > deadline:
            raise SystemExit("node 1: no cable to node 0 within 30 s")
        time.sleep(0.05)
    _configure(1)
    if before is not None:
        before()
    from sglang.srt.entrypoints.engine import Engine

    Engine(**arguments)  # a node other than the first returns when its ranks have ended


def _enter_host_0(peer: int, before: _Before | None) -> None:
    """In node 0's process: leave the machine's namespaces and plug in the cable to `peer`."""
    here = os.readlink("/proc/self/ns/net")
    deadline = time.monotonic() + 30
    while os.readlink(f"/proc/{peer}/ns/net") == here:
        if time.monotonic() > deadline:
            raise SystemExit("node 0: node 1 did not leave this host's network within 30 s")
        time.sleep(0.05)
    _unshare()
    cable = ("type", "veth", "peer", "name", INTERFACES[1], "netns", str(peer))
    _ip("link", "add", INTERFACES[0], *cable)
    _configure(0)
    if before is not None:
        before()


def _unshare() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS | _CLONE_NEWUTS | _CLONE_NEWIPC | _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "a namespace cannot be made")
    _run("mount", "--make-rprivate", "/")
    _run("mount", "-t", "tmpfs", "tmpfs", "/dev/shm")


def _configure(node: int) -> None:
    _ip("link", "set", "lo", "up")
    _ip("address", "add", f"{ADDRESSES[node]}/30", "dev", INTERFACES[node])
    _ip("link", "set", INTERFACES[node], "up")


def _ip(*words: str) -> None:
    _run("ip", *words)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _kill_family(process: Any) -> None:
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        family = [*root.children(recursive=True), root]
    for each in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)
    process.join()
