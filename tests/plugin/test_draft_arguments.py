"""Drafts at launch, through SGLang's own arguments, and what SGLang does with those that pass."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_minimax import ARCHITECTURE, TINY_M2, TINY_M2_EAGLE3
from sglang_minimax.drafts.acceptance import ENOUGH
from sglang_minimax.drafts.checks import VARIABLE
from sglang_minimax.drafts.config import ARCHITECTURES, Draft, guessed_layers
from sglang_minimax.drafts.tensors import EMBEDDING, canonical, wanted
from sglang_minimax.loading.headers import Tensor
from sglang_minimax.validation import one_rank
from tests.drafts import REMOVED, draft_config, draft_in, layers
from tests.plugin.processes import forked
from tests.plugin.test_arguments import resolve

EAGLE3 = ["--speculative-algorithm", "EAGLE3"]


def asked(draft: Path | str, *more: str) -> dict[str, Any] | str:
    """What comes of a launch of the bundled model with this draft."""
    return resolve([*EAGLE3, "--speculative-draft-model-path", str(draft), *more])


def one_sentence(answer: dict[str, Any] | str) -> str:
    assert isinstance(answer, str), "the draft was accepted"
    assert answer.startswith("sglang-minimax: ")
    assert answer.endswith(".")
    assert "\n" not in answer
    return answer


@pytest.fixture(autouse=True)
def _nothing_waved_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.mark.parametrize("arguments", ["", "--tp-size 2", "--tp-size 8", "--tp-size 2 --dp-size 2"])
def test_the_bundled_draft_is_accepted(arguments: str) -> None:
    answer = asked(TINY_M2_EAGLE3, *arguments.split())
    assert isinstance(answer, dict), answer


def test_a_draft_must_be_named() -> None:
    """SGLang would load the target a second time, as its own draft."""
    sentence = one_sentence(resolve(EAGLE3))
    assert "without --speculative-draft-model-path" in sentence
    assert "load the whole model once more" in sentence


def test_stages_are_refused_before_the_draft_is_looked_at(tmp_path: Path) -> None:
    """Even one that is not there: no draft would do."""
    sentence = one_sentence(asked(tmp_path / "none", "--pp-size", "2"))
    assert "EAGLE3 reads the outputs of layers that --pp-size 2 puts on several" in sentence
    sentence = one_sentence(resolve([*EAGLE3, "--pp-size", "2"]))
    assert "--pp-size 2" in sentence


def test_the_algorithm_may_be_written_small(tmp_path: Path) -> None:
    small = ["--speculative-algorithm", "eagle3", "--speculative-draft-model-path"]
    assert isinstance(resolve([*small, str(TINY_M2_EAGLE3)]), dict)
    assert "vocab_size of 1000" in one_sentence(
        resolve([*small, str(draft_in(tmp_path, draft_config(vocab_size=1000)))])
    )


def test_the_target_is_no_draft() -> None:
    assert f"is a {ARCHITECTURE}" in one_sentence(asked(TINY_M2))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "is no folder" in one_sentence(asked(tmp_path / "none"))
    assert "has no config.json" in one_sentence(asked(tmp_path))


@pytest.mark.parametrize(
    ("changes", "arguments", "words"),
    [
        ({"target_hidden_size": 256}, "", ["256", "128"]),
        (layers(0, 1, 1), "", ["names layer 1 twice"]),
        (layers(0, 1), "", ["3 hidden states", "and 2 would be captured"]),
        ({"num_attention_heads": 8}, "--tp-size 16", ["8 query heads", "16 attention ranks"]),
        ({"num_attention_heads": 12}, "", ["12 heads", "no multiple"]),
    ],
)
def test_refused_at_launch_in_one_sentence(
    changes: dict[str, Any], arguments: str, words: list[str], tmp_path: Path
) -> None:
    answer = asked(draft_in(tmp_path, draft_config(**changes)), *arguments.split())
    assert isinstance(answer, str), "the draft was accepted"
    for line in answer.splitlines():
        one_sentence(line)
    for word in words:
        assert word in answer


def test_ranks_of_an_attention_group_share_the_draft(tmp_path: Path) -> None:
    """Eight heads do not go over sixteen ranks, but over the eight of each of two groups."""
    config = draft_config(num_attention_heads=8, head_dim=32)

    def change(tensors: dict[str, Any]) -> None:
        attention = "midlayer.self_attn"
        tensors[f"{attention}.q_proj.weight"] = tensors[f"{attention}.q_proj.weight"][:256]
        tensors[f"{attention}.o_proj.weight"] = tensors[f"{attention}.o_proj.weight"][:, :256]

    draft = draft_in(tmp_path, config, change)
    assert "8 query heads" in one_sentence(asked(draft, "--tp-size", "16"))
    answer = asked(draft, "--tp-size", "16", "--attn-dp-size", "2")
    assert isinstance(answer, dict), answer


def test_doubts_can_be_waved_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not what cannot run."""
    other = {"sglang_minimax": {"target_fingerprint": "0123456789abcdef"}}
    draft = draft_in(tmp_path / "other", draft_config(**other))
    assert f"{VARIABLE}=any" in one_sentence(asked(draft))
    monkeypatch.setenv(VARIABLE, "any")
    assert isinstance(asked(draft), dict)
    wrong = draft_in(tmp_path / "wrong", draft_config(**other, vocab_size=1000))
    assert "vocab_size of 1000" in one_sentence(asked(wrong))
    monkeypatch.setenv(VARIABLE, "all")
    assert f"{VARIABLE} is 'all'" in one_sentence(asked(draft))


