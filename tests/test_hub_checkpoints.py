"""Checkpoints of the hub by name, from one on loopback."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import transformers.utils.hub as library
from huggingface_hub import constants
from transformers import CLIPVisionConfig

from commvlm.model.checkpoints import CheckpointError, find_checkpoint

STATISTICS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
ENCODER = CLIPVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)


class Hub(http.server.BaseHTTPRequestHandler):
    """Files of one repository, as huggingface_hub asks for them."""

    def do_GET(self) -> None:
        server: Any = self.server
        name = self.path.rsplit("/", 1)[-1]
        server.seen.append((self.command, name))
        data = server.files.get(name)
        self.send_response(404 if data is None else 200)
        if data is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("ETag", hashlib.sha1(data or b"").hexdigest())
        self.send_header("Content-Length", str(len(data or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data or b"")

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Any]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.seen, server.files = [], {"config.json": ENCODER.to_json_string().encode()}  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template[template.index("/{repo_id}") :]
        )
        for place in (constants, library):
            monkeypatch.setattr(place, "HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
        yield server
        server.shutdown()


def test_its_own_mean_and_std_are_fetched_with_its_config_and_asked_for_once(hub):
    hub.files["preprocessor_config.json"] = json.dumps(STATISTICS).encode()
    found = find_checkpoint("someone/clip")
    assert (found.source, found.mean, found.std) == ("hub", [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    hub.seen.clear()
    again = find_checkpoint("someone/clip")
    assert (again.source, again.mean, again.std) == ("hub cache", found.mean, found.std)
    assert not [name for _, name in hub.seen if name == "preprocessor_config.json"]


def test_one_without_them_has_its_familys_and_is_asked_once(hub):
    found = find_checkpoint("someone/bare")
    assert (found.mean, found.std) == (None, None)
    hub.seen.clear()
    assert find_checkpoint("someone/bare").mean is None
    assert not [name for _, name in hub.seen if name == "preprocessor_config.json"]


def test_a_broken_file_is_one_line(hub):
    hub.files["preprocessor_config.json"] = b"[1]"
    with pytest.raises(CheckpointError, match=r"'someone/odd': its preprocessor_config.json is no JSON object"):
        find_checkpoint("someone/odd")
