"""What is said of a draft model: at launch, before a rank is started, and once while it serves."""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sglang_minimax import ARCHITECTURE
from sglang_minimax.drafts.acceptance import Watch
from sglang_minimax.drafts.checks import ANY, VARIABLE
from sglang_minimax.drafts.config import EAGLE3, Draft
from sglang_minimax.drafts.fingerprint import fingerprint
from sglang_minimax.drafts.judgement import Verdict, draft_config, judge
from sglang_minimax.drafts.options import Options
from sglang_minimax.errors import LoadError, MinimaxError
from sglang_minimax.loading.files import folder_of, weight_files

logger = logging.getLogger(__name__)

#: SGLang's names of the algorithms that take the same options as EAGLE3. They have no such draft,
#: and would run one without what it reads.
RELATED = ("EAGLE", "NEXTN")
# Formats of weights in which the files are looked at.
_READ = ("auto", "safetensors")


def check_draft(server_args: Any, previous: Callable[[Any], None]) -> None:
    """Judge the draft of our model around SGLang's step for speculation.

    A local folder is judged before SGLang opens it. A name on a hub is judged after, as SGLang has
    fetched its config.json by then; its tensors are, where they are in the cache already. Raises
    SystemExit with one sentence for each reason not to start.
    """
    from sglang.srt.arg_groups.model_override_base import resolving_view

    from sglang_minimax.patches.arguments import asked_for_ours

    cfg = resolving_view(server_args)
    algorithm = (cfg.speculative_algorithm or "").upper()
    if algorithm not in (EAGLE3, *RELATED) or not asked_for_ours(server_args):
        previous(server_args)
        return
    path = cfg.speculative_draft_model_path
    on_hub = path is not None and not os.path.exists(path) and not os.path.isabs(path)
    if on_hub:
        previous(server_args)
    try:
        reasons = list(_reasons(server_args, algorithm, path, on_hub))
    except MinimaxError as error:
        reasons = [str(error)]
    if reasons:
        raise SystemExit("\n".join(f"sglang-minimax: {reason}" for reason in reasons))
    if not on_hub:
        previous(server_args)


def _reasons(server_args: Any, algorithm: str, path: str | None, on_hub: bool) -> Iterator[str]:
    """Yield the reasons not to start; doubts are logged where the user has waved them through."""
    from sglang.srt.arg_groups.model_override_base import resolving_view

    if path is None:
        yield (
            f"--speculative-algorithm {algorithm} without --speculative-draft-model-path would "
            "load the whole model once more as its own draft; name an Eagle3 draft, or start "
            "without it."
        )
        return
    waved = os.environ.get(VARIABLE, "")
    if waved not in ("", ANY):
        yield f"{VARIABLE} is {waved!r}, but it knows only {ANY}; set it to that, or unset it."
        return
    cfg = resolving_view(server_args)
    folder = folder_of(path, cfg.speculative_draft_model_revision)
    if folder is None:
        if not on_hub:
            yield f"{path} is no folder; check --speculative-draft-model-path."
        elif algorithm == EAGLE3:
            _say_unseen(server_args, path)
        return
    config = _config(folder, cfg.decrypted_draft_config_file, cfg.json_model_override_args)
    if algorithm != EAGLE3:
        if "eagle3" in Draft.from_config(config).architecture.lower():
            yield (
                f"{path} is an Eagle3 draft, which --speculative-algorithm {algorithm} would run "
                f"without the hidden states that it reads; use {EAGLE3}."
            )
        return
    verdict = _verdict(server_args, config, folder, on_hub)
    yield from verdict.refusals
    if not waved:
        yield from verdict.doubts
        return
    for doubt in verdict.doubts:
        logger.warning("sglang-minimax: %s", doubt)


def _verdict(server_args: Any, config: dict[str, Any], folder: Path, on_hub: bool) -> Verdict:
    from sglang.srt.arg_groups.model_override_base import model_config_of, resolving_view

    from sglang_minimax.patches.arguments import architecture_asked_for, launch_of

    cfg = resolving_view(server_args)
    read = str(cfg.load_format) in _READ
    draft_read = str(cfg.speculative_draft_load_format or cfg.load_format) in _READ
    whole = _is_whole(folder, on_hub)
    if draft_read and not whole:
        _say_unseen(server_args, str(folder))
    model = model_config_of(server_args)
    launch = launch_of(server_args)
    compared = read and Draft.from_config(config).fingerprint is not None
    return judge(
        architecture_asked_for(server_args),
        config,
        weights=folder if draft_read and whole else None,
        target=_target(model.model_path, model.revision) if compared else None,
        ranks=launch.tp // (launch.dp * launch.attention_cp),
        options=_options(cfg),
    )


