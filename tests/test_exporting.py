"""Exported checkpoints: loaded where this package is not, with the same logits; card, receipts, the hub."""

from __future__ import annotations

import ast
import base64
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file
from test_answering import images, save_checkpoint  # noqa: F401

from commvlm.app.checkpoint import load_checkpoint
from commvlm.app.exporting import Export, export
from commvlm.app.hub import check_repository, push
from commvlm.app.remote_code import MODULES, bundle
from commvlm.cli import main
from commvlm.evaluate.receipts import write_json

QUESTION = "Where is the red star? Answer with its box."
RECEIPT = {
    "task": "rec", "rule": "iou-0.5", "metric": "accuracy", "value": 62.123, "standard_error": 1.5,
    "interval": [59.1, 65.2], "n": 120, "unparsable": 0, "split": "test", "files": {}, "versions": {"commvlm": "0"},
}  # fmt: skip

BARE = """
import json, sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "commvlm":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, pipeline

folder, image, question, out = sys.argv[1:]
try:
    AutoConfig.from_pretrained(folder, trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    raise AssertionError("code of the folder ran without being trusted")
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
messages = [{"role": "user", "content": content}]
batch = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.inference_mode():
    logits = model(**batch).logits
save_file({"logits": logits, "ids": batch["input_ids"], "pixels": batch["pixel_values"]}, out)
ask = pipeline("image-text-to-text", model=model, processor=processor)
said = ask(text=messages, max_new_tokens=6, return_full_text=False)[0]["generated_text"]
assert not any(name.split(".")[0] == "commvlm" for name in sys.modules)
print(json.dumps({"said": said, "class": type(model).__module__, "processor": type(processor).__module__}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run's folder: a model, and a receipt."""
    folder = tmp_path_factory.mktemp("exporting") / "run"
    save_checkpoint(folder / "model")
    (folder / "run.json").write_text('{"model": "model"}')
    write_json(RECEIPT, folder / "receipts" / "rec.json")
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    return export(run, tmp_path_factory.mktemp("exported") / "comm", Export("me/comm", license="apache-2.0"))


def test_a_demo_keeps_the_receipts_of_the_run_that_it_names(run, tmp_path):
    (tmp_path / "comm").symlink_to(run)
    (tmp_path / "run.json").write_text('{"model": "comm"}')
    for place in (tmp_path, run / "model"):
        out = export(place, tmp_path / f"out-{place.name}", Export("a", code=False))
        assert json.loads((out / "receipts" / "rec.json").read_text()) == RECEIPT


