"""Where experts start: is `--init-expert-location` a placement of this model on these ranks?

SGLang accepts any numbers here. An expert that has no slot, or a slot without an expert, would be
found by the first token that is routed there. No SGLang, no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPTION = "--init-expert-location"
TRIVIAL = "trivial"
MAP, COUNT = "physical_to_logical_map", "logical_count"


def refusals(text: str, *, layers: int, experts: int, redundant: int) -> Iterator[str]:
    """Yield why `text` places nothing, in one sentence; nothing when it does.

    text: "trivial", JSON, or the path of a .json or .pt file, as SGLang takes it; a .pt is left to
    SGLang. layers, experts: of the model. redundant: --ep-num-redundant-experts.
    """
    if text == TRIVIAL or text.endswith(".pt"):
        return
    try:
        given = json.loads(Path(text).read_text() if text.endswith(".json") else text)
    except OSError as error:
        yield f"{OPTION} {text} cannot be read ({error.strerror}); name a .json or .pt file."
        return
    except ValueError as error:
        yield (
            f"{OPTION} is not JSON ({error}); give 'trivial', JSON with {MAP} or {COUNT}, or the "
            "path of a .json or .pt file."
        )
        return
    if isinstance(given, dict) and MAP in given:
        problem = _map_problem(given[MAP], layers, experts, experts + redundant)
    elif isinstance(given, dict) and COUNT in given:
        problem = _count_problem(given[COUNT], layers, experts)
    else:
        problem = f"has neither {MAP} nor {COUNT}"
    if problem:
        yield f"{OPTION} {problem}."


def _map_problem(rows: Any, layers: int, experts: int, slots: int) -> str | None:
    """What is wrong with [layers][slots] of expert ids."""
    if not _is_table(rows) or len(rows) != layers:
        return f"needs a list of expert ids for each of the {layers} layers in {MAP}"
    for layer, row in enumerate(rows):
        if len(row) != slots:
            return (
                f"gives layer {layer} {len(row)} slots, but {experts} experts with "
                f"--ep-num-redundant-experts {slots - experts} have {slots}"
            )
        if wrong := [each for each in row if not _is_count(each) or each >= experts]:
            return f"puts expert {wrong[0]} into layer {layer}, which has 0 to {experts - 1}"
        if homeless := sorted(set(range(experts)) - set(row)):
            return f"leaves expert {homeless[0]} of layer {layer} without a slot"
    return None


def _count_problem(counts: Any, layers: int, experts: int) -> str | None:
    """What is wrong with [layers][experts] of token counts, or several of them."""
    tables = [counts] if _is_table(counts) else counts
    if not isinstance(tables, list) or not tables or not all(map(_is_table, tables)):
        return f"needs token counts as a table of layers and experts in {COUNT}"
    for table in tables:
        if len(table) != layers or any(len(row) != experts for row in table):
            return f"needs {layers} layers of {experts} token counts each in {COUNT}"
        if any(not isinstance(each, int | float) or each < 0 for row in table for each in row):
            return f"has a token count in {COUNT} that is no number of tokens"
    return None


def _is_table(value: Any) -> bool:
    """Whether `value` is a list of lists of scalars."""
    return isinstance(value, list) and all(
        isinstance(row, list) and not any(isinstance(each, list) for each in row) for row in value
    )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
