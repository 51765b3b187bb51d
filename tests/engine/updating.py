"""Engines whose weights are updated, what they hold bit for bit, and a sender of weights."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import multiprocessing
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sglang_minimax import TINY_M2
from sglang_minimax.cli.local_server import free_port
from sglang_minimax.validation.agreement import greedy, random_prompt
from sglang_minimax.validation.engine_process import EngineProcess

Tensors = dict[str, torch.Tensor]
Pairs = list[tuple[str, torch.Tensor]]

VOCABULARY = 896
PROMPTS = [random_prompt(12, VOCABULARY, seed) for seed in range(2)]
GROUP = "trainer"


def tiny() -> Tensors:
    """The tensors of the bundled checkpoint."""
    return load_file(TINY_M2 / "model.safetensors")


def other_weights() -> Tensors:
    """Every tensor changed, so that one left behind would be seen."""
    changed = {name: tensor.roll(1, 0) * 1.25 for name, tensor in tiny().items()}
    assert all(not torch.equal(changed[name], tensor) for name, tensor in tiny().items())
    return changed


# --- the engine ----------------------------------------------------------------------------


def prepare() -> None:
    """Give the engine the calls that these tests need; runs in its process, before its ranks."""
    from sglang.srt.entrypoints.engine import Engine

    Engine.update_amid_requests = _update_amid_requests
    Engine.weight_checksums = _checksums
    Engine.update_ranks = _update_ranks
    Engine.update_from_disk = _update_from_disk
    break_reading_where_asked()


def _checksums(engine: Any) -> list[Any]:
    from sglang.srt.managers.io_struct import CheckWeightsReqInput

    request = CheckWeightsReqInput(action="checksum")
    success, message, ranks, _ = engine.loop.run_until_complete(
        engine.tokenizer_manager.check_weights(request)
    )
    assert success, message
    return [rank["checksums"] for rank in ranks]


def _update_ranks(engine: Any, per_rank: list[Any], load_format: str | None = None) -> Any:
    """One payload for each rank; bytes are sent as they are."""
    from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
    from sglang.srt.utils import MultiprocessingSerializer

    payloads = [
        payload if isinstance(payload, bytes) else MultiprocessingSerializer.serialize(payload)
        for payload in per_rank
    ]
    request = UpdateWeightsFromTensorReqInput(
        serialized_named_tensors=payloads, load_format=load_format
    )
    return engine.loop.run_until_complete(
        engine.tokenizer_manager.update_weights_from_tensor(request, None)
    )


def _update_from_disk(engine: Any, path: str, load_format: str | None = None) -> Any:
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    request = UpdateWeightFromDiskReqInput(model_path=path, load_format=load_format)
    return engine.loop.run_until_complete(
        engine.tokenizer_manager.update_weights_from_disk(request, None)
    )


def _update_amid_requests(
    engine: Any,
    path: str,
    prompts: list[list[int]],
    tokens: int,
    update: bool = True,
    paused: bool = False,
) -> dict[str, Any]:
    """Generate, and update from disk in the middle of it."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}

    async def talk() -> dict[str, Any]:
        answers = asyncio.ensure_future(
            engine.async_generate(input_ids=prompts, sampling_params=sampling)
        )
        answer = None
        if update:
            await asyncio.sleep(0.1)
            answer = await _update(engine.tokenizer_manager, path, paused)
        return {"answers": [a["output_ids"] for a in await answers], "update": answer}

    return engine.loop.run_until_complete(asyncio.wait_for(talk(), 60))


async def _update(manager: Any, path: str, paused: bool) -> tuple[bool, str]:
    """paused: whether generation is paused meanwhile, and the cache is kept."""
    from sglang.srt.managers.io_struct import (
        ContinueGenerationReqInput,
        PauseGenerationReqInput,
        UpdateWeightFromDiskReqInput,
    )

    if paused:
        await manager.pause_generation(PauseGenerationReqInput(mode="retract"))
    request = UpdateWeightFromDiskReqInput(model_path=path, flush_cache=not paused)
    success, message, *_ = await manager.update_weights_from_disk(request, None)
    if paused:
        await manager.continue_generation(ContinueGenerationReqInput())
    return success, message


def break_reading_where_asked() -> None:
    """A checkpoint with a file `breaks_on_rank_N` fails on that rank, once, in its last file.

    The disk's error comes from the read itself, when a first of two shards has been written.
    """
    original = os.preadv

    def breaking(descriptor: int, *rest: Any) -> int:
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        flag = file.parent / f"breaks_on_rank_{torch.distributed.get_rank()}"
        if flag.exists() and file.name.startswith(("model-00002", "model.safetensors")):
            flag.unlink()
            raise OSError(errno.EIO, "Input/output error")
        return original(descriptor, *rest)

    os.preadv = breaking


