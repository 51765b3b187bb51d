"""The exchange channel and symmetric memory without a GPU: PyTorch's module and streams faked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from jit_kernels import symmetric
from jit_kernels.choice import KernelUnavailable
from jit_kernels.qk_norm_rope import channel as channels
from jit_kernels.qk_norm_rope.channel import Channel, buffer_bytes, open_channel
from jit_kernels.symmetric import SharedBuffer, SymmetricMemoryUnavailable

CPU = torch.device("cpu")


class Ranks:
    """A group of threads. Values of a `gather` go round; each thread has its own number."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._barrier = threading.Barrier(size, timeout=20)
        self._values: list[Any] = [None] * size

    def agree(self, rank: int) -> channels.Agree:
        def agree(problem: str) -> str:
            self._values[rank] = problem
            self._barrier.wait()
            common = next((f"rank {i}: {each}" for i, each in enumerate(self._values) if each), "")
            self._barrier.wait()
            return common

        return agree

    def run(self, act: Callable[[int], Any]) -> list[Any]:
        """What `act(rank)` returned or raised, in rank order. No thread may be left waiting."""
        found: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            try:
                found[rank] = act(rank)
            except Exception as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        return found


class FakeMemory:
    """PyTorch's module as far as we use it. Ranks share an address space: pointers are real."""

    def __init__(self, size: int, *, offset: int = 0, told: int | None = None) -> None:
        """offset: bytes from the start of a block to a tensor. told: what handles say of it."""
        self._barrier = threading.Barrier(size, timeout=20)
        self._blocks: list[torch.Tensor | None] = [None] * size
        self._offset = offset
        self._told = offset if told is None else told

    def empty(self, size: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        # What an allocator leaves behind: never zeros.
        return torch.full((size + self._offset,), 0x7F, dtype=dtype)[self._offset :]

    def rendezvous(self, tensor: torch.Tensor, group: str) -> Any:
        assert isinstance(group, str)  # what both supported releases take
        rank = int(group.split("@")[1])
        self._blocks[rank] = tensor
        self._barrier.wait()
        pointers = [each.data_ptr() - self._offset for each in self._blocks if each is not None]
        return SimpleNamespace(rank=rank, buffer_ptrs=pointers, offset=self._told)


def group_of(size: int, rank: int) -> Any:
    return SimpleNamespace(size=lambda: size, rank=lambda: rank, group_name=f"attn_tp@{rank}")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeMemory]:
    """Put a fake in the place of PyTorch's module, on a machine that seems to have GPUs."""

    def install(size: int, **options: Any) -> FakeMemory:
        fake = FakeMemory(size, **options)
        monkeypatch.setattr(symmetric, "_module", lambda: fake)
        monkeypatch.setattr(symmetric, "unavailable", lambda device: "")
        monkeypatch.setattr(channels, "_synchronize", lambda device: None)
        return fake

    return install


def opened(ranks: Ranks, slots: int = 4) -> list[Any]:
    return ranks.run(
        lambda rank: open_channel(group_of(ranks.size, rank), ranks.agree(rank), CPU, slots=slots)
    )


@pytest.mark.parametrize("offset", [0, 64])
def test_ranks_find_each_other_and_start_from_zeros(
    memory: Callable[..., FakeMemory], offset: int
) -> None:
    fake = memory(3, offset=offset)
    found = opened(Ranks(3))
    for rank, channel in enumerate(found):
        assert isinstance(channel, Channel), channel
        assert (channel.size, channel.rank, channel.slots) == (3, rank, 4)
        assert channel.ticket.tolist() == [1 << 32]
        assert channel.ticket.dtype == channel.pointers.dtype == torch.int64
        assert channel.pointers.tolist() == found[0].pointers.tolist()
    buffers = [each for each in fake._blocks if each is not None]
    assert found[0].pointers.tolist() == [each.data_ptr() for each in buffers]
    # Two halves of four slots of three ranks with two words of eight bytes; then the table and the
    # ticket, in the same memory: what the caching allocator holds may be given back.
    words = 2 * 4 * 3 * 2 * 8
    assert [len(each) for each in buffers] == [words + 8 * 3 + 8] * 3
    for channel, buffer in zip(found, buffers, strict=True):
        assert not buffer[:words].any()
        assert channel.pointers.data_ptr() == buffer.data_ptr() + words
        assert channel.ticket.data_ptr() == buffer.data_ptr() + words + 8 * 3


