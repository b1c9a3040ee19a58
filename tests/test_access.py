"""Which files and addresses messages may name."""

from __future__ import annotations

import base64
import http.server
import io
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conftest import Factory, answer
from kvmerge import MediaAccess, errors
from kvmerge.media import MediaPart
from kvmerge.media import access as access_module
from kvmerge.media.access import AccessError, is_public


def png(colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves one picture, redirects, and what takes its time."""

    asked: list[str] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        name, _, rest = self.path.lstrip("/").partition("/")
        if name == "to":
            self.send_response(302)
            self.send_header("Location", rest)
            self.end_headers()
        elif name == "loop":
            self.send_response(301)
            self.send_header("Location", f"/loop/{int(rest or 0) + 1}")
            self.end_headers()
        elif name == "slow":
            self.send_response(200)
            self.send_header("Content-Length", str(len(PNG)))
            self.end_headers()
            self.drip(PNG)
        elif name == "slow_head":
            self.drip(b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 1000)
        elif name == "chunks":
            self.protocol_version = "HTTP/1.1"
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"40\r\n" + PNG[:30])
            self.close_connection = True
        elif name == "no_http":
            self.wfile.write(b"SSH-2.0-secret banner\r\n")
        elif name == "odd_length":
            self.wfile.write(b"HTTP/1.1 200 secret\r\nContent-Length: secret\r\n\r\n")
        elif name == "odd_status":
            self.wfile.write(b"HTTP/1.1 500 secret\r\n\r\nsecret")
        elif name == "large":
            self.send_response(200)
            self.end_headers()
            for _ in range(64):
                self.wfile.write(bytes(1 << 16))
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(PNG)))
            self.end_headers()
            self.wfile.write(PNG)

    def drip(self, data: bytes) -> None:
        try:
            for byte in data:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.05)
        except OSError:  # The other side has had enough.
            return

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "pictures"
    (inside / "more").mkdir(parents=True)
    (inside / "a.png").write_bytes(PNG)
    (inside / "more" / "b.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    (tmp_path / "pictures-of-others").mkdir()
    (tmp_path / "pictures-of-others" / "c.png").write_bytes(PNG)
    return inside


def content(source: Any, access: MediaAccess) -> Any:
    return MediaPart(1, "image", source, access).content


def message(source: Any) -> list[Any]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": source}}, "?"]}]


@pytest.mark.parametrize("blank", ["", "  "])
def test_blank_name(blank: str) -> None:
    with pytest.raises(errors.MediaError, match="is empty"):
        content(blank, MediaAccess.everything())


# Nothing.


def test_nothing(folder: Path, server: str, llama: Factory) -> None:
    """What serves others reads no file and asks no host, and takes what messages contain."""
    llm = llama(media_access=MediaAccess())
    asked = len(Handler.asked)
    for source in (
        str(folder / "a.png"),
        (folder / "a.png").as_uri(),
        "/etc/passwd",
        "~/a.png",
        "a.png",
        f"{server}/a.png",
        "https://example.org/a.png",
        "HTTP://LOCALHOST/",
    ):
        with pytest.raises(errors.MediaError, match="media_access=") as caught:
            answer(llm, message(source))
        assert "root:" not in str(caught.value)
    assert len(Handler.asked) == asked
    uri = "data:image/png;base64," + base64.b64encode(PNG).decode()
    assert isinstance(answer(llm, message(uri), max_tokens=1), str)
    images = [{"role": "user", "content": "?", "images": [base64.b64encode(PNG).decode(), PNG]}]
    assert isinstance(answer(llm, images, max_tokens=1), str)
    assert MediaAccess.none() == MediaAccess()


def test_everything_is_the_default(llama: Factory, folder: Path, server: str) -> None:
    llm = llama()
    assert llm.media_access == MediaAccess.everything()
    for source in (str(folder / "a.png"), f"{server}/a.png"):
        assert isinstance(answer(llm, message(source), max_tokens=1), str)


def test_access_goes_along(llama: Factory) -> None:
    access = MediaAccess(urls=["example.org"], max_bytes=100)
    copy = pickle.loads(pickle.dumps(llama(media_access=access)))
    assert copy.media_access == access
    copy.close()


# Files.


def test_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    access = MediaAccess(folders=[folder])
    monkeypatch.chdir(folder)
    for source in (
        folder / "a.png",
        str(folder / "more" / "b.png"),
        (folder / "a.png").as_uri(),
        "a.png",
        "more/../a.png",
    ):
        assert content(source, access) == PNG
    for source in (
        folder.parent / "secret.png",
        folder / ".." / "secret.png",
        "../secret.png",
        folder.parent / "pictures-of-others" / "c.png",
        "/etc/passwd",
        "/proc/self/environ",
        "/dev/zero",
        folder.parent / "nowhere.png",
        folder.parent,
    ):
        with pytest.raises(errors.MediaError, match="outside the folders that media_access="):
            content(source, access)


def test_links_lead_where_they_lead(folder: Path) -> None:
    access = MediaAccess(folders=[folder])
    (folder / "out.png").symlink_to(folder.parent / "secret.png")
    (folder / "out").symlink_to(folder.parent)
    (folder / "in.png").symlink_to(folder / "a.png")
    (folder.parent / "door").symlink_to(folder)
    for source in (folder / "out.png", folder / "out" / "secret.png"):
        with pytest.raises(errors.MediaError, match="outside the folders"):
            content(source, access)
    for source in (folder / "in.png", folder.parent / "door" / "a.png"):
        assert content(source, access) == PNG
    assert content(folder / "a.png", MediaAccess(folders=[folder.parent / "door"])) == PNG


def test_link_that_leads_to_itself(folder: Path) -> None:
    (folder / "loop.png").symlink_to(folder / "loop.png")
    with pytest.raises(errors.MediaError, match="picture 1"):
        content(folder / "loop.png", MediaAccess.everything())


def test_what_is_no_file(folder: Path) -> None:
    """A pipe would wait for ever, and a device has no end."""
    os.mkfifo(folder / "pipe.png")
    for source in (folder / "pipe.png", "/dev/zero", "/dev/null"):
        with pytest.raises(errors.MediaError, match="not a regular file"):
            content(source, MediaAccess.everything())


def test_large_file(folder: Path) -> None:
    access = MediaAccess(folders=[folder], max_bytes=len(PNG))
    assert content(folder / "a.png", access) == PNG
    (folder / "a.png").write_bytes(PNG + b"\0")
    with pytest.raises(errors.MediaError, match="is larger than"):
        content(folder / "a.png", access)
    with pytest.raises(errors.MediaError, match="is larger than"):
        content(io.BytesIO(PNG + b"\0"), access)


# Addresses.


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("::ffff:93.184.216.34", True),
        ("127.0.0.1", False),
        ("127.9.9.9", False),
        ("0.0.0.0", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("198.18.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("fec0::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("::127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b:1::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2001:0:7f00:1::", False),
        ("2001:db8::1", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "LOCALHOST.", "0.0.0.0", "2130706433", "0x7f.1", "127.1"]
    + ["[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "user:pass@127.0.0.1", "169.254.169.254"],
)
def test_private_hosts(host: str, server: str) -> None:
    """However they are written: what a name resolves to is looked at."""
    asked = len(Handler.asked)
    port = server.rpartition(":")[2]
    with pytest.raises(errors.MediaError, match=r"private_addresses|cannot be reached"):
        content(f"http://{host}:{port}/a.png", MediaAccess(urls=True))
    assert len(Handler.asked) == asked


def test_private_hosts_that_are_allowed(server: str) -> None:
    access = MediaAccess(urls=True, private_addresses=True)
    assert content(f"{server}/a.png", access) == PNG
    assert content(f"{server}/to//a.png", access) == PNG


def test_hosts(server: str) -> None:
    access = MediaAccess(urls=["127.0.0.1", "images.example.org"], private_addresses=True)
    assert content(f"{server}/a.png", access) == PNG
    for url in ("http://localhost/a.png", "http://127.0.0.1.example.org/a.png"):
        with pytest.raises(errors.MediaError, match="a host that media_access= does not allow"):
            content(url, access)
    port = server.rpartition(":")[2]
    with pytest.raises(errors.MediaError, match="on localhost, a host that"):
        content(f"{server}/to/http://localhost:{port}/a.png", access)


def test_url_as_people_write_it(server: str) -> None:
    """Spaces and letters beyond ASCII go as browsers send them, and no line is added."""
    for path, sent in (
        ("/grün b.png", "/gr%C3%BCn%20b.png"),
        ("/a%20b.png?x=1&y=[2]", "/a%20b.png?x=1&y=[2]"),
        ("/a.png HTTP/1.1\r\nX: 1", "/a.png%20HTTP/1.1X:%201"),
    ):
        assert content(server + path, MediaAccess.everything()) == PNG
        assert Handler.asked[-1] == sent


def test_redirect_to_a_private_address(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first host counts as public; what it leads to is looked at again."""
    monkeypatch.setattr(access_module, "is_public", lambda address: address == "127.0.0.1")
    access = MediaAccess(urls=True)
    port = server.rpartition(":")[2]
    assert content(f"{server}/to/http://127.0.0.1:{port}/a.png", access) == PNG
    for target in (f"http://127.0.0.2:{port}/b.png", f"http://[::1]:{port}/b.png"):
        with pytest.raises(errors.MediaError, match=r"private_addresses|cannot be reached"):
            content(f"{server}/to/{target}", access)
    assert "/b.png" not in Handler.asked


@pytest.mark.parametrize(
    "scheme", ["file:///etc/passwd", "ftp://127.0.0.1/a", "gopher://x/", "data:,x"]
)
def test_redirect_to_something_else(scheme: str, server: str) -> None:
    with pytest.raises(errors.MediaError, match="picture 1"):
        content(f"{server}/to/{scheme}", MediaAccess.everything())


def test_name_that_changes_its_address(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is looked up once: the address that was checked is the one connected to."""
    looked_up: list[str] = []
    port = int(server.rpartition(":")[2])

    def getaddrinfo(host: str, *_: Any, **__: Any) -> Any:
        looked_up.append(host)
        address = "127.0.0.1" if len(looked_up) == 1 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(access_module, "is_public", lambda address: address == "127.0.0.1")
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert content(f"http://changing.example:{port}/a.png", MediaAccess(urls=True)) == PNG
    assert looked_up == ["changing.example"]
    with pytest.raises(errors.MediaError, match="private_addresses"):
        content(f"http://changing.example:{port}/a.png", MediaAccess(urls=True))


def test_one_private_address_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))
        for address in ("93.184.216.34", "10.0.0.1")
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(errors.MediaError, match=r"\(10.0.0.1\)"):
        content("http://both.example/a.png", MediaAccess(urls=True))


def test_no_proxy_where_addresses_are_checked(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    asked = len(Handler.asked)
    with pytest.raises(errors.MediaError, match="picture 1"):
        content("http://nowhere.invalid/a.png", MediaAccess(urls=True))
    assert len(Handler.asked) == asked
    assert content("http://nowhere.invalid/a.png", MediaAccess.everything()) == PNG


@pytest.mark.parametrize("path", ["slow", "slow_head"])
def test_time(path: str, server: str) -> None:
    access = MediaAccess(urls=True, private_addresses=True, timeout_s=0.5)
    start = time.monotonic()
    with pytest.raises(errors.MediaError, match="did not come within 0.5 s"):
        content(f"{server}/{path}", access)
    assert time.monotonic() - start < 10


def test_size(server: str) -> None:
    for path, size in (("large", 1 << 20), ("a.png", len(PNG) - 1)):
        access = MediaAccess(urls=True, private_addresses=True, max_bytes=size)
        with pytest.raises(errors.MediaError, match="is larger than"):
            content(f"{server}/{path}", access)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("chunks", "cut off"),
        ("no_http", "cannot be fetched"),
        ("odd_length", "picture 1"),
        ("odd_status", "HTTP 500 Internal Server Error"),
    ],
)
def test_what_was_received_is_not_told(path: str, said: str, server: str) -> None:
    with pytest.raises(errors.MediaError, match=said) as caught:
        MediaPart(1, "image", f"{server}/{path}").picture()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("most", [0, 3])
def test_redirects(most: int, server: str) -> None:
    access = MediaAccess(urls=True, private_addresses=True, max_redirects=most)
    with pytest.raises(errors.MediaError, match=f"more than {most} redirects"):
        content(f"{server}/loop", access)
    assert content(f"{server}/a.png", access) == PNG


@pytest.mark.parametrize(
    "url", ["http://", "http:///a.png", "https://[::1", "http://a b/", "http://x:y/"]
)
def test_no_url(url: str) -> None:
    with pytest.raises(errors.MediaError, match="picture 1"):
        content(url, MediaAccess.everything())


# Options.


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MediaAccess(folders="/srv"), "folders must be"),
        (lambda: MediaAccess(folders=[3]), "folders must be"),
        (lambda: MediaAccess(urls="example.org"), "urls must be"),
        (lambda: MediaAccess(urls=[1]), "urls must be"),
        (lambda: MediaAccess(urls=1), "urls must be"),
        (lambda: MediaAccess(private_addresses="no"), "private_addresses must be"),
        (lambda: MediaAccess(max_bytes=0), "max_bytes must be"),
        (lambda: MediaAccess(max_bytes=1.5), "max_bytes must be"),
        (lambda: MediaAccess(timeout_s=0), "timeout_s must be"),
        (lambda: MediaAccess(timeout_s=float("nan")), "timeout_s must be"),
        (lambda: MediaAccess(timeout_s="1"), "timeout_s must be"),
        (lambda: MediaAccess(max_redirects=-1), "max_redirects must be"),
        (lambda: MediaAccess(max_redirects=True), "max_redirects must be"),
    ],
)
def test_option(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(errors.OptionError, match=said):
        make()


def test_no_access(llama: Factory) -> None:
    for value in ("none", True, {"urls": True}):
        with pytest.raises(errors.OptionError, match="kvmerge.MediaAccess"):
            llama(media_access=value)
    assert isinstance(AccessError("x"), Exception)
