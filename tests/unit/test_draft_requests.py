"""What a request may not ask of a server with a draft."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_minimax import ARCHITECTURE
from sglang_minimax.patches import requests
from sglang_minimax.patches.requests import INEXACT_WITH_DRAFT, check_with_draft

#: Option -> the value that asks for nothing, from SGLang's SamplingParams.
NOTHING = {
    "min_p": 0,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "min_new_tokens": 0,
}


def check(processor: Any = None, **sampling: Any) -> None:
    check_with_draft(SimpleNamespace(custom_logit_processor=processor), sampling, "EAGLE3")


def refusal(**sampling: Any) -> str:
    with pytest.raises(ValueError, match="is not exact with drafted tokens") as refused:
        check(**sampling)
    return str(refused.value)


@pytest.mark.parametrize("value", [0.05, 0, 1, 2.0])
@pytest.mark.parametrize("name", NOTHING)
def test_an_inexact_option_is_refused(name: str, value: float) -> None:
    if value == NOTHING[name]:
        check(**{name: value})
        return
    said = refusal(temperature=1.0, **{name: value})
    # Who sends min_tokens by OpenAI's API must find it.
    called = f"{name} (min_tokens)" if name == "min_new_tokens" else name
    assert said.startswith(f"{called} {value} is not exact")
    assert said.replace(str(value), "").count(".") == 1
    assert f"send {name} {NOTHING[name]}, " in said
    assert "--speculative-algorithm EAGLE3" in said


@pytest.mark.parametrize("name", NOTHING)
def test_an_option_left_out_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(INEXACT_WITH_DRAFT, name)
    with pytest.raises(pytest.fail.Exception):
        test_an_inexact_option_is_refused(name, 0.05)


def test_the_values_are_sglangs_defaults() -> None:
    from sglang.srt.sampling.sampling_params import SamplingParams

    defaults = SamplingParams()
    assert {name: getattr(defaults, name) for name in NOTHING} == NOTHING


@pytest.mark.parametrize("form", [int, float, lambda _: None], ids=["int", "float", "None"])
def test_an_option_that_asks_for_nothing_passes(form: Any) -> None:
    for name, nothing in NOTHING.items():
        check(**{name: form(nothing)})
    check(**{name: form(nothing) for name, nothing in NOTHING.items()})


def test_signs_count() -> None:
    """Penalties may be negative, and -0.0 is nothing."""
    check(frequency_penalty=-0.0)
    assert "presence_penalty -0.5 " in refusal(presence_penalty=-0.5)


def test_options_that_stay_exact_pass() -> None:
    """SGLang applies them to each drafted token."""
    check(
        temperature=0.7,
        top_p=0.95,
        top_k=40,
        max_new_tokens=8,
        stop=["\n"],
        logit_bias={"7": 2.0},
        json_schema="{}",
        ignore_eos=True,
    )
    check()


def test_a_processor_is_refused() -> None:
    for processor in (None, ""):
        check(processor)
    with pytest.raises(ValueError, match=r"^custom_logit_processor is not applied") as refused:
        check("{}")
    assert "--speculative-algorithm EAGLE3" in str(refused.value)


@pytest.mark.parametrize(
    ("architecture", "algorithm", "refused"),
    [
        (ARCHITECTURE, "EAGLE3", True),
        (ARCHITECTURE, None, False),
        ("LlamaForCausalLM", "EAGLE3", False),
    ],
)
def test_only_our_model_with_a_draft_refuses(
    architecture: str, algorithm: str | None, refused: bool
) -> None:
    calls = []

    def original(*given: Any) -> None:
        calls.append(given)

    manager = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(architectures=[architecture]), vocab_size=10
        ),
        server_args=SimpleNamespace(speculative_algorithm=algorithm),
        preferred_sampling_params=None,
    )
    validate = requests.refuse_impossible_numbers(original)
    obj = SimpleNamespace(sampling_params={"min_p": 0.1})
    if refused:
        with pytest.raises(ValueError, match=r"min_p 0\.1"):
            validate(manager, obj, [1])
    else:
        validate(manager, obj, [1])
    assert calls == [(manager, obj, [1])]


@pytest.mark.parametrize(
    ("preferred", "own", "words"),
    [
        ({"min_p": 0.1}, None, "min_p 0.1 is not exact"),
        ({"min_p": 0.1}, {"temperature": 1.0}, "min_p 0.1 is not exact"),
        ({"min_p": 0.1}, {"min_p": 0}, None),
        ({"temperature": 1.0}, {}, None),
        ({"n": 0}, {}, "n must be at least 1"),
        ({"min_new_tokens": 2, "stop_token_ids": [10]}, {}, "Token 10 of stop_token_ids"),
    ],
)
def test_options_of_the_server_count_unless_the_request_has_its_own(
    preferred: dict[str, Any], own: dict[str, Any] | None, words: str | None
) -> None:
    """--preferred-sampling-params, which SGLang puts in after this check."""
    manager = SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(architectures=[ARCHITECTURE]), vocab_size=10
        ),
        server_args=SimpleNamespace(speculative_algorithm="EAGLE3"),
        preferred_sampling_params=preferred,
    )
    validate = requests.refuse_impossible_numbers(lambda *given: None)
    obj = SimpleNamespace(sampling_params=own)
    if words is None:
        validate(manager, obj, [1])
        return
    with pytest.raises(ValueError, match=words):
        validate(manager, obj, [1])
