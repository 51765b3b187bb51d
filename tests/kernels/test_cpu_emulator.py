"""The emulator that runs CUDA sources on a CPU, judged with toy kernels, right and wrong."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kernels.on_cpu import emulator

pytestmark = pytest.mark.skipif(bool(emulator.missing()), reason=emulator.missing())

SEEDS = range(3)


@pytest.fixture(scope="module")
def library():
    return emulator.build("toys", (emulator.HERE / "toys.cpp").read_text())


def run(
    library,
    name,
    *,
    blocks=1,
    threads=64,
    launches=1,
    overlaps=False,
    lets_in_last=False,
    seed=0,
    count=0,
):
    data = np.arange(64, dtype=np.float32)
    words = np.zeros(2, dtype=np.uint64)
    with emulator.Machine(library, 1, seed) as machine:
        machine.add("data", data.ctypes.data, data.nbytes, 0, emulator.READ_WRITE)
        machine.add("words", words.ctypes.data, words.nbytes, 0, emulator.WORDS)
        for _ in range(launches):
            unknown = library.toy_launch(
                machine.handle,
                name.encode(),
                blocks,
                threads,
                overlaps,
                lets_in_last,
                *(emulator.ctypes.c_void_p(x.ctypes.data) for x in (data, words)),
                count,
            )
            assert not unknown, name
        machine.run()
    return data, words


@pytest.mark.parametrize("seed", SEEDS)
def test_right_kernels(library, seed):
    data, _ = run(library, "block_sum", seed=seed)
    assert (data == sum(range(64))).all()
    data, _ = run(library, "shuffle_within_half", seed=seed)
    assert (data == np.repeat([5.0, 21.0, 37.0, 53.0], 16)).all()
    _, words = run(library, "count_threads", blocks=5, seed=seed)
    assert words[0] == 320
    for overlaps in (False, True):
        data, _ = run(library, "increment", launches=4, overlaps=overlaps, seed=seed)
        assert (data == np.arange(64) + 4).all()
    _, words = run(library, "ordered_stores", seed=seed)
    assert words[0] == 2


WRONG = {
    "block_sum_without_barrier": r"race|nothing was written there",
    "divergent_shuffle": r"toys.cpp:\d+.*(divergent branch|has ended)",
    "divergent_shuffle_then_barrier": r"divergent branch|waits in __syncthreads",
    "shuffle_from_outside_mask": "which mask 0000ffff does not name",
    "barrier_in_branch": "__syncthreads",
    "out_of_bounds": r"write of 4 bytes at data \+ 256 of 256: outside of it \[toys.cpp",
    "misaligned": "null or not aligned",
    "overflowing_index": "signed overflow",
    "race_between_blocks": "a race with",
    "never_written": "nothing was written there",
    "polls_forever": r"nobody can go on:(.|\n)*polls a word at toys.cpp",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_are_caught(library, name, seed):
    with pytest.raises(emulator.KernelError, match=WRONG[name]):
        run(library, name, blocks=2 if "blocks" in name else 1, seed=seed, count=30000)


def test_a_dependent_launch_that_does_not_wait_is_caught(library):
    for seed in SEEDS:
        run(library, "increment_too_early", launches=4, seed=seed)
        with pytest.raises(emulator.KernelError, match="a race with launch"):
            run(library, "increment_too_early", launches=4, overlaps=True, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_poll_after_the_next_grid_was_let_in_is_caught_where_channels_share_a_chip(library, seed):
    run(library, "polls_then_lets_in", lets_in_last=True, seed=seed)
    run(library, "lets_in_then_polls", seed=seed)
    with pytest.raises(emulator.KernelError, match=r"after its block has let the next grid in"):
        run(library, "lets_in_then_polls", lets_in_last=True, seed=seed)


def test_relaxed_stores_arrive_in_any_order(library):
    seen = {float(run(library, "relaxed_message", blocks=2, seed=seed)[0][0]) for seed in range(40)}
    assert seen == {0.0, 7.0}
