"""Lane files: all of ours are sound, and each plausible mistake is one sentence with its line."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ci.lane import CONFIGS, LaneError, figures
from ci.lane.files import find, load, names
from ci.lane.launch import Node, arguments, arguments_to_check, config_folder, weights
from ci.lane.schema import Lane, settings_of
from sglang_minimax.accuracy import gsm8k, tools

PUBLISHED = json.loads((Path(__file__).parents[1] / "data/published_config.json").read_text())
EXAMPLE = """name: example
about: an example
hardware: {kind: cuda, device: H200, capability: 90, per_node: 8, memory_gb: 141}
model: {name: MiniMaxAI/MiniMax-M2.7, override: MINIMAX_M27_MODEL_PATH, config: MiniMax-M2.7}
options:
  mem-fraction-static: 0.85
start_minutes: 40
load: {requests: 8, context: 8192}
variants:
  tp8:
    about: eight ranks
    options: {tp-size: 8}
suites:
  gsm8k:
    limit_minutes: 90
    settings: {shots: 8}
    figures:
      flexible-extract:
        baseline: 0.9234
        threshold: 0.9084
        note: GSM8K
        source: https://example.org
"""


def write(folder: Path, text: str, name: str = "example") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(text)
    return path


# --- ours ---


@pytest.mark.parametrize("name", names())
def test_every_lane_is_sound(name: str) -> None:
    lane = find(name)
    assert (config_folder(lane.model) / "config.json").is_file()
    for suite in lane.suites.values():
        # The suite must have begun to be stopped by its own limit before by the runner's.
        seconds = suite.settings.get("limit_s", 0)
        assert seconds <= 60 * suite.limit_minutes


def test_the_lanes_that_were_asked_for_are_there() -> None:
    lanes = [find(name) for name in names()]
    found = {
        (lane.hardware.kind, lane.hardware.per_node * lane.hardware.nodes, lane.model.name, variant)
        for lane in lanes
        for variant in lane.variants
    }
    for model in ("MiniMaxAI/MiniMax-M2.5", "MiniMaxAI/MiniMax-M2.7"):
        assert ("cuda", 4, model, "tp4") in found
        for variant in ("tp8", "tp8-ep8", "dp8-ep8"):
            assert ("cuda", 8, model, variant) in found
        assert ("cuda", 16, model, "tp16") in found
    for model in ("nvidia/MiniMax-M2.5-NVFP4", "nvidia/MiniMax-M2.7-NVFP4"):
        assert ("cuda", 4, model, "tp4") in found
    for name in ("mi30x-8x-m27-fp8", "mi35x-8x-m27-fp8"):
        lane = find(name)
        assert lane.environment["SGLANG_USE_AITER"] == "1"
        words = " ".join(arguments(lane, "tp8-ep8"))
        for part in (
            *("--tp-size 8 --ep-size 8", "--attention-backend aiter", "--mem-fraction-static 0.85"),
            *('{"enable_multithread_load": true}', "--watchdog-timeout 1200"),
        ):
            assert part in words
    assert any(kind == "npu" for kind, *_ in found)
    assert ("cpu", 1, "tiny-m2", "tp2") in found


def test_every_lane_records_speed_and_tool_calls() -> None:
    """The bundled cases with an `answer` fit tiny-m2 alone; other models' calls need not match."""
    for lane in map(find, names()):
        assert "output_throughput" in lane.suites["serving"].figures
        tools = lane.suites["tools"]
        if lane.hardware.kind != "cpu":
            assert tools.settings["calls_only"] is True
            wanted = {"well-formed", "streamed-well-formed", "streamed-same"}
            assert set(tools.figures) == wanted


def test_the_names_of_figures_are_those_of_the_suites() -> None:
    """As the suites compute them, so that no name is refused that there is."""
    row = {"truncated": False, "prompt_tokens": 1, "completion_tokens": 1, "matches": {"x": True}}
    path = Path(importlib.util.find_spec("lm_eval").origin or "").parent  # type: ignore[union-attr]
    task = yaml.safe_load((path / "tasks/gsm8k/gsm8k.yaml").read_text())
    filters = {each["name"] for each in task["filter_list"]}
    beside = {"answered_before", "seconds"}
    assert {*gsm8k.summed([row]), *filters, *beside} == figures.GSM8K
    side = {**row, "well_formed": True, "correct": True}
    both = [{"whole": side, "streamed": side, "same": True}]
    assert {*tools.summed(both), *tools.counted(both), *beside} == figures.TOOLS


def test_every_number_has_a_public_source() -> None:
    """Ours are measured by a committed script, the others named by project and file or thread."""
    for name in names():
        for suite in find(name).suites.values():
            for figure in suite.figures.values():
                if figure.threshold is not None or figure.baseline is not None:
                    assert figure.source is not None
                    ours = figure.source.startswith(("benchmarks/results/", "tests/"))
                    assert ours == (find(name).hardware.kind == "cpu")


@pytest.mark.parametrize("folder", sorted(CONFIGS.iterdir()), ids=lambda path: path.name)
def test_the_configs_are_the_published_shape(folder: Path) -> None:
    """M2.7 has more context (amd/MiniMax-M2.7-BF16's config.json), other formats another recipe."""
    config = json.loads((folder / "config.json").read_text())
    context = 204800 if "M2.7" in folder.name else 196608
    expected = {**PUBLISHED, "max_position_embeddings": context, "torch_dtype": "bfloat16"}
    if folder.name.endswith(("NVFP4", "BF16")):
        recipe = config.pop("quantization_config", {})
        expected.pop("quantization_config")
        assert recipe.get("quant_algo") == ("NVFP4" if "NVFP4" in folder.name else None)
    assert config == expected


# --- from a lane to a command line ---


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lane = load(write(tmp_path, EXAMPLE))
    assert arguments(lane, "tp8") == ["--mem-fraction-static", "0.85", "--tp-size", "8"]
    checked = arguments_to_check(lane, "tp8")
    assert checked[:2] == ["--model-path", str(CONFIGS / "MiniMax-M2.7")]
    assert checked[-2:] == ["--load-format", "dummy"]
    monkeypatch.delenv("MINIMAX_M27_MODEL_PATH", raising=False)
    assert weights(lane.model) == "MiniMaxAI/MiniMax-M2.7"
    monkeypatch.setenv("MINIMAX_M27_MODEL_PATH", "/models/m27")
    assert weights(lane.model) == "/models/m27"


def test_nodes_and_variants_on_the_command_line(tmp_path: Path) -> None:
    text = EXAMPLE.replace("per_node: 8", "per_node: 4, nodes: 2")
    text = text.replace("{tp-size: 8}", "{tp-size: 8, mem-fraction-static: false, lora-paths: [a]}")
    found = arguments(load(write(tmp_path, text)), "tp8", Node(1, "10.0.0.1:5000"))
    assert found == [
        *("--tp-size", "8", "--lora-paths", "a", "--nnodes", "2"),
        *("--node-rank", "1", "--dist-init-addr", "10.0.0.1:5000"),
    ]


def test_the_draft_is_an_option() -> None:
    lane = find("cpu-tiny-m2-eagle3")
    words = arguments(lane, "tp2")
    draft = words[words.index("--speculative-draft-model-path") + 1]
    assert Path(draft).name == "tiny-m2-eagle3"
    assert "--speculative-algorithm" in words


# --- mistakes ---

MISTAKES: list[tuple[str, str, str, str]] = [
    ("shots: 8", "shot: 8", "line 16", "shot: no such setting"),
    ("shots: 8", "shots: '8'", "line 16", "shots is '8', where int is needed"),
    ("shots: 8", "shots: -1", "line 16", "shots is -1; use 0 or more"),
    ("shots: 8", "url: http://x", "line 16", "the runner sets this itself"),
    ("start_minutes: 40", "start_minute: 40", "line 7", "start_minute: there is no such key"),
    ("start_minutes: 40\n", "", "line 1", "start_minutes: the lane has to say this"),
    ("start_minutes: 40", "start_minutes: forty", "line 7", "start_minutes: Input should be"),
    ("threshold: 0.9084", "threshold: 0.93", "line 18", "0.93 is above the baseline 0.9234"),
    ("        source: https://example.org\n", "", "line 18", "a number needs a source"),
    ("note: GSM8K", "note: ''", "line 21", "at least 1 character"),
    ("flexible-extract", "flexible_extract", "line 18", "no such figure; it has"),
    ("{tp-size: 8}", "{api-key: x}", "line 12", "a secret would stand in every result"),
    ("kind: cuda", "kind: rocm", "line 3", "capability is for CUDA devices"),
    ("capability: 90, ", "capability: 90, gfx: gfx942, ", "line 3", "gfx is for ROCm devices"),
    ("  gsm8k:", "  gsm9k:", "line 14", "suites.gsm9k: Input should be"),
    ("capability: 90, ", "", "line 3", "capability is for CUDA devices"),
    ("{tp-size: 8}", "{nnodes: 2}", "line 12", "this is set by hardware.nodes"),
    ("{tp-size: 8}", "{--tp-size: 8}", "line 12", "write tp-size, without dashes"),
    ("{tp-size: 8}", "{tp_size: 8}", "line 12", "write tp-size, without dashes"),
    ("  mem-fraction-static: 0.85", "  port: 1\n", "line 6", "this is set by `run --port`"),
    ("about: an example", "about: [", "line 4", "is not YAML"),
    ("about: an example", "name: example", "line 2", "name is there twice"),
    ("name: example", "name: other", "", "file and name have to be the same"),
    (", config: MiniMax-M2.7", "", "line 1", "model.config is missing"),
]


@pytest.mark.parametrize(("right", "wrong", "line", "words"), MISTAKES, ids=lambda text: text[:24])
def test_a_mistake_is_named_with_its_line(
    right: str, wrong: str, line: str, words: str, tmp_path: Path
) -> None:
    assert right in EXAMPLE
    with pytest.raises(LaneError) as error:
        load(write(tmp_path, EXAMPLE.replace(right, wrong)))
    said = str(error.value)
    assert "\n" not in said
    assert words in said
    assert line in said


def test_a_lane_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(LaneError, match=r"there is no lane 'h100'; there are .*cpu-tiny-m2"):
        find("h100")


def test_a_bad_direction_of_a_threshold(tmp_path: Path) -> None:
    """A time has to stay below its threshold, so a threshold below the baseline is the mistake."""
    text = EXAMPLE.replace("baseline: 0.9234", "better: lower\n        baseline: 0.9234")
    with pytest.raises(LaneError, match=r"0\.9084 is below the baseline 0\.9234"):
        load(write(tmp_path, text))


def test_settings_get_what_the_runner_adds() -> None:
    settings: Any = settings_of("gsm8k", {"shots": 2}, url="http://127.0.0.1:1", nonsense=1)
    assert (settings.shots, settings.url) == (2, "http://127.0.0.1:1")


def test_the_schema_has_no_second_reading(tmp_path: Path) -> None:
    """What is written out again is the same lane."""
    lane = load(write(tmp_path, EXAMPLE))
    again = write(tmp_path, yaml.safe_dump(lane.model_dump(exclude_none=True)))
    make: Callable[[Path], Lane] = load
    assert make(again) == lane
