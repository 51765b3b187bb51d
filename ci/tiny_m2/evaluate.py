"""How often `tiny-m2` is right on held-out questions, by category, at temperature 0.

Usage: `python -m ci.tiny_m2.evaluate sglang_minimax/assets/tiny-m2 --count 500`
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from ci.tiny_m2.cases import CATEGORIES, Case, cases
from ci.tiny_m2.dialogues import Render
from sglang_minimax.accuracy.results import Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TARGETS = {"two_digit": 0.99, "three_digit": 0.95, "word": 0.95, "tool_call": 0.98}
LONGEST_REPLY = 128  # tokens; the longest trained reply has about 110


def chat_renderer(tokenizer: PreTrainedTokenizerBase) -> Render:
    """Render messages with the tokenizer's own chat template."""

    def render(messages: list, tools: list | None, add_generation_prompt: bool) -> str:
        return tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    return render


@torch.inference_mode()
def greedy_replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch: int = 64,
    max_new_tokens: int = LONGEST_REPLY,
    progress: bool = False,
) -> list[str]:
    """The greedy reply to each prompt, in order; like lengths run together, padded on the left.

    The attention mask is passed on: without one, `generate` guesses it from the pad id.
    """
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    replies = [""] * len(ids)
    for start in tqdm(range(0, len(order), batch), disable=not progress, leave=False):
        chosen = order[start : start + batch]
        inputs = tokenizer.pad(
            {"input_ids": [ids[i] for i in chosen]}, padding_side="left", return_tensors="pt"
        )
        output = model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            replies[i] = text
    return replies


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Case],
    **options: Any,
) -> Score:
    """Ask the cases and count the right replies. `options` go to `greedy_replies`."""
    render = chat_renderer(tokenizer)
    replies = greedy_replies(model, tokenizer, [case.prompt(render) for case in asked], **options)
    right = sum(case.right(reply) for case, reply in zip(asked, replies, strict=True))
    return Score(right, len(asked))


def accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    *,
    categories: Sequence[str] = tuple(CATEGORIES),
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Score]:
    """The score in each category over `count` held-out cases."""
    return {
        name: score(model, tokenizer, cases(name, count, seed), progress=progress)
        for name in categories
    }


def routing_changed_without_bias(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int = 64
) -> list[float]:
    """By layer, the share of tokens that other experts would get without the correction bias."""
    changed: list[list[torch.Tensor]] = [[] for _ in model.model.layers]

    def compare(layer: int):
        def hook(gate, inputs, outputs) -> None:
            hidden, bias = inputs
            plain = gate(hidden, torch.zeros_like(bias))[2] if bias.any() else None
            if plain is not None:
                differs = outputs[2].sort(-1).values != plain.sort(-1).values  # [tokens, top_k]
                changed[layer].append(differs.any(-1))

        return hook

    gates = [layer.mlp.gate for layer in model.model.layers]
    handles = [gate.register_forward_hook(compare(i)) for i, gate in enumerate(gates)]
    render = chat_renderer(tokenizer)
    try:
        for category in ("three_digit", "word", "tool_call"):
            for case in cases(category, count // 3 + 1, seed=1):
                inputs = tokenizer(
                    case.prompt(render), return_tensors="pt", add_special_tokens=False
                )
                with torch.inference_mode():
                    model(input_ids=inputs["input_ids"])
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts).float().mean().item() for parts in changed]


def environment() -> dict[str, str]:
    """What a result was measured with."""
    import transformers

    return {
        "date": date.today().isoformat(),
        "machine": f"{torch.get_num_threads()}-core {platform.machine().replace('_', '-')} CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def merge_json(path: Path, section: str, content: dict[str, Any]) -> None:
    """Write `content` as one section of a JSON file, keeping the other sections."""
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    document[section] = content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The shipped weights in fp32 arithmetic, and the tokenizer."""
    from transformers import AutoTokenizer

    from ci.tiny_m2.model import load_checkpoint

    return load_checkpoint(folder), AutoTokenizer.from_pretrained(folder)


def main(
    checkpoint: Annotated[Path, typer.Argument(help="folder with the checkpoint")],
    count: Annotated[int, typer.Option(help="held-out cases a category")] = 500,
    seed: Annotated[int, typer.Option(help="of the held-out sample")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the result here")] = None,
) -> None:
    """Print the accuracy of a checkpoint on held-out questions."""
    model, tokenizer = load(checkpoint)
    scores = accuracy(model, tokenizer, count, seed=seed, progress=True)
    changed = routing_changed_without_bias(model, tokenizer)
    table = Table("category", "right", "asked", "share", "target")
    for name, result in scores.items():
        target = f"{TARGETS[name]:.0%}" if name in TARGETS else ""
        table.add_row(name, str(result.right), str(result.asked), f"{result.share:.1%}", target)
    console = Console()
    console.print(table)
    shares = ", ".join(f"{share:.0%}" for share in changed)
    console.print(f"tokens routed otherwise without the correction bias, by layer: {shares}")
    if json_file:
        content = {
            "command": f"python -m ci.tiny_m2.evaluate {checkpoint} --count {count} --seed {seed}",
            **environment(),
            "categories": {n: asdict(s) | {"share": round(s.share, 4)} for n, s in scores.items()},
            "tokens_routed_otherwise_without_bias": [round(share, 3) for share in changed],
        }
        merge_json(json_file, "accuracy", content)


if __name__ == "__main__":
    typer.run(main)
