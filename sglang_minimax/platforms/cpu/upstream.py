"""The part of the upstream register that belongs to the CPU platform."""

from __future__ import annotations

from sglang_minimax.upstream import Patch, Registration, Scope

_MODULE = "sglang_minimax.platforms.cpu.patches"
_COLLECTIVES = "sglang_minimax.platforms.cpu.collectives"
_DEVICES = "sglang_minimax.platforms.cpu.devices"
_EXPERTS = "sglang_minimax.platforms.cpu.experts"
_QUANTISED = "sglang_minimax.platforms.cpu.quantised.walls"
_WAITING = "sglang_minimax.platforms.cpu.waiting"
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
    Patch(
        target="sglang.srt.distributed.parallel_state:GroupCoordinator.reduce_scatterv",
        replacement=f"{_COLLECTIVES}:scatter_uneven_sums",
        scope=Scope.CPU,
        why="demands PyNccl and has no platform seam",
        how="all-reduce over gloo, of which each rank keeps its rows",
        upstream=None,
        exit="when SGLang falls back to torch.distributed here, as reduce_scatter_tensor does",
    ),
    Patch(
        target="sglang.srt.distributed.parallel_state:GroupCoordinator.all_gatherv",
        replacement=f"{_COLLECTIVES}:gather_uneven_rows",
        scope=Scope.CPU,
        why="demands PyNccl and has no platform seam",
        how="all-gather over gloo of rows padded to the longest rank's",
        upstream=None,
        exit="when SGLang falls back to torch.distributed here, as all_gather_into_tensor does",
    ),
    Patch(
        target="sglang.srt.distributed.parallel_state:GroupCoordinator._all_gather_into_tensor",
        replacement=f"{_COLLECTIVES}:gather_rows",
        scope=Scope.CPU,
        why="the output of a DP LM head has a dimension of ranks, which gloo refuses",
        how="views it as the ranks' rows one after the other",
        upstream=None,
        exit="when SGLang gathers the logits of a DP LM head into two dimensions",
    ),
    Patch(
        target="sglang.srt.managers.data_parallel_controller:DataParallelController.event_loop",
        replacement=f"{_WAITING}:sleep_until_asked",
        scope=Scope.CPU,
        why="asks its socket without a pause, and takes a core from the ranks",
        how="the same loop, asleep until there is a request",
        upstream=None,
        exit="when the controller polls with a timeout",
    ),
    Patch(
        target="sglang.srt.managers.scheduler_components.idle_sleeper:IdleSleeper.maybe_sleep",
        replacement=f"{_WAITING}:glance_at_other_groups",
        scope=Scope.CPU,
        why="an idle attention-DP group sleeps up to a second, and the busy ones wait for it",
        how="looks up every 100 ms under attention DP",
        upstream=None,
        exit="when SGLang wakes the groups that have no requests",
    ),
    Patch(
        target="sglang.srt.distributed.parallel_state:_is_cpu",
        replacement=f"{_DEVICES}:on_the_cpu",
        scope=Scope.CPU,
        why="all-gather and reduce-scatter go to operators that are registered for devices only",
        how="takes SGLang's own branch for CPU tensors",
        upstream=None,
        exit=_ASKS_THE_PLATFORM,
    ),
    Patch(
        target="sglang.srt.model_executor.forward_batch_info:_is_cpu",
        replacement=f"{_DEVICES}:on_the_cpu",
        scope=Scope.CPU,
        why="DP attention asks for pinned memory, which needs a GPU",
        how="takes SGLang's own branch for CPU tensors",
        upstream=None,
        exit=_ASKS_THE_PLATFORM,
    ),
    Patch(
        target="sglang.srt.layers.dp_attention:memcpy_func",
        replacement=f"{_DEVICES}:copy_rows",
        scope=Scope.CPU,
        why="a Triton kernel copies the rows of a DP rank",
        how="SGLang's own function for CPU tensors",
        upstream=None,
        exit=_ASKS_THE_PLATFORM,
    ),
    Patch(
        target="sglang.srt.layers.dp_attention:mask_dp_pad_moe_topk_ids",
        replacement=f"{_EXPERTS}:mask_padding",
        scope=Scope.CPU,
        why="a Triton kernel marks the rows that are padding",
        how="the same in PyTorch",
        upstream=None,
        exit=_ASKS_THE_PLATFORM,
    ),
    Patch(
        target="sglang.srt.layers.moe.fused_moe_native:moe_forward_native",
        replacement=f"{_EXPERTS}:skip_experts_elsewhere",
        scope=Scope.CPU,
        why="fails on expert id -1, which expert parallelism writes for an expert of another rank",
        how="plain SwiGLU experts in a loop over the local ids",
        upstream=None,
        exit="when SGLang's native experts accept id -1",
    ),
    Patch(
        target="sglang.srt.eplb.expert_distribution:_StatAccumulator._get_global_average_utilization_rate",
        replacement=f"{_DEVICES}:share_utilisation",
        scope=Scope.CPU,
        why="makes a tensor on device 'cuda'",
        how="broadcasts it from the CPU",
        upstream=None,
        exit="when SGLang uses the configured device here",
    ),
    Patch(
        target="sglang.srt.layers.quantization.marlin_utils:_check_marlin_supported",
        replacement=f"{_QUANTISED}:marlin_is_there",
        scope=Scope.CPU,
        why="without a GPU, GPTQ is an unknown format, and AWQ one without experts",
        how="checks types and group sizes as on SM80",
        upstream=None,
        exit=_ASKS_THE_PLATFORM,
    ),
    Patch(
        target="sglang.srt.layers.quantization.moe_wna16:MoeWNA16Config.__init__",
        replacement=f"{_QUANTISED}:awq_is_there",
        scope=Scope.CPU,
        why="computes with the capability, which is None, for AWQ experts that Marlin cannot cut",
        how="does not ask for it",
        upstream=None,
        exit=_ASKS_THE_PLATFORM,
    ),
    Patch(
        target="sglang.srt.layers.quantization.modelopt_quant:ModelOptNvFp4FusedMoEMethod.__init__",
        replacement=f"{_QUANTISED}:any_device",
        scope=Scope.CPU,
        why="refuses a device without a kernel for NVFP4",
        how="sets the attributes that create_weights reads",
        upstream=None,
        exit=_ASKS_THE_PLATFORM,
    ),
    Patch(
        target=(
            "sglang.srt.layers.quantization.modelslim.schemes.modelslim_w8a8_int8_moe:"
            "NPUW8A8Int8MoEMethod"
        ),
        replacement=f"{_QUANTISED}:no_kernel",
        scope=Scope.CPU,
        why="looks up operators of torch_npu when the layer is built",
        how="a class that does nothing; our method never calls it",
        upstream=None,
        exit="when SGLang looks them up when they are called",
    ),
)

CPU_REGISTRATIONS: tuple[Registration, ...] = (
    Registration(
        module="sglang.srt.model_executor.model_runner",
        run=f"{_DEVICES}:answer_for_the_cpu",
        registry="torch:get_device_module",
        scope=Scope.CPU,
        why="EPLB and weight updates ask PyTorch for the device, which answers CUDA with no GPU",
    ),
    Registration(
        module="sglang.srt.layers.attention.torch_native_backend",
        run=f"{_DEVICES}:teach_padding",
        registry="sglang.srt.layers.attention.torch_native_backend:TorchNativeAttnBackend",
        scope=Scope.CPU,
        why="DP attention pads decode batches, and this backend has no length for a padded request",
    ),
)
