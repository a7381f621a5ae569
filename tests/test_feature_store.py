"""The store of frozen features: what is read is what a forward hook sees, and nothing stale is ever read."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_train import largest_file

from commvlm.model import feature_writer, vision
from commvlm.model.feature_store import FeatureStore, image_key
from commvlm.model.feature_writer import store_features
from commvlm.model.frozen import FrozenEncoder, difference, open_frozen, weight_hashes
from commvlm.model.spec import EncoderSpec
from commvlm.model.stored_pixels import StoredPixels, stored_pixels
from commvlm.train.assemble import assemble, located
from commvlm.train.features import store_recipe
from commvlm.train.run import train


def picture(seed: int, width: int = 60, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def clip(layers: object = "all", **settings: object) -> FrozenEncoder:
    return open_frozen(EncoderSpec("clip", located("micro:clip"), layers=layers, **settings))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [picture(seed) for seed in range(7)]


@pytest.fixture(scope="module")
def whole(images: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """All layers of CLIP in float32."""
    return store_features(tmp_path_factory.mktemp("features") / "clip", clip(), images, kept="fp32", batch=3)


def hooked(source: FrozenEncoder, image: Image.Image, layer: int) -> torch.Tensor:
    """The patch tokens of one block, seen by a hook of this test's own, on pixels made by hand."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (255, 255, 255))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    mean, std = np.array(source.images.encoders[0]["mean"]), np.array(source.images.encoders[0]["std"])
    pixels = torch.from_numpy(((np.asarray(square) / 255 - mean) / std).transpose(2, 0, 1)[None]).float()
    seen = []
    block = source.encoder.encoder.layers[layer - 1]  # type: ignore[union-attr,index]
    handle = block.register_forward_hook(lambda _m, _i, output: seen.append(output))  # type: ignore[union-attr]
    with torch.no_grad():
        source.encoder(pixel_values=pixels)
    handle.remove()
    state = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return state[0, 1:] if state.ndim == 3 else state[1:]