def test_open_channels_of_a_device_share_its_chip(
    memory: Callable[..., FakeMemory], streams: SimpleNamespace
) -> None:
    memory(2)
    ranks = Ranks(2)
    first = opened(ranks)
    alone = first[0].sharers
    second = opened(ranks)
    # The ranks are threads of one process here, and all their channels are on one device.
    assert (first[0].sharers, second[0].sharers) == (alone + 2, alone + 2)
    for channel in second:
        channel.close()
    assert first[0].sharers == alone
    streams.capturing = True
    first[1].claim()
    refused = opened(ranks)
    assert [type(each) for each in refused] == [KernelUnavailable] * 2
    assert "a CUDA graph holds launches" in str(refused[0])
    for channel in first:
        channel.close()
    assert all(isinstance(each, Channel) for each in opened(ranks))


def test_the_size_is_computed_in_one_place() -> None:
    assert buffer_bytes(16, 8192) == 4 << 20
    assert buffer_bytes(2, 1) == 64


def test_nobody_pushes_before_all_have_zeroed(
    memory: Callable[..., FakeMemory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that is done with zeroing early returns only when the last one is done too."""
    fake = memory(2)
    zeroed: list[int] = []
    slow = threading.Event()

    def synchronize(device: torch.device) -> None:
        if threading.current_thread().name == "slow":
            slow.wait(0.3)
        zeroed.append(1)

    monkeypatch.setattr(channels, "_synchronize", synchronize)
    ranks = Ranks(2)

    def act(rank: int) -> int:
        threading.current_thread().name = "slow" if rank else "fast"
        open_channel(group_of(2, rank), ranks.agree(rank), CPU, slots=1)
        return len(zeroed)

    assert ranks.run(act) == [2, 2]
    assert fake._blocks[0] is not None


@pytest.mark.parametrize("step", ["allocate", "share"])
def test_a_rank_that_fails_takes_the_others_with_it(
    memory: Callable[..., FakeMemory], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Otherwise they would wait in the next step for ever: the threads' join would show it."""
    memory(3)
    original = getattr(symmetric, step)
    ranks = Ranks(3)
    failing = threading.local()

    def fail_on_one(*arguments: Any) -> Any:
        done = original(*arguments)
        if failing.here:
            raise RuntimeError("out of memory")
        return done

    monkeypatch.setattr(symmetric, step, fail_on_one)

    def act(rank: int) -> Any:
        failing.here = rank == 1
        return open_channel(group_of(3, rank), ranks.agree(rank), CPU, slots=1)

    found = ranks.run(act)
    assert [type(each) for each in found] == [KernelUnavailable] * 3
    assert [str(each) for each in found] == ["rank 1: out of memory"] * 3


@pytest.mark.parametrize("size", [1, 17])
def test_group_sizes_without_an_exchange(size: int) -> None:
    with pytest.raises(KernelUnavailable, match=f"2 to 16 ranks, the group has {size}"):
        open_channel(group_of(size, 0), lambda problem: problem, CPU)


def test_a_cpu_has_no_symmetric_memory() -> None:
    with pytest.raises(KernelUnavailable, match="needs CUDA devices, this rank computes on cpu"):
        open_channel(group_of(2, 0), lambda problem: problem, CPU)


# --- PyTorch's private module ---


def test_what_pytorch_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:0")
    assert symmetric.unavailable(device) == ""  # the installed release has what we use
    monkeypatch.setattr(symmetric, "_module", lambda: SimpleNamespace(empty=1))
    assert symmetric.unavailable(device).endswith("has no rendezvous")

    def gone() -> Any:
        raise ModuleNotFoundError("No module named 'x'")

    monkeypatch.setattr(symmetric, "_module", gone)
    assert "has no symmetric memory (No module named" in symmetric.unavailable(device)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm" in symmetric.unavailable(device)


def share_with(handle: Any, monkeypatch: pytest.MonkeyPatch) -> SharedBuffer:
    def rendezvous(tensor: torch.Tensor, group: str) -> Any:
        if isinstance(handle, Exception):
            raise handle
        return handle

    fake = SimpleNamespace(rendezvous=rendezvous)
    monkeypatch.setattr(symmetric, "_module", lambda: fake)
    return symmetric.share(LOCAL, group_of(2, 0))


LOCAL = torch.zeros(64, dtype=torch.uint8)
HERE = LOCAL.data_ptr()


@pytest.mark.parametrize(
    ("handle", "sentence"),
    [
        (RuntimeError("CUDA error: invalid device ordinal"), "sharing a buffer failed (CUDA error"),
        (None, "did not take the buffer"),
        (SimpleNamespace(rank=0, buffer_ptrs=[HERE]), "as rank 0 of 1, this is rank 0 of 2"),
        (SimpleNamespace(rank=1, buffer_ptrs=[HERE] * 2), "as rank 1 of 2, this is rank 0 of 2"),
        (SimpleNamespace(rank=0, buffer_ptrs=[HERE, 0]), "a peer's buffer has no address"),
        (
            SimpleNamespace(rank=0, buffer_ptrs=[HERE - 32, 1], offset=16),
            "lies 32 bytes into its block, PyTorch says 16",
        ),
    ],
)
def test_a_rendezvous_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, handle: Any, sentence: str
) -> None:
    with pytest.raises(SymmetricMemoryUnavailable) as raised:
        share_with(handle, monkeypatch)
    assert sentence in str(raised.value)


def test_addresses_with_and_without_an_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    # Releases without pools have no offset to tell, and their pointers are the tensors'.
    plain = SimpleNamespace(rank=0, buffer_ptrs=[HERE, 4096])
    assert share_with(plain, monkeypatch).pointers == (HERE, 4096)
    # A pointer that is already the tensor's own is not moved by an offset that is told besides.
    told = SimpleNamespace(rank=0, buffer_ptrs=[HERE, 4096], offset=32)
    assert share_with(told, monkeypatch).pointers == (HERE, 4096)
    block = SimpleNamespace(rank=0, buffer_ptrs=[HERE - 32, 4096], offset=32)
    assert share_with(block, monkeypatch).pointers == (HERE, 4096 + 32)


# --- streams ---


class Stream:
    """A CUDA stream, as far as it waits for others."""

    def __init__(self) -> None:
        self.waits: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(other)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Which stream is current, and whether it captures."""
    state = SimpleNamespace(current=Stream(), capturing=False)
    monkeypatch.setattr(channels, "_current_stream", lambda device: state.current)
    monkeypatch.setattr(channels, "_capturing", lambda: state.capturing)
    return state


def a_channel() -> Channel:
    return Channel(
        rank=0,
        slots=4,
        pointers=torch.zeros(2, dtype=torch.int64),
        ticket=torch.full((1,), channels.FIRST_TICKET),
    )


def test_a_stream_that_takes_over_waits_for_the_earlier_one(streams: SimpleNamespace) -> None:
    """As a server does: warmed up and captured on one stream, then served on another."""
    channel, first, second = a_channel(), streams.current, Stream()
    channel.claim()
    channel.claim()  # its own stream orders its calls
    assert first.waits == []
    streams.current = second
    channel.claim()
    channel.claim()
    assert (first.waits, second.waits) == ([], [first])
    streams.current = first
    channel.claim()
    assert (first.waits, second.waits) == ([second], [first])


def test_a_capture_orders_nothing_and_claims_nothing(streams: SimpleNamespace) -> None:
    """An event of another stream would end the capture."""
    channel, first, capturing = a_channel(), streams.current, Stream()
    channel.claim()
    streams.current, streams.capturing = capturing, True
    channel.claim()
    assert capturing.waits == []
    streams.current, streams.capturing = first, False
    channel.claim()  # still the first stream's
    assert first.waits == []
    streams.current = Stream()
    channel.claim()
    assert streams.current.waits == [first]


def test_a_closed_channel_says_so(streams: SimpleNamespace) -> None:
    channel = a_channel()
    channel.close()
    channel.close()
    with pytest.raises(RuntimeError, match="closed"):
        channel.claim()
