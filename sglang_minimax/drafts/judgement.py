"""The judgement of a draft's folder beside its target's: what a launch and `inspect` both say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_minimax.config import Architecture
from sglang_minimax.drafts.checks import doubts, refusals
from sglang_minimax.drafts.config import Draft
from sglang_minimax.drafts.fingerprint import fingerprint
from sglang_minimax.errors import LoadError
from sglang_minimax.loading.files import config_of, weight_files
from sglang_minimax.loading.headers import read_headers


@dataclass(frozen=True, slots=True)
class Verdict:
    """What speaks against a draft, one sentence each. doubts: it runs, and replies stay right."""

    draft: Draft
    refusals: tuple[str, ...]
    doubts: tuple[str, ...]


def draft_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a draft's folder. Raises LoadError."""
    config = config_of(folder)
    if config is None:
        raise LoadError(f"{folder} has no config.json; check the path of the draft.")
    return config


def judge(
    arch: Architecture,
    config: Mapping[str, Any],
    *,
    weights: Path | None,
    target: Path | None,
    ranks: int = 1,
) -> Verdict:
    """The verdict on a draft with this config.json for a model of this architecture.

    weights: the folder with the draft's tensors, None where they are not there yet. target: that of
    the model's, None where its fingerprint cannot be taken; it is read only for a draft that has
    one to compare. ranks: over which attention is cut. Raises MinimaxError, in one sentence, for
    what cannot be read.
    """
    draft = Draft.from_config(config)
    tensors = None if weights is None else read_headers(weight_files(weights)).tensors
    refused = tuple(refusals(arch, draft, tensors, ranks))
    if refused:
        return Verdict(draft, refused, ())
    known = draft.fingerprint is not None and target is not None
    found = fingerprint(target) if known and target is not None else None
    return Verdict(draft, (), tuple(doubts(arch, draft, found)))
