"""What does a broken checkpoint do: SGLang's in-tree model against ours, in the same engine?

    python -m benchmarks.bench_strictness

Each case changes one thing in tiny-m2 and starts SGLang's engine twice, on the CPU platform, with
either model class. "starts" means that the engine reports itself ready, with whatever its
parameters then hold. No request is sent: the in-tree QK norm runs on CUDA alone.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from benchmarks import common
from sglang_minimax import ARCHITECTURE, TINY_M2
from sglang_minimax.validation.engine_process import EngineFailed, EngineProcess

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
Change = Callable[[Tensors, Config], object]

LAYER = "model.layers.1"
Q_NORM = f"{LAYER}.self_attn.q_norm.weight"
Q_PROJ = f"{LAYER}.self_attn.q_proj.weight"


def _rename_expert(tensors: Tensors, config: Config) -> None:
    for old, new in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
        name = f"{LAYER}.block_sparse_moe.experts.0.{old}.weight"
        tensors[name.replace(old, new)] = tensors.pop(name)


def _native_config(tensors: Tensors, config: Config) -> None:
    for key in ("scoring_func", "use_qk_norm", "qk_norm_type", "use_routing_bias"):
        del config[key]
    theta, rotary = config.pop("rope_theta"), config.pop("rotary_dim")
    config["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": theta,
        "partial_rotary_factor": rotary / config["head_dim"],
    }


def _drop(key: str) -> Change:
    return lambda tensors, config: config.pop(key)


def _add_unknown(tensors: Tensors, config: Config) -> None:
    tensors[f"{LAYER}.odd.weight"] = torch.ones(2)


def _shorten(tensors: Tensors, config: Config) -> None:
    tensors[Q_PROJ] = tensors[Q_PROJ][:-1]


@dataclass(frozen=True)
class Case:
    """One change to tiny-m2, and what a server is that starts with it.

    same_model: the change only spells the same model otherwise, so that to start is right.
    in_tree_holds: what SGLang's model then holds, read from its source.
    """

    change: Change
    same_model: bool
    in_tree_holds: str = ""


CASES: dict[str, Case] = {
    "as trained": Case(lambda tensors, config: None, True),
    "the q_norm of a layer is missing": Case(
        lambda tensors, config: tensors.pop(Q_NORM), False, "uninitialised memory as q_norm"
    ),
    "a tensor that nobody knows": Case(_add_unknown, False, "all but that tensor"),
    "an expert under transformers' names": Case(
        _rename_expert, True, "uninitialised memory as that expert"
    ),
    "q_proj is one row short": Case(_shorten, False),
    "config without rotary_dim": Case(_drop("rotary_dim"), True, "full rotary"),
    "config without use_qk_norm": Case(_drop("use_qk_norm"), True, "no QK norm"),
    "config without use_routing_bias": Case(_drop("use_routing_bias"), True, "no selection bias"),
    "config as transformers >= 5 writes it": Case(_native_config, True),
}


def use_in_tree_model() -> None:
    """Undo our registration, in the engine's process."""
    from sglang.srt.models import registry
    from sglang.srt.models.minimax_m2 import MiniMaxM2ForCausalLM

    hooked = registry._ModelRegistry.resolve_model_cls
    registry._ModelRegistry.resolve_model_cls = hooked.__sglang_original__
    registry.ModelRegistry.models[ARCHITECTURE] = MiniMaxM2ForCausalLM


def write_case(folder: Path, change: Change) -> None:
    """A copy of tiny-m2 in `folder` with one change."""
    shutil.copytree(TINY_M2, folder, dirs_exist_ok=True)
    tensors = load_file(TINY_M2 / "model.safetensors")
    config = json.loads((TINY_M2 / "config.json").read_text())
    change(tensors, config)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def outcome(checkpoint: Path, before: Callable[[], None] | None) -> str:
    """The word "starts", or the last error that the log tells of."""
    try:
        with EngineProcess(before=before, model_path=str(checkpoint), log_level="error"):
            return "starts"
    except EngineFailed as error:
        return last_error(error.log) or str(error).splitlines()[0]


def last_error(log: str) -> str:
    """The last line of a log that tells of an error, without its time stamp."""
    lines = [re.sub(r"^\[[^]]*\]\s*", "", line.strip()) for line in log.splitlines()]
    return next((line for line in reversed(lines) if re.search(r"Error:|checkpoint", line)), "")


def measure(name: str, case: Case) -> dict[str, Any]:
    """Start both models on one case: the fields of a row."""
    with tempfile.TemporaryDirectory() as folder:
        write_case(Path(folder), case.change)
        in_tree = outcome(Path(folder), use_in_tree_model)
        ours = outcome(Path(folder), None)
    return {
        "case": name,
        "same_model": case.same_model,
        "in_tree": in_tree,
        "in_tree_holds": case.in_tree_holds if in_tree == "starts" else "",
        "ours": ours,
    }


def main() -> None:
    """Run every case with either model, print the table, write results/strictness.json."""
    console, rows = Console(), []
    for name, case in CASES.items():
        with console.status(name):
            rows.append(measure(name, case))
    table = Table("case", "SGLang in-tree", "sglang-minimax", title="start of a server")
    for row in rows:
        in_tree = ", with ".join(filter(None, (row["in_tree"], row["in_tree_holds"])))
        table.add_row(row["case"], in_tree[:150], row["ours"][:150])
    console.print(table)
    console.print(common.write("strictness", rows).name)


if __name__ == "__main__":
    typer.run(main)
