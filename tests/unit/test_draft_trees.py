"""Draft trees, greedy walks and slots in PyTorch, against SGLang's kernels."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sglang_minimax.platforms.cpu.speculation import patches, slots, trees
from tests.unit.draft_mistakes import mistaken
from tests.unit.test_draft_sampling import sample

HERE = Path(__file__).parent
Case = dict[str, Any]
#: The largest draw below 1 that SGLang makes.
LAST = 1 - 2.0**-24


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Case]]:
    """What SGLang's kernels were called with and made, by `draft_kernels.py`."""
    file = tmp_path_factory.mktemp("kernels") / "made"
    quick = {"TRITON_INTERPRET": "1", "TORCH_COMPILE_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "draft_kernels.py"), str(file)],
        env={**os.environ, **quick},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(file)


# --- trees, and the greedy walk ------------------------------------------------------------


def built(case: Case) -> dict[str, Tensor]:
    """Our tree in buffers like the kernel's."""
    buffers = {name: torch.full_like(made, -1) for name, made in case["made"].items()}
    buffers["tree_mask"].fill_(True)
    trees.build_tree(**case["given"], **buffers)
    return buffers


def walked(case: Case) -> dict[str, Tensor]:
    """Our greedy walk in buffers like the kernel's."""
    buffers = {name: torch.full_like(made, -1) for name, made in case["written"].items()}
    buffers["predicts"].fill_(0)
    trees.verify_greedy(**buffers, **case["walked"])
    return buffers


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_trees_are_the_kernels(kernels: dict[str, list[Case]]) -> None:
    """Links in the kernel's order of siblings, too: sampling adds probabilities in that order."""
    for case in kernels["trees"]:
        assert equal(built(case), case["made"]), case["given"]


def test_greedy_walks_are_the_kernels(kernels: dict[str, list[Case]]) -> None:
    for case in kernels["trees"]:
        assert equal(walked(case), case["written"]), case["walked"]


def test_the_trees_have_what_can_go_wrong(kernels: dict[str, list[Case]]) -> None:
    """Nodes without a parent, siblings that are taken, walks to the last node and to none."""
    cases = kernels["trees"]
    given = [case["given"] for case in cases]
    parents = [trees.parents_of(g["parent_list"], g["top_scores_index"], g["topk"]) for g in given]
    assert any((found == trees.NONE).any() for found in parents)
    lengths = [case["written"]["accept_token_num"] for case in cases]
    assert any((found == 0).any() for found in lengths)
    depths = [g["spec_steps"] for g in given]
    assert any((a == d).any() and d > 2 for a, d in zip(lengths, depths, strict=True))
    later = [_takes_a_later_sibling(case) for case in cases]
    assert sum(later) > 5


def _takes_a_later_sibling(case: Case) -> bool:
    firsts = case["walked"]["retrieve_next_token"]
    path = case["written"]["accept_index"]
    nodes = firsts.shape[1]
    return any(
        int(node) % nodes not in row
        for row, taken in zip(firsts.tolist(), path[:, 1:], strict=True)
        for node in taken[taken >= 0]
    )


WRONG_TREES = {
    "the mask transposed": ("ancestry", "return mask,", "return mask.transpose(1, 2),"),
    "depth from 1": ("ancestry", ".sum(dim=2) - 1", ".sum(dim=2)"),
    "a parent's siblings attended": ("ancestry", "mask[rows, parents", "mask[rows, -1 + parents"),
    "the last drafted sibling first": (
        "_link",
        "range(len(parents), 0, -1)",
        "range(1, len(parents) + 1)",
    ),
    "nodes without a parent on the root": (
        "parents_of",
        "match.any(dim=2), position, NONE",
        "match.any(dim=2), position, 0",
    ),
    "parents counted without the root": ("parents_of", "argmax(dim=2) + 1", "argmax(dim=2)"),
    "every request's mask where the first one's is": (
        "build_tree",
        "start += size",
        "start += 0",
    ),
    "positions of the prompt's end": ("build_tree", ".unsqueeze(1) + depth", ".unsqueeze(1) - 1"),
}


@pytest.mark.parametrize("wrong", WRONG_TREES)
def test_a_wrong_tree_is_noticed(
    wrong: str, kernels: dict[str, list[Case]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *change = WRONG_TREES[wrong]
    monkeypatch.setattr(trees, name, mistaken(getattr(trees, name), *change))
    assert not all(equal(built(case), case["made"]) for case in kernels["trees"])


WRONG_WALKS = {
    "siblings not tried": ("verify_greedy", "for child in after", "for child in after[:1]"),
    "the nodes' own tokens": ("verify_greedy", "[wanted[node] for", "[tokens[node] for"),
    "the root counted": ("verify_greedy", "len(path) - 1", "len(path)"),
    "rows of the first request": ("verify_greedy", "retrieve_index[request", "retrieve_index[0"),
}


@pytest.mark.parametrize("wrong", WRONG_WALKS)
def test_a_wrong_walk_is_noticed(
    wrong: str, kernels: dict[str, list[Case]], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *change = WRONG_WALKS[wrong]
    monkeypatch.setattr(trees, name, mistaken(getattr(trees, name), *change))
    try:
        same = all(equal(walked(case), case["written"]) for case in kernels["trees"])
    except (RuntimeError, IndexError):
        same = False
    assert not same


def test_packed_masks_are_refused(kernels: dict[str, list[Case]]) -> None:
    case = kernels["trees"][0]
    with pytest.raises(NotImplementedError, match="bit-packed"):
        built({**case, "given": case["given"] | {"tree_mask_mode": 2}})


def test_a_certain_target_is_walked_greedily(kernels: dict[str, list[Case]]) -> None:
    for case in kernels["trees"]:
        walk = dict(case["walked"])
        wanted = walk.pop("target_predict")
        probs = torch.eye(6)[wanted]
        batch, nodes = wanted.shape
        for draws, final in (
            (torch.rand(batch, nodes), torch.rand(batch)),
            (torch.zeros(batch, nodes), torch.zeros(batch)),
            (torch.full((batch, nodes), LAST), torch.full((batch,), LAST)),
        ):
            found = sample(walk, probs, draws, final, case["given"]["spec_steps"])
            assert equal(found, case["written"])


# --- calls ---------------------------------------------------------------------------------

#: Ours -> what it replaces, or on the platform's own seam what asks it.
REPLACED = {
    "build_tree": "sglang.kernels.ops.speculative.spec_tree:build_tree_kernel_efficient_func",
    "verify_greedy": "sglang.kernels.ops.speculative.spec_tree:verify_tree_greedy_func",
    # None without a GPU: the function that a CUDA device gets.
    "sample_by_target": (
        "sglang.kernels.ops.speculative.sampling:tree_speculative_sampling_target_only"
    ),
    "slots_between": "sglang.kernels.ops.speculative.cache_locs:assign_extend_cache_locs_func",
    "assign_draft_slots": (
        "sglang.kernels.ops.speculative.cache_locs:assign_draft_cache_locs_contiguous_func"
    ),
    "record_slots": "sglang.srt.mem_cache.allocation:assign_req_to_token_pool_func",
    "fill_bonus_tokens": "sglang.kernels.ops.speculative.eagle:fill_bonus_tokens_func",
    "move_accepted": "sglang.srt.speculative.spec_utils:move_accept_tokens_to_target_kvcache",
}


def ours(name: str) -> Callable[..., Any]:
    return getattr(trees, name, None) or getattr(slots, name)


def theirs(target: str) -> Callable[..., Any]:
    """SGLang's function, without what wraps it: our patches are applied when SGLang is imported."""
    module, name = target.split(":")
    return inspect.unwrap(getattr(importlib.import_module(module), name))


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("name", REPLACED)
def test_parameters_are_those_of_what_is_replaced(name: str) -> None:
    original = theirs(REPLACED[name])
    assert original.__module__.startswith("sglang.")
    assert parameters(ours(name)) == parameters(original)


def test_every_replacement_is_compared() -> None:
    from sglang_minimax.platforms.cpu import upstream

    patched = [p for p in upstream.CPU_PATCHES if "cpu.speculation.patches:" in p.replacement]
    names = {p.replacement.split(":")[1]: p.target for p in patched}
    elsewhere = {"keep_top_k", "keep_top_p", "without_compiling", "move_rows_natively"}
    assert set(names) - elsewhere == set(REPLACED) - {"slots_between"}
    for name in set(names) - elsewhere - {"sample_by_target"}:
        assert names[name] == REPLACED[name]


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("top_k_renorm_prob", "keep_top_k"),
        ("top_p_renorm_prob", "keep_top_p"),
        ("sampling_fn", "sample_by_target"),
        ("verify_tree_greedy_func", "verify_greedy"),
        ("build_tree_kernel_efficient_func", "build_tree"),
    ],
)
def test_sglangs_own_calls_fit(called: str, name: str) -> None:
    from sglang.srt.speculative import eagle_utils

    calls = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(eagle_utils)))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == called
    ]
    assert calls
    for call in calls:
        named = {str(keyword.arg): None for keyword in call.keywords}
        inspect.signature(ours(name)).bind(*call.args, **named)
        if name.startswith("keep"):
            _flashinfers(f"{called}s").bind(*call.args, **named)


