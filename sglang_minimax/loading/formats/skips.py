"""Lists of modules that stay in full precision, as SGLang reads them.

Tools write such a list with the checkpoint's names (q_proj, experts.0.w1), SGLang looks it up with
those of its own modules (qkv_proj, experts), and every method by another rule. What SGLang builds
is what must be loaded, so its rule counts here; a list that it would take otherwise than the tool
meant it is refused. No torch, no SGLang.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sglang_minimax.errors import ConfigError
from sglang_minimax.loading.formats.base import Names

#: Whether an entry of a list speaks of a module, by its full name.
Rule = Callable[[str, str], bool]

_SHARDS = ("q_proj", "k_proj", "v_proj")
_MATRICES = ("w1", "w2", "w3")
_LAYER = re.compile(r"\blayers\\?\.(\d+)\b")


def never(entry: str, module: str) -> bool:
    """A rule for modules that a method does not look up."""
    return False


def part(entry: str, module: str) -> bool:
    """An entry is any part of a name."""
    return entry in module


def inside(entry: str, module: str) -> bool:
    """An entry is a module, or one that the module lies in; a few parts of its name will do."""
    return f".{entry}." in f".{module}."


@dataclass(frozen=True, slots=True)
class Skips(Names):
    """The modules that a list keeps in full precision, by the rules of one of SGLang's methods.

    linear: for its linear modules. shards: for q_proj, k_proj and v_proj, all of which must be
    listed; `never` where a method asks for qkv_proj alone. stacked: for the module of all experts.
    """

    linear: Rule = never
    shards: Rule = never
    stacked: Rule = never

    def __contains__(self, module: object) -> bool:
        parent, _, last = str(module).rpartition(".")
        if last == "experts":
            return self._listed(self.stacked, str(module))
        if ".experts." in parent:
            return False  # a spelling of the module of all experts, for methods that know it
        if last in _SHARDS:
            each = (self._listed(self.shards, f"{parent}.{shard}") for shard in _SHARDS)
            return self._listed(self.linear, f"{parent}.qkv_proj") or all(each)
        return self._listed(self.linear, str(module))

    def _listed(self, rule: Rule, module: str) -> bool:
        return any(rule(entry, module) for entry in self.entries)

    def check(self, key: str, meant: Rule) -> None:
        """Raise ConfigError where SGLang does not follow an entry.

        key: where the list is. meant: the rule of the tool that wrote it, for the names of the
        checkpoint's matrices.
        """
        for entry in self.entries:
            number = _LAYER.search(entry)
            layer = f"model.layers.{number[1] if number else 0}"
            for module, tensors in _modules(layer):
                spoken_of = [name for name in tensors if meant(entry, name)]
                if not spoken_of:
                    continue
                if module not in self:
                    remedy = "list it under that name"
                    if self.stacked is never and module.endswith("experts"):
                        remedy = "SGLang's method for this format always quantises the experts"
                    raise ConfigError(
                        f"config: {key} keeps {spoken_of[0]} in full precision by {entry!r}, but "
                        f"SGLang looks up {_asked(module)}, which the list does not have; {remedy}."
                    )
                others = [name for name in tensors if not self._listed(meant, name)]
                if others:
                    raise ConfigError(
                        f"config: {key} keeps {spoken_of[0]} in full precision but not {others[0]}"
                        ", and SGLang makes one module of them; list all of them or none."
                    )


def _asked(module: str) -> str:
    """SGLang's name of the module that a published one is in."""
    parent, _, last = module.rpartition(".")
    return f"{parent}.qkv_proj" if last in _SHARDS else module


def _modules(layer: str) -> list[tuple[str, list[str]]]:
    """(module as `format_of` is asked, the checkpoint's matrices in it) of one layer."""
    attention, experts = f"{layer}.self_attn", f"{layer}.block_sparse_moe.experts"
    return [
        (f"{attention}.q_proj", [f"{attention}.{shard}" for shard in _SHARDS]),
        (f"{attention}.o_proj", [f"{attention}.o_proj"]),
        (experts, [f"{experts}.0.{matrix}" for matrix in _MATRICES]),
    ]


def entries(config: Mapping[str, Any], *keys: str) -> tuple[str, ...]:
    """The list under the first of `keys` that has one. Raises ConfigError for what is no list."""
    for key in keys:
        value = config.get(key)
        if value is None:
            continue
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        if not is_list or not all(isinstance(entry, str) for entry in value):
            raise ConfigError(
                f"config: {key} is {value!r}, but it must be a list of module names; correct the "
                "quantisation config."
            )
        return tuple(value)
    return ()


def check_expression(key: str, entry: str, expression: str) -> None:
    """Raise ConfigError for an entry that is no regular expression."""
    try:
        re.compile(expression)
    except re.error as error:
        raise ConfigError(
            f"config: {key} has {entry!r}, which is no regular expression ({error}); correct the "
            "quantisation config."
        ) from None
