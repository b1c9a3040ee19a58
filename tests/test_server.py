"""llama-server with a cache that merges, over HTTP."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvmerge
from kvmerge import pocket
from kvmerge.commands.serve import command_line, program
from kvmerge.errors import UnsupportedError
from random_model import Shape, write_random_model
from serving import Answer, Server, chat_body, is_built, refusal, serving

pytestmark = pytest.mark.skipif(
    not (is_built() or os.environ.get("CI")), reason="built with KVMERGE_SERVER=OFF"
)

MERGING = ("--kv-merge", "auto", "--kv-budget", "0.2")
PICTURES = 6


def album(seed: int, pictures: int = PICTURES) -> pocket.Prompt:
    return pocket.make_prompt(np.random.default_rng(seed), pictures, n_questions=10)


def converse(server: Server, prompt: pocket.Prompt, n: int, **options: Any) -> list[Answer]:
    """Ask questions one after another in one conversation."""
    answers: list[Answer] = []
    for i in range(n):
        messages = prompt.messages(i, [answer.text for answer in answers])
        answers.append(server.chat(messages, **options))
        assert answers[-1].status == 200, answers[-1]
    return answers


def right(prompt: pocket.Prompt, answers: list[Answer]) -> float:
    scores = [
        pocket.score(q.task, a.text, q.answer)
        for q, a in zip(prompt.questions, answers, strict=False)
    ]
    return sum(scores) / len(scores)


@pytest.fixture(scope="module")
def plain() -> Iterator[Server]:
    with serving("--parallel", "1") as server:
        yield server


@pytest.fixture(scope="module")
def merging(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("slots")
    with serving(
        *(*MERGING, "--parallel", "4", "--metrics", "--slot-save-path", f"{folder}{os.sep}")
    ) as server:
        yield server


def test_pictures_are_merged_and_answers_right(merging: Server, plain: Server) -> None:
    prompt = album(1)
    merged, full = converse(merging, prompt, 5), converse(plain, prompt, 5)
    assert right(prompt, full) > 0.7
    assert right(prompt, merged) >= right(prompt, full) - 0.2
    held = merging.held()
    pictures = PICTURES * 64
    assert held["cells"] <= held["tokens"] - 0.7 * pictures
    assert held["bytes"] > 0
    # Each turn read only what was new.
    assert all(answer["timings"]["prompt_n"] < 64 for answer in merged[1:])


def test_another_question_goes_on_from_the_pictures(merging: Server) -> None:
    prompt = album(2)
    first = merging.chat(prompt.messages(0))
    other = merging.chat(prompt.messages(1))
    assert first.cached == 0
    assert other.cached >= PICTURES * 64
    # Asked on its own it is answered in the same way: the first question left no trace.
    with serving(*MERGING, "--parallel", "1") as alone:
        assert alone.chat(prompt.messages(1)).text == other.text


def test_the_same_request_twice_has_the_same_answer(merging: Server) -> None:
    messages = album(3).messages(0)
    answers = [merging.chat(messages, logprobs=True) for _ in range(2)]
    assert answers[0].text == answers[1].text
    logprobs = [answer["choices"][0]["logprobs"]["content"][0]["logprob"] for answer in answers]
    assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-3)
    assert answers[1].cached > answers[0].cached


def test_streamed_and_whole_are_the_same(merging: Server) -> None:
    messages = album(4).messages(0)
    whole = merging.chat(messages)
    chunks = merging.stream(messages)
    text = "".join(
        chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]
    )
    assert text.strip() == whole.text


def test_four_clients_at_once(merging: Server) -> None:
    prompts = [album(seed) for seed in (10, 11, 12, 13)]
    alone = [[a.text for a in converse(merging, prompt, 4)] for prompt in prompts]
    for id_slot in range(4):
        merging.post(f"/slots/{id_slot}?action=erase", {})
    with ThreadPoolExecutor(5) as pool:
        together = list(
            pool.map(
                lambda prompt: converse(merging, prompt, 4, cache_prompt=True),
                prompts,
            )
        )
    assert [[a.text for a in answers] for answers in together] == alone


def test_cancelled_requests_leave_the_others_alone(merging: Server) -> None:
    prompt = album(5)
    expected = merging.chat(prompt.messages(0)).text

    def give_up(seed: int) -> None:
        connection = merging.connect()
        body = chat_body(album(seed).messages(0), stream=True, max_tokens=2000, ignore_eos=True)
        connection.request(
            "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
        )
        if seed % 2:
            connection.getresponse().read(200)
        connection.close()

    with ThreadPoolExecutor(6) as pool:
        given_up = [pool.submit(give_up, seed) for seed in range(20, 26)]
        answers = [pool.submit(merging.chat, prompt.messages(0)) for _ in range(2)]
        for future in given_up:
            future.result()
        assert [future.result().text for future in answers] == [expected, expected]
    merging.held()
    assert not any(slot["is_processing"] for slot in merging.get("/slots"))


def test_an_oldest_picture_that_is_dropped_is_read_again(merging: Server) -> None:
    prompt = album(6)
    question = prompt.messages(0)
    merging.chat(question)
    content = question[0]["content"]
    without = [i for i, part in enumerate(content) if part["type"] != "text"][0]
    shorter = [{**question[0], "content": content[:without] + content[without + 1 :]}, question[1]]
    answer = merging.chat(shorter)
    assert answer.status == 200
    assert answer["timings"]["prompt_n"] > (PICTURES - 1) * 64
    assert "reading the whole prompt again" in merging.log or answer.cached == 0


def test_an_oldest_picture_that_is_dropped_costs_no_more_than_upstream(
    merging: Server, plain: Server
) -> None:
    """What stands in front of it is not read again."""
    prompt = album(15)
    said = [{"role": "system", "content": "red blue green " * 20}]
    pictures, question = prompt.messages(0)
    content = pictures["content"]
    oldest = [i for i, part in enumerate(content) if part["type"] != "text"][0]
    shorter = {**pictures, "content": content[:oldest] + content[oldest + 1 :]}
    read = []
    for server in (merging, plain):
        server.chat([*said, pictures, question])
        answer = server.chat([*said, shorter, question])
        assert answer.cached > 60
        read.append(answer["timings"]["prompt_n"])
    assert read[0] <= read[1]
    assert "the rest is read again" in merging.log


def test_several_answers_to_one_prompt(merging: Server) -> None:
    messages = album(7).messages(0)
    one, three = merging.chat(messages), merging.chat(messages, n=3)
    assert [c["message"]["content"].strip() for c in three["choices"]] == [one.text] * 3


def test_slot_saved_and_restored_with_pictures(merging: Server) -> None:
    prompt = album(8)
    first = merging.chat(prompt.messages(0), id_slot=1)
    merging.held()
    before = merging.get("/slots")[1]["kv_merge"]
    saved = merging.post("/slots/1?action=save", {"filename": "album.bin"})
    assert saved.status == 200, saved
    merging.post("/slots/1?action=erase", {})
    assert merging.get("/slots")[1]["kv_merge"]["cells"] == 0
    restored = merging.post("/slots/1?action=restore", {"filename": "album.bin"})
    assert restored.status == 200, restored
    assert merging.get("/slots")[1]["kv_merge"] == before
    assert before["cells"] < before["tokens"] - 0.7 * PICTURES * 64
    second = merging.chat(prompt.messages(1, [first.text]), id_slot=1)
    assert second["timings"]["prompt_n"] < 64
    assert second.cached >= PICTURES * 64


def test_a_slot_outlives_the_server(tmp_path: Path) -> None:
    prompt = album(14)
    flags = (*MERGING, "--parallel", "2", "--slot-save-path", f"{tmp_path}{os.sep}")
    with serving(*flags) as server:
        first = server.chat(prompt.messages(0), id_slot=0)
        assert server.post("/slots/0?action=save", {"filename": "album.bin"}).status == 200
        expected = server.chat(prompt.messages(1, [first.text]), id_slot=0)
    with serving(*flags) as server:
        assert server.post("/slots/0?action=restore", {"filename": "album.bin"}).status == 200
        answer = server.chat(prompt.messages(1, [first.text]), id_slot=0)
    assert answer.text == expected.text
    assert answer.cached == expected.cached >= PICTURES * 64


def test_damaged_slot_file(merging: Server) -> None:
    prompt = album(9)
    merging.chat(prompt.messages(0), id_slot=2)
    assert merging.post("/slots/2?action=save", {"filename": "damaged.bin"}).status == 200
    line: Any = merging.process.args
    file = Path(line[line.index("--slot-save-path") + 1]) / "damaged.bin"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    assert merging.post("/slots/2?action=restore", {"filename": "damaged.bin"}).status == 400
    assert merging.chat(prompt.messages(0), id_slot=2).status == 200


def test_what_the_server_tells(merging: Server) -> None:
    prompt = album(30)
    merging.chat(prompt.messages(0))
    held = merging.held()
    props = merging.get("/props")
    assert props["kv_merge"]["policy"] == "auto"
    assert props["kv_merge"]["budget"] == "0.2"
    assert props["kv_merge"]["tokens"] == held["tokens"]
    assert props["kv_merge"]["cells"] == held["cells"]
    assert props["default_generation_settings"]["n_ctx"] == 4096
    metrics = merging.request("GET", "/metrics")[1]
    figures = dict(line.split() for line in metrics.splitlines() if line.startswith("kvmerge:"))
    assert int(figures["kvmerge:kv_cells"]) == held["cells"]
    assert int(figures["kvmerge:kv_merges_total"]) == props["kv_merge"]["merges"] >= 1
    assert float(figures["kvmerge:kv_merge_seconds_total"]) > 0
    assert merging.log.count("merged") >= 1


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64," + base64.b64encode(b"no picture").decode(),
        "data:image/png;base64,%%%",
        "file:///etc/hostname",
    ],
)
def test_a_picture_that_is_none(merging: Server, url: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    answer = merging.chat([{"role": "user", "content": content}])
    assert 400 <= answer.status < 500
    assert answer["error"]["message"]
    assert merging.get("/health")["status"] == "ok"


def test_a_prompt_that_is_longer_than_the_context(merging: Server) -> None:
    answer = merging.chat([{"role": "user", "content": "red blue " * 4000}])
    assert answer.status == 400
    assert "context" in answer["error"]["message"]


def test_embeddings_are_refused(merging: Server) -> None:
    assert merging.post("/v1/embeddings", {"input": "red"}).status == 501


def test_without_our_flags_it_is_upstreams(plain: Server) -> None:
    prompt = album(31)
    answer = plain.chat(prompt.messages(0))
    with kvmerge.Llama(
        pocket.model_path(),
        mmproj=pocket.mmproj_path(),
        n_ctx=4096,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
    ) as llm:
        python = llm.create_chat_completion(
            prompt.messages(0), temperature=0.0, repeat_penalty=1.0, max_tokens=24
        )
    assert answer.text == python["choices"][0]["message"]["content"].strip()
    assert "kv_merge" not in plain.get("/props")
    assert "kv_merge" not in plain.get("/slots")[0]


def test_a_budget_of_everything_is_no_merging(plain: Server) -> None:
    prompt = album(32)
    with serving("--kv-merge", "auto", "--kv-budget", "1.0", "--parallel", "1") as server:
        answers = [s.chat(prompt.messages(0), logprobs=True) for s in (plain, server)]
    first, second = (a["choices"][0]["logprobs"]["content"] for a in answers)
    assert first == second


def test_a_cap_holds_for_all_slots_together() -> None:
    prompts = [album(seed, 8) for seed in (40, 41, 42)]
    flags = ("--kv-max-cells", "768", "--parallel", "3", "--cache-ram", "0", "--metrics")
    with serving(*MERGING, *flags) as server:
        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(lambda prompt: converse(server, prompt, 2), prompts))
        held = server.held()
        assert server.get("/props")["kv_merge"]["max_cells"] == 768
        assert held["tokens"] > 768 >= held["cells"]
        scores = [right(prompt, a) for prompt, a in zip(prompts, answers, strict=True)]
        assert sum(scores) / len(scores) > 0.5


def test_the_environment_says_it_too() -> None:
    variables = {"LLAMA_ARG_KV_MERGE": "auto", "LLAMA_ARG_KV_BUDGET": "0.3"}
    with serving("--parallel", "1", **variables) as server:
        assert server.get("/props")["kv_merge"]["budget"] == "0.3"


def test_copies_of_slots_take_less_memory_while_merging() -> None:
    def cache_ram(*flags: str) -> list[str]:
        line = command_line(["model.gguf", *flags])[0]
        return [line[i + 1] for i, flag in enumerate(line) if flag in ("--cache-ram", "-cram")]

    assert cache_ram(*MERGING) == ["512"]
    assert cache_ram() == []
    assert cache_ram(*MERGING, "--cache-ram", "100") == ["100"]
    assert cache_ram("-cram", "0", *MERGING) == ["0"]


def test_bad_flags_are_refused_at_the_start() -> None:
    assert "Did you mean 'auto'" in refusal("--kv-merge", "atuo")
    assert "--kv-budget" in refusal("--kv-merge", "auto", "--kv-budget", "1.5")
    assert "kv_max_cells" in refusal("--kv-merge", "auto", "--kv-max-cells", "100")
    assert "is Python" in refusal("--kv-merge", "keydiff")
    assert "needs --kv-merge" in refusal("--kv-max-cells", "1024")
    assert "--keep-last-images" in refusal("--kv-merge", "auto", "--keep-last-images", "-1")


def test_who_reads_fewer_tokens_of_a_picture_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    others = "kvmerge.Llama(image_merge=...), `kvmerge chat`, and over HTTP `python -m"
    for flags in (("--image-merge", "0.9"), (*MERGING, "--image-merge=0.9")):
        said = refusal(*flags)
        assert "--image-merge" in said and others in said
    monkeypatch.setenv("LLAMA_ARG_IMAGE_MERGE", "0.9")
    with pytest.raises(UnsupportedError, match="LLAMA_ARG_IMAGE_MERGE"):
        command_line(["model.gguf"])
    monkeypatch.setenv("LLAMA_ARG_IMAGE_MERGE", "")
    assert not any("image-merge" in each for each in command_line(["model.gguf"])[0])


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--embedding",), "nothing to merge"),
        (("--context-shift",), "--context-shift"),
        (("--cache-reuse", "64"), "--cache-reuse"),
        (("--spec-type", "ngram-simple"), "speculative"),
        (("--model-draft", os.fspath(pocket.model_path())), "speculative"),
        (("--reranking",), "nothing to merge"),
        (("--kv-max-cells", "64KiB"), "at least 512"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_flags_that_do_not_go_with_merging(flags: tuple[str, ...], reason: str) -> None:
    assert reason in refusal(*MERGING, *flags)


def test_the_program_alone_knows_the_policies() -> None:
    """As llama-cli and llama-mtmd-cli do, which nobody starts for them."""
    line = [os.fspath(program()), "-m", os.fspath(pocket.model_path()), "--ctx-size", "4096"]
    with serving(line=[*line, "--kv-merge", "auto"]) as server:
        assert server.get("/props")["kv_merge"]["policy"] == "auto"
        assert server.chat([{"role": "user", "content": "red"}]).status == 200
    with (
        pytest.raises(AssertionError, match="--kv-merge atuo: it is none, or one of auto,"),
        serving(line=[*line, "--kv-merge", "atuo"]),
    ):
        pass


def test_the_program_has_the_settings_of_python() -> None:
    root = Path(__file__).resolve().parent.parent
    line = [sys.executable, os.fspath(root / "tools" / "presets.py"), "--check"]
    run = subprocess.run(line, capture_output=True, text=True)
    assert run.returncode == 0, f"{run.stdout}{run.stderr}: python tools/presets.py mends it"


def test_a_model_that_cannot_be_merged(tmp_path: Path) -> None:
    shape = Shape(arch="gemma3", layers=1)  # its only layer has a sliding window
    model = write_random_model(tmp_path / "model.gguf", shape)
    assert "there is nothing to merge" in refusal("--kv-merge", "auto", model=model)
