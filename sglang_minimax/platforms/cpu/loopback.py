"""Where ranks meet: on the loopback interface, or on the one that leads to the other nodes.

Left alone, PyTorch's store listens on every interface, and gloo on the one that the host's name
resolves to, which is loopback on many machines and unreachable from another node.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlparse

from sglang_minimax.errors import TopologyError

LOOPBACK = "127.0.0.1"

#: The scheme of the init method that `rendezvous` serves.
SCHEME = "minimax-loopback"

#: Gloo's environment variable for the interface on which it listens.
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"

#: SGLang's environment variable for the address at which other nodes find its queues.
HOST_ADDRESS = "SGLANG_HOST_IP"


def meet_on_loopback(original: Callable[..., str]) -> Callable[..., str]:
    """Wrap `_resolve_dist_init_method(dist_port=...)`, which every rank calls before it meets.

    With several nodes, or an address or method that the user gave, the answer is SGLang's, and gloo
    listens on the interface from which that address is reached.
    """

    @functools.wraps(original)
    def _resolve_dist_init_method(*, dist_port: int) -> str:
        from sglang.srt.environ import envs
        from sglang.srt.runtime_context import get_parallel

        parallel = get_parallel()
        chosen = envs.SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE.get() or parallel.dist_init_addr
        if chosen or parallel.nnodes != 1:
            return _towards(original(dist_port=dist_port))
        register_scheme()
        os.environ.setdefault(GLOO_INTERFACE, "lo")
        return f"{SCHEME}://{LOOPBACK}:{dist_port}"

    return _resolve_dist_init_method


def _towards(init_method: str) -> str:
    """Let gloo and SGLang's queues listen where `init_method`'s host is reached from.

    What the user has set stays. SGLang would take the address from which 8.8.8.8 is reached, and
    on a network without a way out the one that the host's name resolves to, often loopback.
    """
    host = urlparse(init_method).hostname
    if not host or GLOO_INTERFACE in os.environ:
        return init_method
    address, os.environ[GLOO_INTERFACE] = route_towards(host)
    if "HOST_IP" not in os.environ:
        os.environ.setdefault(HOST_ADDRESS, address)
    return init_method


def route_towards(host: str) -> tuple[str, str]:
    """(address, interface) of this host from which the kernel would reach `host`.

    Raises TopologyError when there is no route. Nothing is sent: a datagram socket is connected,
    which only asks the routing table.
    """
    import psutil

    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, target = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            mine = probe.getsockname()[0]
    except OSError as error:
        raise TopologyError(
            f"--dist-init-addr {host} cannot be reached from this host ({error}); name an address "
            f"of node 0 on a network that all nodes share, or set {GLOO_INTERFACE}."
        ) from error
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == mine for each in addresses):
            return mine, name
    raise TopologyError(
        f"no interface of this host has the address {mine}, from which {host} is reached; set "
        f"{GLOO_INTERFACE} to the interface that leads to the other nodes."
    )


@functools.cache
def register_scheme() -> None:
    """Make PyTorch understand init methods of our scheme, once in a process."""
    import torch.distributed

    torch.distributed.register_rendezvous_handler(SCHEME, rendezvous)


def rendezvous(
    url: str, timeout: timedelta = timedelta(minutes=5), **_: Any
) -> Iterator[tuple[Any, int, int]]:
    """PyTorch's `tcp://` rendezvous, with a store of rank 0 that listens on loopback only.

    url: `scheme://host:port?rank=0&world_size=1`, as PyTorch completes it.
    """
    from torch.distributed import TCPStore

    parts = urlparse(url)
    query = parse_qs(parts.query)
    rank, world_size = int(query["rank"][0]), int(query["world_size"][0])
    assert parts.port is not None
    descriptor = _listening_socket(parts.port) if rank == 0 else None
    store = TCPStore(
        LOOPBACK,
        parts.port,
        world_size,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=descriptor,
    )
    yield store, rank, world_size
    raise RuntimeError("the ranks of one node meet once")


def _listening_socket(port: int) -> int:
    """A descriptor that the store will own."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
        listener.listen(1024)
        return listener.detach()
