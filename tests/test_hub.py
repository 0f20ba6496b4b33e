"""The hub: what is asked of it, how its pauses are kept, and in which words its refusals come."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

from job import hub
from job.config.learning import Model
from job.config.running import Storage
from job.errors import ModelError
from job.headers import FIRST_READ, read_headers
from job.hub import PAUSES_S, Repository, hub_headers, snapshot
from job.pretrained import fetch, fetch_weights
from job.published import published
from job.store import Store
from tests.conftest import REPOSITORY
from tests.hub import NAME, Hub, serve
from tests.test_gguf import exact_model, make_gguf  # noqa: F401  # a fixture

WEIGHTS = {f"layer.{n}.weight": torch.full((64, 64), float(n)) for n in range(2)}
PARTS = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
INDEX = {"weight_map": dict(zip(WEIGHTS, PARTS, strict=True))}
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "original/consolidated.safetensors": b"the same once more",
    **{part: save({name: WEIGHTS[name]}) for name, part in INDEX["weight_map"].items()},
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The hub of this process, which has downloaded nothing before."""
    with serve() as server:
        server.files = dict(FILES)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield server


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of each pause, none of which is waited for."""
    made: list[float] = []
    monkeypatch.setattr(hub, "pause", lambda seconds, given_up: made.append(seconds))
    return made


def test_only_the_files_that_match_are_downloaded_into_a_folder(server: Hub) -> None:
    folder = Path(snapshot(Model(name=NAME), ("*.json",)))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors.index.json"]
    assert (folder / "config.json").read_bytes() == FILES["config.json"]


def test_a_second_snapshot_downloads_nothing(server: Hub) -> None:
    model = Model(name=NAME)
    first, sent = snapshot(model, ("*.safetensors",)), server.sent
    assert snapshot(model, ("*.safetensors",)) == first and server.sent == sent > 0


def test_a_snapshot_leaves_out_the_same_weights_in_other_formats(server: Hub) -> None:
    folder = Path(snapshot(Model(name=NAME), ("*.safetensors",)))
    assert sorted(path.name for path in folder.iterdir()) == PARTS


def test_headers_come_without_the_weights(server: Hub) -> None:
    server.files["model-00001-of-00002.safetensors"] = save({"layer.0.weight": torch.zeros(1000, 1000)})
    headers = hub_headers(Model(name=NAME))
    assert {name: (tensor.shape, tensor.file) for name, tensor in headers.items()} == {
        "layer.0.weight": ((1000, 1000), PARTS[0]),
        "layer.1.weight": ((64, 64), PARTS[1]),
    }
    assert server.sent < 2 * FIRST_READ + 1000 < 1000 * 1000 * 4


def test_headers_of_the_hub_are_those_of_the_downloaded_files(server: Hub) -> None:
    model = Model(name=NAME, revision="main")
    assert hub_headers(model) == read_headers(Store(snapshot(model, ("*.safetensors", "*.json"))))


def test_a_file_of_the_hub_is_read_in_part_and_never_beyond_its_end(server: Hub) -> None:
    files, content = Repository(Model(name=NAME)), FILES["config.json"]
    assert files.read("config.json") == content
    assert files.read("config.json", 5, 9) == content[5:9]
    assert files.read("config.json", 5, 10**6) == content[5:]
    assert files.read("config.json", 10**6, 10**6 + 5) == b"" == files.read("config.json", 0, 0)


def test_a_mirror_that_does_not_know_ranges_is_refused_before_it_sends_the_weights(server: Hub) -> None:
    server.files["model-00001-of-00002.safetensors"] = save({"layer.0.weight": torch.zeros(1000, 1000)})
    server.knows_ranges = False
    with pytest.raises(ModelError, match=r"OSError: .*: the server does not know ranges"):
        hub_headers(Model(name=NAME))


def test_what_is_published_is_config_and_headers(server: Hub) -> None:
    config, headers = published(Model(name=NAME), Storage())
    assert config == {"model_type": "llama"} and set(headers) == set(WEIGHTS)


def test_without_network_what_is_published_comes_from_the_earlier_download(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = published(Model(name=NAME), Storage())
    snapshot(Model(name=NAME), ("*.json", "*.safetensors"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.asked.clear()
    assert published(Model(name=NAME), Storage()) == expected and server.asked == []


def test_a_model_is_fetched_small_files_first(server: Hub) -> None:
    server.files["tokenizer.json"] = b"{}"
    folder, store = fetch(Model(name=NAME), Storage())
    assert server.sent < len(FILES[PARTS[0]]) and Path(folder, "tokenizer.json").read_bytes() == b"{}"
    assert set(read_headers(fetch_weights(Model(name=NAME), store, Storage()))) == set(WEIGHTS)


def test_pickled_weights_of_a_hub_model_are_planned_by_ranges_and_downloaded_when_there_are_no_others(
    server: Hub, tmp_path: Path
) -> None:
    torch.save(WEIGHTS, tmp_path / "saved")
    pickled = {"pytorch_model.bin": (tmp_path / "saved").read_bytes(), "training_args.bin": b"code"}
    server.files = {"config.json": FILES["config.json"], "tokenizer.json": b"{}", **pickled}
    storage, said = Storage(cache_dir=str(tmp_path / "cache")), list[str]()
    assert set(hub_headers(Model(name=NAME))) == set(WEIGHTS)
    assert not list((tmp_path / "hub").rglob("*.bin")), "nothing was downloaded for that"
    _, store = fetch(Model(name=NAME), storage, said.append)
    assert set(read_headers(fetch_weights(Model(name=NAME), store, storage, said.append))) == set(WEIGHTS)
    assert said == [] and not (tmp_path / "cache").exists()
    assert not any("training_args" in asked for asked in server.asked)


def test_the_one_gguf_file_of_a_hub_model_is_downloaded_and_converted(
    server: Hub,
    exact_model: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    make_gguf(exact_model, tmp_path / "saved")
    server.files = {"README.md": b"# Model", "model.gguf": (tmp_path / "saved").read_bytes()}
    model, storage = Model(name=NAME), Storage(cache_dir=str(tmp_path / "cache"))
    folder, store = fetch(model, storage, lambda line: None)
    assert json.loads(Path(folder, "config.json").read_bytes())["model_type"] == "llama"
    assert read_headers(fetch_weights(model, store, storage)) == read_headers(store)
    server.files["other.gguf"] = b"GGUF"
    with pytest.raises(ModelError, match=r"owner/model holds 2 GGUF files \(model.gguf, other.gguf\). Expected one"):
        fetch(model, storage)


@pytest.mark.parametrize("call", [lambda model, say: snapshot(model, ("*.json",), say), hub_headers, Repository])
def test_the_hub_is_asked_again_after_the_pause_that_it_wants(server: Hub, pauses: list[float], call: Any) -> None:
    said: list[str] = []
    server.refusals = [(429, {"Retry-After": "7"}), (429, {"Retry-After": "11"})]
    call(Model(name=NAME), said.append)
    assert pauses == [7.0, 11.0]
    assert said == [f"{NAME}: the hub is busy (HTTP 429), trying again in {seconds} s" for seconds in (7, 11)]


def test_what_nobody_listens_to_is_said_beside_what_a_verb_prints(
    server: Hub, pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    server.refusals = [(503, {})]
    published(Model(name=NAME), Storage())
    said = capsys.readouterr()
    assert said.out == "" and said.err == "owner/model: the hub is busy (HTTP 503), trying again in 2 s\n"


def test_the_pauses_are_really_waited_for(server: Hub) -> None:
    server.refusals = [(429, {"Retry-After": "1"})] * 2
    start = time.monotonic()
    snapshot(Model(name=NAME), ("*.json",), lambda line: None)
    assert 2.0 <= time.monotonic() - start < 10


def test_a_busy_hub_is_asked_again_for_files_too(server: Hub) -> None:
    server.busy_files = 2
    folder = snapshot(Model(name=NAME), ("config.json",), lambda line: None)
    assert Path(folder, "config.json").read_bytes() == FILES["config.json"] and server.busy_files == 0


@pytest.mark.parametrize(
    ("headers", "least_s", "most_s"),
    [
        ({"Retry-After": formatdate(time.time() + 3600, usegmt=True)}, 300, 300),
        ({"RateLimit": '"api";r=0;t=55', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}, 55, 55),
        ({"RateLimit": '"api";r=0;t=900'}, 300, 300),
        ({"RateLimit": '"api";r=20;t=55'}, PAUSES_S[0], PAUSES_S[0]),
        ({"Retry-After": "soon"}, PAUSES_S[0], PAUSES_S[0]),
        ({}, PAUSES_S[0], PAUSES_S[0]),
    ],
)
def test_a_pause_is_asked_for_in_several_ways_and_is_bounded(
    server: Hub, pauses: list[float], headers: dict[str, str], least_s: float, most_s: float
) -> None:
    server.refusals = [(429, headers)]
    Repository(Model(name=NAME), lambda line: None)
    (seconds,) = pauses
    assert least_s <= seconds <= most_s


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_stays_busy_is_given_up_after_growing_pauses(server: Hub, pauses: list[float], status: int) -> None:
    server.refusals = [(status, {})] * 20
    with pytest.raises(ModelError) as refusal:
        snapshot(Model(name=NAME), ("*.json",), lambda line: None)
    assert str(refusal.value) == (
        f"model.name: owner/model: the hub answered {status} (busy) to 6 tries. Start the run again later, put an "
        "account's token into HF_TOKEN (its limits are wider), or copy the model into a folder or bucket"
    )
    assert pauses == list(PAUSES_S) == sorted(PAUSES_S) and len(server.asked) == len(PAUSES_S) + 1


def test_a_busy_hub_is_not_waited_for_when_all_was_downloaded_before(server: Hub, pauses: list[float]) -> None:
    expected = snapshot(Model(name=NAME), ("*.json",))
    server.refusals = [(429, {"Retry-After": "7"})]
    assert snapshot(Model(name=NAME), ("*.json",)) == expected and pauses == []


@pytest.mark.parametrize("call", [lambda model: snapshot(model, ("*.json",)), hub_headers])
def test_a_model_that_the_hub_does_not_have_is_refused_at_once(server: Hub, pauses: list[float], call: Any) -> None:
    with pytest.raises(ModelError) as refusal:
        call(Model(name="owner/none"))
    assert str(refusal.value) == (
        "model.name: owner/none: no such folder, and the hub has no such model for this account. "
        "Check the path, or the id and HF_TOKEN"
    )
    assert pauses == []


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("call", [lambda model: snapshot(model, ("*.json",)), hub_headers])
def test_a_gated_model_says_where_to_ask_for_it(server: Hub, call: Any, status: int) -> None:
    server.gated = status
    with pytest.raises(ModelError) as refusal:
        call(Model(name=NAME))
    assert str(refusal.value) == (
        "model.name: owner/model: its owner gives it only to some accounts. Ask for it at "
        f"{constants.ENDPOINT}/owner/model and put the token of an account that has it into HF_TOKEN"
    )


@pytest.mark.parametrize("call", [lambda model: snapshot(model, ("*.json",)), hub_headers])
def test_a_revision_that_is_not_there_is_named(server: Hub, call: Any) -> None:
    with pytest.raises(ModelError) as refusal:
        call(Model(name=NAME, revision="v9"))
    assert str(refusal.value) == (
        "model.name: owner/model: the hub has no revision v9 of it. Give a branch, tag or commit as model.revision"
    )


@pytest.mark.parametrize("call", [lambda model: snapshot(model, ("*.json",)), hub_headers])
def test_what_is_no_hub_id_is_not_asked_for(server: Hub, call: Any) -> None:
    with pytest.raises(ModelError) as refusal:
        call(Model(name="./none"))
    assert str(refusal.value) == "model.name: ./none: no such folder, and no hub id (owner/name). Check the path"
    assert server.asked == []


def test_without_network_a_model_that_was_not_downloaded_says_so(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as refusal:
        snapshot(Model(name=NAME), ("*.json",))
    assert str(refusal.value) == (
        "model.name: owner/model is no folder here and cannot be had from the hub (HF_HUB_OFFLINE is set). "
        "Check the path, or the id and HF_TOKEN; without a way to the hub, name a folder or bucket, or a mirror in "
        "HF_ENDPOINT"
    )


def test_a_hub_that_is_not_there_is_named_with_what_failed(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ModelError, match=r"the hub \(http://127.0.0.1:9: ConnectError: .*\). Check the path, or the id"
    ):
        snapshot(Model(name=NAME), ("*.json",))


def test_what_is_published_is_read_without_torch() -> None:
    code = "import sys, job.published; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout == "set()\n"
