"""Messages in every form: shown to the model whole, or refused by name."""

from __future__ import annotations

import base64
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_cpp import llama_chat_format
from PIL import Image

import kvmerge
from conftest import Factory, answer, make_llama
from kvmerge import errors, pocket
from kvmerge.chat.messages import check_messages

EXAMPLES = int(os.environ.get("KVMERGE_RANDOM_MESSAGES", "300"))
"""Message lists that are tried; ``KVMERGE_RANDOM_MESSAGES=2000`` tries more of them."""


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture = pocket.render_picture("red", "circle", "A", np.random.default_rng(seed))
    picture.save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
BASE64 = base64.b64encode(PNG).decode()
URI = f"data:image/png;base64,{BASE64}"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def with_pictures() -> Any:
    with make_llama() as llm:
        yield llm


@pytest.fixture(scope="module")
def text_only() -> Any:
    with make_llama(mmproj=None) as llm:
        yield llm


def asking(part: Any, **more: Any) -> list[Any]:
    content = [part, {"type": "text", "text": "\n"}] if part is not None else "\n"
    return [
        {"role": "user", "content": content, **more},
        {"role": "user", "content": "What shape is in picture 1?"},
    ]


# Forms that are taken.

FORMS: dict[str, Any] = {
    "OpenAI chats": {"type": "image_url", "image_url": {"url": URI, "detail": "high"}},
    "a text": {"type": "image_url", "image_url": URI},
    "OpenAI responses": {"type": "input_image", "image_url": URI, "detail": "auto"},
    "OpenAI responses, as chats": {"type": "input_image", "image_url": {"url": URI}},
    "Anthropic": {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": BASE64},
        "cache_control": {"type": "ephemeral"},
    },
    "Anthropic, a URL": {"type": "image", "source": {"type": "url", "url": URI}},
    "Hugging Face": {"type": "image", "image": PNG},
    "Hugging Face, a URL": {"type": "image", "url": URI},
    "Hugging Face, base64": {"type": "image", "base64": BASE64},
    "LangChain": {
        "type": "image",
        "source_type": "base64",
        "data": BASE64,
        "mime_type": "image/png",
    },
}


@pytest.mark.parametrize("name", FORMS)
def test_form(name: str, with_pictures: kvmerge.Llama) -> None:
    llm = with_pictures
    llm.reset()
    assert answer(llm, asking(FORMS[name])) == "circle"
    assert len(llm.media_spans) == 1


@pytest.mark.parametrize(
    "image",
    [BASE64, URI, PNG, BASE64.encode(), base64.encodebytes(PNG), URI.encode()],
    ids=["base64", "URI", "bytes", "base64 as bytes", "with line breaks", "URI as bytes"],
)
def test_form_of_ollama(image: Any, with_pictures: kvmerge.Llama) -> None:
    llm = with_pictures
    llm.reset()
    assert answer(llm, asking(None, images=[image])) == "circle"
    assert len(llm.media_spans) == 1
    assert answer(llm, asking(None, images=[])) is not None
    assert len(llm.media_spans) == 0


def test_all_forms_are_one_picture(with_pictures: kvmerge.Llama) -> None:
    """The same bytes are the same picture, and are read once."""
    llm, encoded = with_pictures, []
    llm.reset()
    for part in FORMS.values():
        usage = llm.create_chat_completion(asking(part), max_tokens=1)["usage"]
        encoded.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert encoded[0] == 0
    assert all(n > 64 for n in encoded[1:])


@pytest.mark.parametrize(
    "uri",
    [
        "data:image/png;base64," + base64.encodebytes(PNG).decode(),
        "data:image/png;base64,\n " + base64.b64encode(PNG).decode() + " \r\n",
        "data:image/png;base64," + base64.urlsafe_b64encode(PNG).decode(),
        "data:image/png;base64," + BASE64.rstrip("="),
        "data:image/png;name=a.png;charset=utf-8;base64," + BASE64,
        "DATA:IMAGE/PNG;BASE64," + BASE64,
        "data:;base64," + BASE64,
        "data:image/png;base64," + BASE64.replace("+", "%2B").replace("/", "%2F"),
        "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
        "  " + URI + "\n",
        base64.encodebytes(PNG).decode(),
        base64.urlsafe_b64encode(PNG).decode().rstrip("="),
    ],
    ids=lambda uri: ascii(uri[:36]),
)
def test_base64_as_it_is_found(uri: str, with_pictures: kvmerge.Llama) -> None:
    llm = with_pictures
    llm.create_chat_completion(asking({"type": "image", "image": PNG}), max_tokens=1)
    [before] = llm.media_spans
    llm.create_chat_completion(asking({"type": "image_url", "image_url": uri}), max_tokens=1)
    assert llm.media_spans == (before,)


