"""Nodes whose environments ask for different paths do not start, instead of waiting for ever."""

from __future__ import annotations

from typing import Any

from sglang_minimax.errors import PathError
from sglang_minimax.layers.plan import agree
from tests.ranks import together


def said(names: list[str | None]) -> list[Any]:
    return together(lambda rank, gather: agree(names[rank], gather), len(names))


def test_one_wish_or_none_is_agreed_on() -> None:
    assert said([None, None]) == [None, None]
    assert said(["gather"] * 3) == [None] * 3


def test_different_wishes_are_one_sentence_on_every_rank() -> None:
    for names in (["gather", "sglang"], [None, "gather-fp8", None]):
        found = said(names)
        assert all(isinstance(each, PathError) for each in found)
        assert len({str(each) for each in found}) == 1
        assert "SGLANG_MINIMAX_MOE is" in str(found[0])
        assert "set it to one name on all machines" in str(found[0])
