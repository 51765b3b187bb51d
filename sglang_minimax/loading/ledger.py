"""The ledger of one load on one rank: which tensor goes where, and what does not fit.

It sees names, types and shapes only, so a whole call, or the headers of a whole checkpoint, can be
judged before the first byte is read or written. No torch, no SGLang.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from sglang_minimax.config import Architecture
from sglang_minimax.loading.formats.base import PLAIN, ROWS, Shape
from sglang_minimax.loading.names import KV_SCALES, TensorName, omission, parse, spell
from sglang_minimax.loading.problems import Problems
from sglang_minimax.loading.slots import Slot, Slots, Stage

Box = tuple[range, ...]

#: What packs several matrices, one under the other, and in which order.
PACKED_MODULES = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}
BOTH_KV_SCALES = "kv_scale"
PACKED_PROJECTIONS = {"w13": ("w1", "w3"), "w31": ("w3", "w1")}

NO_KV_QUANTISATION = "KV scales without a quantised KV cache"

#: Modules that every format leaves in full precision, and what they are for people.
FULL_PRECISION = {
    "gate": "the router",
    "lm_head": "the head",
    "embed_tokens": "the embedding",
    "e_score_correction_bias": "the router's bias",
    "norm": "a norm",
    "q_norm": "a norm",
    "k_norm": "a norm",
    "input_layernorm": "a norm",
    "post_attention_layernorm": "a norm",
}


class Placement(NamedTuple):
    """One (tensor, part) that this rank needs.

    record: what it is, as one matrix of one expert. box: the elements of the checkpoint's tensor,
    for each of its dimensions. copies: how many times this rank holds the expert.
    """

    slot: Slot
    record: TensorName
    box: Box
    copies: int = 1


class _Fit(NamedTuple):
    """How tensors that are alike but for the expert go into slots.

    experts: of the model, 0 where the tensor is not an expert's. stacked: whether it holds all of
    them. parts: of each matrix in it, its record with expert None, its slots, and for each of these
    the box of the tensor, without the dimension of experts.
    """

    experts: int
    stacked: bool
    parts: tuple[tuple[TensorName, tuple[Slot, ...], tuple[Box, ...]], ...]


class Ledger:
    """Takes announced tensors one at a time; `problems` has what did not fit."""

    def __init__(
        self,
        arch: Architecture,
        stage: Stage,
        slots: Slots,
        unused: Collection[TensorName] = frozenset(),
    ) -> None:
        """unused: records without a slot because the kernels of this device do not need them."""
        self._unused = unused
        self.arch = arch
        self.stage = stage
        self.slots = slots
        self.problems = Problems()
        self.elsewhere = 0
        self.placed = 0
        self.omitted: dict[str, int] = {}
        self._seen: dict[TensorName, bytearray] = {}
        self._experts: dict[int, Mapping[int, int]] = {}
        self._fits: dict[tuple[object, ...], _Fit] = {}

    def place(self, name: str, kind: str, shape: Shape) -> list[Placement]:
        """Where a tensor of type `kind` and `shape` goes on this rank; [] where nowhere.

        What does not fit is entered in `problems`.
        """
        return self.place_record(name, parse(name), kind, shape)

    def place_record(
        self, name: str, record: TensorName | None, kind: str, shape: Shape
    ) -> list[Placement]:
        """`place` for a name that has been parsed."""
        if record is None or record.layer is not None or record.module == "lm_head":
            reason = self.omission_of(name, record)
            if reason:
                self._omit(reason)
                return []
        if record is None:
            self.problems.add("unexpected", name)
            return []
        if self._on_another_stage(record):
            self.elsewhere += 1
            return []
        return self._placed(name, record, kind, shape)

    def _omit(self, reason: str) -> None:
        self.omitted[reason] = self.omitted.get(reason, 0) + 1

    def omission_of(self, name: str, record: TensorName | None) -> str | None:
        """Why a tensor is left out on purpose, None where it is not."""
        arch = self.arch
        if record is None or (record.layer or 0) >= arch.num_layers:
            return omission(name, num_layers=arch.num_layers, num_mtp_modules=arch.num_mtp_modules)
        if record.module == "lm_head" and arch.tie_word_embeddings:
            return "the head is tied to the embedding"
        if record.module == "attn" and record.layer in self.stage.layers:
            if record.kind not in (*KV_SCALES, BOTH_KV_SCALES):
                return "attention scales that SGLang has no use for"
            return None if _parts(record)[0] in self.slots else NO_KV_QUANTISATION
        return None

    def _on_another_stage(self, record: TensorName) -> bool:
        if record.layer is not None:
            return record.layer not in self.stage.layers and record.layer < self.arch.num_layers
        if (None, record.module, "weight", None, None) in self.slots:
            return False
        on_this = self.stage.embedding if record.module == "embed_tokens" else self.stage.head
        return on_this is None

    def _placed(self, name: str, record: TensorName, kind: str, shape: Shape) -> list[Placement]:
        # Thousands of experts fit alike, and only the number of the expert differs.
        layer, module, what, expert, projection = record
        alike = (layer, module, what, projection, expert is None, kind, shape)
        fit = self._fits.get(alike)
        if fit is None:
            fit = self._fit(name, record, kind, shape)
            if fit is None:
                return []
            self._fits[alike] = fit
        if fit.experts and expert is not None and expert >= fit.experts:
            self.problems.add("unexpected", name)
            return []
        placements: list[Placement] = []
        for part, slots, boxes in fit.parts:
            for each in range(fit.experts) if fit.stacked else (expert,):
                if not self._mark(part, each, slots[0]):
                    self.problems.add("duplicate", name)
                    return []
                copies = 1
                if each is not None and not slots[0].stored.everywhere:
                    copies = self._copies(part, each)
                if not copies:
                    continue  # others hold it
                held = part if each is None else _of_expert(part, each)
                for slot, box in zip(slots, boxes, strict=True):
                    lead = (range(each, each + 1),) if fit.stacked and each is not None else ()
                    placements.append(Placement(slot, held, lead + box, copies))
        self.placed += bool(placements)
        self.elsewhere += not placements
        return placements

    def _fit(self, name: str, record: TensorName, kind: str, shape: Shape) -> _Fit | None:
        """How a tensor and its like go into their slots; None, with the problem entered, or not."""
        parts = _parts(record)
        slots = [self.slots.get(part) for part in parts]
        if None in slots:
            if all(part in self._unused for part in parts):
                self._omit("not needed by the kernels of this device")
            else:
                self._unplaceable(name, record)
            return None
        found = [slot for slot in slots if slot]
        first = found[0][0]
        experts = first.experts
        if experts and record.expert is not None and record.expert >= experts:
            self.problems.add("unexpected", name)
            return None
        stacked = experts if experts and record.expert is None else 0
        types = first.stored.types.intersection(*(slot[0].stored.types for slot in found))
        if kind not in types:
            self._mistyped(record, f"{name} is {kind}, expected {_one_of(types)}")
            self._mark_all(parts, found, record.expert)
            return None
        offsets = _offsets([slot[0] for slot in found], shape[1:] if stacked else shape)
        if offsets is None or (stacked and shape[:1] != (stacked,)):
            self._misshapen(name, [slot[0] for slot in found], shape, stacked)
            self._mark_all(parts, found, record.expert)
            return None
        dimensions = len(shape) - bool(stacked)
        boxes = [
            tuple(_shifted(slot.box, offset, dimensions) for slot in part)
            for part, offset in zip(found, offsets, strict=True)
        ]
        return _Fit(experts, bool(stacked), tuple(zip(parts, found, boxes, strict=True)))

    def _copies(self, part: TensorName, expert: int) -> int:
        """How many times this rank holds an expert of the part's layer."""
        layer = part.layer or 0
        held = self._experts.get(layer)
        if held is None:
            held = self._experts[layer] = self.stage.experts(layer)
        return held.get(expert, 0)

    def _mark(self, part: TensorName, expert: int | None, slot: Slot) -> bool:
        """Note that a matrix's tensor is there; False where it was before."""
        seen = self._seen.get(part)
        if seen is None:
            seen = self._seen[part] = bytearray(slot.experts or 1)
        if seen[expert or 0]:
            return False
        seen[expert or 0] = 1
        return True

    def _mark_all(
        self, parts: Sequence[TensorName], found: Sequence[tuple[Slot, ...]], expert: int | None
    ) -> None:
        """Note that a tensor which does not fit was there, so that it is not missing as well."""
        for part, slots in zip(parts, found, strict=True):
            experts = slots[0].experts
            for each in range(experts) if experts and expert is None else (expert,):
                self._mark(part, each, slots[0])

    def _unplaceable(self, name: str, record: TensorName) -> None:
        """Say why a tensor whose name is known has no slot."""
        what = FULL_PRECISION.get(record.module)
        if what is not None and record.kind not in ("weight", "bias"):
            self.problems.add(
                "quantised",
                f"{name} ({what} is kept in full precision; leave it out when quantising)",
            )
            return
        form = self.arch.recipe.format_of(_module(record))
        kinds = [record._replace(kind=stored.kind) for stored in form.tensors]
        known = any(part in self.slots for kind in kinds for part in _parts(kind))
        if what is None and known and record.kind != "bias":
            title = form.title
            self.problems.add(
                "contradictory", f"{name} (config.json says that this module is {title})"
            )
            return
        self.problems.add("unexpected", name)

    def _mistyped(self, record: TensorName, line: str) -> None:
        """Enter a tensor of a wrong type, which in a quantised module contradicts the config."""
        form = self.arch.recipe.format_of(_module(record))
        if record.module in FULL_PRECISION or form is PLAIN:
            self.problems.add("invalid", line)
        else:
            self.problems.add("contradictory", f"{line} (config.json says {form.title})")

    def _misshapen(self, name: str, slots: list[Slot], shape: Shape, stacked: int) -> None:
        first = slots[0].shape
        wanted = list(first)
        for i, axis in enumerate(slots[0].stored.axes):
            if axis.along == ROWS:
                wanted[i] = sum(slot.shape[i] for slot in slots)
        expected = [stacked, *wanted] if stacked else wanted
        self.problems.add("misshapen", f"{name} is {list(shape)}, expected {expected}")

    def check_complete(self) -> None:
        """Enter the tensors of this stage that never came."""
        for name, slots in self.slots.items():
            if slots[0].stored.optional:
                continue
            seen = self._seen.get(name) or bytes(slots[0].experts or 1)
            for expert, there in enumerate(seen):
                if not there:
                    record = name._replace(expert=expert) if slots[0].experts else name
                    self.problems.add("missing", spell(record))

    def summary(self) -> str:
        """Counts for the log."""
        counts = [f"{self.placed} tensors loaded"]
        if self.elsewhere:
            counts.append(f"{self.elsewhere} for other ranks")
        counts += [f"{count} left out ({reason})" for reason, count in self.omitted.items()]
        return ", ".join(counts)


