"""Batches: padded rows, packed rows equal to separate ones, prompts, and what is refused."""

import pickle
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from commvlm.data.boxes import PadSquare
from commvlm.data.collate import Collator
from commvlm.data.dialogue import CHAT_TEMPLATE, IGNORED, encode, encode_prompt, image_id_of
from commvlm.data.example import Example, Turn
from commvlm.data.mixture import Mixture, Source
from commvlm.data.packing import pack, packed_rows
from commvlm.data.templates import SYSTEM, instruct
from commvlm.model.processing import CommImageProcessor

N = 6


def made_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SYSTEM] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=CHAT_TEMPLATE,
    )


TOKENIZER = made_tokenizer()


class Pixels:
    """A real, tiny image processor: each picture squeezed to 2 x 2, as numbers in [0, 1]. Counts what it was given."""

    def __init__(self):
        self.seen = 0

    def __call__(self, *, images, return_tensors):
        assert return_tensors == "pt"
        self.seen += len(images)
        rows = [np.asarray(image.resize((2, 2)), dtype=np.float32).ravel() / 255 for image in images]
        return {"pixel_values": torch.from_numpy(np.stack(rows))}


@pytest.fixture
def collator():
    return Collator(TOKENIZER, Pixels(), N)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{n}.png" for n in range(4)]
    for n, path in enumerate(paths):
        Image.new("RGB", (64, 48), (60 * n, 10, 20)).save(path)
    return paths


BOX = (8.0, 4.0, 40.0, 30.0)


def example(id, image, question, answer, *more):
    slot = "" if image is None else "<image>\n"
    turns = (Turn(f"{slot}{question}", answer), *(Turn(q, a) for q, a in more))
    return Example(id, "dialogue", image, turns)


def about(image, tag=""):
    """Dialogues about one image that share more and less of their questions."""
    return [
        example(f"{tag}a", image, "Where is the cup?", "on the left"),
        example(f"{tag}b", image, "Where is the cat?", "nowhere"),
        example(f"{tag}c", image, "Who?", "Ada", ("And who else?", "Bob, and Cy too")),
        example(f"{tag}d", image, "Where is the cup?", "on the right"),  # the same question
        instruct(Example(f"{tag}e", "rec", image, (Turn("the dot", "<boxes>", answer_boxes=((BOX,),)),))),
    ]


def alone(examples):
    return [encode(e, TOKENIZER, image_tokens=N, geometry=PadSquare(64, 48)) for e in examples]


def test_rows_of_one_are_padded_on_the_right(collator, pictures):
    examples = [*about(pictures[0])[:3], example("text", None, "Hi.", "Hello.")]
    batch = collator([[e] for e in examples])
    rows = alone(examples)
    width = max(len(row.ids) for row in rows)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (4, width)
    for place, row in enumerate(rows):
        n = len(row.ids)
        assert batch["input_ids"][place].tolist() == row.ids.tolist() + [TOKENIZER.pad_token_id] * (width - n)
        assert batch["labels"][place].tolist() == row.labels.tolist() + [IGNORED] * (width - n)
        assert batch["attention_mask"][place].tolist() == [1] * n + [0] * (width - n)
        assert batch["position_ids"][place, :n].tolist() == list(range(n))
    assert {k: v.dtype for k, v in batch.items() if k != "pixel_values"} == dict.fromkeys(
        ("input_ids", "labels", "attention_mask", "position_ids"), torch.int64
    )
    assert batch["pixel_values"].shape == (3, 12)  # none for the text


def naive(examples):
    """Packing written out slowly: (ids, labels, positions, who may look at whom), one packed row."""
    rows = alone(examples)
    shared = 0
    while all(
        len(row.ids) > shared + 1
        and row.ids[shared] == rows[0].ids[shared]
        and row.labels[shared] == IGNORED
        and row.labels[shared + 1] == IGNORED
        for row in rows
    ):
        shared += 1
    cells = [(0, p, int(rows[0].ids[p]), IGNORED) for p in range(shared)]
    for number, row in enumerate(rows, start=1):
        cells += [(number, p, int(row.ids[p]), int(row.labels[p])) for p in range(shared, len(row.ids))]
    looks = [[k <= q and cells[k][0] in (0, cells[q][0]) for k in range(len(cells))] for q in range(len(cells))]
    return [c[2] for c in cells], [c[3] for c in cells], [c[1] for c in cells], looks


