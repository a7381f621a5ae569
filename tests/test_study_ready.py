"""What a grid on real checkpoints needs is looked for before its first run."""

import json
import shutil

import pytest
import yaml
from transformers import LlamaConfig

from commvlm.cli import main
from commvlm.train.assemble import load_tokenizer, located


@pytest.fixture
def mine(world, tmp_path):
    """A scale on data of one's own, with an encoder's folder of one's own."""
    folder = shutil.copytree(located("micro:mae"), tmp_path / "mine")
    scale = {
        "name": "mine", "recipe": "micro", "pair": ["clip", "mine"], "layers": [8], "seeds": 1, "tasks": ["pope"],
        "encoders": [{"name": "clip", "checkpoint": "micro:clip"}, {"name": "mine", "checkpoint": str(folder)}],
        "options": {
            "train.stages": [{"name": "align", "steps": 2, "batch": 2, "trains": {"project": 1e-3}}],
            "evaluate.max_new_tokens": 2,
        },
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(scale))
    data = shutil.copytree(world, tmp_path / "data")
    words = ["study", "figure-2", "--scale", str(tmp_path / "mine.yaml"), "--data", str(data)]
    return folder, data, [*words, "--out", str(tmp_path / "out")]


def test_weights_that_are_not_there_are_told_before_anything_starts(mine, tmp_path, capsys):
    folder, _, words = mine
    (folder / "model.safetensors").unlink()
    assert main(words) == 2
    assert f"the weights of '{folder}' cannot be had" in capsys.readouterr().err
    assert not (tmp_path / "out" / "jobs").exists()


def test_data_are_prepared_before_the_first_run(mine, monkeypatch, capsys):
    _, data, words = mine
    found = []

    def first_run(*given, **more):
        found.extend(path.parent.name.rpartition("-")[0] for path in (data / ".prepared").glob("*/meta.json"))
        return []

    monkeypatch.setattr("commvlm.study.study.go_over", first_run)
    assert main(words) == 2
    assert "no run is done" in capsys.readouterr().err
    assert set(found) >= {"rec", "vqa", "pope-random"}


def test_a_tokenizer_that_is_a_sentencepiece_model_alone(tmp_path):
    """As Vicuna's: the ids are the model's own."""
    import sentencepiece

    said = ["the red star is left of the blue circle", "a chat between a curious user and an assistant"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(said), model_prefix=str(tmp_path / "tokenizer"), vocab_size=60, model_type="bpe",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    LlamaConfig().save_pretrained(tmp_path)
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    found = load_tokenizer(str(tmp_path))
    for text in said[:2]:
        assert found(text, add_special_tokens=False).input_ids == own.encode(text)
