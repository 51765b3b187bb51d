"""What a launch's own options make of a draft: one sentence for each that would not go with it.

No torch, no SGLang: the caller reads its arguments into `Options`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sglang_minimax.drafts.config import REJECTION, Draft

# What SGLang can make of plain weights while it loads them, or leave plain: of modelopt_fp4 it
# quantises experts alone. Others need a configuration that a plain draft does not have
# (model_loader/weight_utils.get_quant_config of SGLang 0.5.23).
_TAKES_PLAIN = (None, "fp8", "mxfp8", "w8a8_fp8", "modelopt_fp4", "nvfp4_online", "quark_mxfp4")


@dataclass(frozen=True, slots=True)
class Options:
    """Options that bear on a draft.

    rejection_sampling: --speculative-use-rejection-sampling. quantization: what the draft has from
    the model's --quantization; None where it has none, or one of its own.
    """

    rejection_sampling: bool = False
    quantization: str | None = None


NO_OPTIONS = Options()


def refusals(draft: Draft, options: Options) -> Iterator[str]:
    """Yield the reasons why `draft` cannot be started with these options."""
    own = draft.own_vocab
    if options.rejection_sampling and own is not None and own != draft.vocab_size:
        yield (
            f"{REJECTION} needs a draft that knows the whole vocabulary, and this one knows {own} "
            f"of {draft.vocab_size} tokens; start without that option, or use another draft."
        )
    if options.quantization not in _TAKES_PLAIN and not draft.quantised:
        yield (
            f"--quantization {options.quantization} would be the draft's as well, which is not "
            "quantised; add --speculative-draft-model-quantization unquant."
        )
