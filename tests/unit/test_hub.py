"""Whether a model is on the hub, asked of a hub that is a few lines of this file."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from internvl_core.errors import ArgumentError
from internvl_core.inspection.hub import check_model, is_hub_id
from internvl_core.inspection.lint_report import TokenizerSource
from internvl_core.inspection.tokenizer_source import load_encoder


class FakeHub(ThreadingHTTPServer):
    """Answers every question with one status, and remembers what was asked for."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.status = 404
        self.code = "RepoNotFound"
        self.asked: list[str] = []


class _Answer(BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self) -> None:
        self.server.asked.append(self.path)
        self.send_response(self.server.status)
        self.send_header("X-Error-Code", self.server.code)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", "1")
        self.send_header("Content-Length", "2")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


def set_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    set_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(("status", "code"), [(404, "RepoNotFound"), (401, ""), (503, "")])
def test_what_is_not_on_the_hub_is_asked_for_once(hub: FakeHub, tmp_path: Path, status: int, code: str) -> None:
    hub.status, hub.code = status, code
    with pytest.raises(ArgumentError, match=r"^models/typo: no such folder, nor does the hub give such a model: ."):
        load_encoder(TokenizerSource("models/typo"), tmp_path)
    assert hub.asked == ["/models/typo/resolve/main/config.json"]


def test_a_hub_that_does_not_answer_is_told(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    # A port that nobody listens at.
    set_endpoint(monkeypatch, "http://127.0.0.1:1")
    with pytest.raises(ArgumentError, match=r"^models/typo: no such folder, and the hub, .* cannot be reached: ."):
        check_model("models/typo")
    assert hub.asked == []


@pytest.mark.parametrize(("status", "code"), [(200, ""), (404, "EntryNotFound")])
def test_a_model_on_the_hub_is_let_through_with_a_config_or_without(hub: FakeHub, status: int, code: str) -> None:
    hub.status, hub.code = status, code
    check_model("OpenGVLab/InternVL")
    assert len(hub.asked) == 1


def test_a_path_below_a_folder_that_is_there_is_no_hub_id(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    assert is_hub_id("OpenGVLab/InternVL")
    assert is_hub_id("gpt2")
    assert not is_hub_id("models/typo")
    for path in ("models/typo", "a/b/c", str(tmp_path / "typo"), "../typo"):
        with pytest.raises(ArgumentError, match=r": no such folder\. Give a folder"):
            check_model(path)
    check_model("models")
    assert hub.asked == []
