"""What a lane file may say. An unknown key is an error; nothing is guessed.

Pure: no torch, no SGLang. `files.py` adds the line to a complaint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from ci.lane.figures import NAMES
from sglang_minimax.accuracy.settings import Gsm8kSettings, ServingSettings, ToolSettings
from sglang_minimax.errors import MinimaxError

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
Said = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Options = dict[str, bool | int | float | str | list[str | int] | dict[str, Any]]
SuiteName = Literal["gsm8k", "tools", "serving"]

#: Options that the runner sets itself, and from what.
TAKEN = {
    "model-path": "model",
    "host": "the runner, which serves on loopback",
    "port": "`run --port`",
    "nnodes": "hardware.nodes",
    "node-rank": "`run --node-rank`",
    "dist-init-addr": "`run --dist-init-addr`",
    "speculative-draft-model-path": "draft",
}
#: Options that hold a secret. Command lines stand in results, and the server listens on loopback.
SECRET = ("api-key", "admin-api-key", "ssl-keyfile-password")
#: Settings of suites that the runner sets itself.
OURS = ("url", "log", "progress", "api_key")


class Strict(BaseModel):
    """Every key is known, every type is the one that is written."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Hardware(Strict):
    """Where a lane runs.

    device: the marketing name, a whole word of the driver's own name. also: others that will do.
    capability: compute capability times ten, of CUDA devices. gfx: the architecture of ROCm
    devices, such as gfx942. memory_gb: of each device, in units of 10**9 bytes. packages: Python
    packages that the arguments or the environment need.
    """

    kind: Literal["cpu", "cuda", "rocm", "npu"]
    device: Said
    also: list[Said] = Field(default_factory=list)
    capability: int | None = None
    gfx: Annotated[str, StringConstraints(pattern=r"^gfx\d{2}[0-9a-f]$")] | None = None
    per_node: int = Field(ge=1)
    nodes: int = Field(default=1, ge=1)
    memory_gb: float = Field(gt=0)
    packages: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.kind == "cuda") != (self.capability is not None):
            raise ValueError("capability is for CUDA devices, and they need it")
        if (self.kind == "rocm") != (self.gfx is not None):
            raise ValueError("gfx is for ROCm devices, and they need it")
        return self

    @property
    def version(self) -> int | None:
        """What torch.cuda.get_device_capability says, times ten; gfx942 is 94. None for others."""
        return self.capability if self.gfx is None else int(self.gfx[3:5])


class Model(Strict):
    """Whose weights are served.

    name: of the hub, or of a folder in the package's assets where `bundled`. override: environment
    variable with a local folder. config: a folder of `ci/lanes/configs` for `check`; a bundled
    model has its own. format: for people.
    """

    name: Said
    bundled: bool = False
    override: Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]*$")] | None = None
    config: Said | None = None
    format: Said | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.bundled and (self.override or self.config):
            raise ValueError("a bundled model has neither an override nor another config")
        return self


class Load(Strict):
    """What has to fit at once: requests of so many tokens each."""

    requests: int = Field(ge=1)
    context: int = Field(ge=1)


class Figure(Strict):
    """A number of a suite's result, and what it is held to.

    better: the good direction. baseline: what somebody published. threshold: the worst that
    passes; without one the number is reported only. note: what they were measured with, or why
    there are none. source: where both are from.
    """

    better: Literal["higher", "lower"] = "higher"
    baseline: float | None = None
    threshold: float | None = None
    note: Said
    source: Said | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.source is None and (self.baseline, self.threshold) != (None, None):
            raise ValueError("a number needs a source")
        if self.baseline is not None and self.threshold is not None:
            sign = 1 if self.better == "higher" else -1
            if sign * self.threshold > sign * self.baseline:
                side = "above" if self.better == "higher" else "below"
                raise ValueError(
                    f"the threshold {self.threshold:g} is {side} the baseline {self.baseline:g}, "
                    "so that the baseline itself would fail"
                )
        return self


