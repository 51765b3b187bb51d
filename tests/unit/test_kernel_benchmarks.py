"""The kernel benchmarks: what they compute of their figures, and that they run. No timing here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import (
    bench_tp_qknorm,
    carry_intree,
    common,
    intree_prologue,
    kernel_timing,
    prologue_aims,
    prologue_paths,
    prologue_plot,
    prologue_table,
    virtual_prologue,
)
from benchmarks.kernel_timing import COLD, HOT, spread
from benchmarks.prologue_aims import Row
from benchmarks.prologue_paths import CUDA, FUSED_STORE, IN_TREE, NO_EXCHANGE, PLAIN, VIRTUAL
from benchmarks.prologue_settings import CASES, NORM, PROLOGUE, PROLOGUE_FP8, Setting, make
from jit_kernels.qk_norm_rope import cuda

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_the_bytes_of_a_token_are_those_of_the_published_shape() -> None:
    weights = (6144 + 1024) * 2
    norm = 2 * (6144 + 1024) * 2  # q and k read and written
    turned = norm + 64 * 4 + 8  # a row of the table, a position
    stored = turned + 1024 * 2 + 8  # v read, a slot
    assert Setting(NORM, 1, 1, CPU).bytes_moved() == norm + weights
    assert Setting(PROLOGUE, 3, 1, CPU).bytes_moved() == 3 * (stored + 2 * 1024 * 2) + weights
    assert Setting(PROLOGUE_FP8, 3, 1, CPU).bytes_moved() == 3 * (stored + 2 * 1024) + weights


def test_the_bytes_of_a_rank_are_those_of_its_tensors() -> None:
    setting = Setting(PROLOGUE, 5, 16, CPU, rank=3)  # half a KV head a rank would be: one, twice
    inputs = make(setting)
    assert inputs.rotation is not None
    assert inputs.cache is not None
    once = [inputs.v, inputs.rotation.positions, inputs.cache.slots]
    once += [inputs.norm.q_weight, inputs.norm.k_weight]
    once += [inputs.rotation.cos_sin_cache[inputs.rotation.positions]]
    once += [cache[inputs.cache.slots] for cache in (inputs.cache.k_cache, inputs.cache.v_cache)]
    twice = [inputs.q, inputs.k]
    moved = sum(x.nbytes for x in once) + 2 * sum(x.nbytes for x in twice)
    assert setting.bytes_moved() == moved


def test_rates_and_spreads() -> None:
    assert kernel_timing.gigabytes_per_second(4_800_000_000, 1e6) == 4.8
    found = spread([float(n) for n in range(1, 32)])
    assert (found.median, found.low, found.high, found.runs) == (16, 4, 28, 31)
    assert spread([7.0]) == kernel_timing.Spread(7.0, 7.0, 7.0, 1)
    # The flush alone is taken off pair by pair: a drift of both leaves the difference alone.
    assert kernel_timing.differences([120.0, 220.0], [100.0, 200.0], 20) == [1.0, 1.0]
    assert kernel_timing.ratio({HOT: spread([9.0])}, {HOT: spread([3.0])}, HOT) == 3.0
    assert kernel_timing.slug_of("NVIDIA H200") == "nvidia-h200"


def test_a_call_on_the_cpu_is_timed() -> None:
    calls: list[int] = []
    times = kernel_timing.time_call(lambda: calls.append(1), CPU)
    assert set(times) == {"wall", "process"}
    assert len(calls) > kernel_timing.CPU_RUNS == times["wall"].runs


def row(path: str, hot: float, cold: float, *, tokens: int = 8, tp: int = 1) -> Row:
    """A timed row of the whole prologue that moved 1,000,000 bytes."""
    times = {kind: spread([value]).rounded() for kind, value in ((HOT, hot), (COLD, cold))}
    found: Row = {"case": "prologue", "tp": tp, "tokens": tokens, "path": path}
    found |= {"bytes": 1_000_000, "error": 0.0, "microseconds": times}
    prologue_aims.add_rates(found, bandwidth=4000.0)
    return found


def judged(*rows: Row) -> list[bool | None]:
    found = list(rows)
    prologue_aims.add_ratios(found)
    return [aim.met for aim in prologue_aims.aims(found)]


def test_rows_have_rates_and_ratios() -> None:
    rows = [row(CUDA, 2.0, 0.5), row(IN_TREE, 6.0, 4.0), row(IN_TREE, 1.0, 1.0, tokens=16)]
    prologue_aims.add_ratios(rows)
    assert rows[0]["gbps"] == {HOT: 500.0, COLD: 2000.0}
    assert rows[0]["copy_share"] == {HOT: 0.125, COLD: 0.5}
    assert rows[0]["ratio"] == {IN_TREE: {HOT: 3.0, COLD: 8.0}}
    assert "ratio" not in rows[1]


def test_nothing_measured_is_not_an_aim_met() -> None:
    assert judged() == [None] * 4
    refused = {"case": "prologue", "tp": 1, "tokens": 8, "path": CUDA, "refuses": "no GPU"}
    assert judged(refused, row(IN_TREE, 9.0, 9.0)) == [None] * 4


def test_the_least_ratio_decides() -> None:
    ours = [row(CUDA, 2.0, 2.0), row(CUDA, 2.0, 2.0, tokens=64), row(CUDA, 9.0, 9.0, tokens=512)]
    good = [row(IN_TREE, 5.0, 9.0), row(IN_TREE, 9.0, 9.0, tokens=64)]
    beyond = row(IN_TREE, 9.0, 9.0, tokens=512)  # not a decode step: does not count
    assert judged(*ours, *good, beyond)[0] is True
    assert judged(*ours, row(IN_TREE, 4.9, 9.0), good[1])[0] is False
    assert judged(*ours, *good, row(FUSED_STORE, 9.0, 4.9))[:2] == [True, False]


def test_bandwidth_is_judged_cold_at_its_tokens() -> None:
    fast = 1e6 / 1e3 / (0.85 * 4000.0)
    assert judged(row(CUDA, 9.0, fast * 0.999, tokens=8192))[2] is True
    assert judged(row(CUDA, fast * 0.9, fast * 1.01, tokens=8192))[2] is False
    assert judged(row(CUDA, fast, fast, tokens=2048))[2] is None


def test_the_exchange_is_the_difference_to_the_same_grid() -> None:
    pair = [row(VIRTUAL, 7.9, 9.0, tp=8), row(NO_EXCHANGE, 5.0, 6.5, tp=8)]
    costs = prologue_aims.exchange_costs(pair, HOT)
    assert costs == {("prologue", 8, 8): pytest.approx(2.9)}
    assert judged(*pair)[3] is True
    assert (
        judged(
            *pair, *(row(p, t, t, tp=8, tokens=64) for p, t in ((VIRTUAL, 9.0), (NO_EXCHANGE, 5.0)))
        )[3]
        is False
    )
    assert judged(row(VIRTUAL, 1.0, 1.0, tp=8))[3] is None
    assert judged(row(VIRTUAL, 1.0, 1.0, tp=4), row(NO_EXCHANGE, 1.0, 1.0, tp=4))[3] is None


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tp", [1, 16])
def test_in_trees_steps_are_the_references_arithmetic(case: str, tp: int) -> None:
    call = prologue_paths.ready(PLAIN, Setting(CASES[case], 9, tp, CPU))
    assert call.error is not None
    assert call.error <= bench_tp_qknorm.MOST_ERROR[case]


def turned_wrongly(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Every dimension of a head turned by its first half's angles: the wrong pairs."""
    return intree_prologue_turned(x.roll(1, dims=-1), angles).roll(-1, dims=-1)