def test_text_in_every_form(with_pictures: kvmerge.Llama, text_only: kvmerge.Llama) -> None:
    for llm in (with_pictures, text_only):
        expected = llm.create_chat_completion(HELLO, max_tokens=1)["usage"]["prompt_tokens"]
        for content in (
            ["Hello"],
            ("Hel", "lo"),
            [{"type": "text", "text": "Hello"}],
            [{"type": "input_text", "text": "Hel"}, {"type": "output_text", "text": "lo"}],
            [{"type": "refusal", "refusal": "Hello"}],
            (part for part in ["Hello"]),
        ):
            message = {"role": "user", "content": content}
            usage = llm.create_chat_completion([message], max_tokens=1)["usage"]
            assert usage["prompt_tokens"] == expected


@pytest.mark.parametrize("make", [list, tuple, iter, lambda messages: (m for m in messages)])
def test_messages_of_every_kind_of_list(
    make: Any, with_pictures: kvmerge.Llama, text_only: kvmerge.Llama
) -> None:
    messages = [{"role": "user", "content": "What is the code of the old box?"}]
    for llm in (with_pictures, text_only):
        expected = llm.create_chat_completion(messages, max_tokens=1)["usage"]["prompt_tokens"]
        usage = llm.create_chat_completion(make(messages), max_tokens=1)["usage"]
        assert usage["prompt_tokens"] == expected > 5


def test_message_of_the_openai_sdk(text_only: kvmerge.Llama) -> None:
    class Message:
        def model_dump(self, **_: Any) -> dict[str, Any]:
            return HELLO[0]

    assert isinstance(answer(text_only, [Message()], max_tokens=1), str)


def test_messages_are_left_as_they_are(with_pictures: kvmerge.Llama) -> None:
    messages = asking(None, images=[BASE64])
    before = repr(messages)
    answer(with_pictures, messages, max_tokens=1)
    assert repr(messages) == before


def test_answer_of_an_assistant_that_calls_a_tool(text_only: kvmerge.Llama) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages.append({"role": "tool", "tool_call_id": "1", "content": "5"})
    assert isinstance(answer(text_only, messages, max_tokens=1), str)


