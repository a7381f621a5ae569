"""A live server: the official client, many at once, what is refused, who leaves, and the memory afterwards."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import socket
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from serving_server import CHAT, Live, data_url, live, user
from test_answering import images, save_checkpoint  # noqa: F401
from test_chat import TAUGHT
from test_chat import WHERE as TAUGHT_WHERE
from test_chat import checkpoint as taught  # noqa: F401

from commvlm.app.answering import Answerer
from commvlm.app.growing import Growing
from commvlm.app.serving.saying import Text
from commvlm.data.example import Example, Turn

WHERE = "Where is the {} in the image? Answer with [x1,y1,x2,y2]."
THINGS = ("red star", "blue house", "green tree", "cyan fish", "cup", "yellow moon", "heart", "purple boat")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("serving") / "model")


@pytest.fixture(scope="module")
def server(checkpoint):
    with live(checkpoint, batch=12, side=600, tokens=24) as one:
        yield one


@pytest.fixture(scope="module")
def endless(checkpoint):
    with live(checkpoint, endless=True, batch=2, queue=2, tokens=300, seconds=30.0) as one:
        yield one


@pytest.fixture(scope="module")
def alone(checkpoint) -> Answerer:
    """Asks one question at a time, from files, without a server."""
    return Answerer(checkpoint, max_new_tokens=24, batch_size=1, device="cpu")


def asking(server: Live, kind: str = "OpenAI") -> Any:
    """A client of OpenAI's own package, which takes a second to import."""
    import openai

    return getattr(openai, kind)(base_url=server.url, api_key="none", max_retries=0)


@pytest.fixture
def client(server: Live) -> Any:
    return asking(server)


def example(question: str, image: Path | None, *, past: tuple[Turn, ...] = ()) -> Example:
    turns = (*past, Turn(question, ""))
    first = turns[0]
    shown = "" if image is None else "<image>\n"
    return Example("0", "dialogue", image, (Turn(shown + first.question, first.answer), *turns[1:]))


@pytest.fixture(scope="module")
def knowing(taught):  # noqa: F811
    """A server whose model answers with a box."""
    with live(taught, name="knowing") as one, asking(one) as client:
        yield one, client


IN_PIXELS = [[pytest.approx([12.0, 0.0, 48.0, 48.0])]]
"""[0.125,0.250,0.500,0.750] of 96 x 48 below 24 pixels of padding: 96 x .250 - 24 = 0, 96 x .750 - 24 = 48."""


def test_the_client_gets_the_direct_answer_and_its_boxes(knowing, images):  # noqa: F811
    server, client = knowing
    said = client.chat.completions.create(model="knowing", messages=[user(TAUGHT_WHERE, image=images[1])])
    choice = said.choices[0]
    assert choice.message.content == TAUGHT[TAUGHT_WHERE] == server.answerer([example(TAUGHT_WHERE, images[1])])[0]
    assert choice.message.boxes == IN_PIXELS
    assert choice.finish_reason == "stop"
    with Image.open(images[1]) as image:
        prompt = server.answerer.collator.prompts([example(TAUGHT_WHERE, images[1])], {images[1]: image})[0]
    assert said.usage.prompt_tokens == len(prompt)
    assert [model.id for model in client.models.list()] == [client.models.retrieve("knowing").id] == ["knowing"]


def test_a_stream_is_the_same_answer_in_pieces(knowing, images):  # noqa: F811
    _, client = knowing
    pieces, boxes, ends, usage = [], [], [], None
    for chunk in client.chat.completions.create(
        model="knowing", messages=[user(TAUGHT_WHERE, image=images[1])], stream=True,
        stream_options={"include_usage": True},
    ):  # fmt: skip
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces.append(choice.delta.content or "")
            boxes.append((choice.delta.model_extra or {}).get("boxes"))
            ends += [choice.finish_reason] if choice.finish_reason else []
    assert "".join(pieces) == TAUGHT[TAUGHT_WHERE]
    assert sum(map(bool, pieces)) > 5
    assert [found for found in boxes if found] == [IN_PIXELS]
    assert pieces[next(k for k, found in enumerate(boxes) if found)].endswith("]")
    assert ends == ["stop"]
    assert usage is not None
    assert usage.completion_tokens > 5


