"""The model that shapes are run with: a checkpoint on disk, and transformers' answers for it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch

from sglang_minimax.config import DEFAULTS, Architecture
from sglang_minimax.errors import ConfigError, MinimaxError
from sglang_minimax.topology import Topology, parameter_count, rank_shares
from sglang_minimax.validation.random_checkpoint import write_random_checkpoint

#: Share of the free memory that a run may plan with.
SHARE = 0.8
BYTES = 4  # fp32
#: What one log-probability takes while it travels from a rank to here as Python objects (measured:
#: 2.3 GiB for 32000 tokens of vocabulary), and about how many distributions come back.
REPLY_BYTES, DISTRIBUTIONS = 400, 181


class Subject:
    """A checkpoint folder with its oracle. Answers are kept: other shapes ask the same things."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.config = read_config(folder)
        self.arch = Architecture.from_config(self.config)
        self._answers: dict[tuple[int, ...], torch.Tensor] = {}
        self._margins: dict[tuple[int, ...], torch.Tensor] = {}
        self._outputs: dict[tuple[int, ...], list[torch.Tensor]] = {}

    @cached_property
    def _oracle(self) -> Any:
        from sglang_minimax.validation.oracle import TransformersOracle

        # OpenMP's threads do not survive a fork: this process must never have had any.
        torch.set_num_threads(1)
        return TransformersOracle(self.folder)

    def log_probabilities(self, tokens: Sequence[int]) -> torch.Tensor:
        """[len(tokens), vocabulary] fp32: row i is the distribution after `tokens[: i + 1]`."""
        key = tuple(tokens)
        if key not in self._answers:
            self._answers[key] = self._oracle.log_probabilities(key)
        return self._answers[key]

    def layer_outputs(self, tokens: Sequence[int]) -> list[torch.Tensor]:
        """[len(tokens), hidden] of each layer: the residual stream behind it."""
        key = tuple(tokens)
        if key not in self._outputs:
            self._outputs[key] = self._oracle.layer_outputs(key)
        return self._outputs[key]

    def routing_margins(self, tokens: Sequence[int]) -> torch.Tensor:
        """[len(tokens)]: how close any layer came to choosing another expert for each token."""
        key = tuple(tokens)
        if key not in self._margins:
            self._margins[key] = self._oracle.routing_margins(key)
        return self._margins[key]


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of a checkpoint. Raises ConfigError where there is none."""
    return _parse((folder / "config.json"), "a checkpoint is a folder with a config.json")


def _parse(path: Path, remedy: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); {remedy}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); {remedy}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no JSON object; {remedy}.")
    return found


def random_config(text: str) -> dict[str, Any]:
    """A config.json from a path or from JSON itself; what it does not say is the architecture's.

    Raises ConfigError in one sentence for JSON or values that are no MiniMax-M2.
    """
    if text.lstrip().startswith("{"):
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"--random-config is not JSON: {error}.") from error
    else:
        given = _parse(Path(text), "give a path to a config.json, or JSON in quotes")
    if given.get("quantization_config"):
        raise ConfigError(
            "--random-config has a quantization_config, but random weights are fp32; leave it out."
        )
    return complete(given)


def complete(given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with the architecture's values for what it leaves out, in a form SGLang reads."""
    arch = Architecture.from_config(given)
    extra = {key: value for key, value in DEFAULTS.items() if key not in given}
    # These three have other names in a config of transformers >= 5, where `arch` found them.
    for key in ("rope_theta", "partial_rotary_factor", "num_mtp_modules"):
        extra.pop(key, None)
    return {
        **extra,
        "head_dim": arch.head_dim,
        **({} if "rope_parameters" in given else {"rope_theta": arch.rope_theta}),
        **({} if "rope_parameters" in given else {"rotary_dim": arch.rotary_dim}),
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "torch_dtype": "float32",
        **given,
    }


def write(config: Mapping[str, Any], folder: Path, name: str) -> Subject:
    """Random weights for `config` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    write_random_checkpoint(folder, dict(config))
    return Subject(folder, name)


def refuse_what_does_not_fit(arch: Architecture, topology: Topology) -> None:
    """Raise MinimaxError if oracle and ranks of `topology` need more memory than is free."""
    whole = parameter_count(arch, rank_shares(arch, Topology())[0])
    ranks = sum(parameter_count(arch, share) for share in rank_shares(arch, topology))
    weights, replies = BYTES * (whole + ranks), REPLY_BYTES * DISTRIBUTIONS * arch.vocab_size
    free = psutil.virtual_memory().available
    if weights + replies > SHARE * free:
        raise MinimaxError(
            f"transformers and the ranks of {topology} need {weights / 2**30:.1f} GiB of memory "
            f"for {whole / 1e9:.3g} billion parameters in fp32, and distributions over "
            f"{arch.vocab_size} tokens {replies / 2**30:.1f} GiB, but {free / 2**30:.1f} GiB are "
            "free; use a config with fewer num_hidden_layers or num_local_experts, or a smaller "
            "vocab_size."
        )