def test_packed_rows_written_out(collator, pictures):
    groups = [about(pictures[0]), about(pictures[1], "x")[:2], [about(pictures[2])[2]]]
    batch = collator(groups)
    width = batch["input_ids"].shape[1]
    assert batch["attention_mask"].shape == (3, 1, width, width)
    assert batch["attention_mask"].dtype == torch.bool
    for place, group in enumerate(groups):
        ids, labels, positions, looks = naive(group)
        n = len(ids)
        assert batch["input_ids"][place, :n].tolist() == ids
        assert batch["labels"][place, :n].tolist() == labels
        assert batch["position_ids"][place, :n].tolist() == positions
        mask = batch["attention_mask"][place, 0]
        assert mask[:n, :n].tolist() == looks
        assert (batch["input_ids"][place, n:] == TOKENIZER.pad_token_id).all()
        assert (batch["labels"][place, n:] == IGNORED).all()
        assert torch.equal(mask[n:, n:], torch.eye(width - n, dtype=torch.bool))  # padding sees itself only
        assert not mask[n:, :n].any()
        assert not mask[:n, n:].any()
    assert (batch["input_ids"] == TOKENIZER.convert_tokens_to_ids("<image>")).sum(1).tolist() == [N, N, N]
    assert batch["pixel_values"].shape == (3, 12)
    assert collator.image_processor.seen == 3  # once a group


def test_packing_saves_the_shared_prefix(collator, pictures):
    group = about(pictures[0])
    packed, separate = collator([group]), collator([[e] for e in group])
    assert packed["input_ids"].shape[1] < 0.6 * separate["attention_mask"].sum()
    assert (packed["labels"] != IGNORED).sum() == (separate["labels"] != IGNORED).sum()


SMALL = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}
LANGUAGE_MODELS = {
    "llama": lambda **kw: LlamaForCausalLM(LlamaConfig(**SMALL, **kw)),
    "qwen3": lambda **kw: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=8, **kw)),
}


def summed_loss(model, batch):
    mask = batch["attention_mask"]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    logits = model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=batch["position_ids"]).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("with_images", [True, False])
def test_packed_losses_and_gradients_are_those_of_separate_rows(collator, pictures, name, attention, with_images):
    torch.manual_seed(0)
    model = LANGUAGE_MODELS[name](attn_implementation=attention)
    for parameter in model.parameters():  # larger weights than the library's start, so that attention matters
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    groups = [about(pictures[0] if with_images else None), about(pictures[1] if with_images else None, "x")[1:3]]
    if not with_images:
        groups = [group[:-1] for group in groups]  # a box needs its image
    packed = collator(groups)
    results = []
    for batches in ([packed], [collator([[e]]) for group in groups for e in group]):
        model.zero_grad()
        loss = torch.stack([summed_loss(model, batch) for batch in batches]).sum()
        loss.backward()
        results.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (packed_loss, packed_grad), (loss, grad) = results
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(packed_grad, grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()))
    blurred = packed | {"attention_mask": torch.ones_like(packed["attention_mask"]).tril()}
    assert abs(summed_loss(model, blurred).item() - loss) > 1e-3 * abs(loss)  # the walls between branches do matter


def test_a_joined_row_holds_what_separate_rows_hold(pictures):
    """segments cut the one row back into images and dialogues; there is no padding and no mask."""
    groups = [about(pictures[0]), about(pictures[1], "x")[:2], about(pictures[2], "y")[:1]]
    batch = Collator(TOKENIZER, Pixels(), N, layout="joined")(groups)
    assert "attention_mask" not in batch
    assert [len(image) - 1 for image in batch["segments"]] == [5, 2, 1]
    width = sum(map(sum, batch["segments"]))
    assert {batch[key].shape for key in ("input_ids", "labels", "position_ids")} == {(1, width)}
    start = 0
    for group, (p, *rests) in zip(groups, batch["segments"], strict=True):
        head, at = slice(start, start + p), start + p
        assert (batch["labels"][0, head] == IGNORED).all()
        for row, rest in zip(alone(group), rests, strict=True):
            ids, places = (
                torch.cat([batch[key][0, head], batch[key][0, at : at + rest]]) for key in ("input_ids", "position_ids")
            )
            assert ids.tolist() == row.ids.tolist()
            assert places.tolist() == list(range(p + rest))
            assert batch["labels"][0, at : at + rest].tolist() == row.labels[p:].tolist()
            assert batch["labels"][0, at] == IGNORED  # it would be predicted from the branch before it
            at += rest
        start += p + sum(rests)
    assert start == width
    assert batch["pixel_values"].shape == (3, 12)
    with pytest.raises(ValueError, match="no layout 'rows'; layouts: mask, joined"):
        Collator(TOKENIZER, Pixels(), N, layout="rows")