def test_what_is_read_is_what_a_hook_sees(whole, images):
    source = clip()
    keys = [image_key(image) for image in images]
    for layer in (1, 5, 8):
        read = whole.layer(layer, [keys[4], keys[0]])
        torch.testing.assert_close(read[0], hooked(source, images[4], layer), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(read[1], hooked(source, images[0], layer), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(whole.rows([keys[4]], [layer])[0, 0], read[0], rtol=0, atol=0)
    some = whole.rows(keys[2:4], [3, 7])
    torch.testing.assert_close(some[1, 1], whole.layer(7, [keys[3]])[0], rtol=0, atol=0)


def test_the_batch_changes_nothing_and_an_image_is_kept_once(whole, images, tmp_path):
    other = store_features(tmp_path / "clip", clip(), [*images, *images[:3]], kept="fp32", batch=1)
    assert len(other) == len(whole) == 7
    keys = [image_key(image) for image in images]
    torch.testing.assert_close(other.rows(keys), whole.rows(keys), rtol=1e-5, atol=1e-5)


def test_bf16_and_int8_keep_to_the_error_that_they_state(whole, images, tmp_path):
    keys = [image_key(image) for image in images]
    exact = whole.rows(keys)
    halves = store_features(tmp_path / "bf16", clip(), images, kept="bf16").rows(keys)
    assert ((halves - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()
    bytes_ = store_features(tmp_path / "int8", clip(), images, kept="int8").rows(keys)
    bound = exact.abs().amax(2, keepdim=True) / 254
    assert ((bytes_ - exact).abs() <= bound * 1.001 + 1e-6).all()
    assert (bytes_ - exact).abs().max() > 0.2 * bound.max()  # the bound is no empty promise
    size = {name: sum(p.stat().st_size for p in (tmp_path / name).glob("shard-*")) for name in ("bf16", "int8")}
    assert size["int8"] < 0.6 * size["bf16"]


def test_a_deeper_store_serves_an_encoder_that_was_cut(whole):
    cut = clip([2, 5])
    assert len(weight_hashes(cut.encoder)["blocks"]) == 5
    whole.check(cut)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.encoder.encoder.layers[3].mlp.fc1.weight[0, 0].add_(1e-3), "block 4"),
        (lambda s: s.encoder.embeddings.patch_embedding.weight[0, 0].add_(1e-3), "other weights: "),
        (lambda s: s.images.encoders[0].update(mean=[0.5, 0.5, 0.5]), "mean"),
        (lambda s: s.images.encoders[0].update(size=128), "image_size"),
        (lambda s: setattr(s.images, "geometry", "stretch"), "geometry"),
        (lambda s: setattr(s.images, "pad_color", [0, 0, 0]), "pad_color"),
    ],
)
def test_what_was_made_otherwise_is_refused_in_one_line(whole, images, change, said):
    source = clip()
    with torch.no_grad():
        change(source)
    for act in (lambda: whole.check(source), lambda: store_features(whole.folder, source, images, kept="fp32")):
        with pytest.raises(ValueError, match=said) as error:
            act()
        assert "\n" not in str(error.value)


def test_other_settings_of_the_same_folder_are_refused(whole, images):
    with pytest.raises(ValueError, match="kept fp32, not int8"):
        store_features(whole.folder, clip(), images, kept="int8")
    assert len(store_features(whole.folder, clip([1, 2]), images, kept="fp32")) == 7  # nothing lacks
    with pytest.raises(ValueError, match="lacks images and holds layers"):
        store_features(whole.folder, clip([1, 2]), [picture(99)], kept="fp32")
    with pytest.raises(ValueError, match="unknown kept 'int4'"):
        store_features(whole.folder, clip(), images, kept="int4")


def test_an_image_that_is_not_there_is_said(whole):
    with pytest.raises(ValueError, match="has no features of an image"):
        whole.rows([image_key(picture(99))])
    with pytest.raises(ValueError, match="no layer 9"):
        whole.layer(9, [])


def test_a_folder_of_something_else_is_left_alone(tmp_path, images):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        store_features(tmp_path, clip([1]), images)
    with pytest.raises(ValueError, match="no store of features"):
        FeatureStore(tmp_path)


def test_it_pickles_as_its_path(whole, images):
    again = pickle.loads(pickle.dumps(whole))
    keys = [image_key(images[0])]
    torch.testing.assert_close(again.rows(keys), whole.rows(keys), rtol=0, atol=0)


def counted(source: FrozenEncoder) -> list[int]:
    """Images that the encoder is shown from now on."""
    seen: list[int] = []
    source.encoder.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    return seen


def test_equal_weights_that_are_used_otherwise_are_another_encoder(images, whole):
    """OpenAI's CLIP with gelu in place of quick_gelu, say: every weight is there, and every feature another."""
    other = clip()
    assert difference(whole.identity, other.identity()) is None
    other.encoder.config.hidden_act = "quick_gelu"
    assert difference(whole.identity, other.identity()) == "hidden_act gelu there, quick_gelu now"
    older = {name: value for name, value in whole.identity.items() if name != "computation"}
    assert difference(older, clip().identity()) is None


def test_a_stopped_pass_goes_on_behind_its_last_whole_shard(tmp_path, images, whole, monkeypatch):
    monkeypatch.setattr(feature_writer, "SHARD_BYTES", 2 * 64 * 128 * 4)  # two images of one layer

    def broken():
        yield from images[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store_features(tmp_path / "clip", clip([3]), broken(), kept="fp32", batch=1)
    assert len(FeatureStore(tmp_path / "clip")) == 4
    source = clip([3])
    seen = counted(source)
    store = store_features(tmp_path / "clip", source, images, kept="fp32", batch=1)
    assert sum(seen) == 3
    keys = [image_key(image) for image in images]
    torch.testing.assert_close(store.rows(keys)[:, 0], whole.layer(3, keys), rtol=1e-5, atol=1e-5)


def test_a_killed_pass_leaves_whole_shards_only(tmp_path, monkeypatch):
    """kill -9 in the middle of a pass; what is there can be read, and the pass goes on."""
    monkeypatch.setattr(feature_writer, "SHARD_BYTES", 2 * 64 * 128 * 4)
    folder, source = tmp_path / "clip", clip([1])
    endless = (picture(seed) for seed in range(100_000))
    process = multiprocessing.get_context("fork").Process(
        target=store_features, args=(folder, source, endless), kwargs={"kept": "fp32", "batch": 1}
    )
    process.start()
    deadline = time.monotonic() + 60
    while len(list(folder.glob("shard-*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    count = len(FeatureStore(folder)) + 3
    assert count >= 9
    again = store_features(folder, source, (picture(seed) for seed in range(count)), kept="fp32")
    assert len(again) == count
    assert not list(folder.glob("*.part"))


def test_a_damaged_shard_is_said(tmp_path, images):
    store = store_features(tmp_path / "clip", clip([1]), images)
    shard = next(store.folder.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged; remove it"):
        FeatureStore(store.folder)
    shard.unlink()
    assert len(store_features(tmp_path / "clip", clip([1]), images)) == 7


def test_a_full_disk_is_one_line_and_leaves_nothing_broken(tmp_path, images):
    with largest_file(50_000), pytest.raises(OSError, match="the disk is full") as error:
        store_features(tmp_path / "clip", clip(), images)
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "clip").glob("*shard*"))
    assert len(store_features(tmp_path / "clip", clip(), images)) == 7


def test_two_writers_do_not_meet(tmp_path, images):
    with feature_writer._locked(tmp_path / "clip"), pytest.raises(ValueError, match="another process is writing"):
        store_features(tmp_path / "clip", clip([1]), images)


def test_the_random_twin_is_another_encoder(whole):
    twin = clip(weights="random")
    with pytest.raises(ValueError, match="other weights"):
        whole.check(twin)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


STAGE = [{"name": "align", "steps": 3, "batch": 2, "trains": {"merge": 1e-3, "align": 1e-3, "project": 1e-3}}]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_from_the_store_gives_the_losses_of_the_encoders_in_the_loop(small, tmp_path, precision, monkeypatch):
    """Features are computed as training computes them, so what is kept whole gives the same losses to the last digits; no
    encoder runs."""
    options = ["--train.precision", precision, "--train.log_every", "1", "--train.visual_scale", "null"]
    recipe = small(*options, stages=STAGE)
    store_recipe(recipe, tmp_path / "features", layers="all", kept="fp32")
    train(recipe, tmp_path / "live")

    def never(*args, **kwargs):
        raise AssertionError("an encoder ran")

    monkeypatch.setattr(vision, "stream_layers", never)
    train(small(*options, "--train.features", str(tmp_path / "features"), stages=STAGE), tmp_path / "stored")
    live, read = losses(tmp_path / "live"), losses(tmp_path / "stored")
    assert len(live) == 3
    np.testing.assert_allclose(read, live, rtol=1e-6)


def test_training_refuses_features_of_another_encoder(small, tmp_path):
    store_recipe(small("--model.encoders.clip.weights", "random"), tmp_path / "features")
    with pytest.raises(ValueError, match="features of another encoder than 'clip'"):
        train(small("--train.features", str(tmp_path / "features")), tmp_path / "run")


def test_stored_features_stand_where_pixels_do(small, tmp_path, images):
    """The visual tokens of a model, from pixels and from a store; a single-layer branch included."""
    recipe = small("--model.encoders.clip.layers", "[2]", "--model.encoders.clip.merge", "mean")
    model, processor = assemble(recipe.model)
    vision = model.model.vision_tower
    for name, layers in (("clip", "all"), ("dinov2", "all")):
        source = open_frozen(EncoderSpec(name, located(f"micro:{name}"), layers=layers))
        store_features(tmp_path / name, source, images, kept="fp32")
    reading = stored_pixels(tmp_path, vision, processor.image_processor)
    with torch.no_grad():
        given = processor.image_processor.preprocess(images, return_tensors="pt")["pixel_values"]
        expected = vision(given).last_hidden_state
        rows = reading(images=images)["pixel_values"]
        assert rows.shape == (7, 1, 3 * 64 * 128)
        torch.testing.assert_close(vision(rows).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
        off = vision(given, knock_out="dinov2").last_hidden_state
        torch.testing.assert_close(vision(rows, knock_out="dinov2").last_hidden_state, off, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="stored features are"):
        vision(rows[..., :-1])
    assert isinstance(pickle.loads(pickle.dumps(reading)), StoredPixels)
