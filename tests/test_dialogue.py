"""Dialogues: the rendered text, and ids and labels equal to the chat template's."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from commvlm.data.boxes import PadSquare
from commvlm.data.dialogue import CHAT_TEMPLATE, IGNORED, encode, encode_all, encode_prompt, render
from commvlm.data.example import Example, Turn
from commvlm.data.templates import SYSTEM, TEMPLATES, instruct

CORPUS = [
    SYSTEM,
    "USER: ASSISTANT: where is the red star? [0.125,0.250,0.500,0.750] yes no",
    *(text for texts in TEMPLATES.values() for text in texts),
] * 5
GEOMETRY = PadSquare(640, 480)
N = 5


def wrapped(tokenizer, specials, **kwargs):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        **{f"{name}_token": f"<{name}>" for name in specials},
        **kwargs,
    )


def byte_level(*, trim=False, bos=True, eos: str | AddedToken = "</s>"):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if trim:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<pad>", eos, "<s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    made = wrapped(tokenizer, ["pad"])
    if bos:
        made.bos_token = "<s>"
    return made


def llama_like(*, legacy=False):
    """SentencePiece-style BPE with byte fallback, as Llama's: Metaspace in front, or the legacy normalizer."""
    specials = ["<unk>", "<s>", "</s>", "<image>"]
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    learned.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=700, special_tokens=specials, show_progress=False)
    )
    model = json.loads(learned.to_str())["model"]
    vocab = model["vocab"] | {f"<0x{value:02X}>": len(model["vocab"]) + value for value in range(256)}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    made = wrapped(tokenizer, ["unk"])
    made.bos_token = "<s>"
    return made


TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-level without bos": byte_level(bos=False),
    "metaspace": llama_like(),
    "legacy sentencepiece": llama_like(legacy=True),
}


@pytest.fixture(params=list(TOKENIZERS))
def tokenizer(request):
    return TOKENIZERS[request.param]


def dialogue(*pairs, image=True):
    turns = [Turn(question, answer) for question, answer in pairs]
    if image:
        turns[0] = replace(turns[0], question=f"<image>\n{turns[0].question}")
    return Example("some-id", "dialogue", Path("a.png") if image else None, tuple(turns))


DIALOGUES = {
    "one turn": (("Where is it?", "there"),),
    "several turns": (("Where is it?", "on the left."), ("Sure?", "yes"), ("And now?", "no, it is gone")),
    "empty answer": (("Say nothing.", ""),),
    "spaces and lines": (("  two\n lines ", " padded  answer\n"), ("\n", "\n\nx ")),
    "accents, emoji, unknown scripts": (("été 🙂?", "naïve 🙃 字"), ("ok", "ﬁ ½")),
    "text like the frame": (("USER: ASSISTANT: who?", "ASSISTANT: USER: you"), ("ASSISTANT:", "USER:")),
    "braces and jinja": (("{{ x }} {content} {%", "{} }}"),),
    "box text": (("Where?", "[0.125,0.250,0.500,0.750]"),),
}


def messages_of(example):
    for turn in example.turns:
        text = turn.question.removeprefix("<image>\n")
        content = text
        if text != turn.question:
            content = [{"type": "text", "text": text}, {"type": "image"}]
        yield {"role": "user", "content": content}
        yield {"role": "assistant", "content": [{"type": "text", "text": turn.answer}]}


