"""Whether an attention-TP group gets a channel: the same answer on all ranks, without devices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jit_kernels.choice import KernelUnavailable
from sglang_minimax.layers import exchange
from tests.ranks import own_rank, together

DEVICES = (torch.device("cuda:0"), torch.device("cuda:1"))
CHANNEL = SimpleNamespace(closed=False)
ALONE = {
    "pp_size": 1,
    "enable_eplb": False,
    "moe_a2a_backend": "none",
    "disaggregation_mode": "null",
}


class Machine:
    """What SGLang and NVML say to two ranks. Where they are told different things, a pair."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pdmux = False
        self.arguments = {**ALONE}
        self.one_node = True
        self.one_clique = False
        self.links: tuple[Any, Any] = (True, True)
        self.devices: tuple[Any, Any] = (4, 5)
        self.opened: tuple[Any, Any] = (CHANNEL, CHANNEL)
        self.asked: list[list[int]] = []
        group = SimpleNamespace(cpu_group="host", device_group="devices")
        replacements = {
            "get_server_args": lambda: SimpleNamespace(enable_pdmux=self.pdmux, **self.arguments),
            "get_exec": lambda: SimpleNamespace(
                moe=SimpleNamespace(moe_a2a_backend=self.arguments["moe_a2a_backend"])
            ),
            "get_parallel": lambda: SimpleNamespace(attn_tp_group=group),
            "in_the_same_node_as": lambda group, source_rank: [True, self.one_node],
            "is_one_nvlink_clique": lambda group, device: self.one_clique,
            "is_full_nvlink": self._full_nvlink,
            "open_channel": self._open,
        }
        for name, replacement in replacements.items():
            monkeypatch.setattr(exchange, name, replacement)
        monkeypatch.setattr(torch.cuda, "_get_nvml_device_index", self._index)

    def _full_nvlink(self, ids: list[int], size: int) -> bool:
        self.asked.append(ids)
        return self._said(self.links)

    def _index(self, device: torch.device) -> int:
        assert device == DEVICES[own_rank()]
        return self._said(self.devices)

    def _open(self, group: Any, agree: Any, device: torch.device, *, alone: bool) -> Any:
        """Collective: a rank that comes alone waits in vain."""
        self.alone = alone
        assert (group, device) == ("devices", DEVICES[own_rank()])
        mine = self.opened[own_rank()]
        common = agree(str(mine) if isinstance(mine, Exception) else "")
        if common:
            raise KernelUnavailable(common)
        return mine

    def _said(self, answers: tuple[Any, Any]) -> Any:
        answer = answers[own_rank()]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def open(self) -> tuple[Any, str, bool]:
        """What both ranks get: they must agree on all of it."""
        found = together(lambda rank, gather: exchange.open_to_peers(DEVICES[rank], gather), 2)
        assert found[0] == found[1]
        return found[0]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_linked_devices_get_a_channel(machine: Machine) -> None:
    assert machine.open() == (CHANNEL, "", False)
    assert machine.asked == [[4, 5]] * 2, "NVML counts devices, CUDA_VISIBLE_DEVICES or not"


def test_a_domain_of_several_machines(machine: Machine) -> None:
    machine.one_node = False
    assert machine.open() == (None, "the attention-TP group spans NVLink domains", False)
    machine.one_clique = True
    assert machine.open() == (CHANNEL, "", False)


UNLINKED = "the devices of the attention-TP group are not linked by NVLink"
OLD = RuntimeError("NVML is old")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"links": (False, False)}, UNLINKED),
        # One rank that sees no link is enough, and so is one that sees nothing.
        ({"links": (False, True)}, f"rank 0: {UNLINKED}"),
        ({"links": (True, OLD)}, "rank 1: NVML does not tell how devices are linked (NVML is old)"),
        ({"links": (OLD, OLD)}, "NVML does not tell how devices are linked (NVML is old)"),
        ({"devices": (4, OLD)}, "NVML does not know this device (NVML is old)"),
        ({"devices": (OLD, 5)}, "NVML does not know this device (NVML is old)"),
        ({"pdmux": True}, "--enable-pdmux runs prefill and decode on two streams at once"),
    ],
)
def test_every_other_reason_is_told(machine: Machine, changes: dict[str, Any], reason: str) -> None:
    for name, value in changes.items():
        setattr(machine, name, value)
    assert machine.open() == (None, reason, False)


def test_an_opening_that_fails_is_no_rule(machine: Machine) -> None:
    machine.opened = (CHANNEL, RuntimeError("out of memory"))
    assert machine.open() == (None, "rank 1: out of memory", True)


def test_who_else_waits_for_a_peer(machine: Machine) -> None:
    """Each of these runs kernels on other streams, which must find room on the chip."""
    machine.open()
    assert machine.alone
    for name, value in (
        ("pp_size", 2),
        ("enable_eplb", True),
        ("moe_a2a_backend", "deepep"),
        ("disaggregation_mode", "prefill"),
    ):
        machine.arguments = {**ALONE, name: value}
        machine.open()
        assert not machine.alone, name
