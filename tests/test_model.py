"""COMM as a whole: what learns, what is counted, what comes out the same whatever the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_model_tiny import comm, comm_specs, enliven, language_model_folder, pixels, prompt
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from commvlm.model import PARTS, CommForConditionalGeneration, CommModel, EncoderSpec, build_model

FAMILIES = ["llama", "qwen3"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def models(root) -> dict[str, CommForConditionalGeneration]:
    return {family: comm(root, language_model=family) for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def model(request, models) -> CommForConditionalGeneration:
    return models[request.param]


def labels_of(model: CommForConditionalGeneration, ids: torch.Tensor) -> torch.Tensor:
    """The last two tokens are supervised."""
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    return labels


def test_every_trained_parameter_gets_a_gradient_and_encoders_get_none(root):
    model = comm(root).train()
    ids = prompt(model)
    model(input_ids=ids, pixel_values=pixels(model), labels=labels_of(model, ids)).loss.backward()
    parts = model.parts()
    assert list(parts) == list(PARTS)
    # The one row that never counts is the placeholder's embedding, so gradients are looked at per parameter.
    for part in ("merge", "align", "project", "language_model"):
        for name, parameter in parts[part].named_parameters():
            assert parameter.grad is not None, f"{part} {name}"
            assert parameter.grad.abs().max() > 0, f"{part} {name}"
    assert all(p.grad is None and not p.requires_grad for p in parts["encoders"].parameters())
    assert not any(m.training for encoder in parts["encoders"] for m in encoder.modules())


def test_encoders_are_not_in_the_graph(root):
    model = comm(root).train()
    parts = model.parts()
    for parameter in parts["encoders"].parameters():
        parameter.requires_grad_(True)  # even so
    features = model.get_image_features(pixels(model), return_dict=True)
    reached, nodes, frozen = set(), [features.pooler_output[0].grad_fn], {id(p) for p in parts["encoders"].parameters()}
    while nodes:
        node = nodes.pop()
        if node is None or node in reached:
            continue
        reached.add(node)
        assert id(getattr(node, "variable", None)) not in frozen
        nodes += [following for following, _ in node.next_functions]
    assert reached
    assert all(not s.requires_grad for states in model.model.vision_tower.read(pixels(model)).values() for s in states)


def test_the_parts_hold_every_parameter_exactly_once(model):
    held = [id(p) for part in model.parts().values() for p in part.parameters()]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters()}


def test_visual_tokens_are_project_of_concat_of_align_of_merge(model):
    row = pixels(model, 2)
    vision = model.model.vision_tower
    images = row.view(2, 2, 3, 32, 32)
    merged = []
    for index, (name, layers) in enumerate((("clip", [1, 2, 3, 4]), ("dino", [3, 4]))):
        with torch.no_grad():
            hidden = vision.encoder(name)(pixel_values=images[:, index], output_hidden_states=True).hidden_states
        merge = vision.branches[name].merge
        weights = merge.logits.softmax(0)
        merged.append(
            sum(
                w * merge.linears[i](merge.norms[i](hidden[k][:, 1:]))
                for i, (w, k) in enumerate(zip(weights, layers, strict=True))
            )
        )
    merged[1] = vision.branches["dino"].align(merged[1])
    fused = torch.cat(merged, dim=-1)
    output = model.get_image_features(row, return_dict=True)
    assert fused.shape == (2, model.config.num_image_tokens, 32 + 24) == (2, 16, model.config.vision_config.hidden_size)
    torch.testing.assert_close(output.last_hidden_state, fused)
    torch.testing.assert_close(torch.stack(output.pooler_output), model.model.multi_modal_projector(fused))


def test_visual_tokens_are_written_over_the_placeholders(model):
    """Against the bare language model, given the embeddings put together by hand."""
    ids, row = prompt(model, before=2, after=3), pixels(model)
    embeds = model.get_input_embeddings()(ids)
    embeds[0, 2:18] = model.get_image_features(row, return_dict=True).pooler_output[0]
    by_hand = model.lm_head(model.model.language_model(inputs_embeds=embeds).last_hidden_state)
    torch.testing.assert_close(model(input_ids=ids, pixel_values=row).logits, by_hand)


def test_changing_the_image_changes_the_output_and_only_after_it(model):
    ids = prompt(model, before=2)
    first, second = (model(input_ids=ids, pixel_values=pixels(model, seed=seed)).logits for seed in (0, 1))
    assert torch.equal(first[:, :2], second[:, :2])
    assert (first[:, -1] - second[:, -1]).abs().max() > 1e-2


def test_each_encoder_is_listened_to(model):
    """Another picture for one encoder alone changes the answer: no encoder reads the other's pixels."""
    ids, row = prompt(model), pixels(model)
    baseline = model(input_ids=ids, pixel_values=row).logits
    half = row.shape[1] // 2
    for part in (slice(0, half), slice(half, None)):
        changed = row.clone()
        changed[:, part] = -changed[:, part]
        assert (model(input_ids=ids, pixel_values=changed).logits - baseline)[:, -1].abs().max() > 1e-3


