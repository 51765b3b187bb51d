"""MiniMax-M2 for SGLang. Importing this package costs nothing; `plugin.py` is the way in."""

from pathlib import Path

__version__ = "0.1.0"

#: The one SGLang release that this version is written against and tested with.
SUPPORTED_SGLANG = "0.5.23"

#: The bundled trained checkpoint.
TINY_M2 = Path(__file__).parent / "assets" / "tiny-m2"

#: Its trained Eagle3 draft.
TINY_M2_EAGLE3 = Path(__file__).parent / "assets" / "tiny-m2-eagle3"

#: The architecture name in a checkpoint's config.json that this plugin serves.
ARCHITECTURE = "MiniMaxM2ForCausalLM"
