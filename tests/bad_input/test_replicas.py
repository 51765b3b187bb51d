"""A refused load under a data-parallel controller, which does not look at its ranks' pipes."""

from __future__ import annotations

from typing import Any

REPLICAS = ("--dp-size", "2")


def test_replicas_start(derive: Any, launch: Any) -> None:
    assert launch(derive(), *REPLICAS).started


def test_a_refused_load_ends_all_replicas(derive: Any, launch: Any) -> None:
    ended = launch(derive(lambda tensors: tensors.pop("model.norm.weight")), *REPLICAS)
    # SGLang's controller knows no other way to end than a signal, which leaves a trace.
    ended.assert_refused("missing: model.norm.weight", trace=True)
