"""What is said of a draft for tiny-m2, as lists of sentences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from sglang_minimax import TINY_M2
from sglang_minimax.config import Architecture
from sglang_minimax.drafts.judgement import Verdict, draft_config, judge
from sglang_minimax.errors import MinimaxError
from sglang_minimax.loading.files import architecture_of
from tests.drafts import State

Change = Callable[[State], State | None]

TINY = architecture_of(TINY_M2)
PUBLISHED = Architecture.from_config(
    json.loads((Path(__file__).parents[1] / "data" / "published_config.json").read_text())
)
#: As published for MiniMax-M2.5: a third of the heads, 32000 of the tokens, a layer of three.
PUBLISHED_DRAFT = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "draft_vocab_size": 32000,
    "eagle_config": {
        "eagle_aux_hidden_state_layer_ids": [1, 30, 58],
        "use_aux_hidden_state": True,
    },
    "head_dim": 128,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "model_type": "llama",
    "num_attention_heads": 24,
    "num_hidden_layers": 1,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "vocab_size": 200064,
}


def verdict(folder: Path, ranks: int = 1) -> Verdict:
    assert TINY is not None
    return judge(TINY, draft_config(folder), weights=folder, target=TINY_M2, ranks=ranks)


def said(folder: Path, ranks: int = 1) -> list[str]:
    """Everything that is said of a draft, an unreadable one included."""
    try:
        found = verdict(folder, ranks)
    except MinimaxError as error:
        return [str(error)]
    return [*found.refusals, *found.doubts]


def one_sentence(sentences: list[str]) -> str:
    (sentence,) = sentences
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence
