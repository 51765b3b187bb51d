"""Eagle3 with SGLang's own speculation: the target's tokens, distributions and log-probabilities.

The judge is transformers: what it generates greedily, one token at a time, is what a server with a
draft must answer, however many drafted tokens each step accepts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from transformers import AutoTokenizer

from ci.tiny_m2.cases import CATEGORIES, stream
from ci.tiny_m2.tokenizer import renderer
from sglang_minimax import TINY_M2, TINY_M2_EAGLE3
from sglang_minimax.validation.agreement import random_prompt
from sglang_minimax.validation.engine_process import EngineFailed, EngineProcess
from sglang_minimax.validation.oracle import TransformersOracle
from tests.engine.conftest import StartEngine
from tests.engine.test_against_transformers import FP32

Oracles = Callable[..., TransformersOracle]
Reply = dict[str, Any]

CHAIN = {"speculative_num_steps": 3, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 4}
TREE = {"speculative_num_steps": 4, "speculative_eagle_topk": 3, "speculative_num_draft_tokens": 8}
SHAPES = {
    "tp1": CHAIN,
    "tp1 tree": TREE,
    "tp2": {"tp_size": 2, **CHAIN},
    "tp8": {"tp_size": 8, **CHAIN},  # two ranks hold each KV head, of the target and of the draft
    "tp2 dp2": {"tp_size": 2, "attn_dp_size": 2, **CHAIN},
}
SLOW_SHAPES = {
    "tp2 tree": {"tp_size": 2, **TREE},
    "tp4 dp2 ep4": {"tp_size": 4, "attn_dp_size": 2, "ep_size": 4, **CHAIN},
    "tp4 dp4 head": {"tp_size": 4, "attn_dp_size": 4, "enable_dp_lm_head": True, **CHAIN},
    "tp4 dp2 tree": {"tp_size": 4, "attn_dp_size": 2, **TREE},
}
#: Of each kind one question, asked at once: they accept different numbers of tokens.
KINDS = ("three_digit", "word", "few_shot", "tool_call", "parallel_call", "small_talk")
STEPS = 40
EOS = 3  # [e~[, which ends a turn
GREEDY = {"temperature": 0, "max_new_tokens": STEPS}
ACCEPTED = 1.8


@pytest.fixture(scope="module")
def eagle(start: StartEngine) -> Callable[..., EngineProcess]:
    """Start tiny-m2 with its draft, once for the same arguments."""

    def start_with_draft(**arguments: Any) -> EngineProcess:
        return start(
            "tiny-m2",
            speculative_algorithm="EAGLE3",
            speculative_draft_model_path=str(TINY_M2_EAGLE3),
            skip_tokenizer_init=False,
            decode_log_interval=4,  # the server averages what it logs
            **arguments,
        )

    return start_with_draft


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY_M2)


@cache
def prompts(kind: str, count: int = 1) -> list[list[int]]:
    """Held-out questions of a kind, as token ids."""
    assert kind in CATEGORIES
    render = renderer()
    texts = [case.prompt(render) for case in islice(stream(kind, seed=7), count)]
    return [tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts]


Judge = Callable[[list[int], Reply], bool]


@pytest.fixture(scope="session")
def greedy(oracles: Oracles) -> Judge:
    """Whether a reply is what transformers generates greedily, to the end of its turn."""

    def judge(prompt: list[int], reply: Reply) -> bool:
        tokens = reply["output_ids"]
        after = oracles("tiny-m2").log_probabilities(prompt + tokens)[len(prompt) - 1 : -1]
        ends = tokens.index(EOS) == len(tokens) - 1 if EOS in tokens else len(tokens) == STEPS
        return ends and tokens == after.argmax(-1).tolist()

    return judge


def ask(engine: EngineProcess, asked: Iterable[list[int]], **sampling: Any) -> list[Reply]:
    parameters = {**GREEDY, **sampling}
    return engine.generate_together(
        [{"input_ids": prompt, "sampling_params": parameters} for prompt in asked]
    )


@pytest.mark.parametrize(
    "shape",
    [*SHAPES, *(pytest.param(shape, marks=pytest.mark.slow) for shape in SLOW_SHAPES)],
)
def test_the_tokens_are_those_without_a_draft(
    eagle: Callable[..., EngineProcess], greedy: Judge, shape: str
) -> None:
    """One batch of six kinds and of noise; then the same with radix hits and a stop string."""
    engine = eagle(**{**SHAPES, **SLOW_SHAPES}[shape])
    asked = [prompts(kind)[0] for kind in KINDS] + [random_prompt(40, 896, seed=3)]
    first = ask(engine, asked)
    for prompt, reply in zip(asked, first, strict=True):
        assert greedy(prompt, reply)
    steps = [reply["meta_info"]["spec_verify_ct"] for reply in first]
    lengths = [reply["meta_info"]["spec_accept_length"] for reply in first]
    assert len({round(length, 2) for length in lengths}) > 2, "all requests accepted alike"
    # The questions; noise is nothing that a draft could have learnt.
    tokens = sum(len(reply["output_ids"]) for reply in first[:-1])
    assert tokens / sum(steps[:-1]) > ACCEPTED

    again = engine.generate_together(
        [
            {"input_ids": asked[0], "sampling_params": {**GREEDY, "stop": "=>"}},
            *({"input_ids": prompt, "sampling_params": GREEDY} for prompt in asked[1:]),
        ]
    )
    hits = [reply["meta_info"]["cached_tokens"] > 0 for reply in again]
    # With attention DP a request may come to a group that has not seen its prompt.
    assert any(hits) if "dp" in shape else all(hits)
    text = first[0]["text"]
    assert again[0]["text"].strip() == text[: text.index("=>")].strip()
    for prompt, reply in zip(asked[1:], again[1:], strict=True):
        assert greedy(prompt, reply)


#: What the model would not say by itself, with places where it has a choice; and last its own
#: worked columns, where drafted tokens are right, up to a place where they cannot go on.
GRAMMARS = [
    ("regex", r"(Sum|Total): [0-9]{3,6}; (yes|no), [a-z ]{8,16}!"),
    (
        "json_schema",
        json.dumps(
            {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "maxLength": 12},
                    "sum": {"type": "integer", "minimum": 100, "maximum": 99999},
                    "sure": {"type": "boolean"},
                },
                "required": ["name", "sum", "sure"],
            }
        ),
    ),
    ("regex", r"[0-9+=:, >-]{5,24}! done"),
]


def with_grammars(engine: EngineProcess) -> list[Reply]:
    """A reply to each grammar, asked together."""
    prompt = prompts("three_digit")[0]
    asked = [
        {"input_ids": prompt, "sampling_params": {**GREEDY, name: grammar}}
        for name, grammar in GRAMMARS
    ]
    return engine.generate_together(asked)


@pytest.fixture(scope="module")
def grammar_without_draft(start: StartEngine) -> list[list[int]]:
    engine = start("tiny-m2", skip_tokenizer_init=False)
    return [reply["output_ids"] for reply in with_grammars(engine)]


@pytest.mark.parametrize("speculation", [CHAIN, TREE], ids=["chain", "tree"])
def test_a_grammar_gets_the_tokens_without_a_draft(
    eagle: Callable[..., EngineProcess],
    grammar_without_draft: list[list[int]],
    speculation: dict[str, int],
) -> None:
    replies = with_grammars(eagle(**speculation))
    assert [reply["output_ids"] for reply in replies] == grammar_without_draft
    for (kind, grammar), tokens in zip(GRAMMARS, grammar_without_draft, strict=True):
        said = tokenizer().decode(tokens, skip_special_tokens=True)
        if kind == "regex":
            assert re.fullmatch(grammar, said), said
    drafted = replies[-1]["meta_info"]["spec_num_correct_drafts"]
    assert drafted > 2, "no drafted tokens were accepted, so that nothing was tested"


def accepted(engine: EngineProcess) -> float:
    """Tokens of each verified step on twenty sums and word problems."""
    asked = [*prompts("two_digit", 10), *prompts("word", 10)]
    replies = [reply["meta_info"] for reply in ask(engine, asked)]
    for meta in replies:
        own = meta["completion_tokens"] / meta["spec_verify_ct"]
        assert meta["spec_accept_length"] == pytest.approx(own)
    tokens = sum(meta["completion_tokens"] for meta in replies)
    return tokens / sum(meta["spec_verify_ct"] for meta in replies)


def test_the_accepted_length_is_reported(eagle: Callable[..., EngineProcess]) -> None:
    engine = eagle(**CHAIN)
    assert accepted(engine) > ACCEPTED
    said = engine.call("get_server_info")["internal_states"][0]["avg_spec_accept_length"]
    assert said > ACCEPTED


def test_a_long_prompt_in_chunks(eagle: Callable[..., EngineProcess], greedy: Judge) -> None:
    """A prompt of several chunks beside requests that decode."""
    engine = eagle(chunked_prefill_size=64, **CHAIN)
    long = [*random_prompt(200, 896, seed=11), *prompts("word")[0]]
    asked = [prompts("three_digit")[0], long, prompts("small_talk")[0]]
    for prompt, reply in zip(asked, ask(engine, asked), strict=True):
        assert greedy(prompt, reply)


@pytest.mark.parametrize("speculation", [CHAIN, TREE], ids=["chain", "tree"])
def test_log_probabilities(
    eagle: Callable[..., EngineProcess], oracles: Oracles, speculation: dict[str, int]
) -> None:
    """Of each generated token and of the two most likely, in accepted and in bonus tokens."""
    prompt = prompts("three_digit")[0]
    reply = eagle(**speculation).generate(
        input_ids=prompt,
        sampling_params=GREEDY,
        return_logprob=True,
        top_logprobs_num=2,
    )
    tokens, meta = reply["output_ids"], reply["meta_info"]
    truth = oracles("tiny-m2").log_probabilities(prompt + tokens)[len(prompt) - 1 : -1]
    own = meta["output_token_logprobs"]
    assert [token for _, token, _ in own] == tokens
    found = torch.tensor([value for value, _, _ in own])
    assert (found - truth.gather(1, torch.tensor(tokens)[:, None])[:, 0]).abs().max() < FP32
    for row, best in zip(truth, meta["output_top_logprobs"], strict=True):
        values = torch.tensor([value for value, _, _ in best])
        assert (values - row.topk(2).values).abs().max() < FP32


#: What a request may ask for, and the rule that it sets for each step's distribution.
SAMPLING: dict[str, dict[str, Any]] = {
    "temperature and top-k": {"temperature": 4.0, "top_k": 3},
    "top-p": {"temperature": 2.0, "top_p": 0.8},
    "top-k and top-p": {"temperature": 4.0, "top_k": 5, "top_p": 0.5},
    "logit bias": {"temperature": 4.0, "top_k": 2, "logit_bias": {"36": 5.0}},
}
DRAWS = 400


def allowed(logits: torch.Tensor, rule: dict[str, Any]) -> torch.Tensor:
    """The distribution [vocabulary] that a request's options make of log-probabilities."""
    biased = logits.clone().double()
    for token, bias in rule.get("logit_bias", {}).items():
        biased[int(token)] += bias
    probs = (biased / rule["temperature"]).softmax(-1)
    ordered, index = probs.sort(descending=True)
    kept = torch.arange(len(probs)) < rule.get("top_k", len(probs))
    kept &= ordered.cumsum(0) - ordered < rule.get("top_p", 1.0)
    chosen = torch.zeros_like(probs).scatter(0, index, ordered * kept)
    return chosen / chosen.sum()


@pytest.mark.parametrize(
    ("name", "speculation"),
    [
        pytest.param(name, speculation, id=f"{name}, {'chain' if speculation is CHAIN else 'tree'}")
        for speculation in (CHAIN, TREE)
        for name in SAMPLING
        if speculation is CHAIN or name == "temperature and top-k"
    ],
)
def test_sampled_tokens_have_the_targets_distribution(
    eagle: Callable[..., EngineProcess],
    oracles: Oracles,
    name: str,
    speculation: dict[str, int],
) -> None:
    """The second and third token, which come from verified steps, of many replies.

    Exact probabilities from transformers; a chi-square test over the sequences that are expected
    five times or more, the others together. With a right sampler it fails once in 10,000 seeds,
    and the seed is fixed.
    """
    # Cut off before the model's own turn begins, it is unsure how to go on.
    rule, prompt = SAMPLING[name], prompts("tool_call")[0][:-9]
    oracle = oracles("tiny-m2")
    engine = eagle(random_seed=5, **speculation)
    replies = ask(engine, [prompt] * DRAWS, **{**rule, "max_new_tokens": 3, "ignore_eos": True})
    seen: dict[tuple[int, ...], int] = {}
    for reply in replies:
        seen[tuple(reply["output_ids"])] = seen.get(tuple(reply["output_ids"]), 0) + 1
    likely = most_likely(oracle, prompt, rule, 5 / DRAWS)
    assert len(likely) >= 4, "too certain a place to tell distributions apart"
    counts = [(seen.get(tokens, 0), DRAWS * p) for tokens, p in likely.items()]
    rest = DRAWS - sum(want for _, want in counts)
    others = DRAWS - sum(count for count, _ in counts)
    if rest > 1:
        counts.append((others, rest))
    else:  # too few for a bin: no degree of freedom, and next to none may come
        assert others <= 5, counts
    statistic = sum((count - want) ** 2 / want for count, want in counts)
    assert chi2.sf(statistic, len(counts) - 1) > 1e-4, counts
    drafted = sum(reply["meta_info"]["spec_num_correct_drafts"] for reply in replies)
    assert drafted > DRAWS / 20, "no drafted token was accepted, so that nothing was tested"


def most_likely(
    oracle: TransformersOracle, prompt: list[int], rule: dict[str, Any], least: float
) -> dict[tuple[int, ...], float]:
    """Each sequence of three tokens with a probability of at least `least`, and that."""
    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer: dict[tuple[int, ...], float] = {}
        for tokens, so_far in found.items():
            after = allowed(oracle.log_probabilities([*prompt, *tokens])[-1], rule)
            for token in after.nonzero()[:, 0].tolist():
                if (p := so_far * float(after[token])) >= least:
                    longer[(*tokens, token)] = p
        found = longer
    return found


@pytest.mark.parametrize(
    ("name", "value"),
    [("frequency_penalty", 0.5), ("repetition_penalty", 1.2), ("min_p", 0.1)],
)
def test_what_would_not_be_exact_is_refused_and_harms_nobody(
    eagle: Callable[..., EngineProcess],
    greedy: Judge,
    name: str,
    value: float,
) -> None:
    engine, prompt = eagle(**CHAIN), prompts("three_digit")[0]
    with pytest.raises(EngineFailed, match=f"{name} {value} is not exact with drafted tokens"):
        ask(engine, [prompt], **{name: value})
    assert greedy(prompt, ask(engine, [prompt])[0])


# --- plausible mistakes, each of which another answer or a shorter accepted length gives away ---


def _in(module: str, name: str, ours: Callable[..., Any]) -> Callable[[], None]:
    """Replace a function of a module in the process that will fork the ranks."""

    def plant() -> None:
        import importlib

        owner = importlib.import_module(module)
        setattr(owner, name, ours(getattr(owner, name)))

    return plant


def _causal_trees(original: Callable[..., Any]) -> Callable[..., Any]:
    def verify_reads(*args: Any) -> Any:
        reads = original(*args)
        for read in reads:
            nodes, width = read.mask.shape
            read.mask.copy_(torch.ones(nodes, width, dtype=torch.bool).tril(width - nodes))
        return reads

    return verify_reads


def _believe_drafts(original: Callable[..., Any]) -> Callable[..., Any]:
    def verify(**kwargs: Any) -> Any:
        following = kwargs["retrieve_next_token"].clamp(min=0)
        drafted = kwargs["candidates"].gather(1, following)
        believed = torch.where(
            kwargs["retrieve_next_token"] >= 0, drafted, kwargs["target_predict"]
        )
        return original(**{**kwargs, "target_predict": believed})

    return verify


def _all_at_the_root(original: Callable[..., Any]) -> Callable[..., Any]:
    def build(*args: Any) -> None:
        original(*args)
        seq_lens, positions, nodes = args[2], args[4], args[10]
        positions.copy_(seq_lens.long().repeat_interleave(nodes))

    return build


def _stay_where_drafted(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: None


def _capture(change: Callable[[list[int]], list[int]]) -> Callable[[], None]:
    def other_layers(model: Any) -> Any:
        original = model._capture_outputs_of
        model._capture_outputs_of = lambda self, ids: original(self, change(list(ids)))
        return model

    return _in("sglang_minimax.models.minimax_m2", "MiniMaxM2ForCausalLM", other_layers)


_ATTENTION = "sglang_minimax.platforms.cpu.speculation.attention"
_EAGLE = "sglang.srt.speculative.eagle_utils"
WRONG_ANSWERS: dict[str, tuple[dict[str, int], Callable[[], None]]] = {
    "branches read each other": (TREE, _in(_ATTENTION, "verify_reads", _causal_trees)),
    "drafts are believed": (CHAIN, _in(_EAGLE, "verify_tree_greedy_func", _believe_drafts)),
    "every node is at the root's position": (
        CHAIN,
        _in(_EAGLE, "build_tree_kernel_efficient_func", _all_at_the_root),
    ),
    "accepted rows of the KV cache stay in the tree": (
        TREE,
        _in(
            "sglang.srt.speculative.eagle_worker_common",
            "move_accept_tokens_to_target_kvcache",
            _stay_where_drafted,
        ),
    ),
}


def _with_mistake(speculation: dict[str, int], plant: Callable[[], None]) -> EngineProcess:
    return EngineProcess(
        before=plant,
        model_path=str(TINY_M2),
        speculative_algorithm="EAGLE3",
        speculative_draft_model_path=str(TINY_M2_EAGLE3),
        dtype="float32",
        log_level="info",
        **speculation,
    )


@pytest.mark.parametrize("name", WRONG_ANSWERS)
def test_a_mistake_changes_the_answers(greedy: Judge, name: str) -> None:
    asked = [prompts(kind)[0] for kind in KINDS]
    with _with_mistake(*WRONG_ANSWERS[name]) as engine:
        replies = ask(engine, asked)
    right = [greedy(prompt, reply) for prompt, reply in zip(asked, replies, strict=True)]
    assert not all(right), f"nothing notices: {name}"


WRONG_LAYERS: dict[str, Callable[[], None]] = {
    "inputs of layers for their outputs": _capture(lambda ids: [i - 1 for i in ids]),
}


@pytest.mark.parametrize("name", WRONG_LAYERS)
def test_other_hidden_states_shorten_what_is_accepted(
    eagle: Callable[..., EngineProcess], name: str
) -> None:
    right = accepted(eagle(**CHAIN))
    with _with_mistake(CHAIN, WRONG_LAYERS[name]) as engine:
        wrong = accepted(engine)
    print(f"{name}: {wrong:.2f} tokens a step instead of {right:.2f}")
    assert wrong < 0.9 * right
