"""What a run is measured on: devices, driver, versions, commit."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
#: Seconds to ask for devices; observed 3 to 20.
PATIENCE = 120.0
VERSIONS = ("sglang", "sglang-minimax", "torch", "lm_eval")

# In a process of its own: asking for names would leave a context on the first device.
_DEVICES = """
import json, torch
from pathlib import Path
found = {"kind": None, "devices": [], "driver": None}
def read(path):
    return Path(path).read_text().split() if Path(path).is_file() else []
if torch.cuda.is_available():
    found["kind"] = "rocm" if torch.version.hip is not None else "cuda"
    for i in range(torch.cuda.device_count()):
        one = torch.cuda.get_device_properties(i)
        gfx = getattr(one, "gcnArchName", "").split(":")[0] if torch.version.hip else None
        version = 10 * one.major + one.minor
        found["devices"].append(
            {"name": one.name, "nbytes": one.total_memory, "version": version, "gfx": gfx}
        )
    if torch.version.hip:
        found["driver"] = " ".join(["ROCm", torch.version.hip, *read("/sys/module/amdgpu/version")])
    else:
        words = read("/proc/driver/nvidia/version")
        numbers = [word for word in words if word[:1].isdigit() and word.count(".") >= 1]
        found["driver"] = " ".join([*numbers[:1], "CUDA", torch.version.cuda or "none"])
else:
    try:
        import torch_npu
        if torch.npu.is_available():
            found["kind"] = "npu"
            for i in range(torch.npu.device_count()):
                nbytes = torch.npu.get_device_properties(i).total_memory
                found["devices"].append({"name": torch.npu.get_device_name(i), "nbytes": nbytes})
            found["driver"] = " ".join(read("/usr/local/Ascend/driver/version.info")[:1]) or None
    except ImportError:
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Device:
    """As the driver has it. version: compute capability times ten. gfx: of ROCm devices."""

    name: str
    nbytes: int = 0
    version: int | None = None
    gfx: str | None = None


@dataclass(frozen=True)
class Devices:
    """All devices of this machine. kind: `cuda`, `rocm`, `npu`, or None for none."""

    kind: str | None = None
    devices: tuple[Device, ...] = ()
    driver: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For a result: how many of which, and the driver."""
        counts = Counter(
            f"{each.name}, {each.nbytes / 1e9:.0f} GB, {each.gfx or each.version or 'no version'}"
            for each in self.devices
        )
        named = "; ".join(f"{count} x {name}" for name, count in counts.items())
        return {"devices": named or "none", "driver": self.driver or "none"}


def devices() -> Devices:
    """What PyTorch finds; nothing on a machine without devices, or without an answer."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DEVICES], capture_output=True, text=True, timeout=PATIENCE
        )
        found = json.loads(done.stdout.strip().splitlines()[-1])
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return Devices()
    return Devices(found["kind"], tuple(Device(**e) for e in found["devices"]), found["driver"])


def facts(found: Devices) -> dict[str, str]:
    """Of a result: the machine, its devices, and what ran on it."""
    return {
        "host": platform.machine(),
        "cpu": _cpu(),
        "cpus": str(os.cpu_count()),
        **found.as_dict(),
        **build(),
    }


def build() -> dict[str, str]:
    """Versions of the packages that decide an answer, Python's, and the commit of this checkout."""
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    return {"python": platform.python_version(), **versions, "commit": commit()}


def commit(root: Path = ROOT) -> str:
    """Of the checkout, with `-dirty` where tracked files differ; `unknown` without git."""
    command = ("git", "-C", str(root), "describe", "--always", "--abbrev=40", "--match=", "--dirty")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")
