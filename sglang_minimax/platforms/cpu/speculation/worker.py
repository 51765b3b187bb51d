"""SGLang's Eagle worker with the attention of `attention.py`; everything else is SGLang's own."""

from __future__ import annotations

from typing import Any

from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker, EAGLEWorkerV2

from sglang_minimax.platforms.cpu.speculation.attention import DraftSteps, TreeAttention


class CpuEagleWorker(EAGLEWorkerV2):
    """The worker that `get_speculative_worker_cls` names: SGLang's factory has no CPU backend."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        draft = self._draft_worker
        # Called by SGLang's own `init_attention_backends` of the draft worker, in its contexts.
        draft.init_attention_backend = lambda: give_attention(draft)

    def init_attention_backends(self) -> None:
        """As SGLang's, and the target learns to verify trees."""
        super().init_attention_backends()
        runner = self.target_worker.model_runner
        runner.attn_backend = named_alike(TreeAttention(runner), runner.attn_backend)


def give_attention(draft: EagleDraftWorker) -> None:
    """What `EagleDraftWorker.init_attention_backend` does, for the CPU."""
    runner, steps = draft.draft_runner, draft.speculative_num_steps
    draft.draft_attn_backend = DraftSteps(runner, draft.topk, steps) if steps > 1 else None
    draft.draft_extend_attn_backend = named_alike(TreeAttention(runner), runner.attn_backend)
    runner.draft_attn_backend = draft.draft_attn_backend
    runner.attn_backend = draft.draft_extend_attn_backend


def named_alike(backend: TreeAttention, other: Any) -> TreeAttention:
    """`backend` under the names that SGLang gave the one that it replaces."""
    backend.prefill_attention_backend_str = other.prefill_attention_backend_str
    backend.decode_attention_backend_str = other.decode_attention_backend_str
    return backend
