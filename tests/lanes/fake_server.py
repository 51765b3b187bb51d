"""Stands in for SGLang's launcher: the same command line and logs, and no model.

What it does is named by FAKE_SERVER: `serve`, `die` while loading, `hang` at every question,
`refuse` every question, `vanish` at the first one, `leave` after a second.
It has a child, as SGLang has ranks.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from tests.accuracy.fake_server import Body, FakeServer, Said

BEHAVIOUR = os.environ.get("FAKE_SERVER", "serve")


def answer(body: Body) -> Said:
    """A one, to whatever is asked."""
    if BEHAVIOUR == "hang":
        time.sleep(600)
    if BEHAVIOUR == "vanish":
        os._exit(1)
    return Said("#### 1", status=400 if BEHAVIOUR == "refuse" else 200)


def main() -> None:
    """What `python -m sglang.launch_server` does, in a few words."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("[2026-01-01 00:00:00 TP0] Load weight begin.", flush=True)
    if BEHAVIOUR == "die":
        print("Traceback (most recent call last):", flush=True)
        print("sglang-minimax: model-00001.safetensors is incomplete; copy it again.", flush=True)
        os._exit(3)
    FakeServer(answer, port=int(sys.argv[sys.argv.index("--port") + 1]))
    print("The server is fired up and ready to roll!", flush=True)
    time.sleep(1 if BEHAVIOUR == "leave" else 600)


main()