def asked(folder: Path, image: Path) -> tuple[dict[str, Any], Any, Any]:
    model, processor = load_checkpoint(folder)
    content = [{"type": "image", "image": str(image)}, {"type": "text", "text": QUESTION}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    return batch, model, processor


def test_it_loads_where_this_package_is_not_with_the_same_logits(run, exported, images, tmp_path):  # noqa: F811
    """In an isolated interpreter that cannot import commvlm: Auto classes, chat template, pipeline."""
    out = tmp_path / "logits.safetensors"
    place = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    bare = subprocess.run(
        [sys.executable, "-I", "-c", BARE, str(exported), str(images[1]), QUESTION, str(out)],
        cwd=tmp_path, env={**os.environ, **place}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert bare.returncode == 0, bare.stderr[-2000:]
    found = json.loads(bare.stdout.splitlines()[-1])
    assert found["class"].startswith("transformers_modules.")
    assert found["processor"].startswith("transformers_modules.")
    theirs = load_file(out)
    batch, model, processor = asked(run, images[1])
    with torch.inference_mode():
        logits = model(**batch).logits
        ids = model.generate(**batch, max_new_tokens=6)
    assert torch.equal(theirs["ids"], batch["input_ids"])
    assert torch.equal(theirs["pixels"], batch["pixel_values"])
    torch.testing.assert_close(theirs["logits"], logits, rtol=0, atol=0)
    said = processor.tokenizer.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found["said"] == said
    assert said


def test_it_is_a_checkpoint_for_this_package_too(run, exported, images):  # noqa: F811
    from transformers import pipeline

    batch, model, _ = asked(exported, images[0])
    _, other, _ = asked(run, images[0])
    with torch.inference_mode():
        assert torch.equal(model(**batch).logits, other(**batch).logits)
    ask = pipeline("image-text-to-text", model=str(exported))
    content = [{"type": "image", "image": str(images[0])}, {"type": "text", "text": QUESTION}]
    said = ask(text=[{"role": "user", "content": content}], max_new_tokens=4, return_full_text=False)
    assert said[0]["generated_text"]
    assert type(ask.model).__module__ == "commvlm.model.modeling"


def test_the_code_is_the_model_rooms_own(exported):
    """Every module as it stands in the package, but for its head and what transformers' loader asks for."""
    modules = bundle()
    for name, text in modules.items():
        assert (exported / f"{name}.py").read_text() == text
        own = (Path(sys.modules["commvlm"].__file__).parent / "model" / f"{name}.py").read_text().splitlines()
        head, *lines = text.splitlines()
        assert head.startswith("# commvlm ")
        added = [line for line in lines if line not in own]
        assert all(re.match(r"from \.\w+ import __doc__ as _|\s+timm = __import__", line) for line in added), added
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                named = [node.module] if node.module else [alias.name for alias in node.names]
                assert set(named) <= set(modules)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not {str(name).split(".")[0] for name in names} & {"commvlm", "timm"}
    for place in MODULES.values():
        module, name = place.split(".")
        assert f"class {name}(" in modules[module]


def test_the_folder_holds_what_it_should_and_nothing_of_this_machine(run, exported):
    names = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert {"model.safetensors", "config.json", "generation_config.json", "processor_config.json", "tokenizer.json",
            "chat_template.jinja", "README.md", "receipts/rec.json"} <= names  # fmt: skip
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".part"))]
    assert json.loads((exported / "receipts" / "rec.json").read_text()) == RECEIPT
    for path in exported.rglob("*"):
        if path.suffix in (".json", ".md", ".jinja"):
            text = path.read_text()
            assert str(Path.home()) not in text or str(Path.home()) == "/"
            assert "_name_or_path" not in text
            assert str(run) not in text
            assert str(Path(sys.modules["commvlm"].__file__).parent) not in text


def test_the_card_says_what_it_is_and_what_it_scored(exported):
    card = ModelCard.load(exported / "README.md")
    data = yaml.safe_load((exported / "README.md").read_text().split("---\n")[1])
    assert data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 62.12
    assert "| rec | iou-0.5 | accuracy | 62.1 | 59.1 to 65.2 | 120 |" in card.text
    assert "| clip | clip_vision_model | 64 px | 1-8 of 8 | lln-layerscale | identity |" in card.text
    assert "trust_remote_code=True" in card.text
    assert "converted" not in card.text
    example = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert example is not None
    ast.parse(example[1])