def test_removing_the_fingerprint_is_enough(tmp_path: Path) -> None:
    draft = draft_in(tmp_path, draft_config(sglang_minimax=REMOVED))
    assert isinstance(asked(draft), dict)


@pytest.mark.parametrize("algorithm", ["EAGLE", "NEXTN"])
def test_other_algorithms_of_the_family_are_not_for_it(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; our CPU platform refuses them whatever the draft."""
    from sglang_minimax.platforms.cpu import support

    monkeypatch.setattr(support, "refusals", lambda arch, launch: iter(()))
    asked_for = ["--speculative-algorithm", algorithm]
    assert "without --speculative-draft-model-path" in one_sentence(resolve(asked_for))
    sentence = one_sentence(
        resolve([*asked_for, "--speculative-draft-model-path", str(TINY_M2_EAGLE3)])
    )
    assert f"--speculative-algorithm {algorithm} would run without" in sentence
    assert sentence.endswith("use EAGLE3.")


# --- a name on a hub ---


def on_hub(folder: Path | None) -> dict[str, Any] | str:
    """A launch with a draft from a hub, of which `folder` is in the cache; None for nothing."""

    def meanwhile(server_args: Any) -> None:
        from sglang.srt.utils import hf_transformers_utils

        from sglang_minimax.patches import drafts

        here = drafts.folder_of
        fetch = hf_transformers_utils.get_config
        drafts.folder_of = lambda path, revision: folder if path == HUB else here(path, revision)
        hf_transformers_utils.get_config = lambda path, **more: fetch(
            str(TINY_M2_EAGLE3 if path == HUB else path), **more
        )

    return resolve([*EAGLE3, "--speculative-draft-model-path", HUB], meanwhile)


HUB = "somebody/a-draft"


def test_of_a_draft_on_a_hub_what_is_there_is_judged(tmp_path: Path) -> None:
    assert isinstance(on_hub(None), dict)
    assert isinstance(on_hub(TINY_M2_EAGLE3), dict)
    wrong = draft_in(tmp_path / "wrong", draft_config(vocab_size=1000))
    assert "vocab_size of 1000" in one_sentence(on_hub(wrong))
    # The weights may come later, but a bad one that is there is seen.
    alone = draft_in(tmp_path / "alone")
    (alone / "model.safetensors").unlink()
    assert isinstance(on_hub(alone), dict)
    (alone / "pytorch_model.bin").touch()
    assert "a pickle" in one_sentence(on_hub(alone))
    headless = draft_in(tmp_path / "headless", change=lambda tensors: {"fc.weight": tensors["d2t"]})
    assert "and 9 more tensors" in str(on_hub(headless))


def test_a_draft_that_is_not_here_yet_is_said_to_be_unseen(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    alone = draft_in(tmp_path / "alone")
    (alone / "model.safetensors").unlink()
    assert isinstance(on_hub(alone), dict)
    said = capfd.readouterr().err
    assert said.count("tensors have not been downloaded yet") == 1
    assert f"`sglang-minimax inspect {alone} --target {TINY_M2}`" in said
    assert isinstance(on_hub(TINY_M2_EAGLE3), dict)
    assert "not been downloaded" not in capfd.readouterr().err


# --- what the launch changes of a draft's configuration ---


def overrides(**values: Any) -> list[str]:
    return ["--json-model-override-args", json.dumps(values)]


def test_the_configuration_that_sglang_will_use_is_judged(tmp_path: Path) -> None:
    assert "names layer 1 twice" in one_sentence(
        asked(TINY_M2_EAGLE3, *overrides(**layers(0, 1, 1)))
    )
    unnamed = draft_in(tmp_path / "unnamed", draft_config(eagle_config=REMOVED))
    assert "names no layers" in one_sentence(asked(unnamed))
    answer = asked(unnamed, *overrides(**layers(0, 1, 3)))
    assert isinstance(answer, dict), answer
    # Another file in the place of config.json.
    (unnamed / "plain.json").write_text(json.dumps(draft_config()))
    answer = asked(unnamed, "--decrypted-draft-config-file", "plain.json")
    assert isinstance(answer, dict), answer
    sentence = one_sentence(asked(unnamed, "--decrypted-draft-config-file", "none.json"))
    assert "has no none.json" in sentence


def test_what_we_judge_is_what_sglang_reads(tmp_path: Path) -> None:
    """Its own ModelConfig for the draft, with both options."""
    draft = draft_in(tmp_path)
    (draft / "plain.json").write_text(json.dumps(draft_config(**layers(1, 2, 3))))

    def found() -> tuple[Any, Any]:
        from sglang.srt.configs.model_config import ModelConfig

        from sglang_minimax.patches.drafts import _config

        given = json.dumps({"hidden_act": "gelu"})
        theirs = ModelConfig(
            str(draft),
            model_override_args=given,
            override_config_file="plain.json",
            is_draft_model=True,
        ).hf_config
        ours = _config(draft, "plain.json", given)
        names = ("eagle_config", "hidden_act")
        return [getattr(theirs, name) for name in names], [ours[name] for name in names]

    theirs, ours = forked(found)
    assert theirs == ours == [layers(1, 2, 3)["eagle_config"], "gelu"]


# --- SGLang as the oracle ---


def test_every_eagle3_class_of_sglang_is_known() -> None:
    import sglang

    folder = Path(sglang.__path__[0]) / "srt/models"
    entries = [
        name
        for file in folder.rglob("*.py")
        for entry in re.findall(r"^EntryClass = (.*)", file.read_text(), re.MULTILINE)
        for name in re.findall(r"\w+", entry)
    ]
    assert len(entries) > 50
    assert {name for name in entries if "Eagle3" in name} == set(ARCHITECTURES)


def captured(num_layers: int) -> tuple[list[int], list[int]]:
    """Inputs of layers that SGLang captures for a draft without ids, and outputs that we do."""
    from sglang.srt.models import minimax_m2

    from sglang_minimax.models.minimax_m2 import MiniMaxM2ForCausalLM

    last_stage = SimpleNamespace(pp_group=SimpleNamespace(is_last_rank=True))
    minimax_m2.get_parallel = lambda: last_stage
    config = SimpleNamespace(num_hidden_layers=num_layers)
    theirs = SimpleNamespace(config=config, model=SimpleNamespace())
    minimax_m2.MiniMaxM2ForCausalLM.set_eagle3_layers_to_capture(theirs)
    ours: list[int] = []
    stub: Any = SimpleNamespace(
        arch=SimpleNamespace(num_layers=num_layers), _capture_outputs_of=ours.extend
    )
    MiniMaxM2ForCausalLM.set_eagle3_layers_to_capture(stub)
    return theirs.model.layers_to_capture, ours


@pytest.mark.parametrize("num_layers", [4, 7, 62])
def test_the_guess_is_what_both_models_capture(num_layers: int) -> None:
    inputs, outputs = forked(captured, num_layers)
    assert list(guessed_layers(num_layers)) == outputs == [layer - 1 for layer in inputs]


def parameters_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of SGLang's own draft model for a folder, by canonical name."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.runtime_context import get_server_args

    place = one_rank.OneRank(TINY_M2)
    place.config = ModelConfig.from_server_args(
        get_server_args(), model_path=str(folder), is_draft_model=True
    )
    model = place.build()
    return {canonical(name): tuple(value.shape) for name, value in model.named_parameters()}


VARIANTS: dict[str, dict[str, Any]] = {
    "as bundled": {},
    "norms and a bias": {"fc_norm": True, "norm_before_fc": True, "bias": True},
    "four states": {"num_aux_hidden_states": 4, "eagle_config": {}},
    "another width": {"hidden_size": 64, "head_dim": 16},
    "its own head": {"draft_vocab_size": 896},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_tensors_that_are_asked_for_are_sglang_s_parameters(name: str, tmp_path: Path) -> None:
    config = draft_config(**VARIANTS[name])
    draft = Draft.from_config(config)
    found = one_rank.in_child(parameters_of, draft_in(tmp_path, config))
    there = {each: Tensor(tmp_path, "BF16", shape, 0) for each, shape in found.items()}
    asked_for = {each.name: each.shape for each in wanted(draft, there)}
    if not draft.has_own_embedding:
        found.pop(EMBEDDING)  # SGLang puts the target's in its place
    assert asked_for == found


def test_sglang_needs_to_be_told_of_the_vocabulary(tmp_path: Path) -> None:
    """Which is why a config.json without draft_vocab_size is refused."""
    folder = draft_in(tmp_path, draft_config(draft_vocab_size=REMOVED))
    with pytest.raises(one_rank.Refused, match=r"AttributeError.*draft_vocab_size"):
        one_rank.in_child(parameters_of, folder)


# --- while it serves ---


class Reporter:
    """As much of SGLang's as the watch touches."""

    def __init__(self) -> None:
        self.spec_total_num_forward_ct = self.spec_total_num_accept_tokens = 0
        self.steps = 0

    def report_decode_stats(self, can_run_cuda_graph: bool, running_batch: Any = None) -> None:
        self.steps += 1


def test_a_low_accepted_length_is_warned_about_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt import runtime_context

    from sglang_minimax.patches import drafts

    spec = SimpleNamespace(speculative_num_steps=3)
    monkeypatch.setattr(runtime_context, "get_spec", lambda: spec)
    reporter = Reporter()
    drafts._watch(reporter)
    with caplog.at_level(logging.WARNING):
        for _ in range(30):
            for _ in range(10):
                reporter.report_decode_stats(True, running_batch=None)
            reporter.spec_total_num_forward_ct += ENOUGH // 10
            reporter.spec_total_num_accept_tokens += ENOUGH // 10 + 1
    assert reporter.steps == 300
    (record,) = [each for each in caplog.records if "accepted length" in each.message]
    assert f"is 1.05 tokens over {ENOUGH} verifications (one for" in record.message
    assert "each request and step), below 1.62" in record.message
    # And the step is SGLang's own again.
    assert "report_decode_stats" not in vars(reporter)


def watched(**changes: Any) -> bool:
    """Whether the patch on SGLang's reporter would watch a server like this."""
    import os

    from sglang.srt import runtime_context

    from sglang_minimax.patches import drafts

    facts = {"architecture": ARCHITECTURE, "eagle3": True, "rank": 0, "logs": True, "waved": ""}
    facts |= {"draft": str(TINY_M2_EAGLE3), "target": str(TINY_M2), "format": "auto"}
    facts |= {"overrides": "{}", "draft_format": None} | changes
    os.environ[VARIABLE] = str(facts["waved"])
    spec = SimpleNamespace(
        speculative_draft_model_path=facts["draft"],
        speculative_draft_model_revision=None,
        speculative_draft_load_format=facts["draft_format"],
    )
    model = SimpleNamespace(
        load_format=facts["format"],
        decrypted_draft_config_file=None,
        json_model_override_args=facts["overrides"],
    )
    runtime_context.get_spec = lambda: spec
    runtime_context.get_model = lambda: model
    runtime_context.get_parallel = lambda: SimpleNamespace(attn_dp_rank=facts["rank"])
    config = SimpleNamespace(architectures=[facts["architecture"]])
    model_config = SimpleNamespace(hf_config=config, model_path=facts["target"], revision=None)
    scheduler = SimpleNamespace(
        spec_algorithm=SimpleNamespace(is_eagle3=lambda: facts["eagle3"]),
        model_config=model_config,
    )
    reporter = SimpleNamespace(scheduler=scheduler, is_stats_logging_rank=facts["logs"])
    return drafts._is_to_be_watched(reporter)


def test_who_is_watched(tmp_path: Path) -> None:
    """The first rank of our model, for a draft that nobody vouches for."""
    other = str(draft_in(tmp_path, draft_config(sglang_minimax=REMOVED)))

    def answers() -> list[bool]:
        return [
            watched(draft=other),
            watched(waved="any"),
            watched(),
            watched(draft=other, eagle3=False),
            watched(draft=other, architecture="LlamaForCausalLM"),
            watched(draft=other, rank=1),
            watched(draft=other, logs=False),
        ]

    assert forked(answers) == [True, True, False, False, False, False, False]


def test_a_fingerprint_vouches_only_where_it_was_compared(tmp_path: Path) -> None:
    """With the weights that are served: not those of other files, or of none."""
    wrong = {"sglang_minimax": {"target_fingerprint": "0123456789abcdef"}}
    other = str(draft_in(tmp_path / "other", draft_config(**wrong)))
    unread = tmp_path / "unread"
    unread.mkdir()
    shutil.copy(TINY_M2 / "config.json", unread)

    def answers() -> list[bool]:
        return [
            watched(draft=other),
            watched(target=str(unread)),
            watched(target="somebody/a-model"),
            watched(draft="somebody/a-draft"),
            watched(format="dummy"),
            watched(draft_format="dummy"),
            watched(overrides=json.dumps(wrong)),
            watched(format="safetensors"),
        ]

    assert forked(answers) == [True] * 7 + [False]


def test_the_patch_is_on_sglang_s_reporter() -> None:
    """With the names that the watch reads."""

    def facts() -> tuple[bool, bool]:
        import inspect

        from sglang.srt.managers.scheduler_components import metrics_reporter

        reporter = metrics_reporter.SchedulerMetricsReporter
        source = inspect.getsource(reporter)
        names = ("spec_total_num_forward_ct", "spec_total_num_accept_tokens")
        patched = hasattr(reporter.__post_init__, "__sglang_original__")
        return patched, all(f"self.{name} +=" in source for name in names)

    assert forked(facts) == (True, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "--speculative-use-rejection-sampling",
            "--speculative-use-rejection-sampling needs a GPU",
        ),
        ("--speculative-adaptive", "--speculative-adaptive needs a GPU"),
        ("--enable-multi-layer-eagle", "--enable-multi-layer-eagle needs a GPU"),
        ("--speculative-draft-window-size 64", "--speculative-draft-window-size needs a GPU"),
        ("--speculative-algorithm NGRAM", "NGRAM is not supported on the CPU platform; use EAGLE3"),
    ],
)
def test_what_the_cpu_platform_does_not_verify_is_refused(arguments: str, words: str) -> None:
    assert words in one_sentence(asked(TINY_M2_EAGLE3, *arguments.split()))
