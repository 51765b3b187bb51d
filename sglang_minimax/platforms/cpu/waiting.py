"""Ranks that share cores must wait, not spin, and wake when others need them.

Two loops of SGLang's poll too much, or sleep too long, under data-parallel attention; what they
cost is in docs/validation.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

#: Milliseconds after which an idle attention-DP group looks what the others do.
GLANCE = 100


def sleep_until_asked(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap `DataParallelController.event_loop`, which asks its socket without a pause.

    The same loop, but it sleeps until there is a request; once a second the watchdog is fed.
    """

    @functools.wraps(original)
    def event_loop(controller: Any) -> None:
        from sglang.srt.managers.io_struct import sock_recv

        socket = controller.recv_from_tokenizer
        while True:
            controller.soft_watchdog.feed()
            if socket.poll(1000):
                controller._request_dispatcher(sock_recv(socket))

    return event_loop


def glance_at_other_groups(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap `IdleSleeper.maybe_sleep`, which waits a second for the rank's own sockets.

    With attention DP all groups meet in every round of the scheduler: a group with requests would
    wait until the idle ones wake.
    """

    @functools.wraps(original)
    def maybe_sleep(sleeper: Any) -> None:
        from sglang.srt.runtime_context import get_parallel

        if get_parallel().attn_dp_size == 1:
            original(sleeper)
        else:
            sleeper.poller.poll(GLANCE)

    return maybe_sleep