def test_template_that_shows_only_texts(llama: Factory) -> None:
    """Parts become one text, where a template would have shown them as Python writes them."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
    )
    picture, other = llama(), llama()
    other.metadata["tokenizer.chat_template"] = template
    for messages in (asking({"type": "image", "image": PNG}), asking(None)):
        for llm in (picture, other):
            llm.reset()
            answer(llm, messages, max_tokens=1)
        n = picture.n_tokens
        assert other.input_ids[:n].tolist() == picture.input_ids[:n].tolist()


# What is refused.


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "video_url", "video_url": {"url": "x.mp4"}}, "'video_url'"),
        ({"type": "video", "video": "x.mp4"}, "'video'"),
        ({"type": "input_file", "file_id": "f"}, "'input_file'"),
        ({"type": "file", "file": {"file_id": "f"}}, "'file'"),
        ({"type": "document", "source": {}}, "'document'"),
        ({"type": "tool_use", "name": "f"}, "'tool_use'"),
        ({"type": "thinking", "thinking": "x"}, "'thinking'"),
        ({"type": "imageurl", "image_url": URI}, "Did you mean 'image_url'?"),
        ({"type": "Text", "text": "x"}, "'Text'"),
        ({"type": None, "text": "x"}, "None"),
        ({"type": ["text"], "text": "x"}, "list"),
        ({"image_url": {"url": URI}}, "has no 'type' (it has 'image_url')"),
        ({"text": "x"}, "has no 'type'"),
        ({}, "it has nothing"),
        ({"type": "input_image", "file_id": "file-1"}, "'file_id'"),
        ({"type": "image", "source": {"type": "file", "file_id": "f"}}, "'file_id'"),
        ({"type": "text", "text": "x", "image_url": URI}, "has 'image_url' as well"),
        ({"type": "image", "image": URI, "url": "b.png"}, "has 'image' and 'url'"),
        ({"type": "text"}, "must be a text"),
        ({"type": "text", "text": None}, "must be a text"),
        ({"type": "text", "text": 5}, "must be a text"),
        (5, "of type int"),
        (None, "of type NoneType"),
        ([], "of type list"),
    ],
)
def test_part_that_is_refused(
    part: Any, said: str, with_pictures: kvmerge.Llama, text_only: kvmerge.Llama
) -> None:
    messages = [{"role": "user", "content": ["Picture 1:", part, "What is it?"]}]
    for llm in (with_pictures, text_only):
        with pytest.raises(errors.OptionError, match=re.escape(said)) as caught:
            answer(llm, messages)
        assert "message 1 ('user'), part 2" in str(caught.value)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image"}, "has no 'image' content"),
        ({"type": "image_url", "image_url": {}}, "has no 'image_url' content"),
        ({"type": "input_image"}, "has no 'input_image' content"),
        ({"type": "image", "source": {"type": "base64"}}, "has no 'image' content"),
        ({"type": "image_url", "image_url": {"url": {"url": URI}}}, "has no 'image_url' content"),
    ],
)
def test_picture_that_is_not_there(part: Any, said: str, with_pictures: kvmerge.Llama) -> None:
    with pytest.raises(errors.MediaError, match=said):
        answer(with_pictures, asking(part))


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("Hello", "messages must be a list of messages"),
        (HELLO[0], "messages must be a list of messages"),
        (None, "messages must be a list of messages"),
        (5, "messages must be a list of messages"),
        ([], "messages is empty"),
        (iter(()), "messages is empty"),
        (["Hello"], "message 1 is of type str"),
        ([None], "message 1 is of type NoneType"),
        ([{}], "message 1 has the role None"),
        ([{"role": 1, "content": "x"}], "message 1 has the role 1"),
        ([{"content": "x"}], "has the role None"),
        ([*HELLO, {"role": "user"}], "message 2 ('user') has no content"),
        ([{"role": "user", "content": None}], "has no content"),
        ([{"role": "assistant", "content": None}], "has no content"),
        ([{"role": "user", "content": {"type": "text", "text": "x"}}], "a content of type dict"),
        ([{"role": "user", "content": 5}], "a content of type int"),
        ([{"role": "user", "content": np.zeros(3)}], "part 1 is of type float64"),
        ([{"role": "user", "content": b"x"}], "a content of type bytes"),
        ([{"role": "user", "content": "x", "images": BASE64}], "'images' of type str"),
        ([{"role": "user", "content": "x", "videos": ["a.mp4"]}], "has 'videos' beside"),
        ([{"role": "user", "content": "x", "image_url": URI}], "has 'image_url' beside"),
        (
            [{"role": "user", "content": "x", "experimental_attachments": [{"url": URI}]}],
            "has 'experimental_attachments' beside",
        ),
        ([{"role": "assistant", "content": "x", "tool_calls": 5}], "'tool_calls' of type int"),
        ([{"role": "assistant", "content": "x", "tool_calls": "f"}], "'tool_calls' of type str"),
    ],
)
def test_messages_that_are_refused(
    messages: Any, said: str, with_pictures: kvmerge.Llama, text_only: kvmerge.Llama
) -> None:
    for llm in (with_pictures, text_only):
        before = llm.kv_stats().tokens
        with pytest.raises(errors.OptionError, match=re.escape(said)):
            answer(llm, messages)
        assert llm.kv_stats().tokens == before


def test_no_picture_without_mmproj(text_only: kvmerge.Llama) -> None:
    for part in FORMS.values():
        with pytest.raises(errors.MediaError, match="pass mmproj="):
            answer(text_only, asking(part))
    with pytest.raises(errors.MediaError, match="pass mmproj="):
        answer(text_only, asking(None, images=[BASE64]))


def test_long_text_that_is_no_picture(with_pictures: kvmerge.Llama) -> None:
    noise = base64.b64encode(np.random.default_rng(0).bytes(3_000_000)).decode()
    for source in (noise, noise + "!", "x" * 5000, "/" * 5000, "data:" + noise):
        with pytest.raises(errors.MediaError, match="picture 1") as caught:
            answer(with_pictures, asking({"type": "image_url", "image_url": source}))
        assert len(str(caught.value)) < 500


def test_base64_of_something_else_is_a_path(
    with_pictures: kvmerge.Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("abcdefghijklmnopqrst").write_bytes(PNG)
    part = {"type": "image", "image": "abcdefghijklmnopqrst"}
    assert answer(with_pictures, asking(part)) == "circle"


def test_chat_format_beside_mmproj(llama: Factory) -> None:
    with pytest.raises(errors.OptionError, match="chat_format='chatml' is not used beside mmproj="):
        llama(chat_format="chatml")


@pytest.mark.parametrize("surrogate", ["\ud800", "a\udfffb", "\udc80" * 3])
def test_half_of_a_surrogate_pair(
    surrogate: str, with_pictures: kvmerge.Llama, text_only: kvmerge.Llama
) -> None:
    tool = {"type": "function", "function": {"name": "f", "description": surrogate}}
    picture = {"type": "image_url", "image_url": "https://x.invalid/" + surrogate}
    call = {"id": "1", "type": "function", "function": {"name": surrogate, "arguments": "{}"}}
    for llm in (with_pictures, text_only):
        for messages, options in (
            ([{"role": "user", "content": surrogate}], {}),
            ([{"role": surrogate, "content": "x"}], {}),
            ([{"role": "user", "content": ["x", surrogate]}], {}),
            ([{"role": "user", "content": "x", "name": surrogate}], {}),
            ([*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]}], {}),
            ([{"role": "user", "content": [picture]}], {}),
            ([{"role": "user", "content": [{"type": surrogate}]}], {}),
            (HELLO, {"tools": [tool], "tool_choice": "auto"}),
            (HELLO, {"stop": [surrogate]}),
            (HELLO, {"response_format": {"type": "json_object", "schema": {surrogate: 1}}}),
            (HELLO, {"model": surrogate}),
        ):
            with pytest.raises(errors.KVMergeError) as caught:
                answer(llm, messages, **options)
            str(caught.value).encode("utf-8")
        with pytest.raises(errors.OptionError, match="surrogate"):
            llm.create_completion(surrogate, max_tokens=1)
        with pytest.raises(errors.OptionError, match="surrogate"):
            llm(f"Hello {surrogate}", max_tokens=1)


# The beginning of a text.


def test_begin_of_text_stands_once(llama: Factory) -> None:
    llm, other = llama(), llama(mmproj=None)
    template = "{{ bos_token }}" + llm.metadata["tokenizer.chat_template"]
    picture = asking({"type": "image", "image": PNG})
    for messages in (HELLO, picture):
        llm.reset()
        expected = answer(llm, messages, max_tokens=1)
        tokens = llm.input_ids[: llm.n_tokens].tolist()
        assert tokens.count(llm.token_bos()) == 1
        llm.metadata["tokenizer.chat_template"], plain = (
            template,
            llm.metadata["tokenizer.chat_template"],
        )
        llm.reset()
        assert answer(llm, messages, max_tokens=1) == expected
        assert llm.input_ids[: llm.n_tokens].tolist() == tokens
        llm.metadata["tokenizer.chat_template"] = plain

    @llama_chat_format.register_chat_format("begins_with_bos")
    def begins_with_bos(messages: Any, **_: Any) -> Any:
        text = "<|begin|>" + "".join(message["content"] for message in messages)
        return llama_chat_format.ChatFormatterResponse(prompt=text)

    other.chat_format = "begins_with_bos"
    answer(other, HELLO, max_tokens=1)
    assert other.input_ids[:4].tolist().count(other.token_bos()) == 1
    with other.context(HELLO) as context:
        context.ask("Hello", max_tokens=1)
        assert other.input_ids[:4].tolist().count(other.token_bos()) == 1


def test_format_that_forgets_lists(llama: Factory) -> None:
    """Chat formats of llama-cpp-python leave out contents that are lists: they get texts."""
    for name in ("chatml", "llama-2", "vicuna", "gemma"):
        llm = llama(mmproj=None, chat_format=name)
        answer(llm, HELLO, max_tokens=1)
        expected = llm.input_ids[: llm.n_tokens].tolist()
        llm.reset()
        answer(llm, [{"role": "user", "content": ["Hel", "lo"]}], max_tokens=1)
        assert llm.input_ids[: llm.n_tokens].tolist() == expected, name


def test_unknown_chat_format(llama: Factory) -> None:
    llm = llama(mmproj=None, chat_format="chatlmm")
    with pytest.raises(
        errors.OptionError, match="'chatlmm' is not a chat format. Did you mean 'chat"
    ):
        answer(llm, HELLO)


def test_message_that_a_format_leaves_out(llama: Factory, caplog: pytest.LogCaptureFixture) -> None:
    """The log names it: formats of llama-cpp-python know a few roles, and drop all others."""
    messages = [{"role": "user", "content": "Hello"}, {"role": "tool", "content": "It is five."}]
    named = "message 2 (role 'tool')"
    llm = llama(mmproj=None, chat_format="chatml")
    answer(llm, messages, max_tokens=1)
    assert any(named in line and "chatml" in line for line in caplog.messages)
    picture = llama()
    caplog.clear()
    answer(picture, messages, max_tokens=1)
    answer(picture, asking({"type": "image", "image": PNG}), max_tokens=1)
    assert not any("leaves out" in line for line in caplog.messages)
    picture.metadata["tokenizer.chat_template"] = "{{ messages[0].content }}"
    answer(picture, messages, max_tokens=1)
    assert any(named in line for line in caplog.messages)


# Anything at all.


class Message:
    """What says of itself that it is a message."""

    def model_dump(self, **_: Any) -> Any:
        return {"role": "user", "content": [self]}


words = st.one_of(
    st.text(max_size=12),
    st.text(st.characters(categories=("Cs", "Lu", "So", "Cc")), max_size=6),
    st.sampled_from(["", "Hello", "<__media__>", "<|end|>", "<|begin|>", "{{ x }}", "\0"]),
)
things = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 3),
        st.floats(),
        words,
        st.binary(max_size=8),
        st.sampled_from([PNG, PNG[:-9], URI, BASE64, "nowhere.png", "ftp://x/y", object(), print]),
        st.sampled_from(
            [Image.new("RGB", (9, 9)), Image.new("La", (0, 9)), Path(), io.BytesIO(PNG)]
        ),
        st.sampled_from([np.zeros((4, 4)), np.zeros(0), np.float32(1), Message(), 10**400, 1j]),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
part_types = st.sampled_from(
    "text image_url image input_image input_audio audio_url audio video_url input_text refusal "
    "file tool_result".split()
)
sources = st.one_of(
    things, st.fixed_dictionaries({"url": things}), st.fixed_dictionaries({"data": things})
)
keys = st.sampled_from(
    "text image_url image source url path base64 input_audio detail file_id refusal".split()
)
parts = st.one_of(
    words,
    things,
    st.builds(
        lambda kind, rest: {"type": kind, **rest},
        part_types,
        st.dictionaries(keys, sources, max_size=2),
    ),
    st.builds(lambda kind, source: {"type": kind, kind: source}, part_types, sources),
    st.builds(lambda text: {"type": "text", "text": text}, words),
    st.sampled_from(list(FORMS.values())),
)
pictures = st.sampled_from(list(FORMS.values()))
texts = st.sampled_from(
    ["Hello", "What is in picture 1?", "", "\n", "red", "<__media__>", "{{ x }}"]
)


def mostly(usual: Any, odd: Any) -> Any:
    """Draw what is usual three times in four: else the first odd thing ends every example."""
    return st.integers(0, 3).flatmap(lambda n: usual if n else odd)


contents = mostly(
    mostly(texts, words) | st.lists(mostly(texts | pictures, parts), max_size=4), things
)
roles = mostly(
    st.sampled_from(["user", "assistant", "system", "tool", "developer"]), words | things
)
extras = st.dictionaries(
    st.sampled_from(["name", "images", "tool_calls", "audio", "videos", "x"]) | words,
    things,
    max_size=2,
)
message = st.builds(
    lambda role, content, rest: {"role": role, "content": content, **rest},
    roles,
    contents,
    mostly(st.just({}), extras),
)
message_lists = mostly(
    st.lists(message, min_size=1, max_size=4),
    st.lists(message | things, max_size=3) | things,
)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=EXAMPLES == 300,
)
@given(message_lists, st.booleans())
def test_any_messages(messages: Any, pictures: bool) -> None:
    """They end in an answer or in an error of this package, which can be printed."""
    llm = loaded(pictures)
    try:
        answer(llm, messages, max_tokens=1)
    except errors.DecodeError:
        raise
    except errors.KVMergeError as error:
        said = str(error).encode("utf-8")
        assert 10 < len(said) < 3000
    assert isinstance(check_messages(HELLO), list)


_loaded: dict[bool, kvmerge.Llama] = {}


def loaded(pictures: bool) -> kvmerge.Llama:
    if pictures not in _loaded:
        _loaded[pictures] = make_llama(**({} if pictures else {"mmproj": None}), kv_merge="mosaic")
    return _loaded[pictures]


def test_after_any_messages_all_is_as_before() -> None:
    for pictures in (True, False):
        llm = loaded(pictures)
        llm.reset()
        part = {"type": "image", "image": PNG} if pictures else None
        assert isinstance(answer(llm, asking(part)), str)
        llm.close()
        del _loaded[pictures]