class Suite(Strict):
    """One suite: its settings, how long it may take, and the figures that are looked at."""

    settings: dict[str, Any] = Field(default_factory=dict)
    limit_minutes: float = Field(gt=0)
    figures: dict[str, Figure] = Field(default_factory=dict)


class Variant(Strict):
    """One launch of the lane's model; options here replace those of the lane, false drops one."""

    about: Said
    options: Options = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)


class Lane(Strict):
    """A lane file."""

    name: Name
    about: Said
    hardware: Hardware
    model: Model
    draft: Model | None = None
    options: Options = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)
    start_minutes: float = Field(gt=0)
    load: Load
    variants: dict[Name, Variant] = Field(min_length=1)
    suites: dict[SuiteName, Suite] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for where, options in (
            ("options", self.options),
            *((f"variants.{name}.options", v.options) for name, v in self.variants.items()),
        ):
            _check_options(where, options)
        if not self.model.bundled and self.model.config is None:
            raise ValueError("model.config is missing: the folder that `check` reads")
        for name, suite in self.suites.items():
            try:
                settings_of(name, suite.settings)
            except (MinimaxError, ValueError) as error:
                raise ValueError(f"suites.{name}.settings: {error}") from error
            for figure in suite.figures:
                if figure not in NAMES[name]:
                    there = ", ".join(sorted(NAMES[name]))
                    raise ValueError(
                        f"suites.{name}.figures.{figure}: the suite has no such figure; "
                        f"it has {there}"
                    )
        return self

    def options_of(self, variant: str) -> Options:
        """SGLang's options of a variant, without those that the runner sets."""
        return {**self.options, **self.variants[variant].options}

    def environment_of(self, variant: str) -> dict[str, str]:
        """What is set for the server beside the caller's environment."""
        return {**self.environment, **self.variants[variant].environment}


Settings = Gsm8kSettings | ToolSettings | ServingSettings
_CLASSES: Mapping[str, Any] = {
    "gsm8k": Gsm8kSettings,
    "tools": ToolSettings,
    "serving": ServingSettings,
}


def settings_of(suite: str, values: Mapping[str, Any], **ours: Any) -> Settings:
    """The settings of a suite, from a lane file's mapping and what the runner adds.

    Raises MinimaxError or ValueError in one sentence.
    """
    made = _CLASSES[suite]
    known = {each.name for each in fields(made)}
    if mine := sorted(set(values) & set(OURS)):
        raise ValueError(f"{', '.join(mine)}: the runner sets this itself")
    if unknown := sorted(set(values) - known):
        left = ", ".join(sorted(known - set(OURS)))
        raise ValueError(f"{', '.join(unknown)}: no such setting; there are {left}")
    for each in fields(made):
        if each.name in values and each.default is not MISSING:
            _check_type(each.name, values[each.name], each.default)
    tuples = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
    found: Settings = made(**{**values, **tuples, **{k: v for k, v in ours.items() if k in known}})
    return found


def _check_type(name: str, value: Any, default: Any) -> None:
    """A text where a number belongs would only be found by the suite, after the model is loaded."""
    if default is None or isinstance(default, tuple):
        return
    wanted = (int, float) if isinstance(default, float) else (type(default),)
    if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
        raise ValueError(f"{name} is {value!r}, where {type(default).__name__} is needed")


def _check_options(where: str, options: Options) -> None:
    for option in options:
        if option in TAKEN:
            raise ValueError(f"{where}.{option}: this is set by {TAKEN[option]}; leave it out")
        if option in SECRET:
            raise ValueError(
                f"{where}.{option}: a secret would stand in every result, and the server "
                "listens on loopback; leave it out"
            )
        if option.startswith("-") or "_" in option:
            name = option.strip("-").replace("_", "-")
            raise ValueError(f"{where}.{option}: write {name}, without dashes in front")
