"""Another platform plugin, as a vendor might install it."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def other_platform(tmp_path: Path) -> Path:
    """A folder with another distribution: a platform plugin called `other`, and its hooks."""
    info = tmp_path / "other_platform-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-platform\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[sglang.srt.platforms]\nother = other_platform:activate\n"
        "[sglang.srt.plugins]\nother_hooks = other_platform:register\n"
    )
    (tmp_path / "other_platform.py").write_text(
        "from sglang.srt.platforms.cpu import CpuSRTPlatform\n"
        "class Other(CpuSRTPlatform):\n    device_name = 'other'\n"
        "def activate():\n    return 'other_platform:Other'\n"
        "def register():\n    print('other hooks registered')\n"
    )
    return tmp_path
