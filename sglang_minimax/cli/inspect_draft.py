"""`sglang-minimax inspect DRAFT --target MODEL`: whether a draft fits. No torch, no SGLang."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import typer

from sglang_minimax.cli import tables
from sglang_minimax.config import Architecture
from sglang_minimax.drafts.config import Draft
from sglang_minimax.drafts.judgement import Verdict, draft_config, judge
from sglang_minimax.errors import LoadError
from sglang_minimax.legality import Sizes
from sglang_minimax.loading.files import architecture_of
from sglang_minimax.topology import Topology, exact_div


def inspect(folder: Path, target: Path, sizes: Sizes, layout: str | None, *, as_json: bool) -> int:
    """Print what a launch would say of the draft in `folder`; 1 where it would be refused.

    layout: sizes as one text, in the place of those in `sizes`. Raises MinimaxError.
    """
    if layout is not None:
        sizes = replace(sizes, **Topology.parse_sizes(layout))
    arch = architecture_of(target)
    if arch is None:
        raise LoadError(f"{target} has no config.json; check the path of the model.")
    groups = sizes.dp * sizes.attention_cp
    verdict = judge(
        arch,
        draft_config(folder),
        weights=folder,
        target=target if any(target.glob("*.safetensors")) else None,
        ranks=exact_div(sizes.tp, groups, "ranks over attention groups"),
    )
    fits = not (verdict.refusals or verdict.doubts)
    if as_json:
        said = {"refusals": verdict.refusals, "doubts": verdict.doubts}
        typer.echo(json.dumps({"fits": fits, "fingerprint": verdict.fingerprint, **said}, indent=1))
    else:
        _show(folder, arch, verdict, fits)
    return 0 if fits else 1


def _show(folder: Path, arch: Architecture, verdict: Verdict, fits: bool) -> None:
    found = verdict.fingerprint or "not known, its weights are not there"
    tables.show(tables.pairs([("draft", str(folder)), *_summary(arch, verdict.draft, found)]))
    for sentence in (*verdict.refusals, *verdict.doubts):
        typer.echo(f"  {sentence}")
    typer.echo("The draft fits the model." if fits else "The draft does not fit, see above.")


def _summary(arch: Architecture, draft: Draft, found: str) -> Iterator[tuple[str, str]]:
    layers = "those that SGLang guesses" if draft.layers is None else str(list(draft.layers))
    words = draft.vocab_size if draft.own_vocab is None else draft.own_vocab
    yield "class", f"{draft.architecture}, {draft.num_layers} layer(s) of {draft.hidden_size}"
    if draft.reads_residuals:
        yield "reads", f"outputs of layers {layers} of the model's {arch.num_layers}"
    else:
        yield "reads", "the model's last hidden state"
    yield "tokens", f"{words:,} of the model's {arch.vocab_size:,}"
    yield "trained for", draft.fingerprint or "not said"
    yield "model", found
