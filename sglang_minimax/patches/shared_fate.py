"""All ranks load, or none does: what one rank finds while it reads ends the load on all of them.

A rank that fails would leave the others in their next collective. So each says how its load ended
in the store through which the ranks of torch.distributed have met, looks there while it reads, and
waits there for the others. The first failure becomes the error of every rank; rank 0 prints it.

The store is rank 0's, and is gone when that rank has ended. So it goes last: when the others have
read why, or have had the time to.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist
from sglang.srt.runtime_context import get_parallel

from sglang_minimax.errors import LoadError, MinimaxError

POLL_SECONDS = 0.05
#: How long rank 0 waits for ranks that have not read the failure; those that read files look often.
PATIENCE_SECONDS = 10.0
#: Number of the load, the same on all ranks, for keys of the store that no other load has.
_loads = itertools.count()


class SharedFate:
    """One load on all ranks of a replica; `stop` and `end` are for one rank."""

    def __init__(self) -> None:
        """Called on all ranks, in the same order of loads."""
        group = get_parallel().world_group
        self._rank, self._size = group.rank_in_group, group.world_size
        self._key = f"sglang_minimax/load/{next(_loads)}"
        self._store = _store() if self._size > 1 else None

    def stop(self) -> str | None:
        """The sentence of a rank that has failed, None while all is well."""
        store = self._store
        if store is None or not store.check([f"{self._key}/failure"]):
            return None
        return str(store.get(f"{self._key}/failure").decode())

    def fail(self, sentence: str, of_all_ranks: bool = False) -> None:
        """Tell the others; the first one to do so is heard."""
        if self._store is not None:
            alone = self._rank != 0 and not of_all_ranks
            told = f"rank {self._rank}: {sentence}" if alone else sentence
            self._store.compare_set(f"{self._key}/failure", "", told)

    def wait(self) -> None:
        """Return when all ranks have ended well; LoadError as soon as one has not.

        A rank that was killed says nothing: after SGLang's own patience with slow ranks its barrier
        behind the load has the word.
        """
        if self._store is None:
            return
        from sglang.srt.model_executor.model_runner_components.load_model_utils import (
            UNBALANCED_MODEL_LOADING_TIMEOUT_S,
        )

        deadline = time.monotonic() + UNBALANCED_MODEL_LOADING_TIMEOUT_S
        self._store.add(f"{self._key}/done", 1)
        while self._store.add(f"{self._key}/done", 0) < self._size and time.monotonic() < deadline:
            if sentence := self.stop():
                raise LoadError(sentence)
            time.sleep(POLL_SECONDS)

    def leave(self) -> None:
        """Called on a rank that knows of the failure and will end; rank 0 goes last."""
        if self._store is None:
            return
        left = self._store.add(f"{self._key}/left", 1)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._rank == 0 and left < self._size and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            left = self._store.add(f"{self._key}/left", 0)

    def ended(self, sentence: str, of_all_ranks: bool) -> LoadError:
        """The error of this rank, which may be the failure of another one that was first."""
        try:
            self.fail(sentence, of_all_ranks)
            told = LoadError(self.stop() or sentence)
            told.is_told_elsewhere = self._rank != 0
            self.leave()
        except dist.DistError:  # rank 0 was killed, and says nothing
            told = LoadError(f"rank {self._rank}: {sentence}")
        return told

    def why(self, error: BaseException) -> str | None:
        """What another rank has said, where `error` came from its leaving; None where it did not.

        That is a collective or the store itself, which ends with rank 0.
        """
        try:
            return self.stop()
        except dist.DistError:
            gone = "rank 0 ended during the load; its last lines or the kernel's log say why."
            return gone if isinstance(error, dist.DistError) else None


@contextmanager
def shared_fate() -> Iterator[SharedFate]:
    """Around one load: its error on any rank is a LoadError on all, to be printed by rank 0."""
    fate = SharedFate()
    try:
        yield fate
        fate.wait()
    except MinimaxError as error:
        raise fate.ended(str(error), error.is_of_all_ranks) from error
    except BaseException as error:
        if sentence := fate.why(error):
            raise fate.ended(sentence, of_all_ranks=False) from error
        with suppress(dist.DistError):
            fate.fail(f"the load ended with {type(error).__name__}: {error}")
            fate.leave()
        raise


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
