"""The plan of every rank: all elements are read, by their owners, from the right bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_minimax import shards
from sglang_minimax.config import Architecture
from sglang_minimax.loading import ledger
from sglang_minimax.loading.formats.base import UNQUANTISED, Recipe
from sglang_minimax.loading.formats.fp8 import blocks
from sglang_minimax.loading.headers import ITEM_BYTES, Headers, Tensor
from sglang_minimax.loading.plan import Read, plan_of_rank
from sglang_minimax.topology import Topology

FILE = Path("x.safetensors")
SMALL = replace(
    Architecture.from_config({"head_dim": 128}),
    num_heads=8, num_kv_heads=2, head_dim=4, hidden_size=8, num_layers=2, vocab_size=70,
    num_experts=4, top_k=1, expert_width=24, num_mtp_modules=0,
)  # fmt: skip
BLOCKS = Recipe("fp8", "fp8", blocks(4, 4))
RECIPES = {"plain": UNQUANTISED, "fp8": BLOCKS}


def shapes(arch: Architecture) -> dict[str, tuple[str, tuple[int, ...]]]:
    """name -> (type, shape) of a checkpoint with published names."""
    hidden, q, kv = (n * arch.head_dim for n in (1, arch.num_heads, arch.num_kv_heads))
    hidden = arch.hidden_size
    found: dict[str, tuple[str, tuple[int, ...]]] = {}

    def matrix(name: str, rows: int, columns: int) -> None:
        quantised = arch.recipe.method is not None
        found[f"{name}.weight"] = ("F8_E4M3" if quantised else "BF16", (rows, columns))
        if quantised:
            found[f"{name}.weight_scale_inv"] = ("F32", (-(-rows // 4), -(-columns // 4)))

    found["model.embed_tokens.weight"] = ("BF16", (arch.vocab_size, hidden))
    found["model.norm.weight"] = ("BF16", (hidden,))
    if not arch.tie_word_embeddings:
        found["lm_head.weight"] = ("BF16", (arch.vocab_size, hidden))
    for i in range(arch.num_layers):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{norm}.weight"] = ("BF16", (hidden,))
        for part, rows in (("q", q), ("k", kv), ("v", kv)):
            matrix(f"{layer}.self_attn.{part}_proj", rows, hidden)
        matrix(f"{layer}.self_attn.o_proj", hidden, q)
        found[f"{layer}.self_attn.q_norm.weight"] = ("BF16", (q,))
        found[f"{layer}.self_attn.k_norm.weight"] = ("BF16", (kv,))
        moe = f"{layer}.block_sparse_moe"
        found[f"{moe}.gate.weight"] = ("F32", (arch.num_experts, hidden))
        found[f"{moe}.e_score_correction_bias"] = ("F32", (arch.num_experts,))
        for e in range(arch.num_experts):
            for part in ("w1", "w3"):
                matrix(f"{moe}.experts.{e}.{part}", arch.expert_width, hidden)
            matrix(f"{moe}.experts.{e}.w2", hidden, arch.expert_width)
    return found


def announced(found: dict[str, tuple[str, tuple[int, ...]]]) -> Headers:
    headers, offset = Headers(), 100
    for name, (kind, shape) in found.items():
        headers.tensors[name] = Tensor(FILE, kind, shape, offset)
        offset += headers.tensors[name].nbytes
    return headers


def elements(read: Read) -> np.ndarray:
    """Numbers of the elements that the span and its inner box give, out of the file's bytes."""
    tensor = read.tensor
    item = ITEM_BYTES[tensor.kind]
    assert tensor.offset <= read.offset
    assert read.offset + read.length <= tensor.offset + tensor.nbytes
    numbers = np.arange(int(np.prod(tensor.shape, dtype=int)))
    start = (read.offset - tensor.offset) // item
    held = numbers[start : start + read.length // item].reshape(read.shape)
    return held[tuple(slice(part.start, part.stop) for part in read.inner)]


def check(arch: Architecture, topology: Topology, redundant: int = 0) -> None:
    """All of what `any_rank_reads_its_own` claims, for one shape."""
    headers = announced(shapes(arch))
    counts = {name: np.zeros(t.shape, int) for name, t in headers.tensors.items()}
    for rank in range(topology.world_size):
        plan = plan_of_rank(headers, arch, topology, rank, redundant_experts=redundant)
        assert not plan.problems, plan.problems
        for read in plan.reads:
            box = tuple(slice(part.start, part.stop) for part in read.placement.box)
            shape = read.tensor.shape
            assert all(
                0 <= p.start <= p.stop <= n for p, n in zip(read.placement.box, shape, strict=True)
            )
            numbers = np.arange(int(np.prod(shape, dtype=int))).reshape(shape)
            assert np.array_equal(elements(read), numbers[box]), read.name
            counts[read.name][box] += read.placement.copies
    group = Counter(
        (place.pp_rank, place.attention_dp_rank)
        for place in map(topology.coordinates, range(topology.world_size))
    )
    attention_tp = next(iter(group.values()))
    replicas = max(1, attention_tp // arch.num_kv_heads)
    for name, count in counts.items():
        if ".experts." in name:
            expert = int(name.split(".")[5])
            physical = arch.num_experts + redundant
            wanted = sum(e % arch.num_experts == expert for e in range(physical))
        elif any(part in name for part in ("q_proj", "o_proj.weight", "q_norm")):
            wanted = topology.dp
        elif any(part in name for part in ("k_proj", "v_proj", "k_norm")):
            wanted = topology.dp * replicas
        elif "embed_tokens" in name:
            if arch.tie_word_embeddings:
                continue
            wanted = topology.dp
        elif "lm_head" in name:
            wanted = 1
        else:
            wanted = topology.tp
        assert (count == wanted).all(), (name, wanted, np.unique(count))


@pytest.mark.parametrize("recipe", RECIPES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_element_is_read_by_its_owners_from_the_right_bytes(recipe, data) -> None:
    tp = data.draw(st.sampled_from([1, 2, 4, 8]))
    dp = data.draw(st.sampled_from([n for n in (1, 2, 4) if tp % n == 0]))
    ep = data.draw(st.sampled_from([n for n in (1, 2, 4) if tp % n == 0]))
    arch = replace(
        SMALL,
        recipe=RECIPES[recipe],
        vocab_size=data.draw(st.integers(1, 200)),
        tie_word_embeddings=data.draw(st.booleans()),
        expert_width=24 if recipe == "plain" else data.draw(st.integers(1, 28)),
    )
    pp = data.draw(st.sampled_from([1, 2]))
    check(arch, Topology(tp, dp, ep, pp), data.draw(st.sampled_from([0, 4])))


def packed(arch: Architecture, order: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {n: what for n, what in shapes(arch).items() if ".experts." not in n}
    for i in range(arch.num_layers):
        experts = f"model.layers.{i}.mlp.experts"
        e, w, h = arch.num_experts, arch.expert_width, arch.hidden_size
        found[f"{experts}.{order}"] = ("BF16", (e, 2 * w, h))
        found[f"{experts}.down_proj"] = ("BF16", (e, h, w))
    return found


@pytest.mark.parametrize(("order", "gate_first"), [("gate_up_proj", True), ("up_gate_proj", False)])
def test_stacked_experts_are_taken_apart(order: str, gate_first: bool) -> None:
    assert gate_is_where(order, gate_first)


def gate_is_where(order: str, gate_first: bool) -> bool:
    headers = announced(packed(SMALL, order))
    plan = plan_of_rank(headers, SMALL, Topology(2), 1)
    assert not plan.problems
    starts = {
        read.placement.record.projection: read.placement.box[1].start
        for read in plan.reads
        if read.name.endswith(order) and read.placement.record.expert == 3
    }
    first, second = ("w1", "w3") if gate_first else ("w3", "w1")
    return starts == {first: 12, second: 36}


def test_duplicates_over_files_are_named() -> None:
    headers = announced(shapes(SMALL))
    headers.repeated.append(("model.norm.weight", Path("1.st"), Path("2.st")))
    plan = plan_of_rank(headers, SMALL, Topology(), 0)
    assert plan.problems.groups == {"duplicate": ["model.norm.weight (in 1.st and in 2.st)"]}


def test_a_swapped_order_of_gate_and_up_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ledger.PACKED_PROJECTIONS, "w13", ("w3", "w1"))
    assert not gate_is_where("gate_up_proj", True)


def test_a_wrong_replica_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = property(lambda shard: shard.rank % 2 if shard.rank else 1)
    monkeypatch.setattr(shards.AttentionShard, "kv_owner", wrong)
    with pytest.raises(AssertionError):
        check(SMALL, Topology(8))
