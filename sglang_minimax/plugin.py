"""The way into SGLang: three entry points, one `install()`.

SGLang reads plugins in some of its processes only. Multi-tokenizer workers, Ray actors, the
weight-cache daemon and the offline benchmark never call `load_plugins`, and `SGLANG_PLUGINS`
or `SGLANG_PLATFORM` can exclude a whole distribution. So there are three doors:

* `torch.backends` (`on_torch_import`): PyTorch calls it at the end of `import torch` in every
  process, whatever SGLang's filters say. It only starts to watch imports.
* `sglang.srt.platforms` (`activate_cpu_platform`): SGLang's question whether our CPU platform
  should be the active one.
* `sglang.srt.plugins` (`register`): runs before a server reads its arguments, and stops it if
  the installed SGLang has no place where our model could be registered.

That is why one distribution is enough: with the first door open, a filter that names another
plugin or platform cannot lose the model by accident. `SGLANG_MINIMAX=0` closes all three.

Nothing here imports SGLang or PyTorch; a server of another model pays for a few dictionary
look-ups. A problem that matters to MiniMax-M2 only is kept in `problems()` until that model is
asked for, and then stops the process with one sentence (`require_healthy`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from functools import partial
from types import ModuleType
from typing import Any

from sglang_minimax import SUPPORTED_SGLANG, __version__
from sglang_minimax.imports import when_imported
from sglang_minimax.platforms import choice
from sglang_minimax.upstream import Patch, Registration, Scope, entries

#: target -> "applied", or why not. A target that is absent has not been imported yet.
_status: dict[str, str] = {}
_installed = False

APPLIED = "applied"


def enabled() -> bool:
    """False when `SGLANG_MINIMAX=0` switches the plugin off."""
    return os.environ.get("SGLANG_MINIMAX", "1").strip().lower() not in ("0", "false", "off")


def installed_sglang() -> str | None:
    """The version of the installed SGLang, None without one."""
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


def version_problem() -> str | None:
    """One sentence when the installed SGLang is not the supported release."""
    found = installed_sglang()
    if found == SUPPORTED_SGLANG:
        return None
    return (
        f"sglang-minimax {__version__} is written for SGLang {SUPPORTED_SGLANG}, found "
        f"{found or 'none'}; run `pip install sglang=={SUPPORTED_SGLANG}`, or set "
        "SGLANG_MINIMAX=0 to serve SGLang's own model."
    )


# --- the three doors -----------------------------------------------------------------------


def on_torch_import() -> None:
    """Entry point `torch.backends`: start watching imports. Never raises."""
    install()


def register() -> None:
    """Entry point `sglang.srt.plugins`. Raises SystemExit if the model could never be ours."""
    if not enabled():
        return
    install()
    if importlib.util.find_spec("sglang.srt.models.registry") is None:
        raise SystemExit(version_problem() or "sglang-minimax: SGLang has no model registry.")


def activate_cpu_platform() -> str | None:
    """Entry point `sglang.srt.platforms`: our platform class if it should be active, else None."""
    if not enabled():
        return None
    install()
    if not choice.cpu_platform_chosen():
        return None
    return "sglang_minimax.platforms.cpu.platform:MinimaxCpuPlatform"


# --- attaching -----------------------------------------------------------------------------


def install() -> None:
    """Watch for every module named in the upstream register. Idempotent, imports nothing."""
    global _installed
    if _installed or not enabled():
        return
    _installed = True
    for entry in entries():
        when_imported(entry.module, partial(_attach, entry))


def _attach(entry: Patch | Registration, module: ModuleType) -> None:
    if entry.scope is Scope.CPU and not choice.cpu_platform_chosen():
        return
    try:
        if isinstance(entry, Patch):
            _replace(entry, module)
        else:
            _load(entry.run)()
    except Exception as error:
        _status[entry.target] = f"{type(error).__name__}: {error}"
    else:
        _status.setdefault(entry.target, APPLIED)  # a failure under the same name stays


def _replace(patch: Patch, module: ModuleType) -> None:
    owner: Any = module
    *parents, name = patch.target.partition(":")[2].split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original = getattr(owner, name)
    replacement = _load(patch.replacement)(original)
    setattr(owner, name, replacement)
    if not callable(replacement):
        return  # a flag of that module alone: others hold equal ones
    replacement.__sglang_original__ = original
    # `from module import name` may have copied the original before we came.
    for other in list(sys.modules.values()):
        # The default keeps modules without the name apart from those whose copy is None.
        if isinstance(other, ModuleType) and vars(other).get(name, other) is original:
            setattr(other, name, replacement)


def _load(path: str) -> Any:
    module_name, _, name = path.partition(":")
    return getattr(importlib.import_module(module_name), name)


# --- health --------------------------------------------------------------------------------


def status() -> dict[str, str]:
    """What became of each entry that applies here: "applied", "waiting", or the reason."""
    return {
        entry.target: _status.get(entry.target, "waiting for its module")
        for entry in entries()
        if entry.scope is not Scope.CPU or choice.cpu_platform_chosen()
    }


def problems() -> list[str]:
    """Sentences that speak against serving MiniMax-M2 from this process."""
    found = [problem] if (problem := version_problem()) else []
    for entry in entries():
        if entry.scope is Scope.CPU and not choice.cpu_platform_chosen():
            continue
        state = _status.get(entry.target)
        if state is None and entry.module in sys.modules:
            state = "its module was imported before the plugin could act"
        if state not in (None, APPLIED):
            found.append(
                f"the hook on {entry.target} did not take in SGLang {installed_sglang()}: {state}; "
                f"run `pip install sglang=={SUPPORTED_SGLANG}`, or set SGLANG_MINIMAX=0."
            )
    return found


def require_healthy() -> None:
    """Stop the process with one sentence if MiniMax-M2 would not be served by our code."""
    if found := problems():
        raise SystemExit(f"sglang-minimax: {found[0]}")
