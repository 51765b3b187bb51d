"""The ranks of a single node meet on the loopback interface; PyTorch listens on every one."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlparse

LOOPBACK = "127.0.0.1"

#: The scheme of the init method that `rendezvous` serves.
SCHEME = "minimax-loopback"

#: Gloo's environment variable for the interface on which it listens.
GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def meet_on_loopback(original: Callable[..., str]) -> Callable[..., str]:
    """Wrap `_resolve_dist_init_method(dist_port=...)`, which every rank calls before it meets.

    With several nodes, or an address or method that the user gave, the answer is SGLang's.
    """

    @functools.wraps(original)
    def _resolve_dist_init_method(*, dist_port: int) -> str:
        from sglang.srt.environ import envs
        from sglang.srt.runtime_context import get_parallel

        parallel = get_parallel()
        chosen = envs.SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE.get() or parallel.dist_init_addr
        if chosen or parallel.nnodes != 1:
            return original(dist_port=dist_port)
        register_scheme()
        os.environ.setdefault(GLOO_INTERFACE, "lo")
        return f"{SCHEME}://{LOOPBACK}:{dist_port}"

    return _resolve_dist_init_method


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
