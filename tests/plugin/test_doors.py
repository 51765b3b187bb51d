"""Every way in, each in a fresh interpreter: what is loaded, what is served, what stops."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

OURS = "sglang_minimax.models.minimax_m2"
IN_TREE = "sglang.srt.models.minimax_m2"
#: Prints the module of the class that the registry answers with.
RESOLVE = """
from sglang.srt.models.registry import ModelRegistry
print(ModelRegistry.resolve_model_cls(["MiniMaxM2ForCausalLM"])[0].__module__)
"""
#: Does what a server does first, and prints the class of the platform.
LOAD_PLUGINS = """
from sglang.srt.platforms import current_platform
from sglang.srt.plugins import load_plugins
load_plugins()
print(type(current_platform).__name__)
"""


def python(
    code: str, *, path: Path | None = None, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter; `path` is put before everything else on sys.path."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("SGLANG_")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**inherited, "PYTHONWARNINGS": "ignore", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout.strip().splitlines()[-1]


def test_importing_the_package_and_opening_the_door_is_light() -> None:
    done = python(
        """
        import sys
        before = set(sys.modules)
        import sglang_minimax, sglang_minimax.plugin
        sglang_minimax.plugin.on_torch_import()
        heavy = {name.split(".")[0] for name in set(sys.modules) - before}
        print(sorted(heavy - set(sys.stdlib_module_names)))
        """
    )
    found = last_line(done)
    assert "'sglang_minimax'" in found
    for name in ("torch", "numpy", "transformers", "typer", "'sglang'", "jit_kernels"):
        assert name not in found, found


@pytest.mark.parametrize(
    "prelude",
    [
        pytest.param("", id="a process that never calls load_plugins"),
        pytest.param("from sglang.srt.plugins import load_plugins; load_plugins()", id="a server"),
        pytest.param(
            "import sglang.srt.models.registry",
            id="registry imported first",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_our_class_is_served(prelude: str) -> None:
    assert last_line(python(prelude + RESOLVE)) == OURS


def test_switched_off() -> None:
    done = python(
        RESOLVE
        + """
import sys
print([name for name in sys.modules if name.startswith("sglang_minimax.models")])
from sglang.srt.platforms import current_platform
print(type(current_platform).__name__)
""",
        SGLANG_MINIMAX="0",
    )
    assert done.stdout.strip().splitlines()[-3:] == [IN_TREE, "[]", "SRTPlatform"]


@pytest.mark.slow
def test_another_plugin_is_named(other_platform: Path) -> None:
    """SGLANG_PLUGINS that names another plugin loses neither model nor platform."""
    done = python(
        LOAD_PLUGINS + RESOLVE,
        path=other_platform,
        SGLANG_PLUGINS="other_hooks",
        SGLANG_PLATFORM="minimax_cpu",
    )
    assert done.stdout.strip().splitlines()[-2:] == ["MinimaxCpuPlatform", OURS]


def test_plugins_filter_alone_keeps_the_platform() -> None:
    done = python(
        "from sglang.srt.platforms import current_platform\nprint(type(current_platform).__name__)",
        SGLANG_PLUGINS="something_else",
    )
    assert last_line(done) == "MinimaxCpuPlatform"


@pytest.mark.slow
def test_another_platform_is_chosen(other_platform: Path) -> None:
    """SGLANG_PLATFORM that names another platform gets it, with its hooks, and our model."""
    done = python(
        LOAD_PLUGINS + RESOLVE,
        path=other_platform,
        SGLANG_PLATFORM="other",
    )
    assert "other hooks registered" in done.stdout
    assert done.stdout.strip().splitlines()[-2:] == ["Other", OURS]


@pytest.mark.slow
def test_another_platform_that_is_installed_goes_first(other_platform: Path) -> None:
    done = python(
        "from sglang.srt.platforms import current_platform\nprint(type(current_platform).__name__)",
        path=other_platform,
    )
    assert last_line(done) == "Other"


def test_another_model_does_not_notice_us() -> None:
    done = python(
        """
        import sys
        from sglang.srt.plugins import load_plugins
        load_plugins()
        from sglang.srt.models.registry import ModelRegistry
        found = ModelRegistry.resolve_model_cls(["LlamaForCausalLM"])[0]
        ours = [name for name in sys.modules if name.startswith(("sglang_minimax", "jit_kernels"))]
        heavy = (".models.", ".layers.", "jit")
        print(found.__module__, [n for n in ours if any(part in n for part in heavy)])
        """
    )
    assert last_line(done) == "sglang.srt.models.llama []"


def test_an_unsupported_sglang_stops_our_model_alone(tmp_path: Path) -> None:
    info = tmp_path / "sglang-9.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 9.9.9\n")
    done = python(
        """
        from sglang.srt.plugins import load_plugins
        load_plugins()
        from sglang.srt.models.registry import ModelRegistry
        print(ModelRegistry.resolve_model_cls(["LlamaForCausalLM"])[0].__module__)
        ModelRegistry.resolve_model_cls(["MiniMaxM2ForCausalLM"])
        """,
        path=tmp_path,
        check=False,
    )
    assert done.returncode == 1
    assert last_line(done) == "sglang.srt.models.llama"
    assert done.stderr.strip().splitlines()[-1].startswith("sglang-minimax")
    assert "9.9.9" in done.stderr
    assert "pip install sglang==0.5.23" in done.stderr


def test_a_hook_that_did_not_take_stops_our_model() -> None:
    done = python(
        """
        import sglang.srt.arg_groups.resolution_hooks as hooks
        import sglang_minimax.plugin as plugin
        plugin._status["sglang.srt.arg_groups.resolution_hooks:register_resolution_hook"] = (
            "AttributeError: module has no attribute 'register_resolution_hook'"
        )
        from sglang.srt.models.registry import ModelRegistry
        ModelRegistry.resolve_model_cls(["MiniMaxM2ForCausalLM"])
        """,
        check=False,
    )
    assert done.returncode == 1
    sentence = done.stderr.strip().splitlines()[-1]
    assert "resolution_hooks:register_resolution_hook did not take" in sentence
    assert "SGLANG_MINIMAX=0" in sentence


@pytest.mark.slow
def test_a_moved_symbol_is_a_hook_that_did_not_take() -> None:
    """A release without the symbol: the patch fails for real, and says which."""
    done = python(
        """
        import dataclasses, sglang_minimax.upstream as u
        u.PATCHES = tuple(
            dataclasses.replace(p, target=p.target.replace("scheduler_died", "scheduler_perished"))
            for p in u.PATCHES
        )
        import sglang.srt.entrypoints.engine
        from sglang.srt.models.registry import ModelRegistry
        ModelRegistry.resolve_model_cls(["MiniMaxM2ForCausalLM"])
        """,
        check=False,
    )
    assert done.returncode == 1
    assert "_scheduler_perished_error did not take" in done.stderr.strip().splitlines()[-1]


def test_a_model_that_cannot_be_imported_stops_with_one_sentence() -> None:
    done = python("import sys; sys.modules['jit_kernels'] = None" + RESOLVE, check=False)
    assert done.returncode == 1
    sentence = done.stderr.strip().splitlines()[-1]
    assert sentence.startswith("sglang-minimax: the model could not be imported")
    assert "jit_kernels" in sentence