def test_equal_examples_can_be_packed(collator, pictures):
    one = about(pictures[0])[0]
    batch = collator([[one, one, one]])
    supervised = [i for i in batch["labels"][0].tolist() if i != IGNORED]
    expected = [i for i in alone([one])[0].labels.tolist() if i != IGNORED]
    assert supervised == expected * 3


def test_text_only_groups_share_their_frame(collator):
    batch = collator([[example("a", None, "Hi.", "Hello."), example("b", None, "Ho.", "Hey.")]])
    assert "pixel_values" not in batch
    ids, labels, positions, _ = naive([example("a", None, "Hi.", "Hello."), example("b", None, "Ho.", "Hey.")])
    assert batch["input_ids"].tolist() == [ids]
    assert batch["labels"].tolist() == [labels]
    assert batch["position_ids"].tolist() == [positions]


def test_prompts_are_padded_on_the_left(collator, pictures):
    examples = [*about(pictures[1])[:3], example("text", None, "Hi.", ""), about(pictures[0])[4]]
    batch = collator.prompt_batch(examples)
    width = batch["input_ids"].shape[1]
    for place, e in enumerate(examples):
        ids = encode_prompt(e, TOKENIZER, image_tokens=N, geometry=PadSquare(64, 48)).tolist()
        pad = width - len(ids)
        assert batch["input_ids"][place].tolist() == [TOKENIZER.pad_token_id] * pad + ids
        assert batch["attention_mask"][place].tolist() == [0] * pad + [1] * len(ids)
        assert str(TOKENIZER.decode(ids)).endswith("ASSISTANT:")
    assert collator.image_processor.seen == 2  # three of the examples show one picture
    red = (batch["pixel_values"][:, 0] * 255).round().tolist()
    assert red == [60, 60, 60, 0]


def test_pixels_follow_the_rows(collator, pictures):
    batch = collator([[about(pictures[n])[0]] for n in (2, 0, 2, 1)])
    assert (batch["pixel_values"][:, 0] * 255).round().tolist() == [120, 0, 120, 60]


def test_with_the_models_own_image_processor(pictures):
    """Its geometry is the one that boxes are written for: the picture in the middle of a white square."""
    encoders = [{"name": "a", "size": 16, "mean": [0.0] * 3, "std": [1.0] * 3}]
    collator = Collator(TOKENIZER, CommImageProcessor(encoders=encoders), N)
    batch = collator([about(pictures[3]), about(pictures[1])])
    assert batch["pixel_values"].shape == (2, 3 * 16 * 16)
    red = batch["pixel_values"][0].reshape(3, 16, 16)[0]
    assert red[:2].min() > 0.9  # 8 of 64 rows are padding: 2 of 16
    assert (red[4:-4] * 255 - 180).abs().max() < 2


def test_boxes_take_the_images_own_size(collator, pictures):
    raw = Example(
        "r",
        "rec",
        pictures[0],
        (Turn("the dot", "<boxes>", answer_boxes=((BOX,),)),),
        facts={"width": 64, "height": 48},
    )
    text = TOKENIZER.decode(collator([[instruct(raw)]])["input_ids"][0])
    assert "[0.125,0.188,0.625,0.594]</s>" in text  # (4 + 8) / 64 = .1875, (30 + 8) / 64 = .59375
    resized = instruct(replace(raw, facts={"width": 640, "height": 480}))
    with pytest.raises(ValueError, match=r"example r: its boxes are for an image of 640 x 480 pixels, .* 64 x 48"):
        collator([[resized]])