def _flashinfers(name: str) -> inspect.Signature:
    """The parameters of what a CUDA device gets, read from its text: the import is slow."""
    spec = importlib.util.find_spec("flashinfer")
    assert spec is not None
    assert spec.origin is not None
    text = ast.parse((Path(spec.origin).parent / "sampling.py").read_text())
    (function,) = (n for n in text.body if isinstance(n, ast.FunctionDef) and n.name == name)
    arguments = function.args
    required = len(arguments.args) - len(arguments.defaults)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [
            inspect.Parameter(a.arg, kind, default=inspect.Parameter.empty if i < required else 0)
            for i, a in enumerate(arguments.args)
        ]
    )


# --- slots ---------------------------------------------------------------------------------


def made_between(given: tuple[Any, ...]) -> Tensor:
    return slots.slots_between(*given)


def made_written(function: Callable[..., None], at: int) -> Callable[[tuple[Any, ...]], Tensor]:
    """What a function leaves in the argument that it writes."""

    def made(given: tuple[Any, ...]) -> Tensor:
        function(*(each.clone() if i == at else each for i, each in enumerate(given)))
        written = [each.clone() if isinstance(each, Tensor) else each for each in given]
        function(*written)
        return written[at]

    return made


def made_moved(given: tuple[Any, ...]) -> Tensor:
    """A cache that holds each slot's number, moved as SGLang's pool does without Triton."""
    window, index, correct = given
    cache = torch.arange(201)

    def move(target: Tensor, source: Tensor) -> None:
        cache[target] = cache[source]

    pool = SimpleNamespace(get_kvcache=lambda: SimpleNamespace(move_kv_cache=move))
    slots.move_accepted(SimpleNamespace(out_cache_loc=window), index, correct, pool)
    return cache


