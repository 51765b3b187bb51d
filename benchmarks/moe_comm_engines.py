"""Collectives and bytes counted inside real engines, beside what the arithmetic says of them.

SGLang's engine on the CPU platform with a small model of random weights, once with the in-tree
class and once with ours, at the same arguments. The probe of `sglang-minimax validate` counts what
each rank asks of its groups (sglang_minimax/validation/probe.py): operation, group, calls and the
bytes that it gives. Whether the answers are right is that command's question, not this one's.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.utils.logging import disable_progress_bar

from benchmarks.intree import serve_intree
from benchmarks.moe_comm_cases import IN_TREE, OURS, Row
from sglang_minimax.moe_exchange.paths import FORCEABLE, SGLANG
from sglang_minimax.moe_exchange.payload import Payload
from sglang_minimax.moe_exchange.rules import VARIABLE
from sglang_minimax.topology import RankShare, Topology, rank_shares
from sglang_minimax.validation import observations, ownership, probe, subject
from sglang_minimax.validation.agreement import random_prompt
from sglang_minimax.validation.engine_process import EngineFailed, EngineProcess
from sglang_minimax.validation.ledger import Exchange, Key
from sglang_minimax.validation.observations import Forward, RankRecord
from sglang_minimax.validation.shapes import Shape, arguments, catalogue
from sglang_minimax.validation.subject import Subject

#: Engines of the CPU platform compute in fp32.
ITEM_BYTES = 4
BLOCK, LARGEST = 128, 448.0
#: What a small FP8 checkpoint has of the list's model and what it needs: whole blocks everywhere.
FP8_MODEL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 128,
    "head_dim": 128,
    "rotary_dim": 64,
    "num_hidden_layers": 2,
}
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "float8_e4m3fn",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
    "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
}
TIMEOUT = 300.0


@dataclass(frozen=True, slots=True)
class Case:
    """One launch that both classes are given, and the path that ours must take.

    checkpoint: "FP8", or "plain" for numbers in the type of the engine.
    """

    topology: str
    checkpoint: str
    path: str


CASES = (
    Case("tp=4", "plain", "sglang"),
    Case("tp=4,dp=4,ep=4", "plain", "gather"),
    Case("tp=4,dp=2,ep=4", "plain", "gather"),
    Case("tp=4,dp=4,ep=4", "FP8", "gather-fp8"),
    Case("tp=4,dp=2,ep=4", "FP8", "gather-fp8"),
    Case("tp=8,dp=8,ep=8", "plain", "gather"),
)


def small_model(checkpoint: str, folder: Path) -> Subject:
    """The list's model in `folder`; for FP8 with its matrices in 128x128 blocks."""
    config = catalogue().config("kv4")
    if checkpoint != "FP8":
        return subject.write(config, folder, checkpoint)
    config |= FP8_MODEL
    subject.write(config, folder, checkpoint)
    (file,) = folder.glob("*.safetensors")
    save_file(dict(in_blocks(load_file(file))), file, metadata={"format": "pt"})
    config |= {"quantization_config": QUANTIZATION}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return Subject(folder, checkpoint)