def test_too_long_examples_are_refused_with_both_numbers(pictures):
    one = about(pictures[0])[0]
    length = len(alone([one])[0].ids)
    assert Collator(TOKENIZER, Pixels(), N, max_length=length)([[one]])["input_ids"].shape == (1, length)
    short = Collator(TOKENIZER, Pixels(), N, max_length=length - 1)
    with pytest.raises(ValueError, match=rf"example a: {length} tokens .* max_length {length - 1}"):
        short([[one]])
    with pytest.raises(ValueError, match=r"example a: .* max_length 9"):
        Collator(TOKENIZER, Pixels(), N, max_length=9).prompt_batch([one])


def test_refusals_name_the_example(collator, pictures, tmp_path):
    one, other = about(pictures[0])[0], about(pictures[1], "x")[1]
    with pytest.raises(ValueError, match=r"example xb: shows .*1\.png, the first of its group shows .*0\.png"):
        collator([[one, other]])
    with pytest.raises(ValueError, match=r"example silent: has no turns, .* nothing to supervise"):
        collator([[replace(one, id="silent", turns=())]])
    with pytest.raises(ValueError, match="group of the batch is empty"):
        collator([[one], []])
    with pytest.raises(ValueError, match="batch is empty"):
        collator([])
    late = [Example(f"late{n}", "dialogue", pictures[0], (Turn(f"{w} <image>", "x"),)) for n, w in enumerate("pq")]
    with pytest.raises(ValueError, match="examples late0, late1: differ before their image"):
        collator([late])
    with pytest.raises(ValueError, match="no such image file"):
        collator([[replace(one, image=tmp_path / "gone.png")]])


def test_a_tokenizer_without_padding(pictures):
    bare = made_tokenizer()
    bare.pad_token = None
    group = about(pictures[0])[:2]
    with_pad = Collator(TOKENIZER, Pixels(), N)([[e] for e in group])
    without = Collator(bare, Pixels(), N)([[e] for e in group])
    kept = with_pad["attention_mask"].bool()
    assert torch.equal(without["attention_mask"], with_pad["attention_mask"])
    assert torch.equal(without["input_ids"][kept], with_pad["input_ids"][kept])
    assert torch.equal(without["labels"], with_pad["labels"])  # an end token as padding is not supervised


def test_from_mixture_through_a_data_loader(pictures):
    """As the training loop uses it; the collator goes through pickle as it does to a worker."""
    raw = [Example(f"{p.stem}-{n}", "vqa", p, (Turn(f"q{n}?", f"a{n}"),)) for p in pictures for n in range(5)]
    mixture = Mixture([Source("s", raw)], seed=0, length=6, group=3)
    collator = pickle.loads(pickle.dumps(Collator(TOKENIZER, Pixels(), N)))
    batches = list(torch.utils.data.DataLoader(mixture, batch_size=2, collate_fn=collator))
    assert len(batches) == 3
    for place, batch in enumerate(batches):
        again = collator([mixture[2 * place], mixture[2 * place + 1]])
        assert batch.keys() == again.keys()
        assert all(torch.equal(batch[key], again[key]) for key in batch)
        assert batch["pixel_values"].shape == (2, 12)


def test_packing_grows_with_the_questions_and_no_faster(pictures):
    """Calls of functions, of Python's own and of libraries': no token, and no pair of questions, costs any of its own."""

    def calls(count: int, words: int) -> int:
        group = [
            example(str(n), pictures[0], f"Where is thing number {n}?", " ".join(["left"] * words))
            for n in range(count)
        ]
        rows = list(zip(group, alone(group), strict=True))
        image_id, made = image_id_of(TOKENIZER), 0

        def count_one(frame: object, event: str, arg: object) -> None:
            nonlocal made
            made += event in ("call", "c_call")

        sys.setprofile(count_one)
        try:
            packed_rows([pack(rows, image_id=image_id)], pad=0)
        finally:
            sys.setprofile(None)
        return made

    calls(10, 4)  # whatever is made once
    assert calls(10, 40) <= 1.2 * calls(10, 4)
    assert calls(40, 4) <= 4.4 * calls(10, 4)