def test_a_batch_of_eight_is_eight_singles(model):
    ids = torch.cat([prompt(model, seed=seed) for seed in range(8)])
    rows = pixels(model, 8)
    batch = model(input_ids=ids, pixel_values=rows).logits
    for index in range(8):
        single = model(input_ids=ids[index : index + 1], pixel_values=rows[index : index + 1]).logits
        torch.testing.assert_close(batch[index : index + 1], single, rtol=1e-4, atol=1e-4)


def test_loss_is_the_mean_over_supervised_tokens_or_their_sum_over_a_given_number(model):
    ids, row = prompt(model), pixels(model)
    output = model(input_ids=ids, pixel_values=row, labels=labels_of(model, ids))
    logs = output.logits[0, -3:-1].log_softmax(-1)
    sum_by_hand = -(logs[0, ids[0, -2]] + logs[1, ids[0, -1]])
    torch.testing.assert_close(output.loss, sum_by_hand / 2)
    shared = model(input_ids=ids, pixel_values=row, labels=labels_of(model, ids), num_items_in_batch=7).loss
    torch.testing.assert_close(shared, sum_by_hand / 7)


def test_logits_to_keep(model):
    ids, row = prompt(model), pixels(model)
    every = model(input_ids=ids, pixel_values=row).logits
    torch.testing.assert_close(model(input_ids=ids, pixel_values=row, logits_to_keep=1).logits, every[:, -1:])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("autocast", [False, True])
