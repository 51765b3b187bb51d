"""Mistakes planted in the prologue's CUDA source, each of which a run on a CPU must notice.

A mistake is a replacement of text that must occur exactly once, so a line that moves fails here
instead of planting nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.kernels import cases
from tests.kernels.on_cpu import emulator, scenarios
from tests.kernels.on_cpu.prologue import Exchange, Kernels, Options, Shape, run_case

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=emulator.missing())

E4M3 = torch.float8_e4m3fn
HEADS, KERNEL, EXCHANGE = (
    f"qk_norm_rope/csrc/{name}.cuh" for name in ("heads", "kernel", "exchange")
)


@dataclass(frozen=True)
class Scenario:
    """A shape to compile, and what must hold of the kernels."""

    shape: Shape
    holds: Callable[[Kernels], None]


def _sequences(group: tuple[tuple[int, int], int], **options: bool) -> Scenario:
    heads, size = group

    def holds(kernels: Kernels) -> None:
        for seed in range(20):
            exchange = Exchange(size, scenarios.SLOTS)
            how = Options(seed, blocks=1 + seed % 3, **options)
            scenarios.sequence(kernels, heads, exchange, how)

    return Scenario(scenarios.small_shape(heads, size), holds)


def _wraps(kernels: Kernels) -> None:
    for seed in range(20):
        scenarios.wrap(kernels, seed)


WITH_CACHE = cases.make_case(7, cache_dtype=E4M3).with_rows(cases.SPECIALS)
ONE = Scenario(
    Shape.of(WITH_CACHE, 1), lambda kernels: scenarios.right(kernels, WITH_CACHE, 1, Options(3, 2))
)
EIGHT = Scenario(
    Shape.of(WITH_CACHE, 8), lambda kernels: scenarios.right(kernels, WITH_CACHE, 8, Options(3, 2))
)
FP8 = Scenario(Shape.of(WITH_CACHE, 8), lambda kernels: scenarios.rounded_once(kernels, 8))
WITH_BF16 = cases.make_case(7, cache_dtype=torch.bfloat16).with_rows(cases.SPECIALS)
BF16 = Scenario(
    Shape.of(WITH_BF16, 1), lambda kernels: scenarios.right(kernels, WITH_BF16, 1, Options(3, 2))
)
NARROW = cases.with_indices(WITH_CACHE, "long", "int")
MIXED = Scenario(
    Shape.of(NARROW, 1), lambda kernels: scenarios.right(kernels, NARROW, 1, Options(3, 2))
)
FAR = Scenario(Shape.of(WITH_CACHE, 2), scenarios.offsets_beyond_32_bits)
CALLS = _sequences(scenarios.THREE)
EARLY = _sequences(scenarios.THREE, overlaps=True, launch_early=True)
WRAP = Scenario(scenarios.small_shape(*scenarios.TWO), _wraps)


@dataclass(frozen=True)
class Mistake:
    """`right` in a file replaced by `wrong`; `says`: part of the message of the run that fails."""

    name: str
    file: str
    right: str
    wrong: str
    scenario: Scenario
    says: str


MISTAKES = (
    Mistake(
        "mean over this rank alone",
        EXCHANGE,
        "value = __uint_as_float(static_cast<uint32_t>(word));",
        "value = partial;",
        EIGHT,
        "values are off",
    ),
    Mistake(
        "eps added to the sum",
        KERNEL,
        "__fdiv_rn(sum, divisor) + params.eps",
        "__fdiv_rn(sum + params.eps, divisor)",
        EIGHT,
        "values are off",
    ),
    Mistake(
        "rotation with the wrong sign",
        HEADS,
        "(first ? -other : other)",
        "(first ? other : -other)",
        ONE,
        "values are off",
    ),
    Mistake(
        "rotation with the partner of a full rotation",
        HEADS,
        "first ? part + kHalf : part - kHalf;",
        "part ^ (S::kLanes / 2);",
        ONE,
        "values are off",
    ),
    Mistake(
        "K rounded before it is stored as FP8",
        KERNEL,
        "if (head.side == Side::v) jit::widen<T>(x, y);",
        "jit::widen<T>(rounded, y);",
        FP8,
        "of the values are rounded once",
    ),
    Mistake(
        "stored and loaded again between norm and rotation",
        KERNEL,
        "normalize<T>(x, weight, inverse, y);",
        "normalize<T>(x, weight, inverse, y), jit::widen<T>(jit::narrow<T>(y), y);",
        ONE,
        "values are off",
    ),
    Mistake(
        "shuffle under a divergent branch",
        HEADS,
        """    const float other = __shfl_sync(kWholeWarp, y, partner, S::kLanes);
    if (turns) y = """,
        """    float other = 0.0f;
    if (turns) other = __shfl_sync(kWholeWarp, y, partner, S::kLanes);
    if (turns) y = """,
        ONE,
        "names lane|waits for it",
    ),
    Mistake(
        "32-bit offset of a row",
        HEADS,
        ">(token) * rows.stride",
        ">(token * static_cast<uint32_t>(rows.stride))",
        FAR,
        "outside of it",
    ),
    Mistake(
        "signed 32-bit offset of a row",
        HEADS,
        ">(token) * rows.stride",
        ">(static_cast<int>(token) * static_cast<int>(rows.stride))",
        FAR,
        "signed overflow",
    ),
    Mistake(
        "32-bit offset of a slot",
        HEADS,
        ">(slot) * cache.page_stride",
        ">(slot * static_cast<uint32_t>(cache.page_stride))",
        FAR,
        "outside of it|values are off|written where|a race",
    ),
    Mistake(
        "padding written",
        KERNEL,
        "if (slot < params.first_slot || ",
        "if (",
        ONE,
        "outside of it",
    ),
    Mistake(
        "the slot of padding written",
        KERNEL,
        "if (slot < params.first_slot || ",
        "if (slot < 0 || ",
        ONE,
        "written where",
    ),
    Mistake(
        "no barrier before the block's sum",
        KERNEL,
        "  __syncthreads();  // the partials of this half are there; the other may still be read\n",
        "",
        EIGHT,
        "a race|nothing was written",
    ),
    Mistake(
        "no barrier after the group's sum",
        KERNEL,
        "    __syncthreads();\n    return {shared.inverse[0]",
        "    return {shared.inverse[0]",
        EIGHT,
        "a race|nothing was written",
    ),
    Mistake(
        "one buffer of partials",
        KERNEL,
        "    half ^= 1;\n",
        "",
        ONE,
        "a race",
    ),
    Mistake(
        "one half of the exchange buffer",
        EXCHANGE,
        "static_cast<int64_t>(epoch_ & 1u) * slots * kSlotWords;",
        "0 * slots;",
        CALLS,
        "nobody can go on",
    ),
    Mistake(
        "any tag but 0 is taken",
        EXCHANGE,
        "while (static_cast<uint32_t>(word >> 32) != epoch_)",
        "while (static_cast<uint32_t>(word >> 32) == 0)",
        CALLS,
        "values are off",
    ),
    Mistake(
        "epoch not advanced",
        EXCHANGE,
        "next_epoch(epoch)) << 32",
        "epoch) << 32",
        CALLS,
        "values are off|nobody can go on",
    ),
    Mistake(
        "epoch advanced by the first block",
        EXCHANGE,
        "if (static_cast<uint32_t>(drawn) == blocks - 1)",
        "if (static_cast<uint32_t>(drawn) == 0)",
        CALLS,
        "nobody can go on|values are off",
    ),
    Mistake(
        "nothing cleared before the wrap",
        KERNEL,
        "if (blockIdx.x == 0) exchange.scrub(params.tokens, params.buffer_slots);",
        "",
        WRAP,
        "values are off",
    ),
    Mistake(
        "a slot in use cleared",
        EXCHANGE,
        "if (slot >= tokens && lane_ < kSlotWords)",
        "if (lane_ < kSlotWords)",
        CALLS,
        "nobody can go on",
    ),
    Mistake(
        "tag 0 after the wrap",
        EXCHANGE,
        "epoch == 0xFFFFFFFFu ? 2u : epoch + 1u",
        "epoch + 1u",
        WRAP,
        "values are off",
    ),
    Mistake(
        "the same half twice at the wrap",
        EXCHANGE,
        "epoch == 0xFFFFFFFFu ? 2u : epoch + 1u",
        "epoch == 0xFFFFFFFFu ? 1u : epoch + 1u",
        WRAP,
        "nobody can go on|the epochs are",
    ),
    Mistake(
        "slots read in the width of positions",
        KERNEL,
        "index_at(params.slots, params.wide_slots, token)",
        "index_at(params.slots, params.wide_positions, token)",
        MIXED,
        "outside of it|not aligned|written where|values are off",
    ),
    Mistake(
        "infinity not kept in the V cache",
        KERNEL,
        "      jit::store<16>(to, rounded);\n",
        """      jit::widen<T>(rounded, y);
      for (float& each : y) each = each == each && each - each != 0.0f ? 0.0f : each;
      jit::store<16>(to, jit::narrow<T>(y));