def _options(cfg: Any) -> Options:
    inherited = not cfg._speculative_draft_quantization_explicitly_set
    return Options(
        rejection_sampling=bool(cfg.speculative_use_rejection_sampling),
        quantization=cfg.speculative_draft_model_quantization if inherited else None,
    )


def _config(folder: Path, file: str | None, overrides: str) -> dict[str, Any]:
    """The draft's configuration as SGLang will have it. Raises LoadError.

    file: --decrypted-draft-config-file, in the place of config.json. overrides:
    --json-model-override-args, which SGLang applies to the draft as well; a value that is an object
    takes the place of the other one.
    """
    file = (file or "").strip()
    config = draft_config(folder, file) if file else draft_config(folder)
    return config | json.loads(overrides)


def _say_unseen(server_args: Any, draft: str) -> None:
    """Log that the tensors of a draft have not been judged, and what does it later."""
    from sglang.srt.arg_groups.model_override_base import model_config_of

    logger.warning(
        "sglang-minimax: the draft's tensors have not been downloaded yet, so that their names and "
        "shapes are not judged; the next start does, or `sglang-minimax inspect %s --target %s` "
        "with both folders.",
        draft,
        model_config_of(server_args).model_path,
    )


def _is_whole(folder: Path, on_hub: bool) -> bool:
    """Whether all weights are there; what a hub has is fetched later, pickles are not."""
    if not on_hub:
        return True
    try:
        weight_files(folder)
    except LoadError:
        return any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors"))
    return True


def _target(path: str, revision: str | None) -> Path | None:
    """The folder of the model's weights, None where they have not been fetched yet."""
    folder = folder_of(path, revision)
    if folder is None:
        return None
    return folder if _is_whole(folder, on_hub=not Path(path).is_dir()) else None


# --- while it serves ---


def watch_acceptance(original: Callable[[Any], None]) -> Callable[[Any], None]:
    """Wrap `SchedulerMetricsReporter.__post_init__`: warn once of a low accepted length.

    On the first rank, for our model with a draft that does not have the fingerprint of the weights
    that are served, or where it cannot be taken. Elsewhere nothing changes. SGLang adds to its
    totals every --decode-log-interval steps; between those a step costs one comparison, and none
    after the warning.
    """

    @functools.wraps(original)
    def __post_init__(self: Any) -> None:
        original(self)
        if _is_to_be_watched(self):
            _watch(self)

    return __post_init__


def _is_to_be_watched(reporter: Any) -> bool:
    from sglang.srt.runtime_context import get_parallel

    scheduler = reporter.scheduler
    if not scheduler.spec_algorithm.is_eagle3() or not reporter.is_stats_logging_rank:
        return False
    if ARCHITECTURE not in (scheduler.model_config.hf_config.architectures or []):
        return False
    if get_parallel().attn_dp_rank != 0:
        return False
    return os.environ.get(VARIABLE) == ANY or not _is_vouched_for(scheduler.model_config)


def _is_vouched_for(served: Any) -> bool:
    """Whether the draft has the fingerprint of the weights of `served`, SGLang's ModelConfig.

    Compared here, as a launch may be before the files of a hub. Other formats than safetensors are
    not read: what is served may not be what the files hold.
    """
    from sglang.srt.runtime_context import get_model, get_spec

    model, spec = get_model(), get_spec()
    formats = (model.load_format, spec.speculative_draft_load_format or model.load_format)
    folder = folder_of(spec.speculative_draft_model_path, spec.speculative_draft_model_revision)
    if folder is None or any(str(each) not in _READ for each in formats):
        return False
    try:
        config = _config(folder, model.decrypted_draft_config_file, model.json_model_override_args)
        known = Draft.from_config(config).fingerprint
        target = _target(served.model_path, served.revision) if known else None
        return target is not None and fingerprint(target) == known
    except MinimaxError:
        return False


def _watch(reporter: Any) -> None:
    """Have the totals of `reporter` heard by a Watch, until it has said its sentence."""
    from sglang.srt.runtime_context import get_spec

    report = reporter.report_decode_stats
    watch = Watch(get_spec().speculative_num_steps)
    heard = 0

    def report_decode_stats(*args: Any, **kwargs: Any) -> None:
        nonlocal heard
        report(*args, **kwargs)
        verified = reporter.spec_total_num_forward_ct
        if verified == heard:
            return
        heard = verified
        sentence = watch.heard(verified, reporter.spec_total_num_accept_tokens)
        if sentence is not None:
            logger.warning("sglang-minimax: %s", sentence)
            del reporter.report_decode_stats

    reporter.report_decode_stats = report_decode_stats