def test_packed_dialogues_of_one_image_equal_separate_ones(root, attention, autocast):
    """Two questions share one image: each sees the image and itself, at the positions that it would have alone."""
    model = comm(root, language_model="qwen3")
    model.set_attn_implementation(attention)
    row = pixels(model)
    prefix = prompt(model, before=2, after=0)
    one, two = torch.tensor([[9, 10, 11]]), torch.tensor([[12, 13, 14, 15]])
    p, a, b = prefix.shape[1], one.shape[1], two.shape[1]
    look = torch.ones(p + a + b, p + a + b, dtype=torch.bool).tril()
    look[p + a :, p : p + a] = False
    positions = torch.cat([torch.arange(p + a), torch.arange(p, p + b)])[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        packed = model(
            input_ids=torch.cat([prefix, one, two], dim=1),
            pixel_values=row,
            attention_mask=look[None, None],
            position_ids=positions,
        ).logits.float()
        alone = [
            model(input_ids=torch.cat([prefix, text], dim=1), pixel_values=row).logits.float() for text in (one, two)
        ]
        unmasked = model(input_ids=torch.cat([prefix, one, two], dim=1), pixel_values=row).logits.float()
    tolerance = 0.15 if autocast else 1e-5
    torch.testing.assert_close(packed[:, : p + a], alone[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(packed[:, p + a :], alone[1][:, p:], rtol=tolerance, atol=tolerance)
    assert (unmasked[:, p + a :] - alone[1][:, p:]).abs().max() > 0.3  # the mask is what made them equal


def test_a_row_of_padding_that_may_look_nowhere_is_no_nan(root):
    model = comm(root)
    ids = prompt(model)
    look = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    look[-1] = False
    logits = model(input_ids=ids, pixel_values=pixels(model), attention_mask=look[None, None]).logits
    assert torch.isfinite(logits).all()


def test_another_number_of_placeholders_is_an_error_with_both_numbers(model):
    ids = prompt(model)
    with pytest.raises(ValueError, match="15 image placeholders, but 1 images give 16 visual tokens"):
        model(input_ids=ids[:, 3:], pixel_values=pixels(model))
    with pytest.raises(ValueError, match="16 image placeholders, but 2 images give 32"):
        model(input_ids=ids, pixel_values=pixels(model, 2))


def test_pixels_of_another_model_are_an_error_with_both_shapes(model):
    with pytest.raises(ValueError, match=r"\(1, 10\), but the encoders clip, dino need \(images, 6144\)"):
        model(input_ids=prompt(model), pixel_values=torch.zeros(1, 10))


def test_text_alone_goes_through(model):
    ids = torch.tensor([[5, 6, 7]])
    bare = model.lm_head(model.model.language_model(input_ids=ids).last_hidden_state)
    torch.testing.assert_close(model(input_ids=ids).logits, bare)


def test_training_keeps_no_cache_and_answering_does(root):
    model = comm(root)
    asked = {"input_ids": prompt(model), "pixel_values": pixels(model)}
    kept = model.eval()(**asked)
    assert kept.past_key_values.get_seq_length() == asked["input_ids"].shape[1]
    trained = model.train()(**asked)
    assert trained.past_key_values is None
    torch.testing.assert_close(trained.logits, kept.logits)
    assert model(**asked, use_cache=True).past_key_values is not None


def test_gradient_checkpointing_changes_no_gradient(root):
    gradients = []
    for checkpointing in (False, True):
        model = comm(root).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        ids = prompt(model)
        model(input_ids=ids, pixel_values=pixels(model), labels=labels_of(model, ids), use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_layer_weights_name_the_layers(models):
    weights = models["llama"].layer_weights()
    assert {name: list(layers) for name, layers in weights.items()} == {"clip": [1, 2, 3, 4], "dino": [3, 4]}
    assert all(sum(layers.values()) == pytest.approx(1) for layers in weights.values())


def test_new_merges_start_uniform_and_projections_carry_the_signal(root):
    model = build_model(comm_specs(root), language_model=language_model_folder(root))
    assert list(model.layer_weights()["clip"].values()) == pytest.approx([0.25] * 4)
    tokens = torch.stack(model.get_image_features(pixels(model), return_dict=True).pooler_output)
    assert 0.03 < tokens.std() < 3


def test_the_language_model_and_the_encoders_are_the_checkpoints_own(root, model):
    family = model.config.text_config.model_type
    bare = AutoModelForCausalLM.from_pretrained(language_model_folder(root, family))
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(model(input_ids=ids).logits[..., :64], bare(input_ids=ids).logits)
    dino = AutoModel.from_pretrained(comm_specs(root)[1].checkpoint)
    for (name, ours), theirs in zip(
        model.model.vision_tower.encoder("dino").named_parameters(), dino.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def test_the_vocabulary_grows_by_the_placeholder_and_the_head_follows(model):
    assert model.config.image_token_id == 64
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == 65
    tied = model.config.text_config.tie_word_embeddings
    assert (
        (model.get_input_embeddings().weight is model.lm_head.weight)
        == tied
        == (model.config.text_config.model_type == "qwen3")
    )


def test_random_twins_differ_by_seed_alone_and_leave_the_callers_generator(root):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    specs, name = comm_specs(root), language_model_folder(root)
    first, again, other = (build_model(specs, language_model=name, weights="random", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    values, same, different = (m.state_dict() for m in (first, again, other))
    assert all(torch.equal(values[key], same[key]) for key in values)
    encoder = "model.vision_tower.enc_clip.embeddings.patch_embedding.weight"
    assert not torch.equal(values[encoder], different[encoder])


def test_one_encoder_can_be_random_and_the_other_not(root):
    clip, dino = comm_specs(root)
    twin = EncoderSpec("dino", dino.checkpoint, "half", align="mlp", weights="random")
    real = build_model([clip, dino], language_model=language_model_folder(root)).state_dict()
    model = build_model([clip, twin], language_model=language_model_folder(root)).state_dict()
    changed = {key.split(".")[2] for key in real if not torch.equal(real[key], model[key])}
    assert changed == {"enc_dino"}


def test_auto_classes_know_the_model_from_import_alone(models):
    settings = models["llama"].config.to_dict()
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    assert type(AutoModel.from_config(config)) is CommModel


def test_attention_and_dtype_reach_every_part(root):
    model = comm(root)
    model.set_attn_implementation("eager")
    assert {part.config._attn_implementation for part in model.parts()["encoders"]} == {"eager"}
    assert model.model.language_model.config._attn_implementation == "eager"
    half = build_model(comm_specs(root), language_model=language_model_folder(root), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(input_ids=prompt(half), pixel_values=pixels(half)).logits.dtype == torch.bfloat16


def test_enliven_is_no_empty_gesture(root):
    """The tests above compare values; with the library's quiet start some of them could not fail."""
    quiet = build_model(comm_specs(root), language_model=language_model_folder(root))
    before = quiet.layer_weights()["clip"]
    enliven(quiet.model.vision_tower.branches)
    assert quiet.layer_weights()["clip"] != before
