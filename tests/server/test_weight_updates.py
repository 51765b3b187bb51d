"""Weight updates over HTTP that are wrong: status 400 with the reason; the server goes on."""

from __future__ import annotations

import base64
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file

from sglang_minimax import TINY_M2
from sglang_minimax.cli.local_server import LocalServer

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

HEAD = "lm_head.weight"
Pairs = list[tuple[str, torch.Tensor]]


@pytest.fixture(scope="module")
def http(server: LocalServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http


@pytest.fixture(autouse=True)
def unharmed(http: httpx.Client) -> Iterator[None]:
    """Whatever a test sends, the server answers afterwards as before, from the same weights."""
    before = probabilities(http)
    yield
    assert probabilities(http) == before


def probabilities(http: httpx.Client) -> Any:
    body = {
        "input_ids": [9, 10, 11],
        "sampling_params": {"temperature": 0, "max_new_tokens": 3},
        "return_logprob": True,
        "top_logprobs_num": 5,
    }
    answer = http.post("/generate", json=body)
    assert answer.status_code == 200
    return answer.json()["meta_info"]["output_top_logprobs"]


def payload(pairs: Any) -> str:
    """Tensors with their data, for a process that shares no memory with this one."""
    return base64.b64encode(pickle.dumps(pairs)).decode()


def refused(answer: httpx.Response, *words: str) -> None:
    assert answer.status_code == 400, f"{answer.status_code} {answer.text[:500]}"
    assert answer.json()["success"] is False
    for word in words:
        assert word in answer.json()["message"]


def from_disk(http: httpx.Client, path: Path | str, **more: Any) -> httpx.Response:
    return http.post("/update_weights_from_disk", json={"model_path": str(path), **more})


class Touch:
    """An object whose pickle creates a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


# --- disk ----------------------------------------------------------------------------------


def test_a_path_that_is_not_there(http: httpx.Client, tmp_path: Path) -> None:
    refused(from_disk(http, tmp_path / "nothing"), str(tmp_path / "nothing"), "no folder")


def test_a_pickle_is_not_read(http: httpx.Client, tmp_path: Path) -> None:
    marker, folder = tmp_path / "the pickle was run", tmp_path / "pickled"
    shutil.copytree(TINY_M2, folder)
    (folder / "model.safetensors").unlink()
    torch.save({HEAD: Touch(marker)}, folder / "model.bin")
    for load_format in ("auto", "pt", "npcache"):
        refused(from_disk(http, folder, load_format=load_format))
    assert not marker.exists()


def test_a_truncated_file(http: httpx.Client, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(TINY_M2, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(from_disk(http, folder), "incomplete", "Nothing was changed")


def test_an_unknown_format(http: httpx.Client) -> None:
    """SGLang lets this one end the scheduler."""
    refused(from_disk(http, TINY_M2, load_format="nonsense"), "load_format 'nonsense'")


def test_a_sound_checkpoint_is_taken(http: httpx.Client) -> None:
    answer = from_disk(http, TINY_M2)
    assert answer.status_code == 200
    assert answer.json()["success"] is True


# --- tensors -------------------------------------------------------------------------------


@pytest.fixture
def session(http: httpx.Client) -> Iterator[None]:
    assert http.post("/begin_weight_update", json={}).status_code == 200
    yield
    assert http.post("/end_weight_update", json={}).status_code == 200


def from_tensor(http: httpx.Client, *payloads: str, **more: Any) -> httpx.Response:
    body = {"serialized_named_tensors": list(payloads), **more}
    return http.post("/update_weights_from_tensor", json=body)


@pytest.mark.usefixtures("session")
def test_tensors_that_do_not_fit(http: httpx.Client) -> None:
    wrong = [(HEAD, torch.ones(896, 128)), ("nothing", torch.ones(3))]
    refused(from_tensor(http, payload(wrong)), "(1 unexpected)", "unexpected: nothing")
    refused(from_tensor(http, payload([(HEAD, torch.ones(3))])), f"misshapen: {HEAD}")
    refused(from_tensor(http, payload("no list")), "not a str")
    refused(from_tensor(http, payload([]), load_format="sharded"), "load_format 'sharded'")
    refused(from_tensor(http), "0 ranks")
    refused(from_tensor(http, payload(wrong), payload(wrong)), "2 ranks")


@pytest.mark.usefixtures("session")
def test_what_is_no_payload(http: httpx.Client, tmp_path: Path) -> None:
    refused(from_tensor(http, base64.b64encode(b"\x80\x04 nonsense").decode()), "unpacked")
    marker = tmp_path / "the pickle was run"
    refused(from_tensor(http, payload([(HEAD, Touch(marker))])), "unpacked")
    assert not marker.exists()


@pytest.mark.usefixtures("session")
def test_sound_tensors_are_taken(http: httpx.Client) -> None:
    head = load_file(TINY_M2 / "model.safetensors")[HEAD]
    answer = from_tensor(http, payload([(HEAD, head)]))
    assert answer.status_code == 200, answer.text


@pytest.mark.usefixtures("session")
def test_a_group_that_nobody_has_opened(http: httpx.Client) -> None:
    body = {"names": [HEAD], "dtypes": ["float32"], "shapes": [[896, 128]], "group_name": "none"}
    refused(http.post("/update_weights_from_distributed", json=body), "no group 'none'")
