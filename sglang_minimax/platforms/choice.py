"""Decide whether our CPU platform is the active one. PyTorch is asked, SGLang is not imported."""

from __future__ import annotations

import functools
import importlib.util
import os
from importlib.metadata import entry_points

PLATFORM_NAME = "minimax_cpu"


@functools.cache
def explain() -> tuple[bool, str]:
    """(chosen, why). The answer is fixed for the life of the process.

    Chosen when `SGLANG_PLATFORM=minimax_cpu`, or when the user named no platform, asked for no
    CPU engine of SGLang's own, installed no other platform, and no accelerator is present.
    """
    selected = os.environ.get("SGLANG_PLATFORM", "").strip()
    if selected:
        if selected == PLATFORM_NAME:
            return True, f"SGLANG_PLATFORM={PLATFORM_NAME} asks for it"
        return False, f"SGLANG_PLATFORM={selected} chooses another platform"
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return False, "SGLANG_USE_CPU_ENGINE=1 chooses SGLang's own CPU engine"
    others = [ep.name for ep in entry_points(group="sglang.srt.platforms")]
    others = [name for name in others if name != PLATFORM_NAME]
    if others:
        return False, (
            f"another platform plugin is installed ({', '.join(others)}); "
            f"set SGLANG_PLATFORM={PLATFORM_NAME} to prefer this one"
        )
    if device := accelerator():
        return False, f"an accelerator is present ({device})"
    return True, "no accelerator is present and nothing else was chosen"


def cpu_platform_chosen() -> bool:
    """Whether SGLang will run on our CPU platform in this process."""
    return explain()[0]


@functools.cache
def accelerator() -> str | None:
    """The kind of accelerator PyTorch can use here ("cuda", "npu", ...), None without one."""
    import torch

    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
        return device.type if device is not None else "unknown"
    if importlib.util.find_spec("habana_frameworks") is not None:
        return "hpu"
    return None
