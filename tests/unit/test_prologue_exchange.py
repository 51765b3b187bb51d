"""Whether an attention-TP group gets a channel: the same answer on all ranks, without devices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jit_kernels.choice import KernelUnavailable
from sglang_minimax.layers import exchange

DEVICE = torch.device("cuda:1")
CHANNEL = SimpleNamespace(closed=False)


class Machine:
    """What SGLang, NVML and the other rank of a group of two would say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pdmux = False
        self.one_node = True
        self.one_clique = False
        self.links: bool | Exception = True
        self.device: int | Exception = 5
        self.others: list[Any] = [4, ""]
        self.opened: Any = CHANNEL
        self.asked: list[list[int]] = []
        group = SimpleNamespace(cpu_group="host", device_group="devices")
        replacements = {
            "get_server_args": lambda: SimpleNamespace(enable_pdmux=self.pdmux),
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
        if isinstance(self.links, Exception):
            raise self.links
        return self.links

    def _index(self, device: torch.device) -> int:
        if isinstance(self.device, Exception):
            raise self.device
        return self.device

    def _open(self, group: Any, agree: Any, device: torch.device) -> Any:
        assert (group, device) == ("devices", DEVICE)
        if isinstance(self.opened, Exception):
            raise self.opened
        return self.opened

    def open(self) -> tuple[Any, str]:
        others = iter(self.others)
        return exchange.open_to_peers(DEVICE, lambda mine: [next(others), mine])


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_linked_devices_get_a_channel(machine: Machine) -> None:
    assert machine.open() == (CHANNEL, "")
    assert machine.asked == [[4, 5]], "NVML counts devices, CUDA_VISIBLE_DEVICES or not"


def test_a_domain_of_several_machines(machine: Machine) -> None:
    machine.one_node = False
    assert machine.open() == (None, "the attention-TP group spans NVLink domains")
    machine.one_clique = True
    assert machine.open() == (CHANNEL, "")


def test_devices_without_nvlink(machine: Machine) -> None:
    machine.links = False
    sentence = "the devices of the attention-TP group are not linked by NVLink"
    machine.others = [4, sentence]
    assert machine.open() == (None, sentence)


def test_one_rank_that_sees_no_link_is_enough(machine: Machine) -> None:
    machine.others = [4, "the devices are not linked"]
    assert machine.open() == (None, "rank 0: the devices are not linked")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"links": RuntimeError("no library")}, "NVML does not tell how devices are linked (no li"),
        ({"device": RuntimeError("no UUID")}, "NVML does not know this device (no UUID)"),
        ({"others": ["NVML is old", "NVML is old"]}, "NVML is old"),
        ({"pdmux": True}, "--enable-pdmux"),
        ({"opened": KernelUnavailable("rank 1: out of memory")}, "rank 1: out of memory"),
    ],
)
def test_every_other_reason_is_told(machine: Machine, changes: dict[str, Any], words: str) -> None:
    for name, value in changes.items():
        setattr(machine, name, value)
    channel, reason = machine.open()
    assert channel is None
    assert words in reason
