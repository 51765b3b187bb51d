"""The extra `accuracy` changes nothing that SGLang pins."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
EVALUATOR = "lm-eval"

Requirements = list[Requirement]


def required(package: str, extra: str = "") -> Requirements:
    """What a package requires here."""
    found = map(Requirement, importlib.metadata.requires(package) or ())
    return [each for each in found if not each.marker or each.marker.evaluate({"extra": extra})]


def pinned(requirements: Requirements) -> dict[str, str]:
    """Exact versions by canonical name."""
    return {
        canonicalize_name(each.name): exact.version
        for each in requirements
        for exact in each.specifier
        if exact.operator == "==" and not exact.version.endswith("*")
    }


def contradictions(requirements: Requirements, pins: dict[str, str]) -> list[str]:
    """The requirements that a pinned version does not meet."""
    return [
        str(each)
        for each in requirements
        if (version := pins.get(canonicalize_name(each.name)))
        and not each.specifier.contains(version, prereleases=True)
    ]


def test_the_evaluator_is_pinned() -> None:
    """Its prompts and filters decide the scores."""
    extra = pinned([Requirement(each) for each in PROJECT["optional-dependencies"]["accuracy"]])
    assert EVALUATOR in extra
    pytest.importorskip("lm_eval", reason="the evaluator is not installed: the extra `accuracy`")
    assert importlib.metadata.version(EVALUATOR) == extra[EVALUATOR]


def test_it_contradicts_nothing_that_sglang_pins() -> None:
    pytest.importorskip("lm_eval", reason="the evaluator is not installed: the extra `accuracy`")
    pins = pinned(required("sglang"))
    assert {"torch", "transformers"} <= set(pins)
    asked = required(EVALUATOR)
    assert {"datasets", "jinja2"} <= {canonicalize_name(each.name) for each in asked}
    assert contradictions(asked, pins) == []
    # What SGLang leaves open has been installed for both of them.
    here = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    installed = {canonicalize_name(name): version for name, version in here.items()}
    assert contradictions([*asked, *required("sglang")], installed) == []


@pytest.mark.parametrize("wrong", ["transformers<5", "Torch >= 99", "xgrammar==0.0.1"])
def test_a_contradiction_is_seen(wrong: str) -> None:
    pins = pinned(required("sglang"))
    assert contradictions([Requirement(wrong)], pins) == [str(Requirement(wrong))]
