"""Run a callback right after a module is imported, without importing it early.

The standard library only. `when_imported("a.b", f)` calls `f(module)` once: at once if the
module is there already, else when its code has run and before anyone else can use it. A
callback that raises makes the import fail, so callers decide what may stop a process.

The idea is PEP 369's post-import hooks (withdrawn); `wrapt` has a fuller version.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType

Callback = Callable[[ModuleType], None]


class _NotifyingLoader(importlib.abc.Loader):
    """Stands in for the real loader during one import, then steps aside."""

    def __init__(self, inner: importlib.abc.Loader, notify: Callback) -> None:
        self._inner = inner
        self._notify = notify

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module must look as if its own loader had imported it: inspect, pickle and
        # importlib.resources all read these two.
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        self._notify(module)


class _PostImportFinder(importlib.abc.MetaPathFinder):
    """First on `sys.meta_path`; answers only for watched modules.

    A look-up is not an import: `importlib.util.find_spec("a.b")` comes through here too and
    must not use the watch up. Callbacks go when the module has run.
    """

    def __init__(self) -> None:
        self.watched: dict[str, list[Callback]] = {}
        self._passing_through = threading.local()

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        self._notify_finished()
        if fullname not in self.watched or getattr(self._passing_through, "on", False):
            return None
        self._passing_through.on = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._passing_through.on = False
        if spec is not None and spec.loader is not None:
            spec.loader = _NotifyingLoader(spec.loader, self.notify)
        return spec

    def notify(self, module: ModuleType) -> None:
        for callback in self.watched.pop(module.__name__, ()):
            callback(module)

    def _notify_finished(self) -> None:
        # Watched modules whose import had begun before the watch did.
        for name in [name for name in self.watched if name in sys.modules]:
            module = sys.modules[name]
            if not _initializing(module) and not isinstance(module.__loader__, _NotifyingLoader):
                self.notify(module)


def _initializing(module: ModuleType) -> bool:
    """True in the middle of a module's own import: it is in sys.modules without its contents."""
    return getattr(module.__spec__, "_initializing", False)


_finder = _PostImportFinder()


def when_imported(module_name: str, callback: Callback) -> None:
    """Call `callback(module)` once, now or right after `module_name` is first imported."""
    module = sys.modules.get(module_name)
    if module is not None and not _initializing(module):
        callback(module)
        return
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.watched.setdefault(module_name, []).append(callback)
