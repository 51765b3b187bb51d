"""Fake servers for the suites, stopped at the end of a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.accuracy.fake_server import Body, FakeServer, Said

Serve = Callable[..., FakeServer]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A factory: `serve(answer)` is a FakeServer that answers with `answer(body)`."""
    servers: list[FakeServer] = []

    def start(answer: Callable[[Body], Said], **options: Any) -> FakeServer:
        servers.append(FakeServer(answer, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()