def _parts(record: TensorName) -> tuple[TensorName, ...]:
    """The records of the single matrices that a tensor holds, with expert None."""
    layer, module, kind, _, projection = record
    if module == "experts":
        projections = PACKED_PROJECTIONS.get(projection or "", (projection,))
        return tuple(TensorName(layer, module, kind, None, each) for each in projections)
    if kind == BOTH_KV_SCALES:
        return tuple(TensorName(layer, module, each) for each in KV_SCALES)
    if module in PACKED_MODULES:
        return tuple(TensorName(layer, each, kind) for each in PACKED_MODULES[module])
    return (record,)


def _of_expert(part: TensorName, expert: int) -> TensorName:
    layer, module, kind, _, projection = part
    return TensorName(layer, module, kind, expert, projection)


#: Where one matrix begins in a packed tensor: (dimension, first element), None where it is alone.
_Offset = tuple[int, int] | None


def _offsets(slots: list[Slot], shape: Shape) -> list[_Offset] | None:
    """Where each matrix begins in a tensor of `shape`; None where the shape is wrong.

    shape: without the dimension of experts.
    """
    first = slots[0]
    if len(slots) == 1:
        if shape == first.shape:
            return [None]
        right = first.stored.accepts(shape, first.rows.total, first.columns.total)
        return [None] if right else None
    dimension = next((i for i, a in enumerate(first.stored.axes) if a.along == ROWS), None)
    if dimension is None:
        return _shared_or_listed(slots, shape)
    starts, total = [], 0
    for slot in slots:
        if slot.rows.total % slot.stored.axes[dimension].per:
            return None  # an element would belong to two matrices
        starts.append(total)
        total += slot.shape[dimension]
    wanted = [*first.shape]
    wanted[dimension] = total
    return [(dimension, start) for start in starts] if shape == tuple(wanted) else None


def _shared_or_listed(slots: list[Slot], shape: Shape) -> list[_Offset] | None:
    """A tensor without rows, such as one scale: the same for all matrices, or one for each."""
    first = slots[0]
    if not first.shape and shape in ((len(slots),), (len(slots), 1)):
        return [(0, i) for i in range(len(slots))]
    right = first.stored.accepts(shape, first.rows.total, first.columns.total)
    return [None] * len(slots) if right else None


def _shifted(box: Box, offset: _Offset, dimensions: int) -> Box:
    """`box` where its matrix begins at `offset`, with the dimensions that the tensor has."""
    ranges = list(box[:dimensions]) + [range(1)] * (dimensions - len(box))
    if offset is not None:
        i, start = offset
        ranges[i] = range(ranges[i].start + start, ranges[i].stop + start)
    return tuple(ranges)


def _module(record: TensorName) -> str:
    path = f"model.layers.{record.layer}"
    if record.module == "experts":
        return f"{path}.block_sparse_moe.experts"
    return f"{path}.self_attn.{record.module}"


def _one_of(types: frozenset[str]) -> str:
    return " or ".join(sorted(types))
