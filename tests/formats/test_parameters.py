"""SGLang's own parameters, byte for byte, once our loader has filled them: all formats and ranks.

A forked child is one rank of a shape (`validation.one_rank`) and loads all fixtures, one after the
other. What it finds is compared with `parameters`, written by hand, and with what SGLang's own
model and loader make of the same files. The marker `slow` has what adds little: `make test-all`.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sglang_minimax.config import Architecture
from sglang_minimax.platforms import choice
from sglang_minimax.support import Launch, refusals
from sglang_minimax.validation.one_rank import (
    IN_TREE,
    OURS,
    OneRank,
    Refused,
    in_child,
    in_children,
    preload,
    refusal_of,
)
from tests.formats.base import CONFIG, Fixture, write
from tests.formats.parameters import (
    FIXTURES,
    FORMS,
    REFUSED,
    SHAPES,
    Found,
    Oracle,
    Seat,
    compare,
)

pytestmark = pytest.mark.skipif(not choice.cpu_platform_chosen(), reason="a GPU is present")

#: What a child says of a fixture: what it found, or the error.
Outcome = Found | str

#: SGLang's Marlin linears want 128 columns, and o_proj of eight ranks has 64.
NO_KERNEL = {("awq", "tp8ep8"): "not divisible by min_thread_k = 128"}


@lru_cache(maxsize=1)
def _folder() -> TemporaryDirectory[str]:
    return TemporaryDirectory(prefix="parameters-")


@lru_cache(maxsize=1)
def checkpoints() -> dict[str, Fixture]:
    """All fixtures, written."""
    preload()
    made = {name: make() for name, make in FIXTURES.items()}
    for fixture in made.values():
        write(fixture, folder_of(fixture.name))
    return made


def folder_of(name: str) -> Path:
    """Where the checkpoint of a fixture is."""
    return Path(_folder().name) / name


# --- in a child ---


def load_all(
    names: Sequence[str], seat: Seat, who: str = OURS, mutant: Callable[[], None] | None = None
) -> dict[str, Outcome]:
    """Each fixture loaded at one seat, and compared."""
    if mutant is not None:
        mutant()
    rank: OneRank | None = None
    outcomes: dict[str, Outcome] = {}
    for name in names:
        fixture = checkpoints()[name]
        words = [word for k, v in fixture.arguments.items() for word in (f"--{k}", str(v))]
        arguments = [*seat.arguments, *words]
        try:
            if rank is None:
                rank = OneRank(folder_of(name), arguments, rank=seat.rank, who=who)
            else:
                rank.turn_to(folder_of(name), arguments)
            parameters = dict(rank.load().named_parameters())
            outcomes[name] = compare(Oracle(fixture, seat), parameters)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            outcomes[name] = refusal_of(error)
    return outcomes


#: Shapes of many ranks, and the fixtures that are not slow there.
LARGE = ("tp4ep2", "tp8ep8")
QUICK = ("fp8-blocks", "fp8-static", "ct-fp8-channel", "ct-int4", "awq", "gptq", "nvfp4")


def is_slow(name: str, shape: str) -> bool:
    """Whether a fixture at a shape is left to `make test-all`."""
    return shape in LARGE and name not in QUICK


@cache
def outcomes(shape: str, who: str, slow: bool = False) -> list[dict[str, Outcome]]:
    """Of every rank of a shape, those fixtures that we do not refuse; the slow ones, or others."""
    names = [name for name in checkpoints() if is_slow(name, shape) == slow]
    if who == OURS:
        names = [name for name in names if (name, shape) not in REFUSED]
    found = in_children([partial(load_all, names, seat, who) for seat in SHAPES[shape]])
    for each in found:
        if isinstance(each, Refused):
            raise each
    return found


# --- our loader and the oracle written by hand ---

CASES = [
    pytest.param(shape, name, marks=[pytest.mark.slow] * is_slow(name, shape))
    for shape in SHAPES
    for name in FIXTURES
    if (name, shape) not in REFUSED
]


@pytest.mark.parametrize(("shape", "name"), CASES)
def test_every_parameter_of_every_rank_has_its_bytes(shape: str, name: str):
    used: set[str] = set()
    ranks = outcomes(shape, OURS, is_slow(name, shape))
    for rank, found in enumerate(each[name] for each in ranks):
        if (name, shape) in NO_KERNEL:
            assert isinstance(found, str)
            assert NO_KERNEL[name, shape] in found
            continue
        assert isinstance(found, Found), (rank, found)
        assert not found.wrong, (rank, found.wrong)
        assert found.compared >= 13
        used |= found.used
    # Between them the ranks need every tensor of the checkpoint.
    assert (name, shape) in NO_KERNEL or used == checkpoints()[name].tensors.keys()


def test_parameters_that_sglang_fills_itself_are_these():
    made = {
        name.rpartition(".")[2]
        for fixture in FORMS
        for name in Oracle(checkpoints()[fixture], Seat()).made
    }
    assert made == {
        *("k_scale", "v_scale"),  # of a KV cache that is not quantised
        *("w13_weight_g_idx", "w2_weight_g_idx"),  # of columns in order
        *("w13_g_idx_sort_indices", "w2_g_idx_sort_indices"),  # computed from g_idx
        *("w13_blockscale_swizzled", "w2_blockscale_swizzled"),  # computed from weight_scale
        *("weight_scale", "weight_offset"),  # ModelSlim's static linears have deq_scale
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_left_out_is_what_we_refuse(shape: str):
    seat = SHAPES[shape][0]
    launch = Launch(tp=seat.tp, ep=seat.ep, dp=seat.dp, pp=seat.pp)
    for name in FIXTURES:
        checkpoints()
        config = json.loads((folder_of(name) / "config.json").read_text())
        found = refusals(Architecture.from_config(config, folder_of(name)), launch)
        assert bool(found) == ((name, shape) in REFUSED), (name, found)
        assert all("cannot be shared by" in sentence for sentence in found)


# --- SGLang's own model and loader ---

IN_TREE_SHAPES = ("tp1", "tp2", "ep2", pytest.param("tp4", marks=pytest.mark.slow))
BLOCKS = "is not divisible by weight quantization block_n = 64"
#: What the in-tree model says instead of loading.
IN_TREE_REFUSES = {("fp8-blocks", "tp4"): BLOCKS, ("ct-fp8-blocks", "tp4"): BLOCKS}
#: Where its experts are others than the ones above: it has a kernel of smaller groups for AWQ, and
#: in the others scales are lost without a word.
LOST = ("w2_weight_scale",)
GPTQ_LOST = ("w2_scales", "w2_qzeros")
ALL_INT4 = ("w13_weight_packed", "w2_weight_packed", "w13_weight_scale", "w2_weight_scale")
ALL_AWQ = tuple(f"{w}_{kind}" for w in ("w13", "w2") for kind in ("qweight", "qzeros", "scales"))
ALL_GPTQ = (*ALL_AWQ, "w2_g_idx")
IN_TREE_DIFFERS = {
    ("ct-int4-ordered", "tp2"): LOST,
    ("gptq", "tp2"): GPTQ_LOST,
    ("gptq-v2", "tp2"): GPTQ_LOST,
    ("gptq-act-order", "tp2"): GPTQ_LOST,
    ("ct-int4", "tp4"): ALL_INT4,
    ("ct-int4-ordered", "tp4"): LOST,
    ("awq", "tp4"): ALL_AWQ,
    ("awq-experts", "tp4"): ALL_AWQ,
    ("gptq", "tp4"): ALL_GPTQ,
    ("gptq-v2", "tp4"): ALL_GPTQ,
    ("gptq-act-order", "tp4"): GPTQ_LOST,
}


@pytest.mark.parametrize("shape", IN_TREE_SHAPES)
def test_sglangs_own_loader_makes_the_same(shape: str):
    for rank, theirs in enumerate(outcomes(shape, IN_TREE)):
        ours = outcomes(shape, OURS)[rank]
        for name, found in theirs.items():
            refusal = IN_TREE_REFUSES.get((name, shape))
            if refusal:
                assert isinstance(found, str)
                assert refusal in found
                continue
            assert isinstance(found, Found), (name, found)
            different = {wrong.partition(":")[0].rpartition(".")[2] for wrong in found.wrong}
            assert different == set(IN_TREE_DIFFERS.get((name, shape), ())), (name, found.wrong)
            mine = ours.get(name)  # we refuse some
            if not different:
                assert isinstance(mine, Found), (name, mine)
                assert mine.digests == found.digests, name


# --- mutants: plausible mistakes in our own code, each in a child ---


def _w1_is_w3() -> None:
    from sglang_minimax.loading import slots

    _change_slots(
        slots,
        lambda slot: (
            replace(slot, shard={"w1": "w3", "w3": "w1"}[slot.shard])
            if slot.shard in ("w1", "w3")
            else slot
        ),
    )


def _k_is_v() -> None:
    from sglang_minimax.loading import slots

    _change_slots(
        slots,
        lambda slot: (
            replace(slot, shard={"k": "v", "v": "k"}[slot.shard])
            if slot.shard in ("k", "v")
            else slot
        ),
    )


def _change_slots(module: Any, change: Callable[[Any], Any]) -> None:
    original = module.SlotTable.build

    def build(table: Any) -> Any:
        found = original(table)
        for name, group in found.items():
            found[name] = tuple(map(change, group))
        return found

    module.SlotTable.build = build


def _rotated_blocks() -> None:
    from sglang_minimax.layers import stage

    original = stage.expert_cut

    def expert_cut(width: int, size: int, rank: int, unit: int = 1) -> Any:
        mine, next_one = (original(width, size, (rank + i) % size, unit) for i in (0, 1))
        return replace(mine, lines=next_one.lines)

    stage.expert_cut = expert_cut


def _last_ranks_take_the_rest() -> None:
    from sglang_minimax.layers import stage

    original = stage.expert_cut

    def expert_cut(width: int, size: int, rank: int, unit: int = 1) -> Any:
        mirrored = original(width, size, size - 1 - rank, unit).lines
        lines = range(width - mirrored.stop, width - mirrored.start)
        return replace(original(width, size, rank, unit), lines=lines)

    stage.expert_cut = expert_cut


def _scales_by_rows() -> None:
    _change_axes(lambda axis: replace(axis, per=1) if axis.per == 64 else axis)


def _scales_whole() -> None:
    _change_axes(lambda axis: replace(axis, whole=True) if axis.per == 64 else axis)


def _change_axes(change: Callable[[Any], Any]) -> None:
    """In every format that is asked for, of scales."""
    from sglang_minimax.loading import slots

    original = slots.SlotTable._format

    def changed(table: Any, module: str) -> Any:
        form = original(table, module)
        tensors = tuple(
            replace(t, axes=tuple(map(change, t.axes))) if t.scale else t for t in form.tensors
        )
        return replace(form, tensors=tensors)

    slots.SlotTable._format = changed


def _kv_owner_by_turns() -> None:
    from sglang_minimax.shards import AttentionShard

    AttentionShard.kv_owner = property(lambda self: self.rank % (self.size // self.kv_replicas))


def _kv_not_repeated() -> None:
    from sglang_minimax.shards import AttentionShard

    AttentionShard.kv_owner = property(lambda self: min(self.rank, self.total_kv_heads - 1))


def _next_expert() -> None:
    from sglang_minimax.loading.strict import StrictLoader

    original = StrictLoader._write

    def _write(self: Any, places: Any, placement: Any, held: Any, label: str) -> str:
        record = placement.record
        if record.expert is not None:
            moved = record._replace(expert=(record.expert + 1) % 8)
            placement = placement._replace(record=moved)
        return original(self, places, placement, held, label)

    StrictLoader._write = _write


def _middle_places_swapped() -> None:
    """Both ends, which are checked, stay."""
    from sglang_minimax.loading import places

    original = places._place

    def _place(*arguments: Any) -> Any:
        *others, stored = arguments
        wrong = dict(stored)
        wrong[1], wrong[2] = stored[2], stored[1]
        return original(*others, wrong)

    places._place = _place


def _padding_of_zeros() -> None:
    from sglang_minimax.loading import places, shares

    original = shares.padded

    def padded(held: torch.Tensor, slot: Any) -> torch.Tensor:
        return original(held, replace(slot, stored=replace(slot.stored, padding=0)))

    shares.padded = places.padded = padded


def _local_scales_only() -> None:
    from sglang_minimax.loading.ledger import Ledger

    original = Ledger._placed

    def _placed(self: Any, *arguments: Any) -> Any:
        held = self.stage.experts(0)
        return [p for p in original(self, *arguments) if p.record.expert in {None, *held}]

    Ledger._placed = _placed


def _head_in_attention_group() -> None:
    from sglang_minimax.layers import stage

    original = stage._rows
    stage._rows = lambda arch, in_group: original(arch, not in_group)


@dataclass(frozen=True)
class Mutant:
    """A mistake, and the seat that shows it."""

    make: Callable[[], None]
    fixture: str
    seat: Seat


MUTANTS: Mapping[str, Mutant] = {
    "w1 and w3 swapped": Mutant(_w1_is_w3, "fp8-blocks", Seat()),
    "k and v swapped": Mutant(_k_is_v, "ct-int8", Seat(tp=2)),
    "dealt blocks rotated by one": Mutant(_rotated_blocks, "fp8-blocks", Seat(tp=4, rank=0)),
    "dealt blocks, the short rank": Mutant(_rotated_blocks, "awq", Seat(tp=4, rank=2)),
    "the last ranks take the rest": Mutant(
        _last_ranks_take_the_rest, "fp8-blocks", Seat(tp=4, rank=0)
    ),
    "scales cut by rows": Mutant(_scales_by_rows, "fp8-blocks", Seat(tp=2)),
    "scales not cut": Mutant(_scales_whole, "ct-int4", Seat(tp=2, rank=1)),
    "KV heads by turns": Mutant(_kv_owner_by_turns, "ct-fp8-channel", Seat(tp=8, ep=8, rank=1)),
    "KV heads not repeated": Mutant(_kv_not_repeated, "fp8-static", Seat(tp=8, ep=8, rank=1)),
    "expert e in e + 1": Mutant(_next_expert, "mxfp4", Seat()),
    "two places swapped": Mutant(_middle_places_swapped, "fp8-blocks", Seat()),
    "padding of zeros": Mutant(_padding_of_zeros, "fp8-blocks", Seat(tp=4, rank=3)),
    "scales of local experts only": Mutant(_local_scales_only, "nvfp4", Seat(tp=2, ep=2)),
    "head in the attention group": Mutant(
        _head_in_attention_group, "ct-int8", Seat(tp=2, dp=2, rank=1)
    ),
}


@lru_cache(maxsize=1)
def mutant_outcomes() -> dict[str, Any]:
    """How each mutant ended."""
    checkpoints()
    tasks = [partial(load_all, [m.fixture], m.seat, OURS, m.make) for m in MUTANTS.values()]
    found = in_children(tasks)
    return {
        name: str(each) if isinstance(each, Refused) else each[MUTANTS[name].fixture]
        for name, each in zip(MUTANTS, found, strict=True)
    }


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_noticed(name: str):
    found = mutant_outcomes()[name]
    if isinstance(found, str):
        assert found.startswith(("LoadError", "TopologyError")), found
    else:
        assert found.wrong


# --- the published sizes ---

HIDDEN, WIDTH, BLOCK, SOME = 3072, 1536, 128, 16
PUBLISHED = {
    **CONFIG,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rotary_dim": 64,
    "num_local_experts": SOME,
    "vocab_size": 1024,
    "quantization_config": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "float8_e4m3fn",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    },
}
EXPERTS = "model.layers.0.block_sparse_moe.experts"


@pytest.fixture(scope="module")
def published() -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
    """One layer with 16 experts of the published size, of random bytes."""
    preload()
    generator = torch.Generator().manual_seed(3)

    def quantised(rows: int, columns: int) -> dict[str, torch.Tensor]:
        codes = torch.randint(0, 127, (rows, columns), generator=generator, dtype=torch.uint8)
        scale = torch.rand(rows // BLOCK, columns // BLOCK, generator=generator) + 0.5
        return {"weight": codes.view(torch.float8_e4m3fn), "weight_scale_inv": scale}

    attention, tensors = "model.layers.0.self_attn", dict[str, torch.Tensor]()
    matrices = {
        f"{attention}.q_proj": (6144, HIDDEN),
        f"{attention}.k_proj": (1024, HIDDEN),
        f"{attention}.v_proj": (1024, HIDDEN),
        f"{attention}.o_proj": (HIDDEN, 6144),
    }
    for expert in range(SOME):
        for name in ("w1", "w2", "w3"):
            shape = (HIDDEN, WIDTH) if name == "w2" else (WIDTH, HIDDEN)
            matrices[f"{EXPERTS}.{expert}.{name}"] = shape
    for module, shape in matrices.items():
        tensors |= {f"{module}.{kind}": each for kind, each in quantised(*shape).items()}
    plain = {
        "model.embed_tokens.weight": (1024, HIDDEN),
        "lm_head.weight": (1024, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "model.layers.0.input_layernorm.weight": (HIDDEN,),
        "model.layers.0.post_attention_layernorm.weight": (HIDDEN,),
        f"{attention}.q_norm.weight": (6144,),
        f"{attention}.k_norm.weight": (1024,),
        "model.layers.0.block_sparse_moe.gate.weight": (SOME, HIDDEN),
        "model.layers.0.block_sparse_moe.e_score_correction_bias": (SOME,),
    }
    tensors |= {name: torch.ones(shape).bfloat16() for name, shape in plain.items()}
    with TemporaryDirectory(prefix="published-") as made:
        folder = Path(made)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(PUBLISHED))
        yield folder, tensors


def spread(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What FP8 blocks stand for."""
    return codes.float() * scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