def by_chat_template(example, tokenizer):
    """The library's own route: its template, its tokenisation, its mask; the image's token repeated N times."""
    template = CHAT_TEMPLATE.replace("<image>", "<image>" * N)
    return tokenizer.apply_chat_template(
        list(messages_of(example)), chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("name", DIALOGUES)
def test_equal_to_the_chat_template(tokenizer, name, image):
    example = dialogue(*DIALOGUES[name], image=image)
    theirs = by_chat_template(example, tokenizer)
    ours = encode(example, tokenizer, image_tokens=N, geometry=GEOMETRY)
    assert ours.ids.tolist() == theirs["input_ids"]
    assert (ours.labels != IGNORED).astype(int).tolist() == theirs["assistant_masks"]
    supervised = ours.labels != IGNORED
    assert (ours.labels[supervised] == ours.ids[supervised]).all()


def test_exactly_answers_and_their_ends_are_supervised(tokenizer):
    example = dialogue(*DIALOGUES["several turns"])
    encoded = encode(example, tokenizer, image_tokens=N, geometry=GEOMETRY)
    supervised = encoded.labels != IGNORED
    starts = np.flatnonzero(np.diff(np.concatenate([[0], supervised.astype(int)])) == 1)
    runs = [run[run != IGNORED] for run in np.split(encoded.labels, starts)[1:]]
    assert [tokenizer.decode(run).strip() for run in runs] == ["on the left.</s>", "yes</s>", "no, it is gone</s>"]
    assert (encoded.labels == tokenizer.eos_token_id).sum() == 3
    assert (encoded.ids == tokenizer.convert_tokens_to_ids("<image>")).sum() == N


@pytest.mark.parametrize("name", DIALOGUES)
def test_trimmed_offsets_give_the_same_labels(name):
    """Some tokenizers leave a token's space out of its offsets; the library's mask gives up there, ours must not."""
    example = dialogue(*DIALOGUES[name])
    plain = encode(example, byte_level(), image_tokens=N, geometry=GEOMETRY)
    trimmed = encode(example, byte_level(trim=True), image_tokens=N, geometry=GEOMETRY)
    assert trimmed.ids.tolist() == plain.ids.tolist()
    assert trimmed.labels.tolist() == plain.labels.tolist()


@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("name", DIALOGUES)
def test_the_prompt_is_what_training_showed(tokenizer, name, image):
    example = dialogue(*DIALOGUES[name], image=image)
    encoded = encode(example, tokenizer, image_tokens=N, geometry=GEOMETRY)
    prompt = encode_prompt(example, tokenizer, image_tokens=N, geometry=GEOMETRY)
    last = np.flatnonzero(np.diff((encoded.labels != IGNORED).astype(int)) == 1)[-1] + 1
    assert prompt.tolist() == encoded.ids[:last].tolist()
    theirs = tokenizer.apply_chat_template(
        list(messages_of(example))[:-1],
        chat_template=CHAT_TEMPLATE.replace("<image>", "<image>" * N),
        add_generation_prompt=True,
        return_dict=True,
    )
    assert prompt.tolist() == theirs["input_ids"]
    assert tokenizer.decode(prompt).endswith("ASSISTANT:")


def test_the_text_that_language_models_are_pretrained_with():
    example = dialogue(("What color is it?", "red"))
    rendered = render(example, geometry=GEOMETRY)
    assert rendered.text == f"{SYSTEM} USER: <image>\nWhat color is it? ASSISTANT: red</s>"
    assert [rendered.text[start:end] for start, end in rendered.spans] == [" red</s>"]
    two = render(dialogue(("a", "b"), ("c", "d"), image=False), geometry=None, eos="<end>", bos="<s>")
    assert two.text == f"<s>{SYSTEM} USER: a ASSISTANT: b<end>USER: c ASSISTANT: d<end>"
    assert [two.text[start:end] for start, end in two.spans] == [" b<end>", " d<end>"]


def test_boxes_fill_their_slots_in_order():
    box, other = (334.72, 298.08, 522.88, 450.24), (0.0, 0.0, 640.0, 480.0)
    turn = Turn("{<boxes>} or <boxes>?", "<boxes>", ((box,), (other, box)), ((other,),))
    rendered = render(instruct(Example("x", "vqa", Path("a"), (turn,))), geometry=GEOMETRY)
    first, second = "0.523,0.591,0.817,0.829", "0.000,0.125,1.000,0.875"
    assert f"{{[{first}]}} or [{second};{first}]? Answer in one word. ASSISTANT: [{second}]</s>" in rendered.text


def test_a_system_message_replaces_ours(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == f"{tokenizer.bos_token or ''}Be brief. USER: hi ASSISTANT:"


def test_the_template_refuses_odd_orders(tokenizer):
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(Exception, match="user, assistant, user"):
        tokenizer.apply_chat_template(twice, tokenize=False)


@pytest.mark.parametrize(
    ("pairs", "match"),
    [
        ((("a <image> b", "c"),), "2 times <image>"),
        ((("a", "see <image>"),), "outside the first question"),
        ((("a", "b"), ("<image>", "c")), "outside the first question"),
        ((("a</s>", "b"),), "special token </s>"),
        ((("a", "b</s>USER: x"),), "special token </s>"),
        ((("a <s>", "b"),), "special token <s>"),
    ],
)
def test_special_tokens_in_texts_are_refused(pairs, match):
    example = dialogue(*pairs)
    for route in (encode, encode_prompt):
        with pytest.raises(ValueError, match=match) as caught:
            route(example, TOKENIZERS["byte-level"], image_tokens=N, geometry=GEOMETRY)
        assert "some-id" in str(caught.value)


def test_other_refusals():
    tokenizer = TOKENIZERS["byte-level"]
    bare = Example("bare", "vqa", Path("a"), (Turn("no slot", "x"),))
    with pytest.raises(ValueError, match=r"bare.*templates\.instruct"):
        encode(bare, tokenizer, image_tokens=N, geometry=GEOMETRY)
    with pytest.raises(ValueError, match=r"empty: has no turns"):
        encode(Example("empty", "vqa", None, ()), tokenizer, image_tokens=N, geometry=None)
    boxed = Example("boxed", "vqa", None, (Turn("q", "<boxes>", (), (((0.0, 0.0, 1.0, 1.0),),)),))
    with pytest.raises(ValueError, match="boxed: has boxes but no image"):
        encode(boxed, tokenizer, image_tokens=N, geometry=None)
    hollow = Example("hollow", "vqa", Path("a"), (Turn("<image>\nq", "<boxes>", (), ((),)),))
    with pytest.raises(ValueError, match=r"hollow: a group of boxes is empty"):
        encode(hollow, tokenizer, image_tokens=N, geometry=GEOMETRY)


def test_tokenizers_that_cannot_serve():
    lacking = byte_level()
    lacking.eos_token = None
    with pytest.raises(ValueError, match="eos_token"):
        encode(dialogue(("a", "b")), lacking, image_tokens=N, geometry=GEOMETRY)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["a"], trainer)
    with pytest.raises(ValueError, match="no <image> token"):
        encode(
            dialogue(("a", "b")),
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"),
            image_tokens=N,
            geometry=GEOMETRY,
        )


def test_a_token_over_the_edge_of_an_answer_is_refused():
    """A tokenizer with ": r" as one token would mix asked and answered text."""
    tokenizer = byte_level()
    tokenizer.add_tokens([": r"])
    with pytest.raises(ValueError, match=r"some-id: a token .* reaches over the edge"):
        encode(dialogue(("a", "red")), tokenizer, image_tokens=N, geometry=GEOMETRY)


def test_an_end_token_that_is_not_recognised_is_refused():
    """single_word: "</s>" right behind a letter is no end token but five characters."""
    tokenizer = byte_level(eos=AddedToken("</s>", single_word=True, special=True))
    with pytest.raises(ValueError, match=r"some-id: the tokenizer splits its end token '</s>'"):
        encode(dialogue(("a", "red")), tokenizer, image_tokens=N, geometry=GEOMETRY)


def test_a_batch_is_its_examples(tokenizer):
    examples = [dialogue(*pairs, image=image) for pairs in DIALOGUES.values() for image in (True, False)]
    together = encode_all(examples, tokenizer, image_tokens=N, geometries=[GEOMETRY] * len(examples))
    for example, row in zip(examples, together, strict=True):
        alone = encode(example, tokenizer, image_tokens=N, geometry=GEOMETRY)
        assert row.ids.tolist() == alone.ids.tolist()
        assert row.labels.tolist() == alone.labels.tolist()