SLOTS: dict[str, tuple[str, Callable[[tuple[Any, ...]], Tensor]]] = {
    "between": ("slots_between", made_between),
    "drafts": (
        "assign_draft_slots",
        lambda given: made_written(slots.assign_draft_slots, 3)(given),
    ),
    "recorded": ("record_slots", lambda given: made_written(slots.record_slots, 1)(given)),
    "bonus": ("fill_bonus_tokens", lambda given: made_written(slots.fill_bonus_tokens, 2)(given)),
    "moved": ("move_accepted", made_moved),
}


def all_slots_agree(what: str, cases: list[Case]) -> bool:
    make = SLOTS[what][1]
    return all(torch.equal(make(case["given"]).long(), case["made"].long()) for case in cases)


@pytest.mark.parametrize("what", SLOTS)
def test_slots_are_the_kernels(what: str, kernels: dict[str, list[Case]]) -> None:
    assert all_slots_agree(what, kernels[what])


@pytest.mark.parametrize(
    ("what", "right", "wrong"),
    [
        ("between", "req_pool_indices.long()", "torch.arange(batch_size)"),
        ("between", "start_offset.long()", "(start_offset.long() - 1)"),
        ("drafts", "topk * num_cols,", "num_cols,"),
        ("recorded", "done += end - start", "done += 0"),
        ("recorded", "start:end", "start + 1 : end + 1"),
        ("bonus", "- 1", "- 0"),
        ("moved", "accepted.sum(dim=1, keepdim=True)", "0 * accepted.sum(dim=1, keepdim=True) + 1"),
        ("moved", "move_kv_cache(front, source)", "move_kv_cache(source, front)"),
        (
            "moved",
            "window[torch.arange(window.shape[1]) < accepted.sum(dim=1, keepdim=True)]",
            "window[:, : accept_index.shape[1]][accepted]",
        ),
    ],
)
def test_other_slots_are_noticed(
    what: str,
    right: str,
    wrong: str,
    kernels: dict[str, list[Case]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = SLOTS[what][0]
    monkeypatch.setattr(slots, name, mistaken(getattr(slots, name), right, wrong))
    try:
        same = all_slots_agree(what, kernels[what])
    except (RuntimeError, IndexError):
        same = False
    assert not same


def test_positions_are_refused() -> None:
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="GPUs only"):
        slots.assign_draft_slots(one, one.view(1, 1), one, one, 1, 1, positions=one)


# --- what is left of SGLang's functions ----------------------------------------------------


def test_compiling_is_taken_off() -> None:
    def plain(x: int) -> int:
        return x + 1

    assert patches.without_compiling(torch.compile(plain, dynamic=True)) is plain
    assert patches.without_compiling(plain) is plain


def test_the_pool_moves_rows_without_a_kernel() -> None:
    from sglang.srt.mem_cache import memory_pool

    rows = torch.arange(5)
    pool = SimpleNamespace(k_buffer=[rows], v_buffer=[rows.clone()], _kv_copy_config=None)
    pool._move_native_fp4_scales = lambda *_: None
    prepared = inspect.unwrap(memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup)
    patches.move_rows_natively(prepared)(pool)
    # SGLang's own move, which would ask for the kernel's settings.
    move = memory_pool.MHATokenToKVPool._move_kv_cache_impl
    move(pool, torch.tensor([1, 2]), torch.tensor([2, 4]))
    assert pool.k_buffer[0].tolist() == pool.v_buffer[0].tolist() == [0, 2, 4, 3, 4]
