"""Any rank of N in one process: SGLang's parallel state, its model, and its loading of weights.

`torch.distributed` gets PyTorch's fake backend, which has N ranks and answers at once; SGLang then
builds its groups itself, from published arguments, as in a scheduler process. A process is one rank
of one topology in its life, and may load several checkpoints one after the other: call
`in_children`. Nothing is post-processed or computed.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from sglang_minimax.platforms import choice
from sglang_minimax.validation.engine_process import quiet_child

IN_TREE, OURS = "in-tree", "ours"

Task = Callable[[], Any]


class Refused(Exception):
    """What a child said instead of returning something; its first word is the error's type."""


def preload() -> None:
    """Import once what every child needs."""
    for module in (
        "sglang.srt.entrypoints.engine",
        "sglang.srt.model_executor.model_runner",
        "sglang.srt.models.registry",
        "sglang.srt.models.minimax_m2",
        "torch.testing._internal.distributed.fake_pg",
    ):
        importlib.import_module(module)
    if choice.cpu_platform_chosen():
        from sglang_minimax.platforms.cpu.forking import import_what_children_need

        import_what_children_need()


# --- children ---


@dataclass
class _Child:
    process: Any
    answer: Connection
    log: Any
    until: float

    @classmethod
    def start(cls, task: Task, timeout: float) -> _Child:
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        log = tempfile.NamedTemporaryFile(prefix="one-rank-")  # noqa: SIM115
        process = context.Process(target=_child, args=(there, log.name, task))
        process.start()
        there.close()
        return cls(process, here, log, time.monotonic() + timeout)

    def result(self) -> Any:
        """What the task returned, or the error of the child."""
        tail = Path(self.log.name).read_text(errors="replace")[-3000:]
        if not self.answer.poll():
            raise TimeoutError(f"a child has not answered\n{tail}")
        try:
            kind, value = self.answer.recv()
        except EOFError:
            raise RuntimeError(f"a child ended without an answer\n{tail}") from None
        return Refused(value) if kind == "refused" else value

    def end(self) -> None:
        """Leave nothing behind."""
        self.process.join(1 if self.answer.closed else 5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.answer.close()
        self.log.close()


def in_children(tasks: Sequence[Task], *, at_once: int = 2, timeout: float = 300.0) -> list[Any]:
    """What the tasks return, each in a fork of this process; a Refused in place of one that raised.

    timeout: seconds for each task. Raises TimeoutError, or RuntimeError for a child that died.
    """
    waiting, running = list(enumerate(tasks)), dict[int, _Child]()
    results: dict[int, Any] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                index, task = waiting.pop(0)
                running[index] = _Child.start(task, timeout)
            left = min(child.until for child in running.values()) - time.monotonic()
            ready = wait([child.answer for child in running.values()], max(0.0, left))
            for index, child in list(running.items()):
                if child.answer in ready or time.monotonic() >= child.until:
                    results[index] = child.result()
                    running.pop(index).end()
    finally:
        for child in running.values():
            child.process.kill()
            child.end()
    return [results[index] for index in range(len(tasks))]


def in_child(function: Callable[..., Any], *arguments: Any, timeout: float = 300.0) -> Any:
    """`function(*arguments)` in a fork of this process; Refused with its sentence if it raises."""
    (result,) = in_children([lambda: function(*arguments)], timeout=timeout)
    if isinstance(result, Refused):
        raise result
    return result


def _child(connection: Any, log: str, task: Task) -> None:
    quiet_child(log)
    try:
        connection.send(("value", task()))
    except (Exception, SystemExit) as error:
        connection.send(("refused", refusal_of(error)))
    connection.close()
    os._exit(0)  # nothing of SGLang is to be wound up


def refusal_of(error: BaseException) -> str:
    """An error as `Refused` has it."""
    return f"{type(error).__name__}: {error}"


# --- a rank ---


class OneRank:
    """This process as one rank of a topology, with the checkpoint in `folder` ready to be loaded.

    arguments: of a server's command line, such as --tp-size. rank: of all. who: whose model and
    loader, OURS or IN_TREE, for which our refusals are off.
    """

    def __init__(
        self, folder: Path, arguments: Sequence[str] = (), *, rank: int = 0, who: str = OURS
    ) -> None:
        """Publish the arguments, build the groups, make ready what the model asks for."""
        if who == IN_TREE:
            undo_ours()
        self._rank = rank
        server_args = self._publish(folder, arguments)
        build_groups(server_args, rank)
        self._configure_layers()

    def turn_to(self, folder: Path, arguments: Sequence[str] = ()) -> None:
        """Another checkpoint at the same place; `arguments` must name the same topology."""
        self._publish(folder, arguments)
        self._configure_layers()

    def _publish(self, folder: Path, arguments: Sequence[str]) -> Any:
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.runtime_context import SpawnRanks, publish
        from sglang.srt.server_args import prepare_server_args

        server_args = prepare_server_args(
            ["--model-path", str(folder), "--skip-tokenizer-init", *arguments]
        )
        ranks = SpawnRanks(world_rank=self._rank, gpu_id=0)
        publish(server_args, role="scheduler", ranks=ranks)
        self.config = ModelConfig.from_server_args(server_args)
        self.loader_class: str | None = None
        return server_args

    def _configure_layers(self) -> None:
        """As `Scheduler.init_model_config` to `init_moe_gemm_config` do."""
        from sglang.srt.distributed import bootstrap
        from sglang.srt.layers.moe import initialize_moe_config
        from sglang.srt.layers.quantization.fp8_utils import initialize_fp8_gemm_config
        from sglang.srt.model_loader.loader import DefaultModelLoader

        bootstrap.init_layer_runtime(model_config=self.config)
        initialize_moe_config()
        initialize_fp8_gemm_config()
        DefaultModelLoader.postprocess_weights = staticmethod(lambda model, device: None)

    def load(self) -> torch.nn.Module:
        """What ModelRunner.load_model does between its log lines."""
        from sglang.srt.configs.device_config import DeviceConfig
        from sglang.srt.configs.load_config import LoadConfig
        from sglang.srt.model_loader import loader

        chosen = loader.get_model_loader(load_config=LoadConfig(), model_config=self.config)
        self.loader_class = type(chosen).__qualname__
        model: torch.nn.Module = chosen.load_model(
            model_config=self.config, device_config=DeviceConfig("cpu", 0)
        )
        return model

    def build(self) -> torch.nn.Module:
        """The model alone, its parameters unwritten."""
        from sglang.srt.configs.load_config import LoadConfig
        from sglang.srt.model_loader import loader

        quantization = loader._get_quantization_config(self.config, LoadConfig())
        with loader.set_default_torch_dtype(self.config.dtype), torch.device("cpu"):
            model: torch.nn.Module = loader._initialize_model(
                self.config, LoadConfig(), quantization
            )
        return model


def undo_ours() -> None:
    """SGLang's class and SGLang's loader, in this process; the CPU platform stays."""
    from sglang.srt.model_loader import loader
    from sglang.srt.models import minimax_m2

    from sglang_minimax.patches import arguments, model_registry

    arguments.refuse_unsupported = lambda server_args: None
    in_tree: Any = lambda: minimax_m2.MiniMaxM2ForCausalLM  # noqa: E731
    model_registry.our_model_class = in_tree
    hooked = loader.get_model_loader
    loader.get_model_loader = getattr(hooked, "__sglang_original__", hooked)


def build_groups(server_args: Any, rank: int) -> None:
    """SGLang's process groups over a backend that needs no other process."""
    import torch.distributed as dist
    from sglang.srt.distributed import parallel_state
    from sglang.srt.environ import envs
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.runtime_context import get_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    parallel = get_parallel()
    size = parallel.tp_size * parallel.pp_size
    envs.SGLANG_USE_MESSAGE_QUEUE_BROADCASTER.set(False)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    original = dist.new_group
    dist.new_group = lambda *a, **k: original(*a, **{**k, "backend": "fake"})

    def all_alike(found: list[Any], mine: Any, **_: Any) -> None:
        found[:] = [mine] * len(found)

    dist.all_gather_object = all_alike  # type: ignore[assignment]
    with contextlib.suppress(ImportError):
        from sglang_minimax.patches import shared_fate

        shared_fate._store = lambda: None
    parallel_state.init_distributed_environment(
        world_size=size, rank=rank, local_rank=0, backend="fake"
    )
    parallel_state.initialize_model_parallel()
    initialize_dp_attention(server_args=server_args)
