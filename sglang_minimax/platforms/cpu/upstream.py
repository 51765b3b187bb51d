"""The part of the upstream register that belongs to the CPU platform."""

from __future__ import annotations

from sglang_minimax.upstream import Patch, Scope

_MODULE = "sglang_minimax.platforms.cpu.patches"
_ASKS_THE_PLATFORM = "when SGLang asks the platform here"

CPU_PATCHES: tuple[Patch, ...] = (
    Patch(
        target="sglang.srt.model_executor.model_runner:adjust_config_with_unaligned_cpu_tp",
        replacement=f"{_MODULE}:keep_config",
        scope=Scope.CPU,
        why="device 'cpu' rewrites head counts, which breaks the replication of KV heads",
        how="returns the config as it came",
        upstream=None,
        exit=_ASKS_THE_PLATFORM,
    ),
    Patch(
        target="sglang.srt.distributed.bootstrap:_bind_threads_if_cpu",
        replacement=f"{_MODULE}:share_cores",
        scope=Scope.CPU,
        why="refuses more ranks than NUMA nodes",
        how="gives each rank an equal share of the cores, without pinning",
        upstream=None,
        exit=_ASKS_THE_PLATFORM,
    ),
    Patch(
        target="sglang.srt.distributed.bootstrap:_init_cpu_threads_env",
        replacement=f"{_MODULE}:skip_thread_env",
        scope=Scope.CPU,
        why="calls sgl_kernel operators that only its CPU build has",
        how="does nothing; torch.set_num_threads was called before",
        upstream=None,
        exit=_ASKS_THE_PLATFORM,
    ),
    Patch(
        target="sglang.srt.entrypoints.engine:_set_envs_and_config",
        replacement="sglang_minimax.platforms.cpu.forking:fork_children",
        scope=Scope.CPU,
        why="`spawn` imports SGLang again in every rank, ten seconds of CPU each",
        how="forks the children, after importing what they need",
        upstream=None,
        exit="when SGLang lets a platform choose the start method",
    ),
    Patch(
        target="sglang.srt.distributed.bootstrap:_resolve_dist_init_method",
        replacement="sglang_minimax.platforms.cpu.loopback:meet_on_loopback",
        scope=Scope.CPU,
        why="the store of torch.distributed listens on every interface, without a password",
        how="on a single node, a rendezvous whose store and gloo listen on loopback only",
        upstream=None,
        exit="when SGLang or PyTorch binds the store to the address that it is given",
    ),
)
