"""Carry what the in-tree baselines need to a machine without SGLang.

    python -m benchmarks.carry_intree FOLDER [--wheels-for 3.12 [--skip pillow,requests]]
    PYTHONPATH=FOLDER python -m benchmarks.bench_tp_qknorm        # there

Run where SGLang is installed. FOLDER then holds the `sglang.kernels` package with the CUDA sources
that it compiles on first use, the modules of `sglang` that importing it loads (found by importing
it), and `intree_minimax_m2_norm.py`: the two Triton kernels of MiniMax-M2's QK norm with their
launchers, which stand in a model file that cannot be imported alone. `sglang/__init__.py` is
empty, since the real one loads the server. requirements.txt names the other packages that were
loaded, in the versions installed here; with --wheels-for they are unpacked into FOLDER for that
version of Python on x86-64 Linux, but for those to skip. PyTorch, Triton, NumPy and nvcc must be
there.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

#: What the baselines import, and what they load behind it on their first call.
WANTED = (
    "sglang.kernels.ops.attention.rope",
    "sglang.kernels.ops.kvcache.kvcache",
    "sglang.kernels.ops.communication.all_reduce",
    "sglang.kernels.ops.moe.moe_fused_gate",
)
NORM_SOURCE = "srt/models/minimax_m2.py"
NORM_MODULE = "intree_minimax_m2_norm"
NORM_NAMES = (
    "rmsnorm_sumsq_kernel_serial",
    "rmsnorm_apply_kernel_serial",
    "rms_sumsq_serial",
    "rms_apply_serial",
)
#: Not carried: they decide how everything else is compiled.
THERE = {"torch", "triton", "numpy", "nvidia", "sympy", "mpmath", "functorch", "torchgen"}
#: Imported by `sglang.srt.utils.common` where they can be, and done without where not.
OPTIONAL = {"torchcodec"}

TRACE = """
import importlib, json, sys, types
package = types.ModuleType("sglang")
package.__path__ = [sys.argv[1]]
sys.modules["sglang"] = package
import torch, triton
known = set(sys.modules)
for name in sys.argv[2:]:
    importlib.import_module(name)
files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
print(json.dumps({name: file for name, file in files.items() if file and name not in known}))
"""


class Untraceable(RuntimeError):
    """The baselines cannot be imported here; the message is the last line of the traceback."""


def sglang_root() -> Path:
    """The folder of the installed `sglang`, found without importing it."""
    spec = importlib.util.find_spec("sglang")
    if spec is None or not spec.submodule_search_locations:
        raise Untraceable("SGLang is not installed here")
    return Path(next(iter(spec.submodule_search_locations)))


def loaded(root: Path) -> dict[str, Path]:
    """Module -> file of everything that importing the baselines loads, beyond torch and triton."""
    # Plugins of SGLang and of PyTorch are not what is measured, ours least of all.
    quiet = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "SGLANG_PLUGINS": "none"}
    run = subprocess.run(
        [sys.executable, "-c", TRACE, str(root), *WANTED],
        capture_output=True,
        text=True,
        env=os.environ | quiet,
    )
    if run.returncode:
        raise Untraceable(run.stderr.strip().rpartition("\n")[2])
    return {name: Path(file) for name, file in json.loads(run.stdout.splitlines()[-1]).items()}


def requirements(modules: dict[str, Path]) -> list[str]:
    """`name==version` of the distributions behind the modules, without SGLang and what is there."""
    owners = importlib.metadata.packages_distributions()
    tops = {name.partition(".")[0] for name in modules} - THERE - OPTIONAL
    found = {
        owner
        for top in tops - set(sys.stdlib_module_names)
        for owner in owners.get(top, [])
        if owner.lower().partition("-")[0] not in {"sglang", *THERE}
    }
    return sorted(f"{name}=={importlib.metadata.version(name)}" for name in found)


def norm_module(source: Path) -> str:
    """The text of a module with MiniMax-M2's norm kernels and launchers, taken from its source.

    Raises ValueError, naming them, where some are gone.
    """
    text = source.read_text()
    lines = text.splitlines(keepends=True)
    parts = {
        node.name: "".join(lines[node.decorator_list[0].lineno - 1 : node.end_lineno])
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name in NORM_NAMES
    }
    if missing := [name for name in NORM_NAMES if name not in parts]:
        raise ValueError(f"{source.name} has no {', '.join(missing)}")
    head = (
        f'"""Taken from sglang/{NORM_SOURCE} by benchmarks/carry_intree.py; not kept."""\n\n'
        "import torch\nimport triton\nimport triton.language as tl\n\n"
        "from sglang.kernels.kernel_api_logging import debug_kernel_api\n"
    )
    return head + "".join(f"\n\n{parts[name]}" for name in NORM_NAMES)


def write_norm(folder: Path, root: Path) -> Path:
    """Write the norm's module into `folder` (Triton needs a file to read its kernels from)."""
    path = folder / f"{NORM_MODULE}.py"
    path.write_text(norm_module(root / NORM_SOURCE))
    return path


def carry(folder: Path) -> list[str]:
    """Fill `folder`; returns the requirements, which it also holds."""
    root = sglang_root()
    modules = loaded(root)
    target = folder / "sglang"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "kernels", target / "kernels", ignore=ignored, dirs_exist_ok=True)
    for file in modules.values():
        if file.is_relative_to(root) and file.suffix == ".py":
            there = target / file.relative_to(root)
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, there)
    (target / "__init__.py").write_text('"""Empty: only the kernels of SGLang are here."""\n')
    (target / "version.py").write_text((root / "version.py").read_text())
    write_norm(folder, root)
    needed = requirements(modules)
    (folder / "requirements.txt").write_text("\n".join(needed) + "\n")
    return needed


def unpack_wheels(folder: Path, needed: list[str], python: str) -> None:
    """Unpack the requirements into `folder`, for another Python on x86-64 Linux."""
    platforms = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"),
            *("--only-binary=:all:", "--python-version", python, "--implementation", "cp"),
            *(f"--platform={name}_x86_64" for name in platforms),
            *("--target", str(folder), *needed),
        ],
        check=True,
    )


def main(
    folder: Annotated[Path, typer.Argument(help="Where to; made if need be.")],
    wheels_for: Annotated[str, typer.Option(help="A Python version, as 3.12.")] = "",
    skip: Annotated[str, typer.Option(help="Names of packages that are there, by commas.")] = "",
) -> None:
    """Carry the in-tree baselines into FOLDER."""
    try:
        needed = carry(folder)
    except (Untraceable, ValueError) as error:
        raise SystemExit(f"nothing to carry: {error}") from error
    there = set(skip.split(","))
    needed = [line for line in needed if line.partition("==")[0] not in there]
    if wheels_for:
        unpack_wheels(folder, needed, wheels_for)
    print("there, beside PyTorch, Triton and NumPy:", ", ".join(needed))


if __name__ == "__main__":
    typer.run(main)
