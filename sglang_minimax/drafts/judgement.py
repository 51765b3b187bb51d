"""The judgement of a draft's folder beside its target's: what a launch and `inspect` both say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_minimax.config import Architecture
from sglang_minimax.drafts.checks import doubts, refusals
from sglang_minimax.drafts.config import QUANTISED, Draft
from sglang_minimax.drafts.fingerprint import fingerprint
from sglang_minimax.drafts.options import NO_OPTIONS, Options
from sglang_minimax.drafts.options import refusals as refused_options
from sglang_minimax.errors import LoadError
from sglang_minimax.loading.files import config_of, weight_files
from sglang_minimax.loading.headers import read_headers

# Where ModelOpt writes how it has quantised.
_MODELOPT = "hf_quant_config.json"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What speaks against a draft, one sentence each. doubts: it runs, and replies stay right.

    fingerprint: of the target, None where it has not been taken.
    """

    draft: Draft
    fingerprint: str | None
    refusals: tuple[str, ...]
    doubts: tuple[str, ...]


def draft_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """The parsed config.json of a draft's folder, or the file `name` there. Raises LoadError.

    Where it says nothing of quantisation, what lies in ModelOpt's own file beside it is put in its
    place, as SGLang does.
    """
    config = config_of(folder, name)
    if config is None:
        raise LoadError(f"{folder} has no {name}; check the path of the draft.")
    if all(config.get(key) is None for key in QUANTISED):
        quantised = config_of(folder, _MODELOPT)
        return config if quantised is None else {**config, QUANTISED[0]: quantised}
    return config


def judge(
    arch: Architecture,
    config: Mapping[str, Any],
    *,
    weights: Path | None,
    target: Path | None,
    ranks: int = 1,
    options: Options = NO_OPTIONS,
) -> Verdict:
    """The verdict on a draft with this config.json for a model of this architecture.

    weights: the folder with the draft's tensors, None where they are not there yet. target: that of
    the model's, None where its fingerprint is not to be taken. ranks: over which attention is cut.
    options: of the launch. Raises MinimaxError, in one sentence, for what cannot be read.
    """
    draft = Draft.from_config(config)
    tensors = None if weights is None else read_headers(weight_files(weights)).tensors
    found = None if target is None else fingerprint(target)
    refused = (*refusals(arch, draft, tensors, ranks), *refused_options(draft, options))
    doubted = () if refused else tuple(doubts(arch, draft, found))
    return Verdict(draft, found, refused, doubted)
