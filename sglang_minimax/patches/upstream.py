"""The part of the upstream register that belongs to the model, whatever the platform."""

from __future__ import annotations

from sglang_minimax.upstream import Patch, Registration, Scope

MODEL_PATCHES: tuple[Patch, ...] = (
    Patch(
        target="sglang.srt.models.registry:_ModelRegistry.resolve_model_cls",
        replacement="sglang_minimax.patches.model_registry:resolve_ours_first",
        scope=Scope.MODEL,
        why="the registry holds the in-tree class, and plugin failures would leave it there",
        how="puts our class in when MiniMax-M2 is asked for, and stops the process if it cannot",
        upstream="sglang.srt.plugins logs and ignores exceptions of plugins",
        exit="when SGLang lets a plugin own an architecture lazily and fail loudly",
    ),
    Patch(
        target="sglang.srt.plugins:load_plugins_by_group",
        replacement="sglang_minimax.patches.plugin_loading:always_load_ours",
        scope=Scope.MODEL,
        why="SGLANG_PLUGINS and SGLANG_PLATFORM drop whole distributions, ours among them",
        how="exempts our own entry points from both filters; SGLANG_MINIMAX=0 is the off switch",
        upstream="sglang#38464 (processes that never load plugins)",
        exit="when the filters apply to the plugins they name only",
    ),
    Patch(
        target="sglang.srt.model_loader.loader:get_model_loader",
        replacement="sglang_minimax.patches.model_loader:read_what_is_owned",
        scope=Scope.MODEL,
        why="SGLang's default loader opens every tensor on every rank, and knows no padded share",
        how="returns our subclass of it for MiniMax-M2 in safetensors; other formats keep SGLang's",
        upstream="LoadFormat is a closed set, and a draft model inherits the target's",
        exit="when a plugin can register a load format that drafts do not inherit",
    ),
    Patch(
        target="sglang.srt.layers.moe.fused_moe_triton.layer:create_moe_dispatcher",
        replacement="sglang_minimax.patches.dispatch:ours_for_customized",
        scope=Scope.MODEL,
        why="SGLang has a backend `customized` for dispatchers of others, but no way to add one",
        how="makes our gather or all-to-all dispatcher for that backend; others keep SGLang's",
        upstream="srt/layers/moe/fused_moe_triton/layer.py:242 (NotImplementedError)",
        exit="when SGLang takes a dispatcher factory for its backend `customized`",
    ),
    Patch(
        target="sglang.srt.layers.moe.moe_runner.base:FusedOpPool.get_fused_func",
        replacement="sglang_minimax.patches.dispatch:runners_of_the_standard_one",
        scope=Scope.MODEL,
        why="fused runners are registered for SGLang's backends by name, `customized` has none",
        how="takes those of no backend: our dispatcher hands over what the standard one does",
        upstream="srt/layers/moe/moe_runner/base.py:196",
        exit="with the entry above",
    ),
    Patch(
        target="sglang.srt.managers.scheduler:Scheduler.__init__",
        replacement="sglang_minimax.patches.launch_errors:one_sentence",
        scope=Scope.MODEL,
        why="a user's mistake found while loading ends in a stack trace from every rank",
        how="logs the sentence of a MinimaxError and leaves with a status of its own",
        upstream=None,
        exit="when SGLang has an exception for launch errors without a stack trace",
    ),
    Patch(
        target=(
            "sglang.srt.managers.scheduler_components.metrics_reporter:"
            "SchedulerMetricsReporter.__post_init__"
        ),
        replacement="sglang_minimax.patches.drafts:watch_acceptance",
        scope=Scope.MODEL,
        why="a draft of another model is only slow, and nobody is told",
        how="listens to the totals of the log line, and warns once of a low accepted length",
        upstream=None,
        exit="when SGLang warns of it itself",
    ),
    Patch(
        target="sglang.srt.speculative.eagle_utils:eagle_sample",
        replacement="sglang_minimax.patches.joint_filters:join_for_ours",
        scope=Scope.MODEL,
        why="applies top-p to what top-k has left, where the sampler filters the whole",
        how="says to the two entries below that our model's drafts are verified",
        upstream="srt/speculative/eagle_utils.py:736; srt/layers/sampler.py:439 filters jointly",
        exit="when SGLang's verification filters as its sampler does",
    ),
    Patch(
        target="sglang.srt.speculative.eagle_utils:top_k_renorm_prob",
        replacement="sglang_minimax.patches.joint_filters:remember_the_whole",
        scope=Scope.MODEL,
        why="the entry above",
        how="keeps the distribution beside what top-k leaves of it",
        upstream=None,
        exit="with the entry above",
    ),
    Patch(
        target="sglang.srt.speculative.eagle_utils:top_p_renorm_prob",
        replacement="sglang_minimax.patches.joint_filters:filter_the_whole",
        scope=Scope.MODEL,
        why="the entry above",
        how="keeps of it what top-p keeps in the whole distribution",
        upstream=None,
        exit="with the entry above",
    ),
    Patch(
        target="sglang.srt.entrypoints.engine:_scheduler_died_error",
        replacement="sglang_minimax.patches.launch_errors:stop_quietly",
        scope=Scope.MODEL,
        why="the parent adds a second stack trace and a guess about the OOM killer",
        how="exits 1 without a trace when the child left with our status",
        upstream=None,
        exit="with the entry above",
    ),
    Patch(
        target=(
            "sglang.srt.managers.scheduler_components.weight_updater:"
            "SchedulerWeightUpdaterManager._select_runners"
        ),
        replacement="sglang_minimax.patches.weight_updates:leave_drafts_alone",
        scope=Scope.MODEL,
        why="an update without a selector loads the target's weights into its Eagle3 draft",
        how="the draft only where a call names it",
        upstream=None,
        exit="when SGLang knows drafts with a checkpoint of their own",
    ),
    Patch(
        target=(
            "sglang.srt.managers.scheduler_components.weight_updater:"
            "SchedulerWeightUpdaterManager.update_weights_from_tensor"
        ),
        replacement="sglang_minimax.patches.weight_updates:judge_tensors_first",
        scope=Scope.MODEL,
        why="each rank writes before others have looked; a refusal ends the scheduler",
        how="all ranks judge names, shapes and types, agree, and only then write",
        upstream=None,
        exit="when SGLang lets a model judge an update and asks all ranks before it writes",
    ),
    Patch(
        target=(
            "sglang.srt.managers.scheduler_components.weight_updater:"
            "SchedulerWeightUpdaterManager.update_weights_from_distributed"
        ),
        replacement="sglang_minimax.patches.weight_updates:judge_announcement_first",
        scope=Scope.MODEL,
        why="what is announced is received and written before anybody has looked",
        how="judges the announcement, receives, agrees with the other ranks, and only then writes",
        upstream=None,
        exit="with the entry above",
    ),
    Patch(
        target=(
            "sglang.srt.managers.scheduler_components.weight_updater:"
            "SchedulerWeightUpdaterManager.update_weights_from_disk"
        ),
        replacement="sglang_minimax.patches.weight_updates:judge_checkpoint_first",
        scope=Scope.MODEL,
        why="a checkpoint is written as it is read, and each rank goes back alone",
        how="judges the headers on all ranks; where reading fails, all ranks go back",
        upstream=None,
        exit="with the entry above",
    ),
    Patch(
        target=(
            "sglang.srt.managers.scheduler_components.weight_updater:"
            "SchedulerWeightUpdaterManager.init_weights_update_group"
        ),
        replacement="sglang_minimax.patches.weight_updates:refuse_a_group_of_stages",
        scope=Scope.MODEL,
        why="with pipeline stages ranks get the same number twice, and a stage waits for ever",
        how="answers (False, reason) there, and for an exception",
        upstream=None,
        exit="when the rank in the group counts the stage",
    ),
    Patch(
        target=(
            "sglang.srt.model_executor.model_runner_components.weight_updater:"
            "WeightUpdater.update_weights_from_disk"
        ),
        replacement="sglang_minimax.patches.disk_updates:go_back_to_the_old_weights",
        scope=Scope.MODEL,
        why="its rollback reads the new path again, outside of a try, and ends the scheduler",
        how="reads the old path again and answers (False, reason)",
        upstream=None,
        exit="when SGLang rolls back to the path it came from",
    ),
    Patch(
        target="sglang.srt.managers.scheduler:Scheduler.process_input_requests",
        replacement="sglang_minimax.patches.pipeline:hand_updates_on_first",
        scope=Scope.MODEL,
        why="a pipeline stage answers a weight update before the next one has heard of it",
        how="holds an update back until the stages are dry, then hands it on before processing it",
        upstream=None,
        exit="when stages hand requests on first",
    ),
    Patch(
        target="sglang.srt.managers.scheduler_pp_mixin:SchedulerPPMixin._pp_send_pyobj_to_next_stage",
        replacement="sglang_minimax.patches.pipeline:send_once",
        scope=Scope.MODEL,
        why="the loop sends the same requests once more",
        how="leaves out what the entry above has sent",
        upstream=None,
        exit="with the entry above",
    ),
    Patch(
        target="sglang.srt.managers.tokenizer_manager:TokenizerManager._validate_one_request",
        replacement="sglang_minimax.patches.requests:refuse_impossible_numbers",
        scope=Scope.MODEL,
        why="one request with a number outside the vocabulary ends the scheduler",
        how="raises a ValueError for it, which SGLang answers with status 400",
        upstream=None,
        exit="when SGLang checks token ids and the number of top logprobs itself",
    ),
    Patch(
        target="sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat._process_tool_calls",
        replacement="sglang_minimax.patches.chat:keep_the_reason_of_a_cut",
        scope=Scope.MODEL,
        why="a call that the end of the reply cut off is said to be finished, without streaming",
        how="puts the finish reason back where the last call is not closed, for minimax-m2",
        upstream="srt/entrypoints/openai/serving_chat.py:3211",
        exit="SGLang looks at incomplete_tool_call_indices there, as it does with streaming",
    ),
    Patch(
        target="sglang.srt.entrypoints.anthropic.serving:AnthropicServing._convert_response",
        replacement="sglang_minimax.patches.chat:leave_cut_calls_out",
        scope=Scope.MODEL,
        why="a call that was cut off becomes a tool_use block with the input {}",
        how="leaves it out and says which stop string cut it, for minimax-m2",
        upstream="srt/entrypoints/anthropic/serving.py:1313",
        exit="SGLang leaves such calls out itself",
    ),
    Patch(
        target=(
            "sglang.srt.entrypoints.openai.serving_chat:"
            "OpenAIServingChat._patch_reasoning_skip_special_tokens"
        ),
        replacement="sglang_minimax.patches.chat:keep_tags_in_the_text",
        scope=Scope.MODEL,
        why="</think> is lost where a tokenizer counts it as special, and with it the content",
        how="keeps special tokens in the text of minimax replies then",
        upstream="srt/entrypoints/openai/serving_chat.py:3355",
        exit="SGLang keeps the tags of every reasoning parser in the text",
    ),
    Patch(
        target="sglang.srt.constrained.reasoner_grammar_backend:ReasonerGrammarBackend.__init__",
        replacement="sglang_minimax.patches.thinking_grammar:know_what_ends_a_reply",
        scope=Scope.MODEL,
        why="a thought that opens a tool call, or ends the turn, never comes to its grammar",
        how="notes those tokens where the reasoning parser is ours; for the entry below",
        upstream="srt/constrained/reasoner_grammar_backend.py:273 (only with strict thinking)",
        exit="when a request with a grammar always keeps its thought from going around it",
    ),
    Patch(
        target=(
            "sglang.srt.constrained.reasoner_grammar_backend:"
            "ReasonerGrammarBackend._make_grammar_object"
        ),
        replacement="sglang_minimax.patches.thinking_grammar:keep_them_from_thoughts",
        scope=Scope.MODEL,
        why="the entry above",
        how="switches strict thinking on for the objects of grammars, not for other requests",
        upstream="srt/constrained/reasoner_grammar_backend.py:442",
        exit="with the entry above",
    ),
    Patch(
        target="sglang.srt.entrypoints.openai.serving_chat:OpenAIServingChat._process_messages",
        replacement="sglang_minimax.patches.thinking_grammar:begin_behind_a_finished_thought",
        scope=Scope.MODEL,
        why="a grammar waits for the end of a thought that the message to be continued has ended",
        how="has it begin at once then, for minimax replies",
        upstream="srt/entrypoints/openai/serving_chat.py:1978",
        exit="SGLang looks at a continued message before it says that the reply thinks first",
    ),
)