""",
        BF16,
        "V cache: 1 of .* values are off.* 0.0 where inf",
    ),
    Mistake(
        "the next grid let in at once where channels share the chip",
        KERNEL,
        "if (!S::kExchanges || params.launch_early) jit::",
        "if (true) jit::",
        CALLS,
        "after its block has let the next grid in",
    ),
    Mistake(
        "the next grid let in after the first token",
        KERNEL,
        "if (S::kExchanges && last && !params.launch_early)",
        "if (S::kExchanges && !params.launch_early)",
        CALLS,
        "after its block has let the next grid in",
    ),
    Mistake(
        "no wait for the call before",
        KERNEL,
        "  jit::grid_dependency_wait();\n",
        "",
        EARLY,
        "before the grid waited",
    ),
)


def planted(mistake: Mistake, folder: Path) -> Path:
    """A copy of the kernel sources with the mistake."""
    root = folder / "jit_kernels"
    for path in emulator.kernel_sources(emulator.JIT_KERNELS):
        copy = root / path.relative_to(emulator.JIT_KERNELS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    file = root / mistake.file
    text = file.read_text()
    assert text.count(mistake.right) == 1, f"{mistake.right!r} is not once in {mistake.file}"
    file.write_text(text.replace(mistake.right, mistake.wrong))
    return root


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name.replace(" ", "_"))
def test_a_planted_mistake_is_noticed(mistake, tmp_path):
    kernels = Kernels([mistake.scenario.shape], planted(mistake, tmp_path))
    with pytest.raises(AssertionError, match=mistake.says):
        mistake.scenario.holds(kernels)


def test_replicas_that_are_not_counted_are_noticed():
    case = cases.make_case(7, cache_dtype=E4M3)
    kernels = Kernels([Shape.of(case, 16)])
    scenarios.right(kernels, case, 16, Options())
    with pytest.raises(AssertionError, match="values are off"):
        scenarios.right(kernels, case, 16, Options(k_divisor_of=8 * 128))


def test_unaligned_rows_do_not_go_unnoticed():
    case = cases.make_case(2, cache_dtype=E4M3)
    with pytest.raises(emulator.KernelError, match="null or not aligned"):
        run_case(Kernels([Shape.of(case, 8)]), case, 8, offset=1)


SCENARIOS = {"one": ONE, "eight": EIGHT, "fp8": FP8, "bf16": BF16, "mixed": MIXED, "far": FAR}
SCENARIOS |= {"calls": CALLS, "early": EARLY, "wrap": WRAP}


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_source_as_it_is_passes(name):
    scenario = SCENARIOS[name]
    scenario.holds(Kernels([scenario.shape]))
