"""A checkpoint as lmms-eval's model, with a stub in lmms-eval's place."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image
from test_answering import images  # noqa: F401

from commvlm.data.example import Example, Turn
from commvlm.data.images import open_image
from commvlm.train.assemble import assemble
from commvlm.train.recipe import load_recipe
from commvlm.train.whole import save_whole


@dataclass(frozen=True)
class ModelManifest:
    """As lmms_eval.models.registry_v2 has it."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


class Lmms(ABC):
    """As lmms_eval.api.model has it: what a model must offer."""

    is_simple = True

    def __init__(self) -> None:
        self.task_dict: dict = {}

    @abstractmethod
    def loglikelihood(self, requests): ...

    @abstractmethod
    def generate_until(self, requests): ...

    @abstractmethod
    def generate_until_multi_round(self, requests): ...


@pytest.fixture
def harness(monkeypatch):
    modules = {name: ModuleType(name) for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models")}
    modules["lmms_eval.api.model"] = ModuleType("lmms_eval.api.model")
    modules["lmms_eval.api.model"].lmms = Lmms  # type: ignore[attr-defined]
    modules["lmms_eval.models.registry_v2"] = ModuleType("lmms_eval.models.registry_v2")
    modules["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "commvlm.app.lmms_model", raising=False)
    from commvlm.app.lmms import manifest

    return manifest()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    model, processor = assemble(load_recipe("micro").model)
    with torch.no_grad():
        model.model.multi_modal_projector.weight.mul_(30)
    folder = tmp_path_factory.mktemp("lmms") / "model"
    save_whole(folder, model, processor)
    return folder


def requests(model, images: list[Path]) -> list[SimpleNamespace]:  # noqa: F811
    documents = [(Image.open(image), text) for image in images for text in ("Is there a star?", "where is the cup?")]
    model.task_dict = {"pope": {"test": documents}}

    def messages(document):
        picture, text = document
        content = [{"type": "image", "url": picture}, {"type": "text", "text": text}]
        return [{"role": "user", "content": content}]

    return [
        SimpleNamespace(args=("", messages, {"max_new_tokens": 4 + 2 * (k % 2), "until": ["\n\n"]}, k, "pope", "test"))
        for k in range(len(documents))
    ]


def test_lmms_eval_asks_as_we_do(harness, checkpoint, images):  # noqa: F811
    from commvlm.app.answering import Answerer

    assert isinstance(harness, ModelManifest)
    module, name = harness.chat_class_path.rsplit(".", 1)  # type: ignore[union-attr]
    __import__(module)
    kind = getattr(sys.modules[module], name)
    assert issubclass(kind, Lmms)
    assert kind.is_simple is False
    model = kind(pretrained=str(checkpoint), batch_size="4")
    said = model.generate_until(requests(model, images))
    expected = []
    for k, (picture, text) in enumerate(model.task_dict["pope"]["test"]):
        asked = Example(str(k), "dialogue", Path(picture.filename), (Turn(f"<image>\n{text}", ""),))
        expected += Answerer(checkpoint, max_new_tokens=4 + 2 * (k % 2))([asked])
    assert said == expected
    assert len(set(said)) > 1
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])
    assert (model._rank, model._world_size, model.device.type) == (0, 1, model.answer.device.type)
    with pytest.raises(ValueError, match="answers greedily"):
        model.generate_until([_sampling(model)])
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    shown = [{"type": "image", "url": Image.open(images[0])}, {"type": "text", "text": "Is there a star?"}]
    user = {"role": "user", "content": shown}
    (turn,) = model._example("1", [system, user]).turns
    assert turn == Turn("<image>\nBe brief.\nIs there a star?", "")
    said = {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}
    again = {"role": "user", "content": [{"type": "text", "text": "Why?"}]}
    first, second = model._example("2", [user, said, again]).turns
    assert (first.answer, second.question) == ("Yes", "Why?")
    for odd in ([system], [user, user], [user, said], []):
        with pytest.raises(ValueError, match="has the turns"):
            model._example("3", odd)


def test_pictures_are_what_they_show(harness, tmp_path):
    """A palette's colours count, not its numbers, and what is transparent is white as in training."""
    from commvlm.app.lmms_model import CommVLM

    model = CommVLM.__new__(CommVLM)
    model._folder = SimpleNamespace(name=str(tmp_path))
    pictures = []
    for palette in ((255, 0, 0), (0, 0, 255)):
        picture = Image.new("P", (4, 3), 0)
        picture.putpalette(palette)
        pictures.append(picture)
    shown = Image.new("RGBA", (4, 3), (0, 0, 0, 0))
    pictures += [shown, shown.convert("LA"), Image.new("RGB", (4, 3), (255, 0, 0)), Image.new("L", (4, 3), 7)]
    paths = [model._saved(picture) for picture in pictures]
    colours = [(255, 0, 0), (0, 0, 255), (255, 255, 255), (255, 255, 255), (255, 0, 0), (7, 7, 7)]
    assert [open_image(path).getpixel((0, 0)) for path in paths] == colours
    assert (paths[0], paths[2]) == (paths[4], paths[3])
    assert len(set(paths)) == 4


RANK = """
import json, sys
from types import ModuleType
sys.modules.update({name: ModuleType(name) for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model")})
sys.modules["lmms_eval.api.model"].lmms = object
from commvlm.app.lmms_model import CommVLM
model = type("Whole", (CommVLM,), {})(sys.argv[1])
own = __import__("torch").tensor([model._rank + 1], device=model.device)
print(json.dumps([model._rank, model._world_size, model.accelerator.gather(own).tolist()]))
"""


@pytest.mark.slow
def test_two_processes_are_two_ranks_that_lmms_eval_can_gather(checkpoint):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(checkpoint)], text=True, stdout=subprocess.PIPE,
            env={**shared, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]  # fmt: skip
    said = [json.loads(one.communicate(timeout=120)[0].splitlines()[-1]) for one in started]
    assert said == [[0, 2, [1, 2]], [1, 2, [1, 2]]]


def _sampling(model) -> SimpleNamespace:
    first = model.task_dict["pope"]["test"][0]
    content = [{"type": "image", "url": first[0]}, {"type": "text", "text": "?"}]
    return SimpleNamespace(
        args=("", lambda document: [{"role": "user", "content": content}], {"temperature": 0.7}, 0, "pope", "test")
    )


def test_the_entry_point_is_declared():
    declared = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text()
    assert '[project.entry-points."lmms_eval.models"]\ncommvlm = "commvlm.app.lmms:manifest"' in declared
    for found in entry_points(group="lmms_eval.models", name="commvlm"):
        assert found.value == "commvlm.app.lmms:manifest"
