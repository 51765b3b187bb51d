"""How arguments get from a call to the kernel's Params: Python, tvm-ffi, binding.cuh; needs no GPU.

The binding is compiled as the library of a kernel is, but exports what it would launch with.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from jit_kernels import compile as compiler
from jit_kernels import toolchain
from jit_kernels.choice import KernelUnavailable
from jit_kernels.qk_norm_rope import cuda
from jit_kernels.qk_norm_rope.channel import Channel
from jit_kernels.qk_norm_rope.contract import Call, Group, Request
from tests.kernels import cases
from tests.kernels.on_cpu import emulator

try:
    toolchain.compilers()
    NO_COMPILER = ""
except KernelUnavailable as error:
    NO_COMPILER = str(error)
pytestmark = pytest.mark.skipif(bool(NO_COMPILER), reason=NO_COMPILER or "nvcc is here")

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
REQUEST = Request(
    device="cuda",
    dtype=BF16,
    q_heads=6,
    kv_heads=1,
    head_dim=128,
    rotary_dim=64,
    cache_dtype=E4M3,
    group_size=8,
    capability=(9, 0),
)
BARE = replace(REQUEST, rotary_dim=0, cache_dtype=None, group_size=1)
PAIR = replace(REQUEST, q_heads=24, kv_heads=4, group_size=2)  # virtual ranks

# `launch` of a binding whose kernel is never started, nor compiled.
SOURCE = """#include "qk_norm_rope/csrc/binding.cuh"

template <auto kParams>
struct Filled;

template <class... Arguments, qk_norm_rope::Params (*kParams)(Arguments...)>
struct Filled<kParams> {
  static tvm::ffi::Bytes bytes(Arguments... arguments) {
    const qk_norm_rope::Params params = kParams(arguments...);
    return {reinterpret_cast<const char*>(&params), sizeof(params)};
  }
};

"""
EXPORT = """using Binding_{name} = qk_norm_rope::Binding<qk_norm_rope::Shape<{shape}>>;
TVM_FFI_DLL_EXPORT_TYPED_FUNC({name}, Filled<&Binding_{name}::params>::bytes);
"""


class Rows(ctypes.Structure):
    """`Rows` of params.cuh."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("stride", ctypes.c_uint32),
        ("rank_stride", ctypes.c_int64),
    )


