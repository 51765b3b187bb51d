"""Our K/V write and rotation against SGLang's own: the same bytes in SGLang's own pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.runtime_context import get_parallel

from jit_kernels.qk_norm_rope.op import ALONE, REFERENCE, Choice, Norm, Request, qk_norm_rope_
from jit_kernels.qk_norm_rope.reference import run as run_reference
from sglang_minimax.layers.kv_store import KVStore
from sglang_minimax.layers.prologue import Prologue
from sglang_minimax.layers.qk_norm import ShardedNormWeight
from sglang_minimax.layers.rotation import facts_of, rotation, why_not
from sglang_minimax.topology import AttentionShard

HEADS, HEAD_DIM, LAYERS = 2, 16, 3
WIDTH = HEADS * HEAD_DIM
SLOTS = [5, 9, 17, 3]
FP8 = torch.float8_e4m3fn


class SubPool(MHATokenToKVPool):
    """A subclass may store in any way it likes."""


def make_pool(dtype: torch.dtype, kind: type = MHATokenToKVPool, page_size: int = 4) -> Any:
    """Layers 2, 3 and 4 of a pipeline stage."""
    pool = kind(
        size=32,
        page_size=page_size,
        dtype=dtype,
        head_num=HEADS,
        head_dim=HEAD_DIM,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
        start_layer=2,
        end_layer=4,
    )
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer.zero_()
    return pool


def make_attn(layer_id: int = 3, scales: tuple[float, float] | None = None) -> Any:
    """The attributes of a RadixAttention that bear on storing."""
    attn = SimpleNamespace(
        layer_id=layer_id,
        tp_k_head_num=HEADS,
        head_dim=HEAD_DIM,
        k_scale=None,
        v_scale=None,
        k_scale_float=None,
        v_scale_float=None,
    )
    if scales is not None:
        attn.k_scale, attn.v_scale = (torch.tensor(scale) for scale in scales)
        attn.k_scale_float, attn.v_scale_float = scales
    return attn


class TritonAttnBackend:
    """Called as a backend of SGLang that applies scales."""

    def __init__(self, pool: Any) -> None:
        self.token_to_kv_pool = pool


class OtherBackend(TritonAttnBackend):
    """Not known to apply scales."""


def make_batch(slots: list[int] | None = None, *, idle: bool = False) -> Any:
    return SimpleNamespace(
        out_cache_loc=torch.tensor(SLOTS if slots is None else slots),
        forward_mode=SimpleNamespace(is_idle=lambda: idle),
    )


Running = Callable[..., None]


@pytest.fixture
def running() -> Iterator[Running]:
    """Makes a pool that of the running forward."""
    with ExitStack() as stack:
        stack.enter_context(get_parallel().override(attn_cp_size=1, attn_dcp_size=1))

        def enter(pool: Any, backend: type = TritonAttnBackend) -> None:
            context = ForwardContext(attn_backend=backend(pool))
            stack.enter_context(forward_context(context))

        yield enter


def make_store(attn: Any, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> tuple[Any, Any]:
    """A store, and the list of what it said."""
    said: list[str] = []
    settings = {
        "rotated": True,
        "implementation": "reference",
        "compute": dtype,
        "prepare": lambda dtype: "",
        "say": said.append,
        **changes,
    }
    return KVStore(attn, **settings), said


def rows(seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def store_ours(
    store: KVStore, k: torch.Tensor, v: torch.Tensor, slots: list[int] | None = None
) -> None:
    """The prologue's write alone: a norm of constant size and no rotation leave k known."""
    write = store.target(v, make_batch(slots))
    assert write is not None
    norm = Norm(torch.ones(WIDTH, dtype=k.dtype), torch.ones(WIDTH, dtype=k.dtype), WIDTH, WIDTH, 0)
    qk_norm_rope_(Choice("reference", "", run_reference), k.clone(), k, norm, cache=write)


