"""What the draft learns from: `tiny-m2`'s own replies, and what it computed for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import MiniMaxM2ForCausalLM, PreTrainedTokenizerBase

from ci.tiny_m2.dialogues import Completion, Dialogue, Render, Stream
from ci.tiny_m2.draft.model import LAYER_IDS
from ci.tiny_m2.evaluate import LONGEST_REPLY
from ci.tiny_m2.tokenizer import renderer

TOKENS_A_BATCH = 8192  # in one forward pass of the target


@dataclass
class Conversation:
    """A prompt and the target's reply to it, as one list of token ids."""

    ids: list[int]
    prompt: int  # tokens of the prompt


Features = Callable[[MiniMaxM2ForCausalLM, Tensor], Tensor]


@torch.inference_mode()
def captured(model: MiniMaxM2ForCausalLM, ids: Tensor) -> Tensor:
    """What SGLang captures for the draft: [batch, length, ids * hidden] fp32.

    ids: [batch, length] int64, padded on the right. The output of each layer in `LAYER_IDS`, the
    last one's before the final norm.
    """
    outputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        return lambda module, inputs, output: outputs.update({layer: output})

    handles = [model.model.layers[i].register_forward_hook(keep(i)) for i in LAYER_IDS]
    try:
        model.model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat([outputs[i] for i in LAYER_IDS], -1)


def conversations_in(
    tokenizer: PreTrainedTokenizerBase, sample: Dialogue | Completion, render: Render
) -> Iterator[Conversation]:
    """One conversation for each reply of a sample."""
    before: list[int] = []
    for text, is_reply in sample.segments(render):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if is_reply:
            yield Conversation(before + ids, len(before))
        before = before + ids


def training_conversations(
    tokenizer: PreTrainedTokenizerBase, samples: int, seed: int
) -> Iterator[Conversation]:
    """The conversations in fresh samples of the mixture that the target was trained on."""
    render, stream = renderer(), Stream(f"draft/{seed}")
    for _ in range(samples):
        yield from conversations_in(tokenizer, next(stream), render)


