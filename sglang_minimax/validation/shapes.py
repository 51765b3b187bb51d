"""The list of shapes that must run, as `ci/topologies.yaml` has it: schema and reading."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sglang_minimax.errors import MinimaxError, TopologyError
from sglang_minimax.moe_exchange.paths import FORCEABLE
from sglang_minimax.topology import Topology

SIZES = tuple(each.name for each in fields(Topology))

#: Switches that a topology may name besides its sizes, and SGLang's argument for each.
SWITCHES = {"dp_lm_head": "enable_dp_lm_head"}
#: A forced path to the experts is named like a size: exchange=gather-fp8.
EXCHANGE = "exchange="

#: What every model of the list is, unless its entry says otherwise. Small, but with everything that
#: can go wrong: more query heads than KV heads, a rotation of half a head, an eps that is visible.
SMALL: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "rotary_dim": 16,
    "rope_theta": 10000,
    "intermediate_size": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-2,
    # Said as the published config says it, so that SGLang's in-tree model can read it too.
    "use_qk_norm": True,
    "qk_norm_type": "per_layer",
    "use_routing_bias": True,
    "scoring_func": "sigmoid",
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEFAULT_MODEL = "kv4"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Place(_Strict):
    """A topology, with its switches, on one of the models of the list."""

    topology: str
    model: str = DEFAULT_MODEL

    @field_validator("topology")
    @classmethod
    def _is_understood(cls, text: str) -> str:
        if isinstance(text, str):
            split(text)
        return text

    @property
    def switches(self) -> tuple[str, ...]:
        """The switches that the topology names, the path to the experts left out."""
        return tuple(each for each in split(self.topology)[1] if each in SWITCHES)

    @property
    def exchange(self) -> str | None:
        """The path to the experts that the topology names."""
        found = [each for each in split(self.topology)[1] if each not in SWITCHES]
        return found[0].removeprefix(EXCHANGE) if found else None

    @property
    def name(self) -> str:
        """The topology in its shortest form, "tp=4,dp=2,dp_lm_head"."""
        sizes, switches = split(self.topology)
        return ",".join((sizes or "tp=1", *switches))

    def sizes(self) -> Topology:
        """The sizes; TopologyError where they do not divide."""
        return Topology.parse(split(self.topology)[0] or "tp=1")

    def sizes_or_none(self) -> Topology | None:
        """The sizes, None where they do not divide."""
        try:
            return self.sizes()
        except TopologyError:
            return None


class Shape(Place):
    """A shape that must run.

    why: what it shows that smaller ones do not. combine: the reduce-scatter that must bring the
    experts' sums back to their ranks. arguments: more of SGLang's arguments.
    """

    why: str = ""
    combine: Literal["reduce_scatterv", "reduce_scatter_tensor"] | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)


class Refused(Place):
    """A combination that a launch refuses in one sentence with these words."""

    says: str
    arguments: dict[str, Any] = Field(default_factory=dict)

    @property
    def label(self) -> str:
        """The topology, and the options that are refused with it."""
        options = (
            f"--{key.replace('_', '-')}" + ("" if value is True else f" {value}")
            for key, value in self.arguments.items()
        )
        return " ".join((self.name, *options))


class NotYet(Place):
    """A combination that nobody has made work, and why."""

    reason: str


class Catalogue(_Strict):
    """The whole list. models: name -> fields of a config.json that differ from SMALL."""

    models: dict[str, dict[str, Any]]
    shapes: tuple[Shape, ...]
    refused: tuple[Refused, ...] = ()
    not_yet: tuple[NotYet, ...] = ()

    def config(self, model: str) -> dict[str, Any]:
        """The config.json of a model of the list."""
        if model not in self.models:
            raise MinimaxError(
                f"the list of shapes has no model {model!r}; it has {', '.join(self.models)}."
            )
        return {**SMALL, **self.models[model]}

    def find(self, topology: str) -> Shape | None:
        """The shape of the list with this topology, however it is written."""
        wanted = Shape(topology=topology).name
        return next((shape for shape in self.shapes if shape.name == wanted), None)


def split(text: str) -> tuple[str, tuple[str, ...]]:
    """("tp=4,dp=2", ("dp_lm_head",)) of "tp=4, dp=2, dp_lm_head"; sizes of 1 are left out.

    Raises TopologyError for a key that is neither a size nor a switch. Whether the sizes divide is
    not asked.
    """
    parts = [part.strip() for part in text.split(",")]
    paths = [EXCHANGE + name for name in FORCEABLE]
    switches = tuple(part for part in parts if part in SWITCHES)
    switches += tuple(part for part in parts if part in paths)[:1]
    found: dict[str, int] = {}
    for part in parts:
        if part in switches:
            continue
        key, _, value = (each.strip() for each in part.partition("="))
        if key not in SIZES or key in found or not value.isdecimal() or int(value) < 1:
            raise TopologyError(
                f"topology {text!r}: {part!r} is not understood; write sizes as tp=8,dp=2 with "
                f"each of {', '.join(SIZES)} at most once, {', '.join(SWITCHES)} without a "
                f"value, and {EXCHANGE} with one of {', '.join(FORCEABLE)}."
            )
        found[key] = int(value)
    return ",".join(f"{key}={found[key]}" for key in SIZES if found.get(key, 1) > 1), switches


def read(path: Path) -> Catalogue:
    """The list in a YAML file. Raises MinimaxError, in one sentence, where it is not understood."""
    try:
        return Catalogue.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise MinimaxError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise MinimaxError(f"{path}: {_first_problem(error)}") from error


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"]) or "the file"
    return f"{where}: {problem['msg']}."


@cache
def catalogue() -> Catalogue:
    """The list that comes with this package."""
    return read(Path(str(files("sglang_minimax.validation") / "topologies.yaml")))


def arguments(place: Place) -> dict[str, Any]:
    """SGLang's arguments for the sizes and switches of a place."""
    sizes = split(place.topology)[0]
    pairs = dict(part.split("=") for part in sizes.split(",")) if sizes else {}
    options = {"tp": "tp_size", "dp": "attn_dp_size", "ep": "ep_size", "pp": "pp_size"}
    found: dict[str, Any] = {
        option: int(pairs[key]) for key, option in options.items() if key in pairs
    }
    return {**found, **{SWITCHES[switch]: True for switch in place.switches}}
