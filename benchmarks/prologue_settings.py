"""What the attention prologue is timed on: cases, tensors of one rank, and the bytes of a call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from jit_kernels.qk_norm_rope.contract import (
    ALONE,
    CacheWrite,
    Call,
    Group,
    Norm,
    Request,
    Rotation,
)
from sglang_minimax.topology import AttentionShard

# The published shape (MiniMax-M2's config.json).
HEADS, HEAD_DIM, ROTARY_DIM, EPS = (48, 8), 128, 64, 1e-6
#: Rows of the cos/sin table; positions are random among them, as those of running requests.
POSITIONS = 32768
#: Slots of the cache at least, so that writes are scattered as in a server's pool.
LEAST_SLOTS = 4096


@dataclass(frozen=True, slots=True)
class Case:
    """What a call does. cache_dtype None: no K/V write."""

    name: str
    what: str
    rotary_dim: int
    cache_dtype: torch.dtype | None


PROLOGUE = Case("prologue", "norm, rotary, K/V write in bf16", ROTARY_DIM, torch.bfloat16)
PROLOGUE_FP8 = Case(
    "prologue-fp8", "norm, rotary, K/V write in FP8 (e4m3)", ROTARY_DIM, torch.float8_e4m3fn
)
NORM = Case("norm", "norm only", 0, None)
CASES = {case.name: case for case in (PROLOGUE, PROLOGUE_FP8, NORM)}


@dataclass(frozen=True, slots=True)
class Setting:
    """One case for so many tokens on rank `rank` of an attention-TP group of `tp` ranks."""

    case: Case
    tokens: int
    tp: int
    device: torch.device
    rank: int = 0
    dtype: torch.dtype = torch.bfloat16

    @property
    def shard(self) -> AttentionShard:
        """The heads of this rank."""
        return AttentionShard(self.tp, self.rank, HEAD_DIM, *HEADS)

    def request(self) -> Request:
        """What an implementation is asked for."""
        cuda = self.device.type == "cuda"
        return Request(
            device=self.device.type,
            dtype=self.dtype,
            q_heads=self.shard.q_heads,
            kv_heads=self.shard.kv_heads,
            head_dim=HEAD_DIM,
            rotary_dim=self.case.rotary_dim,
            cache_dtype=self.case.cache_dtype,
            group_size=self.tp,
            capability=torch.cuda.get_device_capability(self.device) if cuda else None,
        )

    def bytes_moved(self) -> int:
        """The fewest bytes that one rank's call can move, each operand counted once.

        For each token: q and k read and written, v read, K and V written to the cache, a row of
        the fp32 cos/sin table, position and slot (8 bytes each). Once a call: the norm weights.
        What a sequence of kernels moves between its launches is not counted, so its GB/s are the
        rate of useful bytes.
        """
        shard, size = self.shard, self.dtype.itemsize
        token = 2 * (shard.q_width + shard.kv_width) * size
        if self.case.rotary_dim:
            token += self.case.rotary_dim * 4 + 8
        if self.case.cache_dtype is not None:
            token += shard.kv_width * (size + 2 * self.case.cache_dtype.itemsize) + 8
        return self.tokens * token + (shard.q_width + shard.kv_width) * size


@dataclass(slots=True)
class Inputs:
    """The tensors of one rank's call; q, k and v are views of `packed`, as projected.

    packed: [tokens, q_width + 2 * kv_width]. weights have only 1 and -1: a call overwrites its
    input, and after thousands of calls any other weights had led to zeros or infinities, on which
    a chip is not timed as it works.
    """

    setting: Setting
    packed: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    norm: Norm
    rotation: Rotation | None
    cache: CacheWrite | None

    def call(self, group: Group = ALONE) -> Call:
        """The call of this rank in `group`."""
        return Call(self.q, self.k, self.norm, group, self.rotation, self.cache)

    def copied(self) -> Inputs:
        """The same inputs in tensors of their own: q, k, v and caches; constants are shared."""
        packed = self.packed.clone()
        q, k, v = views(self.setting, packed)
        cache = self.cache
        if cache is not None:
            caches = (x.view(torch.uint8).clone().view(x.dtype) for x in _caches(cache))
            k_cache, v_cache = caches
            cache = replace(cache, v=v, k_cache=k_cache, v_cache=v_cache)
        return replace(self, packed=packed, q=q, k=k, v=v, cache=cache)


def _caches(cache: CacheWrite) -> tuple[torch.Tensor, torch.Tensor]:
    return cache.k_cache, cache.v_cache


def views(setting: Setting, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v of a packed projection."""
    shard = setting.shard
    return packed.split([shard.q_width, shard.kv_width, shard.kv_width], dim=-1)


def make(setting: Setting, *, rotary_dim: int | None = None, seed: int = 7) -> Inputs:
    """Random inputs on the setting's device. rotary_dim: another width of the rotation."""
    shard, device = setting.shard, setting.device
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32)

    width = shard.q_width + 2 * shard.kv_width
    packed = random(setting.tokens, width).to(setting.dtype)
    q, k, v = views(setting, packed)
    weights = [random(x.shape[1]).sign().to(setting.dtype) for x in (q, k)]
    norm = Norm(weights[0], weights[1], shard.q_divisor, shard.k_divisor, EPS)
    rotation = cache = None
    rotary = setting.case.rotary_dim if rotary_dim is None else rotary_dim
    if rotary:
        angles = random(POSITIONS, rotary // 2) * 3
        table = torch.cat([angles.cos(), angles.sin()], dim=-1)
        positions = torch.randint(POSITIONS, (setting.tokens,), generator=generator, device=device)
        rotation = Rotation(positions, table, HEAD_DIM)
    if setting.case.cache_dtype is not None:
        slots = max(LEAST_SLOTS, 2 * setting.tokens)
        shape = (slots, shard.kv_heads, HEAD_DIM)
        caches = [torch.zeros(shape, device=device).to(setting.case.cache_dtype) for _ in "kv"]
        # Slot 0 is the one that SGLang keeps for padding.
        chosen = torch.randperm(slots - 1, generator=generator, device=device)[: setting.tokens]
        cache = CacheWrite(v, caches[0], caches[1], chosen + 1, first_slot=1)
    return Inputs(setting, packed, q, k, v, norm, rotation, cache)
