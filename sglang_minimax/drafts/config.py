"""A draft's config.json as one checked view, read as SGLang reads it.

The published form is SpecForge's: a Llama configuration with `draft_vocab_size`, now and then
`target_hidden_size` and `num_aux_hidden_states`, and an object `eagle_config` with the layers whose
outputs the draft was trained on. SGLang's defaults stand in for what is absent, except where it
would be a guess about the draft's own size. No torch, no SGLang.

Source of the reading: srt/models/llama_eagle3.py, srt/speculative/eagle_utils.py and
srt/model_executor/model_runner_components/spec_aux_hidden_state.py of SGLang 0.5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from sglang_minimax.errors import ConfigError

#: SGLang's name of the algorithm that drafts from captured hidden states.
EAGLE3 = "EAGLE3"
#: SGLang's option to verify drafted tokens by the probabilities that the draft gave them.
REJECTION = "--speculative-use-rejection-sampling"
#: The architecture whose tensors are known here; of others only the configuration is judged.
LLAMA = "LlamaForCausalLMEagle3"
#: Every architecture of SGLang 0.5.23 that can draft for EAGLE3 beside a model of another class.
ARCHITECTURES = (LLAMA, "Eagle3DeepseekV2ForCausalLM")
#: Our own part of a draft's config.json, and what it holds.
OWN_KEY, FINGERPRINT_KEY = "sglang_minimax", "target_fingerprint"
#: Where SGLang looks for the layers, beside `eagle_config`.
LAYERS_KEY = "eagle_aux_hidden_state_layer_ids"
#: Keys under which SGLang finds how a checkpoint is quantised.
QUANTISED = ("quantization_config", "compression_config")
# Residuals that SGLang takes a draft to read which names no layers.
_USUAL_INPUTS = 3


def guessed_layers(num_layers: int) -> tuple[int, int, int]:
    """Layers whose outputs SGLang captures for a draft that names none.

    SGLang counts by inputs, 2, n // 2 and n - 3 (set_eagle3_layers_to_capture); the input of a
    layer is the output of the one before.

    >>> guessed_layers(62)
    (1, 30, 58)
    """
    return 1, num_layers // 2 - 1, num_layers - 4


@dataclass(frozen=True, slots=True)
class Draft:
    """What a draft's configuration says; numbers have been checked one by one, not together.

    reads_residuals: False where the draft reads the target's last hidden state alone. layers: whose
    outputs it reads; None where it names none. inputs: residuals that its first projection takes.
    own_vocab: rows of its head, which may be fewer than the target's; None where it uses the
    target's head. states_own_vocab: whether config.json says either. fingerprint: of the target
    that it was trained for. eagle_config: the object of that name, as it is.
    """

    architecture: str
    hidden_size: int
    target_hidden_size: int
    vocab_size: int
    own_vocab: int | None
    states_own_vocab: bool
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    width: int
    reads_residuals: bool
    layers: tuple[int, ...] | None
    layers_at_top: bool
    inputs: int
    tied: bool
    fc_bias: bool
    attention_bias: bool
    fc_norm: bool
    norm_before_fc: bool
    quantised: bool
    fingerprint: str | None
    eagle_config: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def has_own_embedding(self) -> bool:
        """Whether SGLang leaves the draft its embedding instead of the target's."""
        return self.target_hidden_size != self.hidden_size

    @property
    def uses_target_head(self) -> bool:
        """Whether SGLang gives the draft the target's head."""
        return not self.tied and self.states_own_vocab and self.own_vocab is None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Draft:
        """Read a parsed config.json. Raises ConfigError, in one sentence, for a malformed value."""
        eagle = config.get("eagle_config")
        if eagle is None:
            eagle = {}
        if not isinstance(eagle, Mapping):
            _refuse(f"eagle_config is {eagle!r}, but it must be an object")
        hidden_size = _whole(config, "hidden_size")
        num_heads = _whole(config, "num_attention_heads")
        layers = _layers(eagle)
        usual = len(layers) if layers else _USUAL_INPUTS
        return cls(
            architecture=_architecture(config),
            hidden_size=hidden_size,
            target_hidden_size=_whole(config, "target_hidden_size", hidden_size),
            vocab_size=_whole(config, "vocab_size"),
            own_vocab=_whole(config, "draft_vocab_size", 0) or None,
            states_own_vocab="draft_vocab_size" in config,
            num_layers=_whole(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=_whole(config, "num_key_value_heads", num_heads),
            head_dim=_whole(config, "head_dim", max(1, hidden_size // num_heads)),
            width=_whole(config, "intermediate_size"),
            reads_residuals=_switch(eagle, "use_aux_hidden_state", True),
            layers=layers,
            layers_at_top=config.get(LAYERS_KEY) is not None,
            inputs=_whole(config, "num_aux_hidden_states", usual),
            tied=_switch(config, "tie_word_embeddings"),
            fc_bias=_switch(config, "bias"),
            attention_bias=_switch(config, "attention_bias") or _switch(config, "bias"),
            # SGLang asks for their truth, not for their type.
            fc_norm=bool(config.get("fc_norm") or config.get("use_aux_norm")),
            norm_before_fc=bool(eagle.get("norm_before_fc", config.get("norm_before_fc"))),
            quantised=any(config.get(key) is not None for key in QUANTISED),
            fingerprint=_fingerprint(config),
            eagle_config=eagle,
        )


def _refuse(what: str) -> NoReturn:
    raise ConfigError(f"draft config: {what}; correct config.json of the draft.")


def _whole(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        if default is None:
            _refuse(f"{key} is missing, and SGLang would put another model's in its place")
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _refuse(f"{key} is {value!r}, but it must be a whole number of at least 1")
    return value


def _switch(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        _refuse(f"{key} is {value!r}, but it must be true or false")
    return value


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        _refuse(f"architectures is {names!r}, but it must name one, as {LLAMA}")
    return names[0]


def _layers(eagle: Mapping[str, Any]) -> tuple[int, ...] | None:
    value = eagle.get(LAYERS_KEY)
    if value is None or value == []:
        return None
    whole = isinstance(value, list) and all(type(each) is int for each in value)
    if not whole:
        _refuse(f"eagle_config.{LAYERS_KEY} is {value!r}, but it must be a list of layer numbers")
    return tuple(value)


def _fingerprint(config: Mapping[str, Any]) -> str | None:
    own = config.get(OWN_KEY)
    if own is None:
        return None
    value = own.get(FINGERPRINT_KEY) if isinstance(own, Mapping) else own
    if value is not None and not (isinstance(value, str) and isinstance(own, Mapping)):
        _refuse(f'{OWN_KEY} is {own!r}, but it must be {{"{FINGERPRINT_KEY}": "..."}}')
    return value