def test_without_code_and_in_half_precision(run, images, tmp_path):  # noqa: F811
    out = export(run / "model", tmp_path / "half", Export("half", dtype="bf16", code=False))
    assert not list(out.glob("*.py"))
    assert "auto_map" not in (out / "config.json").read_text() + (out / "processor_config.json").read_text()
    assert {tensor.dtype for tensor in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    batch, half, _ = asked(out, images[0])
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    _, whole, _ = asked(run, images[0])
    with torch.inference_mode():
        one, other = half(**batch).logits.float(), whole(**batch).logits
    assert float((one - other).norm() / other.norm()) < 0.03  # eight bits, layer after layer
    assert "import commvlm" in (out / "README.md").read_text()
    assert "converted after they were scored" in (out / "README.md").read_text()
    shutil.copytree(run / "model", tmp_path / "bare")
    bare = export(tmp_path / "bare", tmp_path / "unscored", Export("half", code=False))
    assert "Scores" not in (bare / "README.md").read_text()


def test_what_cannot_be_exported_is_refused_in_one_line_and_leaves_nothing(run, exported, tmp_path, capsys):
    def refused(*argv: object) -> str:
        assert main(["export", *map(str, argv)]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith("commvlm: error: ")
        return lines[-1]

    assert "exists" in refused(run, exported)
    assert "no such folder" in refused(tmp_path / "none", tmp_path / "out")
    assert "no name of a repository" in refused(run, tmp_path / "out", "--push-to-hub", "a/b/c")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "run.json").write_text(json.dumps({"model": "model"}))
    (broken / "model").symlink_to(run / "model")
    (broken / "receipts").mkdir()
    (broken / "receipts" / "rec.json").write_text("{}")
    assert "is no receipt" in refused(broken, tmp_path / "out")
    assert "bf16" in refused_by_parser("--dtype", "int3", capsys=capsys)
    assert not list(tmp_path.glob("out*"))


def refused_by_parser(*argv: str, capsys: Any) -> str:
    with pytest.raises(SystemExit, match="2"):
        main(["export", "a", "b", *argv])
    return capsys.readouterr().err


# --- the hub, on loopback ---


class Hub(http.server.BaseHTTPRequestHandler):
    """The calls of an upload, as huggingface_hub makes them; every file goes in the commit itself."""

    refuses = 0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.server.seen.append((self.path, self.headers.get("authorization"), body))  # type: ignore[attr-defined]
        answer: dict[str, Any] = {}
        if self.path == "/api/repos/create":
            answer = {"url": f"http://127.0.0.1:{self.server.server_port}/me/comm"}  # type: ignore[attr-defined]
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            answer = {"commitUrl": "http://127.0.0.1/me/comm/commit/a", "commitOid": "a" * 40, "hookOutput": ""}
        data = json.dumps(answer).encode()
        self.send_response(self.refuses or 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_HEAD = do_POST

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def hub(refuses: int = 0) -> Iterator[Any]:
    handler = type("Handler", (Hub,), {"refuses": refuses})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.seen = []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def at(monkeypatch) -> Callable[[str], None]:
    """Online, at another address than the hub's."""

    def set_address(address: str) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")

    return set_address


def test_push_uploads_every_file_in_one_commit(exported, at):
    with hub() as server:
        address = f"http://127.0.0.1:{server.server_port}"
        at(address)
        assert push(exported, "me/comm", private=True) == f"{address}/me/comm"
        seen = {path: (key, body) for path, key, body in server.seen}
    key, body = seen["/api/repos/create"]
    assert key == "Bearer hf_secret"
    assert json.loads(body)["visibility"] == "private"
    lines = [json.loads(line) for line in seen["/api/models/me/comm/commit/main"][1].splitlines()]
    sent = {line["value"]["path"]: line["value"]["content"] for line in lines if line["key"] == "file"}
    assert set(sent) == {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert base64.b64decode(sent["modeling.py"]) == (exported / "modeling.py").read_bytes()


def test_a_hub_that_refuses_or_is_not_there_is_one_line(exported, at):
    with hub(refuses=401) as server:
        at(f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(ValueError, match=r"^me/comm was not pushed: [^\n]*hf auth login") as refused:
            push(exported, "me/comm")
        assert str(refused.value).endswith(f"later: hf upload me/comm {exported}")
    with pytest.raises(ValueError, match=r"^me/comm was not pushed: the hub cannot be reached [^\n]*$"):
        push(exported, "me/comm")  # it is gone


def test_offline_is_one_line(exported):
    with pytest.raises(ValueError, match=r"^me/comm was not pushed: HF_HUB_OFFLINE is set"):
        push(exported, "me/comm")  # conftest sets it
    check_repository("me/comm")
