"""What is done in a child of the loading benchmark: one timed load, or one that is looked into."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.load_meters import Meter, cached_bytes, drop_from_cache, warm_cache
from benchmarks.load_rank import IN_TREE, Place, Rank


def files_of(folder: Path) -> list[Path]:
    """The weight files of a checkpoint."""
    return sorted(folder.glob("*.safetensors"))


def timed_load(folder: Path, place: Place, who: str, cold: bool) -> dict[str, Any]:
    """One load with nothing in its way: the figures of `Meter`, and what the rank holds then.

    cold: whether the files have left the page cache before; else they are all in it.
    """
    rank, files = Rank(folder, place, who), files_of(folder)
    (drop_from_cache if cold else warm_cache)(files)
    before = cached_bytes(files)
    meter = Meter()
    meter.start()
    model = rank.load()
    figures = meter.stop()
    parameters = dict(model.named_parameters())
    return {
        **figures,
        "cached_before": before,
        "cached_after": cached_bytes(files),
        "bytes_owned": sum(p.nbytes for p in parameters.values()),
        "parameters_owned": len(parameters),
        "tensors_loaded": loaded_tensors(model),
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "peak_reset": meter.peak_reset,
        **rank.extra,
    }


def loaded_tensors(model: torch.nn.Module) -> int:
    """Checkpoint tensors that the parameters of this rank are made of, by their shapes.

    Packed parameters hold three (q, k, v), of the experts each, w1 and w3 beside each other.
    """
    count = 0
    for name, parameter in model.named_parameters():
        if name.endswith((".k_scale", ".v_scale")):
            continue  # made by the attention layer, not in these checkpoints
        parts = 3 if ".qkv_proj." in name else 1
        if ".experts." in name:
            parts = parameter.shape[0] * (2 if "w13_" in name else 1)
        count += parts
    return count


def examined_load(folder: Path, place: Place, who: str) -> dict[str, Any]:
    """A load that is counted and not timed, and the CPU time of name handling alone."""
    seen = Watch()
    seen.install()
    rank = Rank(folder, place, who)
    model = rank.load()
    found = seen.figures()
    found["names_seconds"] = (
        dispatch_in_tree(model, folder) if who == IN_TREE else parse_all(folder)
    )
    return found


class Watch:
    """Counts what either loader asks of the files."""

    def __init__(self) -> None:
        self.opened = self.handed = 0
        self.plans: list[Any] = []
        self.seconds = {"read_headers": 0.0, "make_plan": 0.0}

    def install(self) -> None:
        """Wrap safetensors' `safe_open`, and the two steps of ours before it reads."""
        import safetensors

        watch, original = self, safetensors.safe_open

        class CountingOpen:
            def __init__(self, *arguments: Any, **keywords: Any) -> None:
                self._file = original(*arguments, **keywords)

            def __enter__(self) -> CountingOpen:
                self._file.__enter__()
                return self

            def __exit__(self, *raised: Any) -> Any:
                return self._file.__exit__(*raised)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._file, name)

            def get_tensor(self, name: str) -> torch.Tensor:
                tensor = self._file.get_tensor(name)
                watch.opened += 1
                watch.handed += tensor.nbytes
                return tensor

        safetensors.safe_open = CountingOpen  # type: ignore[misc, assignment]
        from sglang_minimax.loading import strict

        for step in self.seconds:
            if hasattr(strict, step):
                setattr(strict, step, self._timing(step, getattr(strict, step)))

    def _timing(self, step: str, original: Any) -> Any:
        def timed(*arguments: Any, **keywords: Any) -> Any:
            began = time.process_time()
            result = original(*arguments, **keywords)
            self.seconds[step] += time.process_time() - began
            if step == "make_plan":
                self.plans.append(result)
            return result

        return timed

    def figures(self) -> dict[str, Any]:
        """tensors_opened and bytes_asked: whole tensors in-tree, the spans of the plan in ours."""
        if not self.plans:
            return {"tensors_opened": self.opened, "bytes_asked": self.handed}
        reads = [read for plan in self.plans for read in plan.reads]
        return {
            "tensors_opened": len({read.name for read in reads}) + self.opened,
            "bytes_asked": sum(read.length for read in reads) + self.handed,
            "bytes_in_boxes": sum(read.boxed_bytes for read in reads),
            **whole_and_rows(reads),
            "plan_seconds": self.seconds["make_plan"],
            "headers_seconds": self.seconds["read_headers"],
        }


def whole_and_rows(reads: list[Any]) -> dict[str, int]:
    """Bytes asked of the system for reads that lie together, gaps between them included, and held.

    Tensors cut by column are read in whole rows, and not counted here.
    """
    from sglang_minimax.loading.reader import Span, plan

    mine = [read for read in reads if read.length == read.boxed_bytes]
    runs = plan([Span(read.tensor.file, read.offset, read.length) for read in mine], 16 << 20)
    return {
        "bytes_asked_whole_and_rows": sum(run.length for run in runs),
        "bytes_held_whole_and_rows": sum(read.boxed_bytes for read in mine),
    }


def parse_all(folder: Path) -> float:
    """CPU seconds in which our grammar says of every name what it is; see also `plan_seconds`."""
    from sglang_minimax.loading.names import parse

    names = list(names_as_loaded(folder))
    began = time.process_time()
    for name in names:
        parse(name)
    return time.process_time() - began


def dispatch_in_tree(model: torch.nn.Module, folder: Path) -> float:
    """CPU seconds of the in-tree `load_weights` with loaders that do nothing, for every name."""
    parameter = SimpleNamespace(weight_loader=lambda *arguments, **keywords: None)
    names = list(names_as_loaded(folder))
    stand_ins = {name: parameter for name, _ in model.named_parameters()}
    model.named_parameters = stand_ins.items  # type: ignore[assignment, method-assign]
    began = time.process_time()
    model.load_weights((name, None) for name in names)  # type: ignore[operator]
    return time.process_time() - began


def names_as_loaded(folder: Path) -> Iterator[str]:
    """Every name, in the order in which SGLang's loader passes them on."""
    from safetensors import safe_open

    for file in files_of(folder):
        with safe_open(file, framework="pt") as opened:
            yield from sorted(opened.keys())
