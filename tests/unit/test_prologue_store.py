"""Our K/V write and rotation against SGLang's own: the same bytes in SGLang's own pool."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt import runtime_context
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.runtime_context import get_parallel

from jit_kernels.qk_norm_rope import op
from jit_kernels.qk_norm_rope.op import Choice, KernelUnavailable, Norm, Request, qk_norm_rope_
from jit_kernels.qk_norm_rope.reference import run as run_reference
from sglang_minimax.layers import path
from sglang_minimax.layers import prologue as prologue_module
from sglang_minimax.layers.kv_store import WHILE_CAPTURING, KVStore
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
        quant_method=None,
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
    store, said = make_store(make_attn())
    first = make_pool(torch.bfloat16)
    gone = weakref.ref(first)
    with forward_context(ForwardContext(attn_backend=TritonAttnBackend(first))):
        assert store.target(rows(1), make_batch()) is not None
    del first
    gc.collect()
    assert gone() is None
    running(make_pool(torch.float16))
    assert store.target(rows(1), make_batch()) is None
    assert len(said) == 2


def test_what_a_capture_could_not_prepare_is_asked_for_again(running: Running) -> None:
    running(make_pool(torch.bfloat16))
    answers = [WHILE_CAPTURING, WHILE_CAPTURING, "", "not asked again"]
    store, said = make_store(make_attn(), prepare=lambda dtype: answers.pop(0))
    found = [store.target(rows(1), make_batch()) is not None for _ in range(4)]
    assert found == [False, False, True, True]
    assert said == [WHILE_CAPTURING, WHILE_CAPTURING, ""]


def test_scales_that_change_are_judged_again(running: Running) -> None:
    """A weight update may bring other scales, or leave the host without their values."""
    running(make_pool(FP8))
    attn = make_attn(scales=(0.5, 1.0))
    store, said = make_store(attn)

    def scales() -> tuple[float, float] | None:
        write = store.target(rows(1), make_batch())
        return None if write is None else (write.k_scale, write.v_scale)

    assert scales() == (0.5, 1.0)
    attn.v_scale_float = 4.0
    assert scales() == (0.5, 4.0)
    attn.v_scale_float = None
    assert scales() is None
    assert said == ["", "", "the FP8 scales are not known to the host"]
    attn.v_scale_float = 4.0
    assert scales() == (0.5, 4.0)
    assert scales() == (0.5, 4.0)
    assert len(said) == 4, "and nothing is judged where nothing has changed"


def test_other_scales_are_judged_by_the_backends_rule(running: Running) -> None:
    running(make_pool(FP8), OtherBackend)
    attn = make_attn(scales=(1.0, 1.0))
    store, said = make_store(attn)
    assert store.target(rows(1), make_batch()) is not None
    attn.k_scale_float = 0.5
    assert store.target(rows(1), make_batch()) is None
    assert "OtherBackend may not apply the FP8 scales (0.5, 1.0)" in said[-1]


def test_what_runs_behind_sglangs_wrappers_is_judged(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--prefill-attention-backend with another --decode-attention-backend, and two batches."""
    from sglang.srt.layers.attention import hybrid_attn_backend
    from sglang.srt.layers.attention.tbo_backend import TboAttnBackend

    monkeypatch.setattr(
        hybrid_attn_backend,
        "get_spec",
        lambda: SimpleNamespace(speculative_attention_mode="prefill"),
    )
    pool = make_pool(FP8)

    def plain(kind: type) -> Any:
        backend = kind(pool)
        backend.req_to_token_pool = backend.kv_index_translator = None
        backend.needs_cpu_seq_lens = False
        return backend

    def hybrid(prefill: type, decode: type) -> Any:
        runner = SimpleNamespace(
            kv_cache_dtype=FP8,
            token_to_kv_pool=pool,
            req_to_token_pool=None,
            kv_index_translator=None,
            model_config=SimpleNamespace(context_len=64),
        )
        return hybrid_attn_backend.HybridAttnBackend(runner, plain(prefill), plain(decode))  # type: ignore[arg-type]

    ours, other = TritonAttnBackend, OtherBackend
    backends = [
        (hybrid(ours, ours), True),
        (hybrid(ours, other), False),
        (hybrid(other, ours), False),
        (TboAttnBackend(plain(ours), []), True),
        (TboAttnBackend(hybrid(ours, other), []), False),
    ]
    store, said = make_store(make_attn(scales=(0.5, 1.0)))
    for backend, stores in backends:
        running(pool, lambda _, backend=backend: backend)
        assert (store.target(rows(1), make_batch()) is not None) == stores
    assert "OtherBackend may not apply the FP8 scales (0.5, 1.0)" in said


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
    assert "Identity rotates in its own way" in reason(torch.nn.Identity())
    # Facts of a plain one, as the kernels see it.
    facts = facts_of(make_rope(), head_dim=HEAD_DIM, implementation="cuda", device="cuda")
    assert (facts.cache_shape, facts.cache_dtype) == ((64, 8), torch.float32)
    assert reason(make_rope(), "cuda", "cuda") == ""


