"""The tokenizer of `tiny-m2`: byte-level BPE, one token a digit, MiniMax-M2's tags and template.

Words are split so that the template's boilerplate costs little: a chunk that starts with a quote or
bracket runs to the next blank or digit (`{"type":` is one token), and the space before a number
joins the sign in front of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ci.tiny_m2.dialogues import Render, Stream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TEMPLATE_FILE = Path(__file__).with_name("chat_template.jinja")
VOCAB_SIZE = 896  # rows of the embedding; the mixture's words need a few less
PAD, BOS, ROLE, EOS = "]!p~[", "]~!b[", "]~b]", "[e~["
CONTROL_TOKENS = (PAD, BOS, ROLE, EOS)  # ids 0 to 3, special: skipped when decoding
# Not special: SGLang drops special tokens from replies without tools, the tags with them.
TAG_TOKENS = ("<think>", "</think>", "<minimax:tool_call>", "</minimax:tool_call>")  # ids 4 to 7

PIECES = "|".join(
    (
        r"\p{N}",  # every digit alone
        r"\n+",
        r' ?[<{"\[][^\s\p{N}]*',  # JSON and XML chunks
        r" ?[^\s\p{L}\p{N}]+ (?=\p{N})",  # a sign and the space before a number
        r" ?\p{L}+",
        r" ?[^\s\p{L}\p{N}]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)


@cache
def template_text() -> str:
    """The chat template's source."""
    return TEMPLATE_FILE.read_text(encoding="utf-8")


def renderer() -> Render:
    """Render messages with the chat template, exactly as the saved tokenizer does."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(messages: list, tools: list | None, add_generation_prompt: bool) -> str:
        texts, _ = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=template_text(),
            add_generation_prompt=add_generation_prompt,
        )
        return texts[0]

    return render


def corpus(samples: int, seed: int = 0) -> Iterator[str]:
    """Rendered training samples to learn the merges from."""
    render, stream = renderer(), Stream(f"tokenizer/{seed}")
    for _ in range(samples):
        yield "".join(text for text, _ in next(stream).segments(render))


def train_tokenizer(samples: int = 8000, seed: int = 0) -> Tokenizer:
    """Learn the merges from the training mixture. Deterministic for a seed."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[*CONTROL_TOKENS, *TAG_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(samples, seed), trainer)
    return tokenizer


def with_plain_tags(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with plain tags; the trainer gives low ids to special tokens only."""
    document = json.loads(tokenizer.to_str())
    for token in document["added_tokens"]:
        token["special"] = token["content"] in CONTROL_TOKENS
    return Tokenizer.from_str(json.dumps(document, ensure_ascii=False))


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> PreTrainedTokenizerFast:
    """Write the files that `AutoTokenizer` loads, the chat template as its own file."""
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=with_plain_tags(tokenizer),
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[ROLE],
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        padding_side="left",
    )
    fast.chat_template = template_text()
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(folder)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every transformers knows
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return fast
