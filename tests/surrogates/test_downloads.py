"""Weights that are not on this machine: downloaded once, from a real server; a hub that is not there costs one line."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.surrogates.pretrained import weights_file


class Hub(ThreadingHTTPServer):
    """A hub of models on loopback that has one file, and notes what it was asked for."""

    daemon_threads = True

    def __init__(self, path: str, data: bytes) -> None:
        self.asked: list[str] = []

        class Answers(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:  # noqa: N802
                self.answer(b"")

            def do_GET(self) -> None:  # noqa: N802
                self.answer(data)

            def answer(self, body: bytes) -> None:
                hub.asked.append(f"{self.command} {self.path}")
                found = self.path == path
                self.send_response(200 if found or self.path == "/" else 404)
                if found:
                    self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                    self.send_header("X-Repo-Commit", "c" * 40)
                elif self.path != "/":
                    self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", str(len(data) if found else 0))
                self.end_headers()
                self.wfile.write(body if found else b"")

            def log_message(self, *_: object) -> None:
                pass

        hub = self
        super().__init__(("127.0.0.1", 0), Answers)
        threading.Thread(target=self.serve_forever, daemon=True).start()


def use_hub(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does before the library is imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_hub_that_does_not_answer_is_asked_once_and_costs_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    use_hub(nowhere, monkeypatch)
    started = time.monotonic()
    with caplog.at_level("INFO", "scumble"), pytest.raises(InputError, match="could not be downloaded") as caught:
        weights_file("open_clip:ViT-B-32/openai", None)
    assert time.monotonic() - started < 5  # of which the library's retries would take 46
    assert f"({nowhere} does not answer: [Errno 111] Connection refused)" in str(caught.value)
    place = nowhere.removeprefix("http://")
    assert caplog.messages == [f"downloading timm/vit_base_patch32_clip_224.openai on {place}"]


def test_weights_are_downloaded_under_the_name_that_the_hub_has_and_only_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = "/timm/vit_base_patch32_clip_224.openai/resolve/main"
    hub = Hub(f"{folder}/open_clip_pytorch_model.bin", b"weights")
    use_hub(f"http://127.0.0.1:{hub.server_port}", monkeypatch)
    with caplog.at_level("INFO", "scumble"):
        assert weights_file("open_clip:ViT-B-32/openai", None).read_bytes() == b"weights"
    assert len([message for message in caplog.messages if message.startswith("downloading ")]) == 1
    assert [one for one in hub.asked if one.startswith(f"GET {folder}/")] == [
        f"GET {folder}/open_clip_pytorch_model.bin"
    ]
    hub.shutdown()
    hub.server_close()
    caplog.clear()
    assert weights_file("open_clip:ViT-B-32/openai", None).read_bytes() == b"weights"  # without any network
    assert caplog.messages == []
