"""Drafts as published, and configurations that nobody would write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_minimax.drafts.checks import doubts, refusals
from sglang_minimax.drafts.config import Draft, guessed_layers
from sglang_minimax.drafts.options import Options
from sglang_minimax.drafts.options import refusals as refused_options
from sglang_minimax.errors import ConfigError
from tests.drafts import REMOVED, State, draft_in, layers
from tests.drafts import draft_config as changed
from tests.unit.draft_verdicts import PUBLISHED, PUBLISHED_DRAFT, one_sentence, said


def published(**changes: Any) -> tuple[list[str], list[str]]:
    draft = Draft.from_config(
        {
            key: value
            for key, value in {**PUBLISHED_DRAFT, **changes}.items()
            if value is not REMOVED
        }
    )
    return list(refusals(PUBLISHED, draft)), list(doubts(PUBLISHED, draft, "0" * 16))


def test_a_published_draft_passes() -> None:
    assert published() == ([], [])
    assert published(num_aux_hidden_states=3, target_hidden_size=3072) == ([], [])


@pytest.mark.parametrize("changes", [{"eagle_config": REMOVED}, {"eagle_config": {}}, layers()])
def test_what_sglang_would_guess_is_said(changes: dict[str, Any]) -> None:
    refused, doubted = published(**changes)
    assert refused == []
    sentence = one_sentence(doubted)
    assert "names no layers" in sentence
    assert "outputs of layers [1, 30, 58], as SpecForge does unless told otherwise" in sentence
    (option,) = re.findall(r"--json-model-override-args '(.*)', or", sentence)
    assert published(**json.loads(option)) == ([], [])
    assert "SGLANG_MINIMAX_DRAFT=any" in sentence


def test_layers_in_the_wrong_place_are_pointed_out() -> None:
    """vLLM looks there; so does SGLang for their number, but not for the layers themselves."""
    outside = {"eagle_config": REMOVED, "eagle_aux_hidden_state_layer_ids": [2, 31, 59]}
    refused, doubted = published(**outside)
    assert refused == []
    sentence = one_sentence(doubted)
    assert "outside of eagle_config, where SGLang does not look" in sentence
    assert "[2, 31, 59] is [1, 30, 58] here" in sentence


def test_what_else_eagle_config_says_stays_in_the_remedy() -> None:
    _, doubted = published(eagle_config={"norm_before_fc": True})
    assert '{"eagle_config": {"norm_before_fc": true, "eagle_aux' in one_sentence(doubted)


def test_a_guess_of_another_number_is_refused() -> None:
    refused, _ = published(eagle_config={}, num_aux_hidden_states=4)
    assert "takes 4 hidden states" in one_sentence(refused)


def test_a_draft_of_the_last_hidden_state_alone_needs_no_layers() -> None:
    last = {"eagle_config": {"use_aux_hidden_state": False}}
    assert published(**last) == ([], [])
    refused, _ = published(**last, hidden_size=1536, target_hidden_size=3072)
    assert "reads the model's last hidden state alone" in one_sentence(refused)


def test_of_another_eagle_class_the_configuration_is_judged() -> None:
    other = {"architectures": ["Eagle3DeepseekV2ForCausalLM"], "num_attention_heads": 64}
    assert published(**other) == ([], [])
    refused, _ = published(**other, **layers(1, 30, 62))
    assert "no 62" in one_sentence(refused)
    draft = Draft.from_config({**PUBLISHED_DRAFT, **other})
    assert list(refusals(PUBLISHED, draft, {}, ranks=16)) == [
        "the draft knows 32000 of 200064 tokens and has no d2t, which would say which; "
        "download or train the draft again."
    ]


def test_matrices_of_a_quantised_draft_are_left_to_sglang(tmp_path: Path) -> None:
    def change(tensors: State) -> None:
        for name in list(tensors):
            if "proj" in name:
                tensors[f"{name}_packed"] = tensors.pop(name)[:, ::8]

    config = changed(quantization_config={"quant_method": "compressed-tensors"})
    assert said(draft_in(tmp_path, config, change)) == []
    assert "no layers.0.self_attn.q_proj.weight" in said(draft_in(tmp_path, change=change))[0]
    # As ModelOpt says it, in a file of its own.
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert said(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, Options(rejection_sampling=True), "knows 256 of 896 tokens"),
        ({"draft_vocab_size": None}, Options(rejection_sampling=True), None),
        ({"draft_vocab_size": 896}, Options(rejection_sampling=True), None),
        ({}, Options(quantization="compressed-tensors"), "quantization unquant"),
        ({}, Options(quantization="awq_marlin"), "--quantization awq_marlin would be the draft's"),
        ({}, Options(quantization="fp8"), None),
        ({}, Options(quantization="modelopt_fp4"), None),
        ({"quantization_config": {}}, Options(quantization="awq_marlin"), None),
    ],
)
def test_options_that_a_draft_does_not_go_with(
    changes: dict[str, Any], options: Options, words: str | None
) -> None:
    found = list(refused_options(Draft.from_config(changed(**changes)), options))
    if words is None:
        assert found == []
    else:
        assert words in one_sentence(found)


@given(st.integers(7, 200))
def test_a_guess_is_three_layers_of_any_model_that_is_deep_enough(depth: int) -> None:
    guess = guessed_layers(depth)
    assert len(set(guess)) == 3
    assert all(0 <= layer < depth for layer in guess)
    # Inputs, as SGLang counts.
    assert [layer + 1 for layer in guess] == [2, depth // 2, depth - 3]


ODD: tuple[Any, ...] = (None, True, -1, 0, 7, 10**12, 2.5, "", "3072", [], [1, 1], {}, {"a": 1})


@given(st.dictionaries(st.sampled_from(sorted(PUBLISHED_DRAFT)), st.sampled_from(ODD)))
def test_any_configuration_is_read_or_refused(changes: dict[str, Any]) -> None:
    try:
        draft = Draft.from_config({**PUBLISHED_DRAFT, **changes})
    except ConfigError as error:
        sentences = [str(error)]
    else:
        sentences = [*refusals(PUBLISHED, draft, {}), *doubts(PUBLISHED, draft, "0")]
    for sentence in sentences:
        assert one_sentence([sentence])