# --- the prologue of a layer ---


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """What a prologue reads of SGLang's settings, on the first rank of one."""
    settings = SimpleNamespace(kv_cache_dtype="auto")
    monkeypatch.setattr(prologue_module, "get_model", lambda: settings)
    monkeypatch.delenv(path.VARIABLE, raising=False)
    _forget()
    with get_parallel().override(tp_rank=0, pp_rank=0, attn_tp_rank=0):
        yield settings
    _forget()


def _forget() -> None:
    """What the process has chosen for other layers."""
    for kept in (prologue_module._prepared, prologue_module._say):
        kept.cache_clear()
    prologue_module._stores.clear()


def make_prologue(attn: Any = None, dtype: torch.dtype = torch.float32) -> Prologue:
    shard = AttentionShard(1, 0, HEAD_DIM, 4, HEADS)
    q_norm, k_norm = (
        ShardedNormWeight(range(n), n).to(dtype) for n in (shard.q_width, shard.kv_width)
    )
    for norm in (q_norm, k_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    return Prologue(q_norm, k_norm, shard, make_rope(), attn or make_attn(), eps=1e-6)


def test_torch_compile_traces_the_prologue_in_one_graph(
    running: Running, server: SimpleNamespace
) -> None:
    """And leaves the K/V pool, which is not the compiler's business, to SGLang."""
    running(make_pool(torch.float32))
    prologue = make_prologue()
    qkv = torch.randn(4, (4 + 2 * HEADS) * HEAD_DIM)
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


def test_the_pool_that_a_checkpoint_brings_is_prepared_for(server: SimpleNamespace) -> None:
    """So that nothing is compiled in the first forward."""

    def prepared(algorithm: str | None) -> list[torch.dtype | None]:
        prologue_module._stores.clear()
        attn = make_attn()
        config = SimpleNamespace(kv_cache_quant_algo=algorithm)
        attn.quant_method = SimpleNamespace(quant_config=config)
        make_prologue(attn)
        return [request.cache_dtype for request, _ in prologue_module._stores]

    assert prepared("FP8") == [FP8]
    assert prepared(None) == [torch.float32]
    server.kv_cache_dtype = "fp8_e5m2"
    assert prepared("FP8") == [torch.float8_e5m2]
    server.kv_cache_dtype = "mxfp8"
    assert prepared(None) == []


GPU = Request("cuda", torch.bfloat16, 4, HEADS, HEAD_DIM, capability=(9, 0))


class Kernel:
    """The first of our implementations, as it would be on one rank of an accelerator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing = False
        self.refuses: str | None = None
        self.compiles = True
        self.prepared = 0
        mine = op.Implementation("cuda", lambda request: self.refuses, self._prepare)
        monkeypatch.setattr(op, "IMPLEMENTATIONS", [mine, op.REFERENCE])
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    def _prepare(self, request: Request) -> Any:
        self.prepared += 1
        if not self.compiles:
            raise KernelUnavailable("nvcc stopped")
        return run_reference


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, server: SimpleNamespace) -> Kernel:
    return Kernel(monkeypatch)


def test_nothing_is_compiled_while_a_graph_is_captured(kernel: Kernel) -> None:
    kernel.capturing = True
    assert prologue_module._storing(GPU, "cuda") == WHILE_CAPTURING
    assert kernel.prepared == 0
    kernel.capturing = False
    found = prologue_module._storing(GPU, "cuda")
    assert not isinstance(found, str)
    kernel.capturing = True
    assert prologue_module._storing(GPU, "cuda") is found, "a later capture has it"
    assert kernel.prepared == 1


DEVICE = torch.device("cuda", 0)


def test_a_failed_compile_is_a_warning_of_each_group(
    kernel: Kernel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups decide for themselves: what fails in another than the first must be seen too."""
    caplog.set_level("INFO")

    def told(tp_rank: int, attn_tp_rank: int) -> list[tuple[int, str]]:
        caplog.clear()
        _forget()
        # Not by `override`, which checks ranks against the sizes that an earlier test has left.
        ranks = SimpleNamespace(tp_rank=tp_rank, attn_tp_rank=attn_tp_rank, pp_rank=0)
        for module in (runtime_context, prologue_module):
            monkeypatch.setattr(module, "get_parallel", lambda: ranks)
        prepared = prologue_module._prepared(GPU, DEVICE)
        prologue_module._say(path.summary(prepared.choice, GPU, ""), prepared.failed)
        prologue_module._storing(GPU, "cuda")
        return [(record.levelno, record.getMessage()) for record in caplog.records]

    assert [level for level, _ in told(0, 0)] == [logging.INFO]
    assert told(4, 0) == []
    kernel.refuses = "not for sm_75"
    assert [level for level, _ in told(0, 0)] == [logging.INFO]
    assert told(4, 0) == [], "a rule is no failure"
    kernel.refuses, kernel.compiles = None, False
    fallback, no_store = told(4, 0)
    assert (fallback[0], no_store[0]) == (logging.WARNING, logging.WARNING)
    assert "reference on cuda, attention-TP 1 (cuda: nvcc stopped)" in fallback[1]
    assert "Attention prologue: cuda cannot store K and V: " in no_store[1]
    assert "nvcc stopped" in no_store[1]
    assert told(0, 0) == [fallback, no_store]
    assert told(5, 1) == [], "one rank of a group says it"