MODEL_REGISTRATIONS: tuple[Registration, ...] = (
    Registration(
        module="sglang.srt.arg_groups.overrides",
        run="sglang_minimax.patches.arguments:register_overrides",
        registry="sglang.srt.arg_groups.model_override_base:register_model_override",
        scope=Scope.MODEL,
        why="in-tree switches TF32 on for the whole process, whatever the user said",
    ),
    Registration(
        module="sglang.srt.arg_groups.overrides",
        run="sglang_minimax.patches.communication:register_fusion",
        registry="sglang.srt.arg_groups.overrides:register_model_override",
        scope=Scope.MODEL,
        why="the fused all-reduce is on by default for a closed set of architectures only",
    ),
    Registration(
        module="sglang.srt.configs.moe_model_registry",
        run="sglang_minimax.patches.communication:register_deepep_v2",
        registry="sglang.srt.configs.moe_model_registry:register_deepep_v2_model",
        scope=Scope.MODEL,
        why="DeepEP v2 is refused for models that nobody has registered",
    ),
    Registration(
        module="sglang.srt.arg_groups.resolution_hooks",
        run="sglang_minimax.patches.arguments:register_launch_checks",
        registry="sglang.srt.arg_groups.resolution_hooks:register_resolution_hook",
        scope=Scope.MODEL,
        why="what a topology or format cannot do is refused while arguments are checked",
    ),
    Registration(
        module="sglang.srt.function_call.function_call_parser",
        run="sglang_minimax.patches.parsers:register_tool_calls",
        registry="sglang.srt.function_call.function_call_parser:FunctionCallParser",
        scope=Scope.MODEL,
        why="in-tree loses and corrupts calls of minimax-m2, in quadratic time",
    ),
    Registration(
        module="sglang.srt.parser.reasoning_parser",
        run="sglang_minimax.patches.parsers:register_reasoning",
        registry="sglang.srt.parser.reasoning_parser:ReasoningParser",
        scope=Scope.MODEL,
        why="in-tree parses minimax with the tool tag of another model",
    ),
)