@torch.inference_mode()
def replies(
    model: MiniMaxM2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    started: Sequence[Conversation],
    *,
    temperature: float = 0.0,
    batch: int = 64,
    progress: bool = False,
) -> list[Conversation]:
    """The conversations with the target's reply written to its end of turn, like lengths first.

    Greedy, or drawn at `temperature` from torch's global generator.
    """
    waiting = sorted(started, key=lambda conversation: len(conversation.ids))
    done: list[Conversation] = []
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    starts = range(0, len(waiting), batch)
    for start in tqdm(starts, desc="replies", unit="batch", disable=not progress):
        chosen = waiting[start : start + batch]
        inputs = tokenizer.pad(
            {"input_ids": [c.ids for c in chosen]}, padding_side="left", return_tensors="pt"
        )
        output = model.generate(
            **inputs,
            **(how if temperature else {"do_sample": False}),
            max_new_tokens=LONGEST_REPLY,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        for before, new in zip(chosen, output[:, inputs["input_ids"].shape[1] :], strict=True):
            reply = new.tolist()
            if tokenizer.eos_token_id in reply:
                reply = reply[: reply.index(tokenizer.eos_token_id) + 1]
            done.append(Conversation(before.ids + reply, before.prompt))
    return done


def first_disagreement(logits: Tensor, reply: Tensor, temperature: float) -> tuple[int, int] | None:
    """Where the target does not say `reply`, and what it says there; None if it says all of it.

    logits: [tokens, vocab], reply: [tokens] int64. At a temperature, a token stays with the
    target's probability of it, else one of the others is drawn: as speculative sampling does, so
    that the reply is distributed as the target's own (Leviathan et al. 2023).
    """
    if temperature:
        chances = (logits / temperature).softmax(-1)
        said = chances.gather(1, reply[:, None])[:, 0]
        other = torch.rand(len(reply)) >= said
    else:
        other = logits.argmax(-1) != reply
    places = other.nonzero()
    if not len(places):
        return None
    place = int(places[0])
    if not temperature:
        return place, int(logits[place].argmax())
    chances[place, reply[place]] = 0
    return place, int(chances[place].multinomial(1))


@dataclass
class Batch:
    """Conversations padded on the right: ids, features as `captured`, and where replies start."""

    ids: Tensor  # [batch, length] int64
    features: Tensor  # [batch, length, ids * hidden] fp32
    prompts: Tensor  # [batch] int64
    lengths: Tensor  # [batch] int64

    def rows(self) -> Tensor:
        """[batch, chains]: the rows from which a reply's tokens are drafted, clamped to the length.

        The first sees the reply's first token, which is the target's own.
        """
        longest = int((self.lengths - self.prompts).max()) - 1
        rows = self.prompts[:, None] - 1 + torch.arange(longest)
        return rows.clamp(max=self.ids.shape[1] - 2)


def padded(conversations: Sequence[Conversation]) -> Tensor:
    """[batch, length] int64, padded on the right with id 0."""
    rows = [torch.tensor(conversation.ids) for conversation in conversations]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def collated(conversations: Sequence[Conversation], features: Tensor) -> Batch:
    """The batch of these conversations and their features, [batch, length, width]."""
    prompts = torch.tensor([conversation.prompt for conversation in conversations])
    lengths = torch.tensor([len(conversation.ids) for conversation in conversations])
    return Batch(padded(conversations), features.float(), prompts, lengths)


@torch.inference_mode()
def features_of(
    model: MiniMaxM2ForCausalLM, conversations: Sequence[Conversation], *, progress: bool = False
) -> Iterator[tuple[Conversation, Tensor]]:
    """Each conversation with its features, [tokens, ids * hidden] fp32; like lengths first."""
    ordered = sorted(conversations, key=lambda conversation: len(conversation.ids))
    start = 0
    with tqdm(total=len(ordered), desc="target", unit="reply", disable=not progress) as bar:
        while start < len(ordered):
            chosen = ordered[start : start + max(1, TOKENS_A_BATCH // len(ordered[start].ids))]
            features = captured(model, padded(chosen))
            for i, conversation in enumerate(chosen):
                yield conversation, features[i, : len(conversation.ids)]
            start += len(chosen)
            bar.update(len(chosen))


@torch.inference_mode()
def own_replies(
    model: MiniMaxM2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    temperature: float = 0.0,
    *,
    progress: bool = False,
) -> list[tuple[Conversation, Tensor]]:
    """The target's own replies to these prompts with their features, fp16.

    One pass over the replies at hand keeps those that the target says, most of them for a target
    that was trained on such; the others are rewritten from the first token that it does not say.
    """
    kept: list[tuple[Conversation, Tensor]] = []
    rewritten: list[Conversation] = []
    for conversation, features in features_of(model, conversations, progress=progress):
        ids, prompt = conversation.ids, conversation.prompt
        last = features[prompt - 1 : -1, -model.config.hidden_size :]
        logits = model.lm_head(model.model.norm(last))
        found = first_disagreement(logits, torch.tensor(ids[prompt:]), temperature)
        if found is None:
            kept.append((conversation, features.half()))
        else:
            rewritten.append(Conversation([*ids[: prompt + found[0]], found[1]], prompt))
    ended = [c for c in rewritten if c.ids[-1] == tokenizer.eos_token_id]
    open_ = [c for c in rewritten if c.ids[-1] != tokenizer.eos_token_id]
    ended += replies(model, tokenizer, open_, temperature=temperature, progress=progress)
    kept += [(c, features.half()) for c, features in features_of(model, ended, progress=progress)]
    return kept


class Corpus:
    """Conversations, sorted by length, and the target's features for each of their tokens.

    features: [tokens, ids * hidden] fp16, all conversations end to end. Raises OverflowError for
    features beyond fp16's range.
    """

    def __init__(self, conversations: list[Conversation], features: Tensor) -> None:
        if not features.isfinite().all():
            raise OverflowError("the target's residuals do not fit into fp16; store them in fp32")
        self.conversations, self.features = conversations, features
        lengths = torch.tensor([len(conversation.ids) for conversation in conversations])
        self.ends = lengths.cumsum(0).tolist()

    @classmethod
    def of(cls, parts: Sequence[tuple[Conversation, Tensor]]) -> Corpus:
        """The corpus of these conversations and their features."""
        ordered = sorted(parts, key=lambda part: len(part[0].ids))
        return cls([c for c, _ in ordered], torch.cat([features for _, features in ordered]))

    def batch(self, index: Sequence[int]) -> Batch:
        """The conversations with these indices."""
        chosen = [self.conversations[i] for i in index]
        rows = [
            self.features[self.ends[i] - len(c.ids) : self.ends[i]]
            for i, c in zip(index, chosen, strict=True)
        ]
        return collated(chosen, torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))

    def most_frequent(self, count: int, vocabulary: int) -> Tensor:
        """[count] int64, ascending: the ids most frequent in replies, then in prompts, then low."""
        said = torch.zeros(vocabulary, dtype=torch.int64)
        for conversation in self.conversations:
            ids = torch.tensor(conversation.ids)
            # One token of a reply outweighs all the prompts.
            said += torch.bincount(ids, minlength=vocabulary)
            said += torch.bincount(ids[conversation.prompt :], minlength=vocabulary) << 40
        order = said.argsort(descending=True, stable=True)
        return order[:count].sort().values

    def save(self, path: Path) -> None:
        """Write the corpus, then move it into place."""
        part = path.with_suffix(".part")
        ids = torch.tensor([i for c in self.conversations for i in c.ids], dtype=torch.int32)
        sizes = torch.tensor([(len(c.ids), c.prompt) for c in self.conversations])
        torch.save({"ids": ids, "sizes": sizes, "features": self.features}, part)
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Corpus:
        """Read what `save` wrote."""
        state = torch.load(path, weights_only=True)
        ids, conversations, done = state["ids"].tolist(), [], 0
        for length, prompt in state["sizes"].tolist():
            conversations.append(Conversation(ids[done : done + length], prompt))
            done += length
        return cls(conversations, state["features"])
