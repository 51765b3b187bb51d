"""Ranks on two hosts, each in namespaces of its own, joined by a virtual cable."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from sglang_minimax import TINY_M2
from sglang_minimax.errors import TopologyError
from sglang_minimax.platforms.cpu.loopback import route_towards
from sglang_minimax.validation import hosts
from sglang_minimax.validation.agreement import compare, random_prompt
from sglang_minimax.validation.oracle import TransformersOracle
from tests.engine.test_against_transformers import FP32

REASON = hosts.reason_not_to()
needs_namespaces = pytest.mark.skipif(REASON is not None, reason=f"two hosts: {REASON}")


@needs_namespaces
@pytest.mark.parametrize(
    "shape",
    [{"tp_size": 4}, {"tp_size": 4, "dp_size": 2, "ep_size": 4, "enable_dp_attention": True}],
    ids=["tp4", "tp4-dp2-ep4"],
)
def test_two_hosts_compute_the_same_model(
    oracles: Callable[..., TransformersOracle], shape: dict[str, int]
) -> None:
    oracle = oracles("tiny-m2")
    prompts = [random_prompt(length, oracle.vocab_size, seed=length) for length in (1, 7, 64)]
    with hosts.two_hosts(
        model_path=str(TINY_M2),
        dtype="float32",
        skip_tokenizer_init=True,
        log_level="info",
        **shape,
    ) as engine:
        ranks = engine.ranks()
        assert len(ranks) == 2, "the other two ranks belong to the other host"
        before = _crossed(ranks[0].pid)
        found = compare(engine, oracle, prompts, 16)
        crossed = _crossed(ranks[0].pid) - before
    assert found.max_error < FP32
    assert found.tokens_equal
    # At least the hidden states of every token at every layer, in one direction.
    tokens = sum(map(len, prompts)) + 16 * len(prompts)
    config = oracle.model.config
    assert crossed > tokens * config.num_hidden_layers * config.hidden_size * 4


def _crossed(pid: int) -> int:
    """Bytes that the host of process `pid` has sent over the cable."""
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == hosts.INTERFACES[0]:
            return int(counters.split()[8])
    raise AssertionError("the host has no cable")


def test_the_interface_is_the_one_that_leads_there() -> None:
    assert route_towards("127.0.0.1") == ("127.0.0.1", "lo")


def test_an_address_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(TopologyError, match="--dist-init-addr node0 cannot be reached"):
        route_towards("node0")


def test_an_address_of_no_interface_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.net_if_addrs", dict)
    with pytest.raises(TopologyError, match="GLOO_SOCKET_IFNAME"):
        route_towards("127.0.0.1")
