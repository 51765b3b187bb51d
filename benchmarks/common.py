"""What every benchmark writes beside its figures: when, on what, and with which command."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, Any]:
    """Date, command, machine and versions."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": "python -m " + " ".join([f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "machine": f"{len(os.sched_getaffinity(0))}-core {platform.machine()}, {processor()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("sglang", "torch", "transformers")},
    }


def version(package: str) -> str:
    """The installed version; kernels are measured where little else than torch is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The processor's name as the kernel tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def write(name: str, rows: list[dict[str, Any]], *, folder: Path = RESULTS, **more: Any) -> Path:
    """Write `<folder>/<name>.json` with its provenance and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"provenance": provenance(), **more, "rows": rows}, indent=1) + "\n")
    return path
