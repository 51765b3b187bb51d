"""Every reason against a draft that its tensors give, each beside a near miss that passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sglang_minimax.drafts.tensors import canonical
from tests.drafts import State, draft_in
from tests.drafts import draft_config as changed
from tests.unit.draft_verdicts import Change, one_sentence, said


def without(*names: str) -> Change:
    def change(tensors: State) -> None:
        for name in names:
            del tensors[name]

    return change


def grown(name: str) -> Change:
    def change(tensors: State) -> None:
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])

    return change


def absolute_map(tensors: State) -> None:
    """Ids of the target where the distance to them belongs."""
    tensors["d2t"] += torch.arange(len(tensors["d2t"]))


def negative_map(tensors: State) -> None:
    tensors["d2t"][0] = -1


def last_token_and_one(tensors: State) -> None:
    tensors["d2t"][-1] = 896 - 255


def float_map(tensors: State) -> None:
    tensors["d2t"] = tensors["d2t"].float()


STORED = sorted(
    name
    for name in (
        *("d2t", "fc.weight", "lm_head.weight", "norm.weight"),
        *(
            f"midlayer.{norm}.weight"
            for norm in ("hidden_norm", "input_layernorm", "post_attention_layernorm")
        ),
        *(f"midlayer.self_attn.{side}_proj.weight" for side in "qkvo"),
        *(f"midlayer.mlp.{side}_proj.weight" for side in ("gate", "up", "down")),
    )
)


@pytest.mark.parametrize("name", STORED)
def test_each_tensor_is_needed_in_its_shape(name: str, tmp_path: Path) -> None:
    sentence = one_sentence(said(draft_in(tmp_path / "without", change=without(name))))
    assert canonical(name) in sentence
    sentence = one_sentence(said(draft_in(tmp_path / "grown", change=grown(name))))
    assert canonical(name) in sentence


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (absolute_map, ["d2t", "distance", "896 tokens"]),
        (negative_map, ["makes token -1 of its token 0", "1 of 256"]),
        (last_token_and_one, ["makes token 896 of its token 255", "1 of 256"]),
        (float_map, ["d2t of the draft is F32"]),
    ],
)
def test_the_map_stays_in_the_vocabulary(change: Change, words: list[str], tmp_path: Path) -> None:
    sentence = one_sentence(said(draft_in(tmp_path, change=change)))
    assert all(word in sentence for word in words), sentence


def last_token(tensors: State) -> None:
    tensors["d2t"][-1] = 895 - 255


def narrow_map(tensors: State) -> None:
    tensors["d2t"] = tensors["d2t"].int()


def newer_names(tensors: State) -> State:
    return {f"model.{canonical(name)}": value for name, value in tensors.items()}


def fused(tensors: State) -> None:
    path = "midlayer.self_attn"
    parts = [tensors.pop(f"{path}.{side}_proj.weight") for side in "qkv"]
    tensors[f"{path}.qkv_proj.weight"] = torch.cat(parts)
    parts = [tensors.pop(f"midlayer.mlp.{side}_proj.weight") for side in ("gate", "up")]
    tensors["midlayer.mlp.gate_up_proj.weight"] = torch.cat(parts)


@pytest.mark.parametrize("change", [last_token, narrow_map, newer_names, fused, without("t2d")])
def test_other_forms_of_the_same_draft_pass(change: Change, tmp_path: Path) -> None:
    assert said(draft_in(tmp_path, change=change)) == []


def test_a_fused_matrix_has_all_rows(tmp_path: Path) -> None:
    def change(tensors: State) -> None:
        fused(tensors)
        name = "midlayer.self_attn.qkv_proj.weight"
        tensors[name] = tensors[name][:-1]

    assert "767x256" in one_sentence(said(draft_in(tmp_path, change=change)))


def whole_vocabulary(tensors: State) -> None:
    tensors["lm_head.weight"] = torch.zeros(896, 128, dtype=torch.bfloat16)
    del tensors["d2t"], tensors["t2d"]


def test_a_draft_with_the_whole_vocabulary_needs_no_map(tmp_path: Path) -> None:
    config = changed(draft_vocab_size=896)
    assert said(draft_in(tmp_path, config, whole_vocabulary)) == []
    headless = draft_in(tmp_path / "headless", config, without("lm_head.weight", "d2t", "t2d"))
    assert "draft_vocab_size to null" in one_sentence(said(headless))
    # And one without a head of its own takes the model's.
    shared = changed(draft_vocab_size=None)
    assert said(draft_in(tmp_path, shared, without("lm_head.weight", "d2t", "t2d"))) == []


def test_a_narrower_draft_needs_its_own_embedding(tmp_path: Path) -> None:
    """Which SGLang leaves it only where target_hidden_size says that the widths differ."""
    config = changed(hidden_size=64, target_hidden_size=128, draft_vocab_size=896)
    small = {"num_attention_heads": 4, "head_dim": 16, "num_key_value_heads": 4}
    config |= {**small, "intermediate_size": 96}

    def change(tensors: State) -> State:
        shapes = {
            "embed_tokens": (896, 64),
            "fc": (64, 384),
            "lm_head": (896, 64),
            "norm": (64,),
            **{f"midlayer.self_attn.{side}_proj": (64, 128) for side in "qkv"},
            "midlayer.self_attn.o_proj": (64, 64),
            **{f"midlayer.mlp.{side}_proj": (96, 64) for side in ("gate", "up")},
            "midlayer.mlp.down_proj": (64, 96),
            **{f"midlayer.{norm}_norm": (64,) for norm in ("hidden",)},
            **{f"midlayer.{norm}_layernorm": (64,) for norm in ("input", "post_attention")},
        }
        return {f"{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}

    assert said(draft_in(tmp_path, config, change)) == []

    def without_embedding(tensors: State) -> State:
        found = change(tensors)
        del found["embed_tokens.weight"]
        return found

    sentence = one_sentence(said(draft_in(tmp_path, config, without_embedding)))
    assert "embed_tokens.weight" in sentence
    shared = {**config, "draft_vocab_size": None}
    assert "the model's head takes 128" in one_sentence(said(draft_in(tmp_path, shared, change)))


@pytest.mark.parametrize("count", [2, 10**12])
def test_layers_that_are_not_there_are_counted_and_not_listed(count: int, tmp_path: Path) -> None:
    """A list of 10**12 layers would take all memory of the machine."""
    sentence = one_sentence(said(draft_in(tmp_path, changed(num_hidden_layers=count))))
    assert f"num_hidden_layers of {count}, but its files hold 1 layer(s)" in sentence