def normed(seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of +1 and -1, which a norm leaves as they are, to the bit."""
    return rows(seed, torch.float32).sign().to(dtype)


@pytest.mark.parametrize(
    ("compute", "stored", "scales"),
    [
        (torch.float32, torch.float32, None),
        (torch.bfloat16, torch.bfloat16, None),
        (torch.float16, torch.float16, None),
        # Scales belong to FP8: SGLang leaves them out for other pools, and so do we.
        (torch.bfloat16, torch.bfloat16, (0.5, 2.0)),
        (torch.bfloat16, FP8, None),
        (torch.bfloat16, torch.float8_e5m2, None),
        # Powers of two, so that SGLang's division in bf16 is exact, as ours in fp32 is.
        (torch.bfloat16, FP8, (0.25, 4.0)),
        (torch.float16, torch.float8_e5m2, (2.0, 0.5)),
    ],
)
@pytest.mark.parametrize("page_size", [1, 4])
def test_the_same_bytes_as_sglangs_store(
    running: Running,
    compute: torch.dtype,
    stored: torch.dtype,
    scales: tuple[float, float] | None,
    page_size: int,
) -> None:
    ours, theirs = (make_pool(stored, page_size=page_size) for _ in range(2))
    attn = make_attn(scales=scales)
    k, v = normed(1, compute), rows(2, compute)
    theirs.set_kv_buffer(
        attn,
        torch.tensor(SLOTS),
        k.clone().view(-1, HEADS, HEAD_DIM),
        v.clone().view(-1, HEADS, HEAD_DIM),
        attn.k_scale,
        attn.v_scale,
    )
    running(ours)
    store, said = make_store(attn, compute)
    before = v.clone()
    store_ours(store, k, v)
    assert said == [""]
    assert torch.equal(v, before)
    for mine, its in zip(
        (*ours.k_buffer, *ours.v_buffer), (*theirs.k_buffer, *theirs.v_buffer), strict=True
    ):
        assert torch.equal(mine.view(torch.uint8), its.view(torch.uint8))
    # Not empty by mistake, and in no other layer of the stage.
    assert [bool(each.any()) for each in ours.k_buffer] == [False, True, False]


def test_padding_is_not_stored(running: Running) -> None:
    """Rows of padding name slot 0, which SGLang's kernel on GPUs skips as well."""
    pool = make_pool(torch.bfloat16)
    running(pool)
    store, _ = make_store(make_attn())
    store_ours(store, normed(1, torch.bfloat16), rows(2), [5, 0, 0, 3])
    for buffer in (pool.k_buffer[1], pool.v_buffer[1]):
        written = buffer.flatten(1).bool().any(-1).nonzero().flatten().tolist()
        assert written == [3, 5]


@pytest.mark.parametrize(
    ("pool", "words"),
    [
        (lambda: make_pool(torch.bfloat16, SubPool), "SubPool is not SGLang's plain KV pool"),
        (lambda: make_pool(torch.float16), "holds torch.float16, k and v are torch.bfloat16"),
    ],
)
def test_sglang_stores_where_we_cannot(
    running: Running, pool: Callable[[], Any], words: str
) -> None:
    running(pool())
    store, said = make_store(make_attn())
    assert store.target(rows(1), make_batch()) is None
    assert store.target(rows(1), make_batch()) is None
    assert len(said) == 1, "it is said once a pool, not once a call"
    assert words in said[0]


def test_heads_outside_of_slots(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_HND_KVCACHE", "1")
    running(make_pool(torch.bfloat16))
    store, said = make_store(make_attn())
    assert store.target(rows(1), make_batch()) is None
    assert said == ["the layout of the KV pool is hnd"]


def test_scales_of_a_backend_that_may_ignore_them(running: Running) -> None:
    pool = make_pool(FP8)
    running(pool, OtherBackend)
    store, said = make_store(make_attn(scales=(0.5, 1.0)))
    assert store.target(rows(1), make_batch()) is None
    assert "OtherBackend may not apply the FP8 scales (0.5, 1.0)" in said[0]
    store, said = make_store(make_attn(scales=(1.0, 1.0)))
    assert store.target(rows(1), make_batch()) is not None
    # The same pool under another backend is looked at again.
    store, said = make_store(make_attn(scales=(0.5, 1.0)))
    assert store.target(rows(1), make_batch()) is None
    running(pool)
    write = store.target(rows(1), make_batch())
    assert write is not None
    assert (write.k_scale, write.v_scale) == (0.5, 1.0)
    assert len(said) == 2


def test_scales_that_the_host_does_not_know(running: Running) -> None:
    running(make_pool(FP8))
    attn = make_attn(scales=(0.5, 1.0))
    attn.v_scale_float = None
    store, said = make_store(attn)
    assert store.target(rows(1), make_batch()) is None
    assert said == ["the FP8 scales are not known to the host"]


def test_context_parallel_ranks_and_checked_slots(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    running(make_pool(torch.bfloat16))
    with get_parallel().override(attn_dcp_size=2):
        store, said = make_store(make_attn())
        assert store.target(rows(1), make_batch()) is None
        assert "2 ranks share the context of a decode" in said[0]
    monkeypatch.setenv("SGLANG_ENABLE_ASYNC_ASSERT", "1")
    store, said = make_store(make_attn())
    assert store.target(rows(1), make_batch()) is None
    assert "SGLANG_ENABLE_ASYNC_ASSERT" in said[0]


def test_rows_that_are_not_those_of_the_slots(running: Running) -> None:
    running(make_pool(torch.bfloat16))
    store, said = make_store(make_attn())
    assert store.target(rows(1), make_batch([1, 2, 3])) is None
    assert store.target(rows(1), make_batch(idle=True)) is None
    none = make_batch()
    none.out_cache_loc = None
    assert store.target(rows(1), none) is None
    assert said == [], "such a batch says nothing about the pool"
    assert store.target(rows(1), make_batch()) is not None


def test_what_cannot_be_prepared_is_left_to_sglang(running: Running) -> None:
    running(make_pool(torch.bfloat16))
    asked: list[torch.dtype] = []

    def prepare(dtype: torch.dtype) -> str:
        asked.append(dtype)
        return "no compiler"

    store, said = make_store(make_attn(), prepare=prepare)
    assert store.target(rows(1), make_batch()) is None
    assert (asked, said) == ([torch.bfloat16], ["no compiler"])


def test_a_pool_that_is_replaced_is_looked_at_again_and_not_kept(running: Running) -> None:
    import weakref

    store, said = make_store(make_attn())
    first = make_pool(torch.bfloat16)
    running(first)
    assert store.target(rows(1), make_batch()) is not None
    gone = weakref.ref(first)
    with forward_context(ForwardContext(attn_backend=TritonAttnBackend(make_pool(torch.float16)))):
        assert store.target(rows(1), make_batch()) is None
    assert len(said) == 2
    assert gone() is first


# --- rotation ---


def make_rope(scaling: dict[str, Any] | None = None, **changes: Any) -> Any:
    settings = {"rotary_dim": 8, "max_position": 64, "base": 10000, "is_neox_style": True}
    return get_rope(HEAD_DIM, rope_scaling=scaling, dtype=torch.float32, **{**settings, **changes})


SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: (scaling or {}).get("rope_type"))
def test_the_same_rotation_as_sglangs(scaling: dict[str, Any] | None) -> None:
    """Whatever makes the table: a module whose class computes in its own way is not used."""
    rope = make_rope(scaling)
    assert why_not(rope, head_dim=HEAD_DIM, implementation="reference", device="cpu") == ""
    q, k = rows(3, torch.float32), rows(4, torch.float32)
    positions = torch.tensor([0, 7, 63, 20])
    expected = rope.forward_native(positions, q.clone(), k.clone())
    # A norm that changes nothing: rows of mean square 1.
    q, k = (x * (WIDTH**0.5) / x.norm(dim=-1, keepdim=True) for x in (q, k))
    expected = rope.forward_native(positions, q.clone(), k.clone())
    norm = Norm(torch.ones(WIDTH), torch.ones(WIDTH), WIDTH, WIDTH, 0)
    turn = rotation(rope, positions, HEAD_DIM)
    qk_norm_rope_(Choice("reference", "", run_reference), q, k, norm, rotation=turn)
    # The norm's own rounding: mean and root are 1 up to a few units of 2**-24.
    torch.testing.assert_close((q, k), expected, rtol=1e-6, atol=1e-6)


def test_modules_that_rotate_otherwise_keep_their_rotation() -> None:
    def reason(rope: Any, implementation: str = "reference", device: str = "cpu") -> str:
        return why_not(rope, head_dim=HEAD_DIM, implementation=implementation, device=device)

    assert "neighbours" in reason(make_rope(is_neox_style=False))
    mrope = make_rope({"rope_type": "default", "mrope_section": [1, 1, 2]})
    assert "MRotaryEmbedding rotates in its own way" in reason(mrope)
    assert "nn.Identity" not in reason(torch.nn.Identity())
    assert "Identity rotates in its own way" in reason(torch.nn.Identity())
    # Facts of a plain one, as the kernels see it.
    facts = facts_of(make_rope(), head_dim=HEAD_DIM, implementation="cuda", device="cuda")
    assert (facts.cache_shape, facts.cache_dtype) == ((64, 8), torch.float32)
    assert reason(make_rope(), "cuda", "cuda") == ""


# --- torch.compile ---


def test_torch_compile_traces_the_prologue_in_one_graph(running: Running) -> None:
    """And leaves the K/V pool, which is not the compiler's business, to SGLang."""
    running(make_pool(torch.float32))
    shard = AttentionShard(1, 0, HEAD_DIM, 4, HEADS)
    q_norm, k_norm = (ShardedNormWeight(range(n), n) for n in (shard.q_width, shard.kv_width))
    for norm in (q_norm, k_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    prologue = Prologue.__new__(Prologue)
    prologue._q_norm, prologue._k_norm, prologue._head_dim = q_norm, k_norm, HEAD_DIM
    prologue._widths = (shard.q_width, shard.kv_width, shard.kv_width)
    prologue._divisors = (shard.q_divisor, shard.k_divisor)
    prologue._rotary, prologue._eps, prologue._no_rotation = make_rope(), 1e-6, ""
    prologue._group = ALONE
    request = Request("cpu", torch.float32, 4, HEADS, HEAD_DIM)
    prologue._plain = prologue._storing = Choice("reference", "", REFERENCE.prepare(request))
    prologue._store, _ = make_store(make_attn(), torch.float32)
    qkv = torch.randn(4, shard.q_width + 2 * WIDTH)
    positions, batch = torch.tensor([1, 2, 3, 4]), make_batch()
    eager = prologue(positions, qkv.clone(), batch)
    assert eager.stored
    compiled = torch.compile(
        lambda positions, qkv: tuple(prologue(positions, qkv, batch)),
        backend="eager",
        fullgraph=True,
        dynamic=True,
    )
    traced = compiled(positions, qkv.clone())
    assert traced[3] is False
    torch.testing.assert_close(traced[:3], tuple(eager[:3]), rtol=1e-6, atol=1e-6)
