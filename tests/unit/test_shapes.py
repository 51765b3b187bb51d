"""The list of shapes: its schema, how a topology is written, and what the documents say of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_minimax.config import Architecture
from sglang_minimax.errors import MinimaxError, TopologyError
from sglang_minimax.topology import rank_shares
from sglang_minimax.validation import shapes, subject
from sglang_minimax.validation.report import topology_table
from sglang_minimax.validation.run import refusal
from sglang_minimax.validation.shapes import Shape

ROOT = Path(__file__).parents[2]
CATALOGUE = shapes.catalogue()


def test_the_packaged_list_is_the_one_in_ci() -> None:
    assert shapes.read(ROOT / "ci" / "topologies.yaml") == CATALOGUE


@pytest.mark.parametrize("shape", CATALOGUE.shapes, ids=lambda shape: shape.name)
def test_each_shape_divides_its_model(shape: Shape) -> None:
    arch = Architecture.from_config(CATALOGUE.config(shape.model))
    assert len(rank_shares(arch, shape.sizes())) == shape.sizes().world_size


@pytest.mark.parametrize(
    "wanted",
    [
        *("tp=1", "tp=2", "tp=4", "tp=8", "tp=16", "tp=3", "tp=6", "tp=4,ep=2", "tp=4,ep=4"),
        *("tp=2,dp=2", "tp=4,dp=2", "tp=4,dp=4", "tp=4,dp=4,ep=4", "tp=4,dp=2,ep=4"),
        *("tp=4,dp=2,dp_lm_head", "pp=2", "pp=3", "tp=2,pp=2", "tp=2,dp=2,pp=2"),
    ],
)
def test_nothing_that_must_run_has_left_the_list(wanted: str) -> None:
    assert CATALOGUE.find(wanted) is not None


def test_replicas_and_stages_are_what_the_list_is_for() -> None:
    def replicas(name: str) -> int:
        shape = CATALOGUE.find(name)
        assert shape is not None
        arch = Architecture.from_config(CATALOGUE.config(shape.model))
        return rank_shares(arch, shape.sizes())[0].attention.kv_replicas

    assert [replicas(f"tp={n}") for n in (1, 2, 4, 8, 16, 3, 6)] == [1, 1, 1, 2, 4, 1, 2]
    arch = Architecture.from_config(CATALOGUE.config("kv4-5layers"))
    shape = CATALOGUE.find("pp=3")
    assert shape is not None
    assert [len(share.layers) for share in rank_shares(arch, shape.sizes())] == [1, 2, 2]


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("tp=1", "tp=1"),
        ("tp=1,pp=2", "pp=2"),
        (" pp=2, tp=4 ", "tp=4,pp=2"),
        ("dp_lm_head,dp=2,tp=4", "tp=4,dp=2,dp_lm_head"),
        ("exchange=gather,tp=4,dp_lm_head", "tp=4,dp_lm_head,exchange=gather"),
    ],
)
def test_a_topology_has_one_name(written: str, name: str) -> None:
    assert Shape(topology=written).name == name


@pytest.mark.parametrize(
    "text", ["tp", "tp=0", "tp=two", "tp=2,tp=4", "cp=2", "", "tp=4 dp=2", "exchange=deepep"]
)
def test_what_is_not_a_topology_is_said_with_the_keys(text: str) -> None:
    with pytest.raises(
        TopologyError, match="tp, dp, ep, pp, nodes at most once, dp_lm_head without"
    ):
        Shape(topology=text)


def test_arguments_are_sglangs() -> None:
    found = shapes.arguments(Shape(topology="tp=4,dp=2,ep=4,pp=2,dp_lm_head"))
    assert found == {
        "tp_size": 4,
        "attn_dp_size": 2,
        "ep_size": 4,
        "pp_size": 2,
        "enable_dp_lm_head": True,
    }
    assert shapes.arguments(Shape(topology="tp=1")) == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("shapes: [{topology: tp=2, modle: kv4}]\nmodels: {}", "shapes.0.modle"),
        ("shapes: []", "models"),
        ("shapes: [{topology: tp=2, combine: all_reduce}]\nmodels: {}", "reduce_scatterv"),
        ("- [", "cannot be read"),
        ("shapes: [{topology: cp=2}]\nmodels: {}", "'cp=2' is not understood"),
    ],
)
def test_a_list_that_is_wrong_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "list.yaml"
    path.write_text(text)
    with pytest.raises(MinimaxError, match=words) as caught:
        shapes.read(path)
    assert "\n" not in str(caught.value)


def test_an_unknown_model_is_named_with_those_there_are() -> None:
    with pytest.raises(MinimaxError, match=r"no model 'kv5'; it has kv4"):
        CATALOGUE.config("kv5")


def test_the_document_has_the_table_of_the_list() -> None:
    text = (ROOT / "docs" / "validation.md").read_text()
    assert topology_table(CATALOGUE) in text, "run `python -m benchmarks.readme`"


def test_a_context_too_short_for_the_requests_is_refused() -> None:
    arch = Architecture.from_config({**CATALOGUE.config("kv4"), "max_position_embeddings": 64})
    reason = refusal(Shape(topology="tp=2"), arch)
    assert reason is not None
    assert "max_position_embeddings is 64" in reason
    assert (
        refusal(Shape(topology="tp=2"), Architecture.from_config(CATALOGUE.config("kv4"))) is None
    )


def test_what_a_config_leaves_out_is_the_architectures() -> None:
    found = subject.complete({"num_hidden_layers": 2, "head_dim": 128})
    arch = Architecture.from_config(found)
    assert (arch.num_layers, arch.num_experts, arch.rotary_dim) == (2, 256, 64)
    assert found["architectures"] == ["MiniMaxM2ForCausalLM"]
    native = subject.complete({"rope_parameters": {"rope_theta": 1e4}, "head_dim": 64})
    assert "rope_theta" not in native  # one place for one fact
    assert Architecture.from_config(native).rope_theta == 1e4