def load_published(
    folder: Path, size: int, rank: int, who: str, expert: int = 0
) -> dict[str, torch.Tensor]:
    """In a child: one expert's dequantised share of each matrix, without what is padding."""
    loaded = OneRank(folder, ["--tp-size", str(size)], rank=rank, who=who).load()
    held = dict(loaded.named_parameters())
    blocks = [12 // size + (each < 12 % size) for each in range(size)]
    mine, room = blocks[rank], max(blocks)
    high, lines = room * BLOCK, mine * BLOCK
    w13, w2 = (held[f"{EXPERTS}.{name}_weight"].data for name in ("w13", "w2"))
    s13, s2 = (held[f"{EXPERTS}.{name}_weight_scale_inv"].data for name in ("w13", "w2"))
    assert w13.shape == (SOME, 2 * high, HIDDEN)
    assert s13.shape == (SOME, 2 * room, HIDDEN // BLOCK)
    assert w2.shape == (SOME, HIDDEN, high)
    codes13 = w13.view(torch.uint8).unflatten(1, (2, high))
    assert not codes13[:, :, lines:].any()
    assert not w2.view(torch.uint8)[:, :, lines:].any()
    assert bool((s13.unflatten(1, (2, room))[:, :, mine:] == 1).all())
    assert bool((s2[:, :, mine:] == 1).all())
    gate_and_up = spread(w13[expert], s13[expert])
    return {
        "w1": gate_and_up[:lines].numpy(),
        "w3": gate_and_up[high : high + lines].numpy(),
        "w2": spread(w2[expert], s2[expert])[:, :lines].numpy(),
    }


@pytest.mark.parametrize("size", [8, pytest.param(16, marks=pytest.mark.slow)])
def test_shares_of_the_published_size_are_the_whole(size: int, published: Any):
    folder, tensors = published
    expert = SOME - 1
    tasks = [partial(load_published, folder, size, r, OURS, expert) for r in range(size)]
    shares = in_children(tasks)
    assert not [each for each in shares if isinstance(each, Refused)], shares
    for name, dim in (("w1", 0), ("w3", 0), ("w2", 1)):
        path = f"{EXPERTS}.{expert}.{name}"
        whole = spread(tensors[f"{path}.weight"], tensors[f"{path}.weight_scale_inv"])
        found = torch.cat([torch.from_numpy(each[name]) for each in shares], dim)
        assert torch.equal(found, whole), name


@pytest.mark.parametrize("size", [8, 16])
def test_sglangs_own_check_of_blocks_refuses_the_published_size(size: int, published: Any):
    with pytest.raises(Refused, match=r"is not divisible by weight quantization block_n = 128"):
        in_child(load_published, published[0], size, 0, IN_TREE)
