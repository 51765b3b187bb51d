"""What does a broken checkpoint do: SGLang's in-tree model against ours, in the same engine?

    python -m benchmarks.bench_strictness

Each case changes one thing in tiny-m2 and starts SGLang's engine twice, on the CPU platform, with
either model class. "starts" means that the engine reports itself ready, with whatever its parameters
then hold. No request is sent: the in-tree QK norm runs on CUDA alone.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from benchmarks import common
from sglang_minimax import ARCHITECTURE
from sglang_minimax.cli.local_server import TINY_M2
from sglang_minimax.validation.engine_process import EngineFailed, EngineProcess

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
Case = Callable[[Tensors, Config], object]

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


def _drop(key: str) -> Case:
    return lambda tensors, config: config.pop(key)


CASES: dict[str, Case] = {
    "as trained": lambda tensors, config: None,
    "q_norm of a layer missing": lambda tensors, config: tensors.pop(Q_NORM),
    "a tensor nobody knows": lambda tensors, config: tensors.update({f"{LAYER}.odd": torch.ones(2)}),
    "an expert under other names": _rename_expert,
    "q_proj one row short": lambda tensors, config: tensors.update({Q_PROJ: tensors[Q_PROJ][:-1]}),
    "config without rotary_dim": _drop("rotary_dim"),
    "config without use_qk_norm": _drop("use_qk_norm"),
    "config without use_routing_bias": _drop("use_routing_bias"),
    "config as transformers >= 5 writes it": _native_config,
}
#: Cases that describe the same model in another form: to start is right.
RIGHT_TO_START = {name for name in CASES if name == "as trained" or name.startswith("config")}


def use_in_tree_model() -> None:
    """Undo our registration, in the engine's process."""
    from sglang.srt.models import registry
    from sglang.srt.models.minimax_m2 import MiniMaxM2ForCausalLM

    hooked = registry._ModelRegistry.resolve_model_cls
    registry._ModelRegistry.resolve_model_cls = hooked.__sglang_original__
    registry.ModelRegistry.models[ARCHITECTURE] = MiniMaxM2ForCausalLM


def write_case(folder: Path, change: Case) -> None:
    """A copy of tiny-m2 in `folder` with one change."""
    shutil.copytree(TINY_M2, folder, dirs_exist_ok=True)
    tensors = load_file(TINY_M2 / "model.safetensors")
    config = json.loads((TINY_M2 / "config.json").read_text())
    change(tensors, config)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def outcome(checkpoint: Path, before: Callable[[], None] | None) -> str:
    """"starts", or the last line of the error."""
    try:
        with EngineProcess(before=before, model_path=str(checkpoint), log_level="error"):
            return "starts"
    except EngineFailed as error:
        lines = [line for line in error.log.splitlines() if "rror" in line or "sglang-minimax" in line]
        return lines[-1].strip() if lines else str(error).splitlines()[0]


def verdict(name: str, found: str) -> str:
    """What an outcome means for the person who started the server."""
    if found == "starts":
        return "starts" if name in RIGHT_TO_START else "starts, silently wrong"
    return "refuses to start"


def main() -> None:
    """Run every case with either model, print the table, write results/strictness.json."""
    console, rows = Console(), []
    for name, change in CASES.items():
        with tempfile.TemporaryDirectory() as folder, console.status(name):
            write_case(Path(folder), change)
            in_tree = outcome(Path(folder), use_in_tree_model)
            ours = outcome(Path(folder), None)
        rows.append({"case": name, "in_tree": in_tree, "ours": ours})
    table = Table("case", "SGLang in-tree", "sglang-minimax", title="start of a server")
    for row in rows:
        table.add_row(row["case"], row["in_tree"][:150], row["ours"][:150])
    console.print(table)
    console.print(common.write("strictness", rows).name)


if __name__ == "__main__":
    typer.run(main)
