"""Does SGLang cut its own modules as `topology` says? Asked once a rank, when the model is built.

SGLang's pipeline helper and its vocabulary tables find out for themselves what a rank holds. What
the loader expects and what operators are shown (`sglang-minimax topology`) comes from `topology`;
where the two differ, nothing should run.
"""

from __future__ import annotations

import os

from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.runtime_context import get_parallel
from torch import nn

from sglang_minimax.config import Architecture
from sglang_minimax.errors import TopologyError
from sglang_minimax.topology import layer_range, vocabulary_rows, vocabulary_rows_in_memory


def check_layers(arch: Architecture, theirs: range) -> None:
    """Raise TopologyError unless SGLang's layers of this pipeline stage are ours."""
    partition = os.environ.get("SGLANG_PP_LAYER_PARTITION")
    group = get_parallel().pp_group
    ours = layer_range(
        arch.num_layers,
        group.world_size,
        group.rank_in_group,
        [int(count) for count in partition.split(",")] if partition else None,
    )
    _demand(f"layers of pipeline stage {group.rank_in_group}", ours, theirs)


def check_vocabulary(arch: Architecture, what: str, table: nn.Module) -> None:
    """The same for the rows of the embedding or the head; a stage without it has nothing to check.

    what: its name for the message.
    """
    if not isinstance(table, VocabParallelEmbedding):
        return
    parallel = get_parallel()
    if table.use_attn_tp_group:
        size, rank = parallel.attn_tp_size, parallel.attn_tp_rank
    else:
        size, rank = parallel.tp_size, parallel.tp_rank
    theirs = table.shard_indices
    rows = range(theirs.org_vocab_start_index, theirs.org_vocab_end_index)
    _demand(f"rows of the {what}", vocabulary_rows(arch.vocab_size, size, rank), rows)
    held = range(vocabulary_rows_in_memory(arch.vocab_size, size))
    _demand(f"rows of the {what} in memory", held, range(table.num_embeddings_per_partition))


def _demand(what: str, ours: range, theirs: range) -> None:
    if ours != theirs:
        raise TopologyError(
            f"SGLang has {what} from {theirs.start} to {theirs.stop}, but {ours.start} to "
            f"{ours.stop} were expected; report this to sglang-minimax."
        )
