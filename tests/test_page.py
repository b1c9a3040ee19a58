"""The page of `kvmerge serve`, and llama-server's own where it is built in, in a real browser.

Needs Chromium and its driver (Debian: ``chromium chromium-driver``) and ``pip install selenium``.
"""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvmerge import pocket
from kvmerge.commands.serve import has_interface
from serving import Server, is_built, serving

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (is_built() or os.environ.get("CI")), reason="built with KVMERGE_SERVER=OFF"
)

SECONDS = 120
OURS = "kv.html" if has_interface() else ""
PROMPT = pocket.make_prompt(np.random.default_rng(90), 12, tasks=["letter_of"], n_questions=6)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving("--kv-merge", "auto", "--parallel", "2", "--temp", "0") as server:
        yield server


@pytest.fixture
def chromium() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    if BROWSER is None or DRIVER is None:
        pytest.skip("chromium or chromedriver is missing")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield browser
        assert not [
            entry for entry in browser.get_log("browser") if entry["source"] == "javascript"
        ]
    finally:
        browser.quit()


@pytest.fixture
def browser(chromium: Any, server: Server) -> Any:
    """Return a browser that shows our own page."""
    chromium.get(f"http://127.0.0.1:{server.port}/{OURS}")
    return chromium


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    files = [tmp_path / f"{i}.png" for i in range(len(PROMPT.pictures))]
    for file, picture in zip(files, PROMPT.pictures, strict=True):
        picture.image.save(file)
    return [os.fspath(file) for file in files]


def wait(browser: Any, what: Callable[[Any], Any]) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, SECONDS, poll_frequency=0.1).until(what)


def ask(browser: Any, text: str) -> str:
    """Type a question, and return the answer that the page shows when it is done."""
    n = len(browser.find_elements("css selector", ".assistant .words"))
    browser.find_element("id", "text").send_keys(text)
    browser.find_element("id", "send").click()

    def done(_: Any) -> Any:
        found = browser.find_elements("css selector", ".assistant .words[data-state=done]")
        return found if len(found) > n else None

    return str(wait(browser, done)[-1].text)


def test_twelve_pictures_are_dropped_and_asked_about(
    browser: Any, server: Server, pictures: list[str]
) -> None:
    browser.find_element("id", "files").send_keys("\n".join(pictures))
    wait(browser, lambda b: len(b.find_elements("css selector", "#shown img")) == 12)
    points = []
    for question in PROMPT.questions[:4]:
        said = ask(browser, question.text)
        points.append(pocket.score(question.task, said.strip(), question.answer))
    assert sum(points) >= 3, points
    assert browser.find_elements("css selector", "#shown img") == []
    assert len(browser.find_elements("css selector", ".user img")) == 12

    # What the cache holds is what the server says.
    held = server.held()
    status = browser.find_element("id", "cache")
    wait(browser, lambda _: status.get_attribute("data-cells") == str(held["cells"]))
    assert f"{held['tokens']} tokens seen, {held['cells']} cells held" in status.text
    assert held["cells"] < held["tokens"] - 0.7 * 12 * 64
    assert float(status.get_attribute("data-saved")) > 1


def test_an_answer_can_be_stopped_and_errors_are_said(browser: Any, pictures: list[str]) -> None:
    browser.find_element("id", "files").send_keys("\n".join(pictures[:6] * 6))
    wait(browser, lambda b: len(b.find_elements("css selector", "#shown img")) == 36)
    browser.find_element("id", "text").send_keys("Which letters are there?")
    send = browser.find_element("id", "send")
    send.click()
    wait(browser, lambda _: send.text == "Stop")
    send.click()
    wait(browser, lambda _: send.text == "Ask")
    # It was not answered, and is there to be asked again.
    assert len(browser.find_elements("css selector", "#shown img")) == 36
    browser.find_element("id", "files").send_keys("\n".join(pictures * 3))
    wait(browser, lambda b: len(b.find_elements("css selector", "#shown img")) == 72)
    send.click()
    errors = wait(browser, lambda b: b.find_elements("css selector", ".error .words"))
    assert "context" in errors[0].text
    browser.find_element("id", "new").click()
    assert browser.find_elements("css selector", ".said") == []
    assert ask(browser, PROMPT.questions[0].text)


def test_a_file_that_is_no_picture(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "note.png").write_text("no picture")
    browser.find_element("id", "files").send_keys(os.fspath(tmp_path / "note.png"))
    errors = wait(browser, lambda b: b.find_elements("css selector", ".error .words"))
    assert "note.png is not a picture" in errors[0].text


@pytest.mark.skipif(not has_interface(), reason="built with KVMERGE_WEB_INTERFACE=OFF")
def test_pictures_are_shown_in_the_interface_of_llama_server(
    chromium: Any, server: Server, pictures: list[str]
) -> None:
    chromium.get(f"http://127.0.0.1:{server.port}/")
    wait(chromium, lambda b: b.find_elements("css selector", "textarea"))
    chromium.find_element("css selector", "input[type=file]").send_keys("\n".join(pictures))
    thumbnails = "button[aria-label^='Preview']"
    wait(chromium, lambda b: len(b.find_elements("css selector", thumbnails)) == 12)

    points = []
    for n, question in enumerate(PROMPT.questions[:4]):
        chromium.find_element("css selector", "textarea").send_keys(question.text)
        send = "button[type=submit]:enabled"
        wait(chromium, lambda b, send=send: b.find_elements("css selector", send))[-1].click()
        said = wait(chromium, lambda b, n=n: answered(b, n))
        points.append(pocket.score(question.task, said, question.answer))
    assert sum(points) >= 3, points
    held = server.held()
    assert held["cells"] < held["tokens"] - 0.7 * 12 * 64


def answered(browser: Any, before: int) -> str | None:
    """Return the last answer, once it is complete: then it is followed by what it took."""
    found = browser.find_elements("css selector", "[aria-label='Assistant message with actions']")
    lines = found[-1].text.splitlines() if len(found) > before else []
    return lines[0] if lines and lines[-1].endswith("t/s") else None


def test_the_page_is_served_unless_another_is_named(server: Server, tmp_path: Path) -> None:
    connection = server.connect()
    connection.request("GET", f"/{OURS}", headers={"Accept-Encoding": "gzip"})
    response = connection.getresponse()
    assert response.status == 200
    text = response.read()
    if response.getheader("Content-Encoding") == "gzip":  # what is built in is
        text = gzip.decompress(text)
    assert b"<title>kvmerge</title>" in text
    connection.close()
    (tmp_path / "index.html").write_text("another")
    with serving("--parallel", "1", "--path", os.fspath(tmp_path)) as other:
        assert other.request("GET", "/") == (200, "another")