def test_boxes_history_and_limits_of_a_question(client, alone, images):  # noqa: F811
    """A box part is a box of the question in pixels; past turns are read; max_tokens and stop end an answer."""
    box = (8.0, 8.0, 40.0, 30.0)
    turn = Turn("<image>\nWhat is in <boxes>?", "", question_boxes=((box,),))
    (expected,) = alone([Example("0", "dialogue", images[1], (turn,))])
    shown = {"type": "image_url", "image_url": {"url": data_url(images[1])}}
    parts = [shown, {"type": "text", "text": "What is in "}, {"type": "box", "box": box}, {"type": "text", "text": "?"}]
    asked = [{"role": "user", "content": parts}]
    assert client.chat.completions.create(model="tiny", messages=asked).choices[0].message.content == expected
    past = (Turn(WHERE.format("cup"), "[0.100,0.200,0.300,0.400]"),)
    (expected,) = alone([example("What color is it?", images[0], past=past)])
    asked = [user(past[0].question, image=images[0]), {"role": "assistant", "content": past[0].answer}]
    asked.append({"role": "user", "content": "What color is it?"})
    assert client.chat.completions.create(model="tiny", messages=asked).choices[0].message.content == expected
    cut = client.chat.completions.create(
        model="tiny", messages=[user(WHERE.format("cup"), image=images[0])], max_tokens=2
    )
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 2
    (whole,) = alone([example(WHERE.format("cup"), images[0])])
    mark = max(set(whole), key=whole.index)  # what comes for the first time as late as can be
    stopped = client.chat.completions.create(
        model="tiny", messages=[user(WHERE.format("cup"), image=images[0])], stop=[mark]
    )
    assert stopped.choices[0].message.content == whole.split(mark)[0].rstrip() != ""
    assert stopped.choices[0].finish_reason == "stop"


def test_64_clients_at_once_each_get_their_own_answer(server, alone, images):  # noqa: F811
    """Streamed and not, with an image and without, with a past: none lost, none crossed, each as if alone."""
    asked = []
    for k in range(64):
        image = [*images, None][k % 4]
        past = (Turn("Is there a cup?", "no"),) if k % 5 == 0 else ()
        asked.append(example(f"{k}: {WHERE.format(THINGS[k // 8])}", image, past=past))
    alone.decoder.max_new_tokens = 8
    expected = alone(asked)
    alone.decoder.max_new_tokens = 24
    assert len(set(expected)) > 12
    before = server.metric('commvlm_requests_total{status="200"}')

    async def ask(client: Any, one: Example, stream: bool) -> str:
        messages = []
        for place, turn in enumerate(one.turns):
            image = one.image if place == 0 else None
            messages.append(user(turn.question.removeprefix("<image>\n"), image=image))
            messages.append({"role": "assistant", "content": turn.answer})
        create = client.chat.completions.create(model="tiny", messages=messages[:-1], stream=stream, max_tokens=8)
        if not stream:
            return (await create).choices[0].message.content
        return "".join([chunk.choices[0].delta.content or "" async for chunk in await create])

    async def all_at_once() -> list[str]:
        async with asking(server, "AsyncOpenAI") as client:
            return await asyncio.gather(*(ask(client, one, k % 2 == 0) for k, one in enumerate(asked)))

    assert asyncio.run(all_at_once()) == expected
    assert server.metric('commvlm_requests_total{status="200"}') == before + 64
    assert server.metric("commvlm_batch_rows_count") < server.metric('commvlm_tokens_total{kind="answer"}') / 3
    assert server.metric("commvlm_growing") == server.metric("commvlm_waiting") == 0


def test_sampling_follows_its_seed(client, images):  # noqa: F811
    def drawn(seed: int) -> str:
        return client.chat.completions.create(
            model="tiny", messages=[user("What is there?", image=images[0])], temperature=2.0, seed=seed
        ).choices[0].message.content  # fmt: skip

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(12)}) > 2


# --- refused ---


