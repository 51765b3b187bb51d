"""SGLang's parameters of every fixture on every rank, by hand, from SGLang 0.5.23's sources.

The second column of each table is from the `create_weights` of the method that SGLang chooses
(layers/quantization/...); nothing here asks our package how a tensor is cut. In short:

  qkv_proj holds the rank's rows of q, k and v one after the other, o_proj its columns;
  w13 holds for each local expert the rows of w1 (gate) and then those of w3 (up), w2 its columns;
  where the formats store matrices transposed, so do the parameters, and "rows" are columns there;
  a scale of a whole matrix has one place for each of q, k, v, or of w1, w3; some have one for all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

from tests.formats import awq, compressed_tensors, fp8, gptq, modelslim, mxfp4, nvfp4
from tests.formats.base import EXPERTS, HIDDEN, LAYERS, VOCABULARY, WIDTH, Fixture
from tests.formats.oracle import same

MODULES = (fp8, compressed_tensors, awq, gptq, nvfp4, mxfp4, modelslim)
FIXTURES = {name: made for module in MODULES for name, made in module.FIXTURES.items()}

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Q_ROWS, KV_HEADS, HEAD_ROWS = 512, 4, 64


# --- where a rank stands ---


@dataclass(frozen=True)
class Seat:
    """One rank of a shape."""

    tp: int = 1
    ep: int = 1
    dp: int = 1
    pp: int = 1
    rank: int = 0

    @property
    def arguments(self) -> list[str]:
        """The server's command line."""
        sizes = {"tp": self.tp, "ep": self.ep, "dp": self.dp, "pp": self.pp}
        words = [word for k, v in sizes.items() if v > 1 for word in (f"--{k}-size", str(v))]
        return [*words, *(["--enable-dp-attention"] if self.dp > 1 else [])]

    @property
    def stage(self) -> int:
        """Pipeline stage."""
        return self.rank // self.tp

    @property
    def in_stage(self) -> int:
        """TP rank."""
        return self.rank % self.tp

    @property
    def layers(self) -> range:
        """Of three, the second stage has two."""
        return range(LAYERS) if self.pp == 1 else (range(1), range(1, LAYERS))[self.stage]

    @property
    def experts(self) -> range:
        """Neighbouring ranks share experts."""
        each = EXPERTS // self.ep
        first = self.in_stage // (self.tp // self.ep) * each
        return range(first, first + each)

    def q(self) -> range:
        """Rows of q, and columns of o, in the rank's attention group."""
        size = self.tp // self.dp
        return part(Q_ROWS, size, self.in_stage % size)

    def kv(self) -> range:
        """Rows of k and of v: whole heads, which neighbouring ranks repeat if there are too few."""
        size = self.tp // self.dp
        owners = min(size, KV_HEADS)
        return part(KV_HEADS * HEAD_ROWS, owners, self.in_stage % size * owners // size)

    def width(self, unit: int) -> tuple[range, int]:
        """Lines of each expert, and how many there are in memory; cards of `unit`, dealt."""
        size = self.tp // self.ep
        hands = [len(range(rank, WIDTH // unit, size)) * unit for rank in range(size)]
        mine = self.in_stage % size
        return range(sum(hands[:mine]), sum(hands[: mine + 1])), max(hands)


def part(total: int, size: int, rank: int) -> range:
    """The part of one of `size` equal ranks."""
    assert total % size == 0
    return range(total // size * rank, total // size * (rank + 1))


def seats(**sizes: int) -> list[Seat]:
    """All ranks of a shape."""
    return [Seat(**sizes, rank=rank) for rank in range(sizes.get("tp", 1) * sizes.get("pp", 1))]


SHAPES: Mapping[str, list[Seat]] = {
    "tp1": seats(),
    "tp2": seats(tp=2),
    "tp4": seats(tp=4),
    "ep2": seats(tp=2, ep=2),
    "tp4ep2": seats(tp=4, ep=2),
    "pp2": seats(pp=2),
    "dp2": seats(tp=2, dp=2),
    # Two ranks for each KV head, and experts that are whole on every rank.
    "tp8ep8": seats(tp=8, ep=8),
}


# --- parameters of the formats ---


@dataclass(frozen=True)
class Kind:
    """A kind of tensor and its parameter.

    dims: of the tensor in the checkpoint, and of a linear parameter: "r" for rows of the matrix,
    "c" for columns, "r64" where an element covers 64 of them, "all" where no rank cuts it; none for
    a scalar. parts: `joined` along rows, `each` in a place of its own, `one` for all, because they
    are alike. dtype: of a parameter that differs from the checkpoint.
    """

    dims: tuple[str, ...]
    parts: str = "joined"
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Experts:
    """What is different in experts.

    unit: lines of their width that stay together. padding: kind -> what a rank has beyond its
    lines, 0 if not said. transposed: kinds whose parameter is. everybody: kinds of which every rank
    has those of all experts.
    """

    kinds: Mapping[str, Kind]
    unit: int = 1
    padding: Mapping[str, int] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    everybody: tuple[str, ...] = ()


@dataclass(frozen=True)
class Form:
    """A format: its tensors in attention and in experts, and what SGLang makes itself.

    made_linear, made_experts: kinds of parameters without a tensor. kv_scales: whether attention
    has k_scale and v_scale.
    """

    linear: Mapping[str, Kind]
    experts: Experts
    made_linear: tuple[str, ...] = ()
    made_experts: tuple[str, ...] = ()
    kv_scales: bool = False


W = Kind(("r", "c"))
PLAIN = {"weight": W}
SCALAR_EACH, SCALAR_ONE = Kind((), "each", FP32), Kind((), "one", FP32)

#: fp8.py: Fp8LinearMethod.create_weights, Fp8MoEMethod.create_weights, block_quant.
_BLOCK_SCALE = Kind(("r64", "c64"), dtype=FP32)
FP8_BLOCKS = Form(
    {**PLAIN, "weight_scale_inv": _BLOCK_SCALE},
    Experts({**PLAIN, "weight_scale_inv": _BLOCK_SCALE}, 64, {"weight_scale_inv": 1}),
    kv_scales=True,
)
#: The same without blocks: [parts] and [E, 2] or [E]; `input_scale` of experts is [E].
_DYNAMIC = {**PLAIN, "weight_scale": SCALAR_EACH}
FP8_DYNAMIC = Form(_DYNAMIC, Experts(_DYNAMIC), kv_scales=True)
_STATIC = (
    {**_DYNAMIC, "input_scale": SCALAR_EACH},
    Experts({**_DYNAMIC, "input_scale": SCALAR_ONE}),
)
FP8_STATIC = Form(*_STATIC, kv_scales=True)
#: modelopt_quant.py: ModelOptFp8LinearMethod, ModelOptFp8MoEMethod.
MODELOPT = Form(*_STATIC)

#: compressed_tensors/schemes: CompressedTensorsW8A8Fp8, CompressedTensorsW8A8Fp8MoE; scales are
#: fp32 whatever the checkpoint has, and [1] in the checkpoint where there is one.
_CHANNEL = {**PLAIN, "weight_scale": Kind(("r", "all"), dtype=FP32)}
_TENSOR = {**PLAIN, "weight_scale": Kind(("all",), "each", FP32)}
_CT_STATIC = Kind(("all",), "each", FP32), Kind(("all",), "one", FP32)
CT_CHANNEL = Form(_CHANNEL, Experts(_CHANNEL))
CT_TENSOR = Form(_TENSOR, Experts(_TENSOR))
CT_STATIC = Form(
    {**_TENSOR, "input_scale": _CT_STATIC[0]}, Experts({**_TENSOR, "input_scale": _CT_STATIC[1]})
)
_CT_BLOCKS = {**PLAIN, "weight_scale": _BLOCK_SCALE}
CT_BLOCKS = Form(_CT_BLOCKS, Experts(_CT_BLOCKS, 64, {"weight_scale": 1}))

#: CompressedTensorsWNA16 and ...WNA16MoE: experts are transposed, and their weight_shape has the
#: model's type. Eight values of eight are a word of zeros.
_EIGHTS = 0x88888888 - (1 << 32)
_SORTED = ("w13_g_idx_sort_indices", "w2_g_idx_sort_indices")
_NO_ORDER = (*_SORTED, "w13_weight_g_idx", "w2_weight_g_idx")


def _int4(scale: tuple[str, ...], unit: int) -> Form:
    linear = {
        "weight_packed": Kind(("r", "c8")),
        "weight_scale": Kind(scale),
        "weight_shape": Kind(("all",), "one"),
    }
    experts = Experts(
        {**linear, "weight_shape": Kind(("all",), "one", BF16)},
        unit,
        {"weight_packed": _EIGHTS, "weight_scale": 1},
        ("weight_packed", "weight_scale"),
    )
    return Form(linear, experts, made_experts=_NO_ORDER)


def _ordered(form: Form) -> Form:
    """With the group of each column; q, k, v have the same, and so do w1 and w3."""
    groups = {"weight_g_idx": Kind(("c",), "one")}
    experts = Experts(
        {**form.experts.kinds, **groups},
        transposed=form.experts.transposed,
    )
    return Form({**form.linear, **groups}, experts, made_experts=_SORTED)


#: awq_marlin: everything is [in, out], scales have the model's type.
_AWQ = {
    "qweight": Kind(("c", "r8")),
    "qzeros": Kind(("c64", "r8")),
    "scales": Kind(("c64", "r"), dtype=BF16),
}
AWQ = Form(_AWQ, Experts(_AWQ, 64, {"scales": 1}))


def _gptq(groups: str, unit: int) -> Form:
    """gptq_marlin: experts have fp16 scales and zero points in the model's type, as numbers."""
    common = {"qweight": Kind(("c8", "r")), "g_idx": Kind(("c",), "one")}
    linear = {
        **common,
        "qzeros": Kind((groups, "r8")),
        "scales": Kind((groups, "r"), dtype=BF16),
    }
    experts = {
        **common,
        "qzeros": Kind((groups, "r8"), dtype=BF16),
        "scales": Kind((groups, "r"), dtype=FP16),
    }
    return Form(linear, Experts(experts, unit), made_experts=_SORTED)


#: modelopt_quant.py: ModelOptFp4LinearMethod, ModelOptNvFp4FusedMoEMethod.
_NVFP4 = {
    "weight": Kind(("r", "c2")),
    "weight_scale": Kind(("r", "c16")),
    "weight_scale_2": SCALAR_EACH,
    "input_scale": SCALAR_EACH,
}
_SWIZZLED = ("w13_blockscale_swizzled", "w2_blockscale_swizzled")
_NVFP4_EXPERTS = Experts(_NVFP4, 16, everybody=("input_scale",))
#: quark_w4a4_mxfp4.py, quark_w4a4_mxfp4_moe.py.
_MXFP4 = {"weight": Kind(("r", "c2")), "weight_scale": Kind(("r", "c32"))}
#: modelslim_w8a8_int8.py, modelslim_w8a8_int8_moe.py: scales of experts are fp32.
_DYNAMIC_INT8 = {k: Kind(("r", "all"), dtype=FP32) for k in ("weight_scale", "weight_offset")}
_SLIM_EXPERTS = Experts({**PLAIN, **_DYNAMIC_INT8})
_SLIM_STATIC = {
    **PLAIN,
    "input_scale": Kind(("all",), "one"),
    "input_offset": Kind(("all",), "one"),
    "quant_bias": Kind(("r",)),
    "deq_scale": Kind(("r",)),
}

FORMS: Mapping[str, Form] = {
    "fp8-blocks": FP8_BLOCKS,
    "fp8-dynamic": FP8_DYNAMIC,
    "fp8-static": FP8_STATIC,
    "modelopt-fp8": MODELOPT,
    "ct-fp8-channel": CT_CHANNEL,
    "ct-fp8-tensor": CT_TENSOR,
    "ct-fp8-static": CT_STATIC,
    "ct-fp8-blocks": CT_BLOCKS,
    "ct-int4": _int4(("r", "c64"), 64),
    "ct-int4-channel": _int4(("r", "all"), 8),
    # Which group a column is in is known from all of the scales only.
    "ct-int4-ordered": _ordered(_int4(("r", "all"), 8)),
    "ct-int8": CT_CHANNEL,
    "awq": AWQ,
    "awq-experts": Form(PLAIN, AWQ.experts),
    "gptq": _gptq("c64", 64),
    "gptq-v2": _gptq("c64", 64),
    "gptq-act-order": _gptq("all", 8),
    "gptq-whole-rows": _gptq("all", 8),
    "nvfp4": Form(_NVFP4, _NVFP4_EXPERTS, (), _SWIZZLED, True),
    "nvfp4-experts": Form(PLAIN, _NVFP4_EXPERTS, (), _SWIZZLED, True),
    "nvfp4-own-file": Form(PLAIN, _NVFP4_EXPERTS, (), _SWIZZLED, True),
    "mxfp4": Form(_MXFP4, Experts(_MXFP4, 32), kv_scales=True),
    "mxfp4-experts": Form(PLAIN, Experts(_MXFP4, 32), kv_scales=True),
    "modelslim": Form({**PLAIN, **{k: Kind(("r", "all")) for k in _DYNAMIC_INT8}}, _SLIM_EXPERTS),
    "modelslim-static": Form(_SLIM_STATIC, _SLIM_EXPERTS, tuple(_DYNAMIC_INT8)),
}

#: Shapes at which ranks share an expert's width, which these formats cannot in SGLang.
WHOLE_EXPERTS = ("ct-int4-ordered", "gptq", "gptq-v2", "gptq-act-order")
SHARING = tuple(name for name, (seat, *_) in SHAPES.items() if seat.tp > seat.ep)
REFUSED = {(name, shape) for name in WHOLE_EXPERTS for shape in SHARING}


# --- the parameters of a rank ---


class Oracle:
    """The parameters of one rank, cut from the tensors of a fixture.

    parameters: by name. made: names of those that SGLang fills itself. used: names of tensors.
    """

    def __init__(self, fixture: Fixture, seat: Seat) -> None:
        self.fixture, self.seat, self.form = fixture, seat, FORMS[fixture.name]
        self.used: set[str] = set()
        self.made: set[str] = set()
        self.parameters = dict(self._all())

    def _tensor(self, name: str) -> torch.Tensor:
        self.used.add(name)
        return self.fixture.tensors[name]

    def _all(self) -> Iterator[tuple[str, torch.Tensor]]:
        seat = self.seat
        rows = part(VOCABULARY, seat.tp, seat.in_stage)
        # Under attention DP every group embeds its own tokens; the head stays cut over all.
        size = seat.tp // seat.dp
        embedded = part(VOCABULARY, size, seat.in_stage % size)
        if seat.stage == 0:
            yield self._rows("model.embed_tokens.weight", embedded)
        if seat.stage == seat.pp - 1:
            yield self._rows("model.norm.weight", range(HIDDEN))
            yield self._rows("lm_head.weight", rows)
        for layer in seat.layers:
            yield from self._layer(f"model.layers.{layer}")

    def _rows(self, name: str, rows: range) -> tuple[str, torch.Tensor]:
        return name, self._tensor(name)[rows.start : rows.stop]

    def _layer(self, path: str) -> Iterator[tuple[str, torch.Tensor]]:
        seat, attention, moe = self.seat, f"{path}.self_attn", f"{path}.block_sparse_moe"
        hidden = range(HIDDEN)
        yield self._rows(f"{path}.input_layernorm.weight", hidden)
        yield self._rows(f"{path}.post_attention_layernorm.weight", hidden)
        yield self._rows(f"{attention}.q_norm.weight", seat.q())
        yield self._rows(f"{attention}.k_norm.weight", seat.kv())
        yield self._rows(f"{moe}.gate.weight", range(EXPERTS))
        yield self._rows(f"{moe}.e_score_correction_bias", range(EXPERTS))
        for kind, how in self.form.linear.items():
            thirds = [
                self._cut(f"{attention}.{name}_proj.{kind}", how, rows, hidden)
                for name, rows in (("q", seat.q()), ("k", seat.kv()), ("v", seat.kv()))
            ]
            yield f"{attention}.qkv_proj.{kind}", packed(thirds, how)
            o = self._cut(f"{attention}.o_proj.{kind}", how, hidden, seat.q())
            yield f"{attention}.o_proj.{kind}", packed([o], how)
        experts = f"{moe}.experts"
        for kind in self.form.experts.kinds:
            yield f"{experts}.w13_{kind}", self._experts(experts, kind, ("w1", "w3"))
            yield f"{experts}.w2_{kind}", self._experts(experts, kind, ("w2",))
        scales = ("k_scale", "v_scale") if self.form.kv_scales else ()
        self.made |= {f"{attention}.attn.{name}" for name in scales}
        self.made |= {
            f"{attention}.{p}.{k}" for p in ("qkv_proj", "o_proj") for k in self.form.made_linear
        }
        self.made |= {f"{experts}.{name}" for name in self.form.made_experts}

    def _experts(self, path: str, kind: str, names: tuple[str, ...]) -> torch.Tensor:
        """One parameter: its part of each expert."""
        form, how = self.form.experts, self.form.experts.kinds[kind]
        lines, room = self.seat.width(form.unit)
        rows, columns = (range(HIDDEN), lines) if names == ("w2",) else (lines, range(HIDDEN))
        along = "c" if names == ("w2",) else "r"
        chosen = range(EXPERTS) if kind in form.everybody else self.seat.experts
        each = []
        for expert in chosen:
            parts = [
                padded(
                    self._cut(f"{path}.{expert}.{name}.{kind}", how, rows, columns),
                    how.dims,
                    along,
                    room,
                    form.padding.get(kind, 0),
                )
                for name in names
            ]
            value = packed(parts, how)
            if how.parts == "one" and how.dims in ((), ("all",)) and value.numel() == 1:
                value = value.reshape(())  # [E], however the checkpoint writes a scalar
            elif how.parts == "each" and names == ("w2",):
                value = value.reshape(())
            each.append(value.t() if kind in form.transposed else value)
        return torch.stack(each)

    def _cut(self, name: str, how: Kind, rows: range, columns: range) -> torch.Tensor:
        """The rank's part of one tensor."""
        index = []
        for dim in how.dims:
            if dim == "all":
                index.append(slice(None))
                continue
            lines, per = rows if dim[0] == "r" else columns, int(dim[1:] or 1)
            assert lines.start % per == lines.stop % per == 0, (name, dim, lines)
            index.append(slice(lines.start // per, lines.stop // per))
        tensor = self._tensor(name)
        assert tensor.dim() == len(how.dims), (name, tensor.shape)
        return tensor[tuple(index)]


def padded(
    tensor: torch.Tensor, dims: tuple[str, ...], along: str, room: int, padding: int
) -> torch.Tensor:
    """With `padding` behind it, until it covers `room` lines."""
    for axis, dim in enumerate(dims):
        if dim == "all" or dim[0] != along:
            continue
        shape = list(tensor.shape)
        shape[axis] = room // int(dim[1:] or 1) - shape[axis]
        more = torch.full(shape, padding).to(tensor.dtype)  # FP8 is not filled, but converted
        return (
            torch.cat([tensor.view(torch.uint8), more.view(torch.uint8)], axis).view(tensor.dtype)
            if tensor.itemsize == 1
            else torch.cat([tensor, more], axis)
        )
    return tensor


def packed(parts: list[torch.Tensor], how: Kind) -> torch.Tensor:
    """q, k and v, or w1 and w3, in one parameter."""
    if how.parts == "one":
        value = parts[-1]
    elif how.parts == "each":
        value = torch.stack([each.reshape(()) for each in parts])
    else:
        axis = next(i for i, dim in enumerate(how.dims) if dim[0] == "r")
        raw = [each.view(torch.uint8) if each.itemsize == 1 else each for each in parts]
        value = torch.cat(raw, axis).view(parts[0].dtype)
    return value.to(how.dtype or value.dtype)


# --- the comparison ---


@dataclass
class Found:
    """What the parameters of a rank are.

    wrong: what differs from the oracle, in words. compared: parameters; bytes: in them. digests:
    name -> type, shape and hash of those that a checkpoint fills. used: tensors of the checkpoint.
    loader: its class.
    """

    wrong: list[str]
    compared: int
    bytes: int
    digests: dict[str, tuple[str, tuple[int, ...], str]]
    used: set[str]
    loader: str | None = None


def compare(oracle: Oracle, parameters: Mapping[str, torch.Tensor]) -> Found:
    """Every parameter of a model with the oracle's."""
    wrong, size = [], 0
    for name, found in parameters.items():
        if name in oracle.made:
            continue
        wanted = oracle.parameters.get(name)
        if wanted is None:
            wrong.append(f"{name}: not known")
        elif (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
            wrong.append(
                f"{name}: {found.dtype} {list(found.shape)}, not {wanted.dtype} "
                f"{list(wanted.shape)}"
            )
        elif not same(found.detach(), wanted):
            wrong.append(f"{name}: other values")
        size += found.nbytes
    absent = (oracle.parameters.keys() | oracle.made) - parameters.keys()
    wrong += [f"{name}: absent" for name in sorted(absent)]
    digests = {n: digest(p.detach()) for n, p in parameters.items() if n not in oracle.made}
    return Found(wrong, len(digests), size, digests, oracle.used)


def digest(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], str]:
    """Type, shape and hash of the bytes."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(raw).hexdigest()