def put_elsewhere(buffer: torch.Tensor, slots: torch.Tensor, x: torch.Tensor, scale: float) -> None:
    """One token's row in another's slot."""
    intree_prologue_put(buffer, slots.roll(1), x, scale)


def local_mean(x: torch.Tensor, mean: torch.Tensor, weight: torch.Tensor, eps: float) -> Any:
    """The mean over half of a row."""
    return intree_prologue_scaled(x, mean * 2, weight, eps)


intree_prologue_turned = intree_prologue._turned
intree_prologue_put = intree_prologue._put
intree_prologue_scaled = intree_prologue._scaled
WRONG = {"_turned": turned_wrongly, "_put": put_elsewhere, "_scaled": local_mean}


@pytest.mark.parametrize("case", [PROLOGUE, PROLOGUE_FP8], ids=lambda case: case.name)
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_path_is_not_timed(name: str, case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intree_prologue, name, WRONG[name])
    found, call = bench_tp_qknorm.prepared(PLAIN, Setting(case, 9, 1, CPU))
    assert "off the reference" in found["refuses"]
    assert call is None


def test_what_refuses_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_tp_qknorm.MOST_ERROR, "norm", -1.0)
    (found,) = bench_tp_qknorm.measure(Setting(NORM, 1, 1, CPU), [PLAIN], 10.0, 3)
    assert "microseconds" not in found
    # Neither our kernels nor in-tree's run on a CPU, and they say so.
    for path in (CUDA, VIRTUAL, IN_TREE):
        found, call = bench_tp_qknorm.prepared(path, Setting(NORM, 1, 2, CPU))
        assert call is None
        assert found["refuses"]