class Updated:
    """An engine under test."""

    def __init__(self, engine: EngineProcess, parallelism: dict[str, int]) -> None:
        self.engine = engine
        self.tp = parallelism.get("tp_size", 1)
        self.pp = parallelism.get("pp_size", 1)

    def wait_until_idle(self) -> None:
        """Until the cache could be flushed, which SGLang refuses while a request winds down."""
        deadline = time.monotonic() + 10
        while not self.engine.call("flush_cache").success:
            assert time.monotonic() < deadline, "the engine does not come to rest"
            time.sleep(0.05)

    def call(self, method: str, **arguments: Any) -> tuple[bool, str]:
        self.wait_until_idle()
        success, message, *_ = self.engine.call(method, **arguments)
        return success, message

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        assert self.call("begin_weight_update")[0]
        try:
            yield
        finally:
            success, message = self.call("end_weight_update")
            assert success, message

    def tensors(self, pairs: Any, load_format: str | None = None) -> tuple[bool, str]:
        """Update by the same tensors for every rank, inside a session."""
        return self.call(
            "update_ranks", per_rank=[pairs] * self.tp * self.pp, load_format=load_format
        )

    def disk(self, path: Path | str, load_format: str | None = None) -> tuple[bool, str]:
        return self.call("update_from_disk", path=str(path), load_format=load_format)

    def holds(self) -> Held:
        """What the engine holds and answers now."""
        self.wait_until_idle()
        answers = [greedy(self.engine, prompt, 4, VOCABULARY)[:2] for prompt in PROMPTS]
        self.wait_until_idle()
        return Held(self.engine.call("weight_checksums"), answers)


@dataclass(frozen=True, eq=False)
class Held:
    """checksums: of every parameter on every rank (of the first stage). answers: tokens, and
    [steps, vocabulary] log-probabilities, after each prompt."""

    checksums: list[Any]
    answers: list[tuple[list[int], torch.Tensor]]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Held)
        return self.checksums == other.checksums and all(
            mine[0] == theirs[0] and torch.equal(mine[1], theirs[1])
            for mine, theirs in zip(self.answers, other.answers, strict=True)
        )


# --- the sender ----------------------------------------------------------------------------


class Sender:
    """Rank 0 of a group for weight updates, in a process of its own, as a trainer would be."""

    def __init__(self, target: Updated) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, far_end = context.Pipe()
        self._size = 1 + target.tp
        self.port = free_port()
        self._process = context.Process(
            target=_send, args=(far_end, self.port, self._size), daemon=True
        )
        self._process.start()
        far_end.close()
        joined = target.call(
            "init_weights_update_group",
            master_address="127.0.0.1",
            master_port=self.port,
            rank_offset=1,
            world_size=self._size,
            group_name=GROUP,
            backend="gloo",
        )
        assert joined[0], joined[1]
        self._target = target

    def update(self, pairs: Pairs, load_format: str | None = None, **lies: Any) -> tuple[bool, str]:
        """Broadcast `pairs` while the engine receives them. lies: other things to announce."""
        self._pipe.send((pairs, load_format))
        answer = self.announce(pairs, load_format=load_format, **lies)
        assert self._pipe.poll(20), "the sender waits for its receivers"
        assert self._pipe.recv() == "sent"
        return answer

    def announce(self, pairs: Pairs, **changes: Any) -> tuple[bool, str]:
        """Only the call to the engine."""
        request = {
            "names": [name for name, _ in pairs],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in pairs],
            "shapes": [list(tensor.shape) for _, tensor in pairs],
            "group_name": GROUP,
            **changes,
        }
        return self._target.call("update_weights_from_distributed", **request)

    def close(self) -> None:
        self._target.call("destroy_weights_update_group", group_name=GROUP)
        self._pipe.send(None)
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()


def _send(pipe: Any, port: int, size: int) -> None:
    from sglang.srt.utils import init_custom_process_group
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    group = init_custom_process_group(
        backend="gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        world_size=size,
        rank=0,
        group_name=GROUP,
    )
    while (message := pipe.recv()) is not None:
        pairs, load_format = message
        if load_format == "flattened_bucket":
            bucket = FlattenedTensorBucket(named_tensors=pairs)
            pairs = [("bucket", bucket.get_flattened_tensor())]
        for _, tensor in pairs:
            torch.distributed.broadcast(tensor.contiguous(), src=0, group=group)
        pipe.send("sent")
    torch.distributed.destroy_process_group(group)