def chat(*content: object, **fields: object) -> dict[str, object]:
    return {"model": "tiny", "messages": [{"role": "user", "content": list(content)}], **fields}


def link(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url}}


def png(width: int, height: int, pixels: bytes) -> str:
    """A PNG that says this size, whatever its pixels are."""

    def piece(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n" + piece(b"IHDR", head) + piece(b"IDAT", pixels) + piece(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(whole).decode()


TEXT = {"type": "text", "text": "What is there?"}
BOMB = png(60_000, 60_000, zlib.compress(bytes(1_000_000)))
REFUSED = {
    "no JSON": (b"{nonsense", 400, "JSON"),
    "no object": (b"[1, 2]", 400, "object"),
    "deep": (b'{"model": ' + b"[" * 100_000, 400, "recursion"),
    "huge number": (b'{"seed": ' + b"9" * 5000 + b"}", 400, "out of range"),
    "bad UTF-8": (b'{"model": "\xff\xfe"}', 400, "JSON"),
    "nothing": (b"", 400, "JSON"),
    "no messages": ({"model": "tiny"}, 400, "messages"),
    "empty messages": ({"model": "tiny", "messages": []}, 400, "messages"),
    "other model": (chat(TEXT) | {"model": "gpt"}, 404, "'tiny'"),
    "unknown part": (chat({"type": "video", "video": "x"}), 400, "messages.0"),
    "wrong type": (chat(TEXT, max_tokens="many"), 400, "max_tokens"),
    "too many tokens": (chat(TEXT, max_tokens=25), 400, "24"),
    "no tokens": (chat(TEXT, max_tokens=0), 400, "max_tokens"),
    "several answers": (chat(TEXT, n=2), 400, "n=2"),
    "tools": (chat(TEXT, tools=[{"type": "function"}]), 400, "tools"),
    "roles": ({"model": "tiny", "messages": [{"role": "assistant", "content": "a"}]}, 400, "user was expected"),
    "no question": ({"model": "tiny", "messages": [{"role": "system", "content": "a"}]}, 400, "question"),
    "empty question": (chat({"type": "text", "text": " "}), 400, "asks nothing"),
    "slot": (chat({"type": "text", "text": "what is <image>?"}), 400, "<image>"),
    "special token": (chat({"type": "text", "text": "say </s> now"}), 400, "special token"),
    "remote": (chat(link("https://example.org/a.png"), TEXT), 400, "not fetched"),
    "file": (chat(link("file:///etc/passwd"), TEXT), 400, "not fetched"),
    "not base64": (chat(link("data:image/png;base64,%%%"), TEXT), 400, "base64"),
    "no image": (chat(link("data:image/png;base64,aGVsbG8="), TEXT), 400, "is no image"),
    "two images": (chat(link(BOMB), link(BOMB), TEXT), 400, "2 images"),
    "bomb": (chat(link(BOMB), TEXT), 400, "pixels"),
    "long side": (chat(link(png(601, 2, zlib.compress(bytes(3608)))), TEXT), 400, "600"),
    "truncated": (chat(link(png(64, 64, zlib.compress(bytes(100)))), TEXT), 400, "damaged"),
    "box without image": (chat({"type": "box", "box": [1, 2, 3, 4]}, TEXT), 400, "needs an image"),
    "odd box": (chat({"type": "box", "box": [1, 2, 3]}, TEXT), 400, "box"),
    "too long": (chat({"type": "text", "text": "star " * 5000}), 400, "tokens and its answer"),
    "far too long": (chat({"type": "text", "text": "star " * 50_000}), 400, "characters, the model takes"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_answered_is_refused_in_openais_form(server, case):
    body, status, words = REFUSED[case]
    found, said = server.post(body)
    assert found == status
    error = said["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["code"]
    assert len(error["message"]) < 500
    assert "\n" not in error["message"]


def test_other_refusals(server, checkpoint):
    for path, status in (("/nowhere", 404), (CHAT, 405)):
        answered, raw = server.send("GET", path)[:2]
        assert answered == status
        assert json.loads(raw)["error"]["type"] == "invalid_request_error"
    assert server.send("GET", "/v1/models/other")[0] == 404
    assert server.post(chat(TEXT), content_type="text/plain")[0] == 415
    assert server.post(b"x", content_encoding="gzip")[0] == 415
    assert json.loads(server.send("GET", "/health")[1]) == {"status": "ok"}
    with live(checkpoint, key="secret", body=2000, read_seconds=2.0) as locked:
        assert locked.post(chat(TEXT))[0] == 401
        assert locked.send("GET", "/v1/models")[0] == 401
        assert locked.post(chat(TEXT), authorization="Bearer secres")[0] == 401
        held = {"authorization": "Bearer secret"}
        assert locked.post({**chat(TEXT), "model": "no"}, **held)[0] == 404
        assert locked.post(b"x" * 3000, **held) == locked.post(b"x" * 2001, **held)
        assert locked.post(b"x" * 3000, **held)[0] == 413
        assert chunked(locked, 3000) == 413
        assert chunked(locked, 100) == 408  # never ends


def chunked(server: Live, size: int) -> int:
    """The status for a body of no stated length, whose last piece never comes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as line:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer secret\r\nContent-Type: application/json\r\n"
        line.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n{size:x}\r\n".encode() + b"x" * size + b"\r\n")
        return int(line.recv(100).split()[1])


def streaming(server: Live) -> socket.socket:
    """A client that has got the first piece of an endless answer."""
    line = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    body = json.dumps(chat(TEXT, stream=True)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    line.sendall(head.encode() + body)
    return line


def first_piece(line: socket.socket) -> None:
    said = b""
    while said.count(b"data: ") < 2:
        said += line.recv(4096)


def test_who_leaves_is_not_answered_further_and_the_queue_is_bounded(endless):
    """Two grow, two wait, the fifth is refused; when they hang up, their rows end and the memory is free."""
    lines = []
    for _ in range(2):
        lines.append(streaming(endless))
        first_piece(lines[-1])
    for waiting in (1, 2):
        lines.append(streaming(endless))
        assert endless.until(lambda n=waiting: len(endless.service.engine._waiting) == n)
    status, said = endless.post(chat(TEXT))
    assert (status, said["error"]["code"]) == (429, "queue_full")
    before = endless.metric("commvlm_batch_rows_sum")
    for line in lines:
        line.close()
    engine = endless.service.engine
    assert endless.until(lambda: not engine._waiting and not engine._growing)
    assert endless.metric("commvlm_batch_rows_sum") - before < 300  # of four times 300 that they would have grown to
    assert endless.until(lambda: endless.metric('commvlm_requests_total{status="499"}') == 4)
    status, said = endless.post(chat(TEXT, max_tokens=3))
    assert status == 200
    assert said["usage"]["completion_tokens"] == 3


def test_one_who_waits_for_a_whole_answer_may_hang_up_too(endless):
    body = json.dumps(chat(TEXT)).encode()
    line = socket.create_connection(("127.0.0.1", endless.port), timeout=20)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    line.sendall(head.encode() + body)
    engine = endless.service.engine
    assert endless.until(lambda: engine._growing)
    before = endless.metric("commvlm_batch_rows_sum")
    line.close()
    assert endless.until(lambda: not engine._growing)
    assert endless.metric("commvlm_batch_rows_sum") - before < 250  # of 300 that it would have grown to


def test_an_answer_that_takes_too_long_is_refused(checkpoint):
    with live(checkpoint, endless=True, tokens=350, seconds=0.2) as slow:
        status, said = slow.post(chat(TEXT))
        assert (status, said["error"]["code"]) == (504, "timeout")
        assert slow.until(lambda: not slow.service.engine._growing)
        _, raw = slow.send("POST", CHAT, json.dumps(chat(TEXT, stream=True)).encode(), content_type="application/json")
        events = raw.decode().strip().split("\n\n")
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "timeout"


def test_a_failing_model_is_an_answer_of_500_and_the_next_one_is_answered(checkpoint, capfd):
    with live(checkpoint, tokens=4) as frail:
        decoder = frail.answerer.decoder
        begin, decoder.begin = decoder.begin, lambda *_: 1 / 0  # type: ignore[assignment,method-assign]
        status, said = frail.post(chat(TEXT))
        assert (status, said["error"]["code"]) == (500, "internal_error")
        assert "division" not in said["error"]["message"]
        decoder.begin = begin  # type: ignore[method-assign]
        assert frail.post(chat(TEXT))[0] == 200
        assert frail.send("GET", "/health")[0] == 200


def test_a_fault_while_a_row_is_taken_out_does_not_end_the_engine(endless, monkeypatch, capfd):
    line = streaming(endless)
    first_piece(line)
    engine = endless.service.engine
    monkeypatch.setattr(Growing, "leave", lambda *_: 1 / 0)
    line.close()
    assert endless.until(lambda: not engine._growing)
    monkeypatch.undo()
    assert engine.alive
    assert endless.post(chat(TEXT, max_tokens=3))[0] == 200
    assert "ZeroDivisionError" in capfd.readouterr().err


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_is_back_after_bombs_large_bodies_and_leavers(server):
    large = io.BytesIO()
    Image.effect_noise((600, 600), 80).convert("RGB").save(large, "PNG")
    url = "data:image/png;base64," + base64.b64encode(large.getvalue()).decode()
    bodies = [chat(link(BOMB), TEXT), chat(link(url), TEXT, max_tokens=1), b"[" * 15_000_000]

    def attack() -> None:
        for body in bodies:
            server.post(body)
        for _ in range(3):
            streaming(server).close()
        engine = server.service.engine
        assert server.until(lambda: not engine._waiting and not engine._growing)

    attack()
    gc.collect()
    before = resident()
    for _ in range(4):
        attack()
    gc.collect()
    assert resident() - before < 24 * 2**20  # one large body of 15 MB at the very most, not four
    assert server.until(lambda: server.service.intake._held == 0)


def test_text_is_certain_before_it_is_sent(alone):
    """Neither half a character nor the beginning of a stop text goes out."""
    tokenizer = alone.processor.tokenizer
    whole = "déjà vu ✓ END of it"
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    text = Text(tokenizer)
    pieces = [text.take((one,), last=k == len(ids) - 1) for k, one in enumerate(ids)]
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    text = Text(tokenizer, stops=("END", "never"))
    pieces = [text.take((one,), last=k == len(ids) - 1) for k, one in enumerate(ids) if not text.stopped]
    assert "".join(pieces) == "déjà vu ✓"
    assert text.stopped


@pytest.mark.parametrize(
    ("whole", "stop", "kept"),
    [("cat Observation: x", "Observation:", "cat"), ("USER: hi", "USER:", ""), ("yes<|im_end|>", "<|im_end|>", "yes")],
)
def test_a_stop_text_longer_than_the_answer_is_held_back_whole(whole, stop, kept):
    """Decoded a character at a time."""
    letters = SimpleNamespace(decode=lambda ids, **_: "".join(map(chr, ids)))
    text = Text(letters, stops=(stop,))
    pieces = [text.take((ord(one),), last=False) for one in whole if not text.stopped]
    assert ("".join(pieces), text.said, text.stopped) == (kept, kept, True)


def test_nulls_and_zeros_of_openais_schema_are_taken(server):
    for given in ({"stream": None}, {"temperature": 1e-320}, {"temperature": 1.0, "top_p": 0}):
        status, said = server.post(chat(TEXT, max_tokens=3, **given))
        assert status == 200, said
        _, plain = server.post(chat(TEXT, max_tokens=3))
        assert said["choices"] == plain["choices"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_cannot_go_on_leaves_nobody_waiting(checkpoint, capfd):
    """What fails after the failure, such as a device that is lost, ends the engine; all are told, and it is not alive."""
    with live(checkpoint, tokens=4) as frail:
        decoder = frail.answerer.decoder
        decoder.begin = decoder.start = lambda *_: 1 / 0  # type: ignore[assignment,method-assign]
        assert frail.post(chat(TEXT))[0] == 500
        assert frail.until(lambda: not frail.service.engine.alive)
        assert frail.post(chat(TEXT))[0] == 503
    assert "ZeroDivisionError" in capfd.readouterr().err