class Cache(ctypes.Structure):
    """`Cache` of params.cuh: each of its numbers takes eight bytes."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("page_stride", ctypes.c_uint32),
        ("_", ctypes.c_uint32),
        ("slot_stride", ctypes.c_uint32),
        ("rank_stride", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


class Params(ctypes.Structure):
    """`Params` of params.cuh."""

    _fields_ = (
        *((name, Rows) for name in ("q", "k", "v")),
        *((name, ctypes.c_uint64) for name in ("q_weight", "k_weight")),
        *((name, Cache) for name in ("k_cache", "v_cache")),
        *(
            (name, ctypes.c_uint64)
            for name in ("positions", "slots", "cos_sin", "buffers", "ticket")
        ),
        *((name, ctypes.c_float) for name in ("q_divisor", "k_divisor", "eps")),
        *((name, ctypes.c_uint32) for name in ("tokens", "buffer_slots", "page_size")),
        ("first_slot", ctypes.c_int32),
        ("rank", ctypes.c_uint32),
        *((name, ctypes.c_bool) for name in ("wide_positions", "wide_slots", "launch_early")),
    )


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    shapes = {
        "grouped": cuda.shape_arguments(REQUEST),
        "bare": cuda.shape_arguments(BARE),
        "stacked": cuda.shape_arguments(PAIR, virtual=True),
    }
    text = SOURCE + "".join(EXPORT.format(name=name, shape=shapes[name]) for name in shapes)
    with pytest.MonkeyPatch.context() as patch:
        # Kept between runs, under a name that hashes the sources.
        patch.setenv("JIT_KERNELS_CACHE", str(emulator.store()))
        yield compiler.load(compiler.Unit("binding", text, "90a"))


class Recorder:
    """In place of a loaded library: keeps the Params that `launch` would start the kernel with."""

    def __init__(self, fill: Any) -> None:
        self.fill = fill

    def launch(self, *arguments: Any) -> None:
        *given, blocks, dependent, early = arguments
        data = bytes(self.fill(*given, early))
        assert len(data) == ctypes.sizeof(Params)
        self.params = Params.from_buffer_copy(data)
        self.blocks, self.dependent, self.early = blocks, dependent, early


def launched(fill: Any, call: Call, channel: Channel | None, *, virtual: bool = False) -> Recorder:
    """What the kernel is started with where `call` is served."""
    kernel = object.__new__(cuda._Kernel)  # as it is after compiling and asking a GPU
    recorder = Recorder(fill)
    kernel._module, kernel._virtual, kernel._dependent = recorder, virtual, not virtual
    kernel.launch(call, channel, room=4)
    return recorder


def channel_of(size: int, *, alone: bool = True) -> Channel:
    pointers = torch.arange(size, dtype=torch.int64)
    ticket = torch.zeros(size, dtype=torch.int64)
    return Channel(rank=5, slots=32, pointers=pointers, ticket=ticket, alone=alone)


def assert_fields(structure: ctypes.Structure, **want: Any) -> None:
    """Every field is what is said, or 0 where nothing is."""
    for name, kind, *_ in structure._fields_:
        value = getattr(structure, name)
        if isinstance(value, ctypes.Structure):
            assert_fields(value, **want.pop(name, {}))
            continue
        right = want.pop(name, 0)
        if kind is ctypes.c_float:
            right = ctypes.c_float(right).value
        assert value == right, f"{type(structure).__name__}.{name}: {value}, not {right}"
    assert not want


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("widths", [("int", "long"), ("long", "int")])
def test_a_rank_of_a_group(module: Any, page_size: int, widths: tuple[str, str]) -> None:
    case = cases.make_case(7, cache_dtype=E4M3, page_size=page_size, eps=1e-5)
    rank = cases.cut(cases.with_indices(case, *widths), 8, 3, spare_columns=16)
    assert rank.cache is not None
    assert rank.rotation is not None
    norm, cache, rotation = rank.norm, rank.cache, rank.rotation
    assert type(norm.q_divisor) is int
    channel = channel_of(8, alone=widths[0] == "int")
    found = launched(module.grouped, rank.call(Group(8, channel=channel)), channel)
    assert (found.blocks, found.dependent) == (4, True)
    assert found.early == (widths[0] == "int")
    stride = rank.packed.stride(0)
    # The K and V caches have gaps of their own.
    assert cache.k_cache.stride(0) != cache.v_cache.stride(0)
    caches = {
        name: {
            "data": x.data_ptr(),
            "page_stride": x.stride(0),
            "slot_stride": x.stride(1) if page_size else 0,
            "scale": scale,
        }
        for name, x, scale in (("k_cache", cache.k_cache, 0.37), ("v_cache", cache.v_cache, 1.7))
    }
    assert_fields(
        found.params,
        q={"data": rank.q.data_ptr(), "stride": stride},
        k={"data": rank.k.data_ptr(), "stride": stride},
        v={"data": rank.v.data_ptr(), "stride": stride},
        q_weight=norm.q_weight.data_ptr(),
        k_weight=norm.k_weight.data_ptr(),
        **caches,
        positions=rotation.positions.data_ptr(),
        slots=cache.slots.data_ptr(),
        cos_sin=rotation.cos_sin_cache.data_ptr(),
        buffers=channel.pointers.data_ptr(),
        ticket=channel.ticket.data_ptr(),
        q_divisor=48 * 128,
        k_divisor=8 * 128,
        eps=1e-5,
        tokens=7,
        buffer_slots=32,
        page_size=page_size or 1,
        first_slot=1,
        rank=5,
        wide_positions=widths[0] == "long",
        wide_slots=widths[1] == "long",
        launch_early=widths[0] == "int",
    )


def test_a_lone_rank_that_only_norms(module: Any) -> None:
    case = cases.make_case(3, heads=(6, 1), rotary_dim=0)
    rank = cases.cut(case, 1, 0)
    found = launched(module.bare, rank.call(Group()), None)
    assert (found.blocks, found.dependent) == (3, True)
    assert_fields(
        found.params,
        q={"data": rank.q.data_ptr(), "stride": 8 * 128},
        k={"data": rank.k.data_ptr(), "stride": 8 * 128},
        q_weight=rank.norm.q_weight.data_ptr(),
        k_weight=rank.norm.k_weight.data_ptr(),
        q_divisor=6 * 128,
        k_divisor=128,
        eps=cases.EPS,
        tokens=3,
        page_size=1,
    )


@pytest.mark.parametrize("page_size", [0, 16])
def test_virtual_ranks(module: Any, page_size: int) -> None:
    case = cases.make_case(5, cache_dtype=E4M3, page_size=page_size)
    rank = cases.cut(case, 2, 0)
    assert rank.cache is not None
    assert rank.rotation is not None

    def twice(x: torch.Tensor, apart: int) -> torch.Tensor:
        """Two ranks' tensors; what they hold is not looked at."""
        storage = torch.zeros(2 * apart + x.untyped_storage().nbytes(), dtype=x.dtype)
        return storage.as_strided((2, *x.shape), (apart, *x.stride()))

    norm = replace(
        rank.norm,
        q_weight=rank.norm.q_weight.expand(2, -1).contiguous(),
        k_weight=rank.norm.k_weight.expand(2, -1).contiguous(),
    )
    q, k, v = (twice(x, apart) for x, apart in ((rank.q, 80000), (rank.k, 80016), (rank.v, 80032)))
    buffers = twice(rank.cache.k_cache, 900000), twice(rank.cache.v_cache, 900016)
    cache = replace(rank.cache, v=v, k_cache=buffers[0], v_cache=buffers[1])
    channel = channel_of(2)
    stacked = Call(q, k, norm, Group(2), rank.rotation, cache)
    found = launched(module.stacked, stacked, channel, virtual=True)
    assert (found.blocks, found.dependent) == (3, False)
    stride = rank.packed.stride(0)
    caches = {
        name: {
            "data": x.data_ptr(),
            "page_stride": x.stride(1),
            "slot_stride": x.stride(2) if page_size else 0,
            "rank_stride": apart,
            "scale": scale,
        }
        for name, x, apart, scale in (
            ("k_cache", buffers[0], 900000, 0.37),
            ("v_cache", buffers[1], 900016, 1.7),
        )
    }
    assert_fields(
        found.params,
        q={"data": q.data_ptr(), "stride": stride, "rank_stride": 80000},
        k={"data": k.data_ptr(), "stride": stride, "rank_stride": 80016},
        v={"data": v.data_ptr(), "stride": stride, "rank_stride": 80032},
        q_weight=norm.q_weight.data_ptr(),
        k_weight=norm.k_weight.data_ptr(),
        **caches,
        positions=rank.rotation.positions.data_ptr(),
        slots=cache.slots.data_ptr(),
        cos_sin=rank.rotation.cos_sin_cache.data_ptr(),
        buffers=channel.pointers.data_ptr(),
        ticket=channel.ticket.data_ptr(),
        q_divisor=48 * 128,
        k_divisor=8 * 128,
        eps=cases.EPS,
        tokens=5,
        buffer_slots=32,
        page_size=page_size or 1,
        first_slot=1,
        rank=5,
        wide_positions=True,
        wide_slots=True,
        launch_early=found.early,
    )