def test_a_nan_is_wrong() -> None:
    assert prologue_paths.relative(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


def test_repeated_calls_neither_fade_nor_grow() -> None:
    """Weights of 1 and -1 keep what is timed alike from the first call to the last."""
    inputs = make(Setting(NORM, 4, 1, CPU))
    call = inputs.call()
    for _ in range(40):
        prologue_paths.reference.run(call)
    assert inputs.q.float().square().mean(-1).sqrt().sub(1).abs().max() < 0.05
    assert inputs.q.abs().median() > 0.3


@pytest.mark.parametrize("tp", [2, 16])
def test_virtual_ranks_are_ranks_of_one_group(tp: int) -> None:
    stacked = virtual_prologue.stack(Setting(NORM, 3, tp, CPU))
    before = [rank.q.double().clone() for rank in stacked.ranks]
    whole = torch.cat(before, dim=-1)
    assert whole.shape[1] == 6144
    scale = (whole.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    right = virtual_prologue.right_answers(stacked)
    for n, (rank, answer, q) in enumerate(zip(stacked.ranks, right, before, strict=True)):
        want = q * scale * stacked.q_weight[n].double()
        assert (answer.q.double() - want).abs().max() <= want.abs().max() * 2**-8
        assert torch.equal(rank.q.double(), q), "the inputs themselves were served"
        assert rank.q.data_ptr() - stacked.ranks[0].q.data_ptr() == n * stacked.packed[0].nbytes


def test_virtual_caches_lie_rank_by_rank() -> None:
    stacked = virtual_prologue.stack(Setting(PROLOGUE_FP8, 3, 2, CPU))
    assert stacked.k_cache is not None
    for n, rank in enumerate(stacked.ranks):
        assert rank.cache is not None
        assert rank.cache.k_cache.data_ptr() == stacked.k_cache[n].data_ptr()
        assert torch.equal(rank.cache.slots, stacked.ranks[0].cache.slots)  # type: ignore[union-attr]
    # As the launch over all ranks wants them: one storage, one distance.
    together = cuda.stack(stacked.calls())
    assert together.q.shape == (2, 3, 48 * 128 // 2)
    assert together.cache is not None
    assert together.cache.v_cache.shape == (2, *stacked.ranks[1].cache.v_cache.shape)  # type: ignore[union-attr]
    assert stacked.bytes_moved() == sum(r.setting.bytes_moved() for r in stacked.ranks)


def test_the_norms_kernels_are_found_in_the_installed_model(tmp_path: Path) -> None:
    text = carry_intree.norm_module(carry_intree.sglang_root() / carry_intree.NORM_SOURCE)
    compile(text, "norm", "exec")
    assert text.count("@triton.jit\n") == 2
    assert all(f"def {name}(" in text for name in carry_intree.NORM_NAMES)
    moved = tmp_path / "model.py"
    moved.write_text(text.replace("def rms_apply_serial(", "def rms_apply("))
    with pytest.raises(ValueError, match=r"model\.py has no rms_apply_serial"):
        carry_intree.norm_module(moved)


CARRIED = """
import importlib, sys
from pathlib import Path
from types import SimpleNamespace
folder = Path(sys.argv[1])
for name in sys.argv[2:]:
    importlib.import_module(name)
files = [Path(m.__file__) for n, m in sys.modules.items()
         if n.partition(".")[0] == "sglang" and getattr(m, "__file__", None)]
assert len(files) > 20 and all(file.is_relative_to(folder) for file in files), files
"""


@pytest.mark.slow
def test_what_is_carried_needs_no_installed_sglang(tmp_path: Path) -> None:
    needed = carry_intree.carry(tmp_path)
    assert any(line.startswith("apache-tvm-ffi==") for line in needed)
    assert not any(line.startswith(("torch", "sglang", "nvidia", "triton")) for line in needed)
    for source in ("elementwise/rope.cuh", "elementwise/kvcache.cuh"):
        assert (tmp_path / "sglang/kernels/jit/csrc" / source).exists()
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    names = (*carry_intree.WANTED, carry_intree.NORM_MODULE)
    run = subprocess.run(
        [sys.executable, "-c", CARRIED, str(tmp_path), *names],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_tp_qknorm", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        # No GPU for it, whatever this machine has.
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )


def test_it_runs_without_a_gpu_and_writes_what_it_says(tmp_path: Path) -> None:
    run = bench("--cpu", "--tokens", "2", "--case", "norm", "--results", str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[-2:] == ["tp_qknorm_cpu.json", "tp_qknorm_cpu.png"]
    data = json.loads((tmp_path / "tp_qknorm_cpu.json").read_text())
    assert (tmp_path / "tp_qknorm_cpu.png").stat().st_size > 1000
    assert data["device"]["type"] == "cpu"
    assert data["device"]["threads"] == 1
    assert data["aims"] == [], "aims are for a GPU"
    assert set(data["paths"]) == {"reference", PLAIN} == {r["path"] for r in data["rows"]}
    for found in data["rows"]:
        assert found["microseconds"]["wall"]["median"] > 0
        assert found["bytes"] == Setting(NORM, 2, 1, CPU).bytes_moved()
    assert set(data["rows"][0]["ratio"]) == {PLAIN}


def test_a_part_does_not_replace_a_result() -> None:
    result = common.RESULTS / "tp_qknorm_cpu.json"
    before = result.read_bytes() if result.exists() else None
    run = bench("--cpu", "--tokens", "1", "--case", "norm")
    assert run.returncode == 0, run.stderr
    assert "nothing written: a part is not a result" in run.stdout
    assert (result.read_bytes() if result.exists() else None) == before


def test_without_a_gpu_it_names_what_runs() -> None:
    run = bench()
    assert run.returncode == 2
    assert "--cpu compares what runs without one" in " ".join(run.stderr.split()).replace("│ ", "")


def test_a_gpus_rows_are_shown_and_drawn(tmp_path: Path) -> None:
    rows = [
        row(path, scale * tokens, 2 * scale * tokens, tokens=tokens, tp=tp)
        for tokens in (1, 8, 64)
        for tp, path, scale in (
            (1, CUDA, 1.0),
            (1, IN_TREE, 3.0),
            (8, VIRTUAL, 2.0),
            (8, NO_EXCHANGE, 1.5),
        )
    ]
    prologue_aims.add_ratios(rows)
    rows.append({"case": "prologue", "tp": 1, "tokens": 8, "path": FUSED_STORE, "refuses": "why"})
    table = bench_tp_qknorm.table(rows, "prologue", 1)
    cells = [list(column.cells) for column in table.columns]
    assert [str(column.header) for column in table.columns][:4] == ["tokens", "path", HOT, COLD]
    ours = cells[1].index(CUDA)
    assert [column[ours] for column in cells] == [
        "1",
        CUDA,
        "1.00",
        "2.00",
        "500",
        "12%",
        "3.00",
        "",
    ]
    lines = prologue_plot.lines_of(rows, "prologue", 1, COLD)
    assert lines[IN_TREE] == [(1, 6.0, 6.0, 6.0), (8, 48.0, 48.0, 48.0), (64, 384.0, 384.0, 384.0)]
    assert set(lines) == {CUDA, IN_TREE}, "virtual ranks are no line beside real ones"
    path = tmp_path / "tp_qknorm_gpu.json"
    device = {"type": "cuda", "name": "a GPU"}
    path.write_text(json.dumps({"device": device, "provenance": {"date": "today"}, "rows": rows}))
    assert prologue_plot.draw(path).stat().st_size > 1000


def test_settings_compile_few_kernels_unless_asked() -> None:
    default = bench_tp_qknorm.settings(CPU, [], [1, 2], [4])
    assert [(s.case.name, s.tp) for s in default] == [
        ("prologue", 1),
        ("prologue", 2),
        ("prologue-fp8", 1),
        ("norm", 1),
    ]
    asked = bench_tp_qknorm.settings(CPU, ["norm"], [2], [4])
    assert [(s.case.name, s.tp) for s in asked] == [("norm", 2)]
    gpu = replace(asked[0], device=torch.device("cuda"))
    assert VIRTUAL in prologue_paths.paths(gpu)
    assert FUSED_STORE not in prologue_paths.paths(gpu), "a norm stores nothing"


def test_the_readmes_rows_are_those_of_a_gpu(tmp_path: Path) -> None:
    for name in ("tp_qknorm_cpu", "tp_qknorm_a-gpu", "router_a-gpu"):
        (tmp_path / f"{name}.json").write_text("{}")
    assert prologue_table.gpu_results(tmp_path) == [tmp_path / "tp_qknorm_a-gpu.json"]
    found = [row(CUDA, 2.0, 2.5), row(IN_TREE, 6.0, 10.0), row(CUDA, 1.0, 1.0, tokens=3)]
    prologue_aims.add_ratios(found)
    shown = prologue_table.rows({"rows": found})
    assert shown == [
        ("8", "6.0 / 10.0 us", "2.0 / 2.5 us", "not run", "3.0x / 4.0x", "10%"),
    ]
    judged_rows = [aim.as_row() for aim in prologue_aims.aims(found)]
    lines = prologue_table.aims({"aims": judged_rows}).splitlines()
    assert lines[0].endswith("met (3.00 at 8 tokens, hot L2)")
    assert lines[-1].endswith("not measured")


class Clock:
    """A device on which a call takes 2 us, 5 us after a flush, and a flush 40 us."""

    def __init__(self) -> None:
        self.now = 0.0
        self.flushed = False

    def work(self) -> None:
        self.now += 5.0 if self.flushed else 2.0
        self.flushed = False

    def fill_(self, value: int) -> None:
        self.now += 40.0
        self.flushed = True

    def capture(self, work: Any, calls: int) -> float:
        before, self.flushed = self.now, False
        for _ in range(calls):
            work()
        return self.now - before

    def replayed(self, graphs: list[float], replays: int) -> list[list[float]]:
        return [[graph] * replays for graph in graphs]


def test_the_flush_is_not_in_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(kernel_timing, "capture", clock.capture)
    monkeypatch.setattr(kernel_timing, "replayed", clock.replayed)
    monkeypatch.setattr(kernel_timing, "flush_buffer", lambda: clock)
    assert kernel_timing.hot(clock.work, 5) == kernel_timing.Spread(2.0, 2.0, 2.0, 5)
    assert kernel_timing.cold(clock.work, 5) == kernel_timing.Spread(5.0, 5.0, 5.0, 5)


def test_on_a_gpu_each_path_is_timed_as_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)

    def ready(path: str, setting: Setting) -> prologue_paths.Ready:
        if path == IN_TREE:
            raise prologue_paths.NotTimed("not carried")
        return prologue_paths.Ready(lambda: path, 1000, 1e-3, graph=path != "reference")

    def time_call(work: Any, device: torch.device, *, replays: int) -> kernel_timing.Times:
        if work() == "triton":
            raise kernel_timing.Uncapturable("the driver said so")
        return {HOT: spread([2.0] * replays), COLD: spread([4.0] * replays)}

    monkeypatch.setattr(bench_tp_qknorm, "ready", ready)
    monkeypatch.setattr(kernel_timing, "time_call", time_call)
    monkeypatch.setattr(kernel_timing, "eager", lambda work: {"eager": spread([8.0])})
    setting = Setting(PROLOGUE, 8, 1, gpu)
    rows = bench_tp_qknorm.measure(setting, prologue_paths.paths(setting), 4000.0, 3)
    found = {row["path"]: row for row in rows}
    assert set(found) == {CUDA, "triton", "reference", IN_TREE, FUSED_STORE}
    assert found[CUDA]["microseconds"][HOT]["runs"] == 3
    assert found[CUDA]["gbps"] == {HOT: 0.5, COLD: 0.25}
    assert found["triton"]["refuses"] == "no CUDA graph holds it: the driver said so"
    assert set(found["reference"]["microseconds"]) == {"eager"}
    assert found[IN_TREE]["refuses"] == "not carried"
    prologue_aims.add_ratios(rows)
    assert found[CUDA]["ratio"] == {FUSED_STORE: {HOT: 1.0, COLD: 1.0}}
    assert found["reference"]["ratio"] == {FUSED_STORE: {}}, "eager is not compared with a graph"


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name="NVIDIA H200",
        major=9,
        minor=0,
        multi_processor_count=132,
        L2_cache_size=60 << 20,
        total_memory=1 << 37,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = torch.device("cuda", 0)
    assert kernel_timing.slug(gpu) == "nvidia-h200"
    facts = bench_tp_qknorm.header(gpu, 4300.04, 31, [], prologue_aims.aims([]))
    assert facts["device"]["name"] == "NVIDIA H200"
    assert facts["device"]["l2_bytes"] == 60 << 20
    assert (facts["copy_gbps"], facts["replays"]) == (4300.0, 31)
    assert len(facts["aims"]) == 4