def in_blocks(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Projections and experts in FP8 with a scale for each block; everything else as it is."""
    for name, value in state.items():
        converted = name.endswith("_proj.weight") or ".experts." in name
        if not converted:
            yield name, value
            continue
        rows, columns = (size // BLOCK for size in value.shape)
        blocks = value.float().view(rows, BLOCK, columns, BLOCK)
        scale = blocks.abs().amax((1, 3)) / LARGEST
        codes = (blocks / scale[:, None, :, None]).view(value.shape).to(torch.float8_e4m3fn)
        yield name, codes
        yield f"{name}_scale_inv", scale


def rows(cases: Sequence[Case], status: Callable[[str], Any]) -> list[Row]:
    """Both classes in every case. status: a context with a line of what is running."""
    disable_progress_bar()
    found: list[Row] = []
    with TemporaryDirectory(prefix="moe-comm-") as folder:
        models: dict[str, Subject] = {}
        for case in cases:
            if case.checkpoint not in models:
                place = Path(folder) / case.checkpoint
                models[case.checkpoint] = small_model(case.checkpoint, place)
            for way in (IN_TREE, OURS):
                with status(f"{case.topology}, {case.checkpoint}, {way}"):
                    found.append(one(case, way, models[case.checkpoint]))
    return found


def one(case: Case, way: str, model: Subject) -> Row:
    """One engine's counts, or how it ended."""
    path = SGLANG.name if way == IN_TREE else case.path
    row: Row = {
        "topology": case.topology,
        "checkpoint": case.checkpoint,
        "way": way,
        "path": path,
        "hidden": model.arch.hidden_size,
        "top_k": model.arch.top_k,
    }
    topology = Topology.parse(case.topology)
    payload = Payload(FORCEABLE[path].rows, model.arch.hidden_size, model.arch.top_k, ITEM_BYTES)
    exchange = Exchange(topology, FORCEABLE[path], payload)
    try:
        records = run(topology, model, partial(prepare, way == IN_TREE, case.path))
        return row | summary(compared(exchange, rank_shares(model.arch, topology), records))
    except EngineFailed as error:
        said = [line.strip() for line in error.log.splitlines() if "rror: " in line]
        return row | {"ends": next(iter(said), str(error).splitlines()[0])}
    except ValueError as error:
        return row | {"ends": str(error)}


def prepare(in_tree: bool, path: str) -> None:
    """In the engine's process: SGLang's class and its way, or ours with its path."""
    os.environ[VARIABLE] = SGLANG.name if in_tree else path
    if in_tree:
        serve_intree()


def run(topology: Topology, model: Subject, before: Callable[[], None]) -> list[RankRecord]:
    """What the ranks recorded while every group had requests, and while one had none."""
    with TemporaryDirectory(prefix="moe-comm-probe-") as folder:
        expectation = Path(folder) / "expectation.json"
        ownership.Expectation(str(model.folder), str(topology), False, ()).write(expectation)
        with EngineProcess(
            before=partial(_in_turn, before, probe.watch(Path(folder), expectation)),
            timeout=TIMEOUT,
            model_path=str(model.folder),
            dtype="float32",
            skip_tokenizer_init=True,
            log_level="info",
            max_total_tokens=2048,
            **arguments(Shape(topology=str(topology))),
        ) as engine:
            for requests in steps(topology.dp, model.arch.vocab_size):
                engine.generate_together(requests)
        return observations.read(Path(folder))


def _in_turn(*hooks: Callable[[], None]) -> None:
    for hook in hooks:
        hook()


def steps(groups: int, vocabulary: int) -> Iterator[list[dict[str, Any]]]:
    """Requests that are sent at once: one a group, then lengths that differ, then one group alone.

    The second batch also ends at different steps, so that groups run dry one after the other.
    """
    lengths = [[12] * groups, [5 + 7 * group for group in range(groups)], [20]]
    for step, prompts in enumerate(lengths):
        yield [
            {
                "input_ids": list(random_prompt(length, vocabulary, seed=100 * step + group)),
                "sampling_params": {
                    "temperature": 0,
                    "max_new_tokens": 6 + (step == 1) * 2 * group,
                    "ignore_eos": True,
                },
                "routed_dp_rank": group if groups > 1 else None,
            }
            for group, length in enumerate(prompts)
        ]


@dataclass(frozen=True, slots=True)
class Compared:
    """One forward of one rank. Calls and bytes of its layers' collectives, found and expected.

    kind: "prefill" where any group's is one, else "decode". rows: that all groups computed. The QK
    norm's sums are in neither.
    """

    kind: str
    padding: str | None
    rows: int
    layers: int
    found: dict[Key, tuple[int, int]]
    expected: dict[Key, tuple[int, int]]

    @property
    def equal(self) -> bool:
        return self.found == self.expected

    @property
    def given(self) -> int:
        """Bytes that the rank gave, by the count."""
        return sum(size for _, size in self.found.values())


def compared(
    exchange: Exchange, shares: Sequence[RankShare], records: Sequence[RankRecord]
) -> list[Compared]:
    """Every forward of every rank.

    Raises ValueError where ranks are missing, ran unlike numbers of forwards, or took another path.
    """
    numbers = sorted({len(record.forwards) for record in records})
    if len(records) != len(shares) or len(numbers) != 1:
        raise ValueError(f"{len(records)} of {len(shares)} ranks recorded {numbers} forwards")
    paths = sorted({record.path for record in records})
    if paths != [exchange.path.name]:
        raise ValueError(f"the ranks took {', '.join(paths)}, not {exchange.path.name}")
    found = []
    for together in zip(*(record.forwards for record in records), strict=True):
        kind = "prefill" if any(each.mode == "EXTEND" for each in together) else "decode"
        for share, forward in zip(shares, together, strict=True):
            found.append(_forward(exchange, share, forward, kind))
    return found


def _forward(exchange: Exchange, share: RankShare, forward: Forward, kind: str) -> Compared:
    calls: Counter[Key] = Counter()
    sizes: Counter[Key] = Counter()
    for move in exchange.all_moves(share, forward):
        key = (move.site, move.operation, share.groups[move.kind])
        calls[key] += 1
        sizes[key] += move.given
    return Compared(
        kind=kind,
        padding=forward.padding,
        rows=sum(forward.groups),
        layers=len(share.layers),
        found={
            (each.site, each.operation, each.ranks): (each.calls, each.bytes)
            for each in forward.collectives
            if each.site in ("experts", "boundary")
        },
        expected={key: (calls[key], sizes[key]) for key in calls},
    )


def summary(forwards: Sequence[Compared]) -> Row:
    """What a row keeps: how many forwards agree, and the numbers of each kind and padding mode.

    given_a_row_a_layer: bytes that a rank gave, a mean over ranks, for each row of all groups.
    """
    kinds: dict[str, list[Compared]] = {}
    for each in forwards:
        if each.rows:
            kinds.setdefault(f"{each.kind} {each.padding or ''}".strip(), []).append(each)
    first = next((each for each in forwards if not each.equal), None)
    return {
        "forwards": len(forwards),
        "equal": sum(each.equal for each in forwards),
        "first_difference": None
        if first is None
        else {
            "forward": f"{first.kind} {first.padding}, {first.rows} rows",
            "found": _listed(first.found),
            "expected": _listed(first.expected),
        },
        "kinds": {
            name: {
                "collectives_a_layer": max(
                    sum(calls for calls, _ in each.found.values()) / each.layers for each in made
                ),
                "given_a_row_a_layer": sum(each.given / each.layers for each in made)
                / sum(each.rows for each in made),
            }
            for name, made in kinds.items()
        },
    }


def _listed(calls: dict[Key, tuple[int, int]]) -> list[str]:
    return [
        f"{number} {operation} at {site} over {list(ranks)}, {size} bytes"
        for (site, operation, ranks), (number, size) in sorted(calls.items())
    ]
