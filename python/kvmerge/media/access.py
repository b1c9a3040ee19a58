"""Which files and addresses messages may name, and how much is fetched."""

from __future__ import annotations

import http.client
import ipaddress
import os
import socket
import stat
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import OptionError

_MIB = 1024 * 1024
_PIECE = 1 << 16


class AccessError(Exception):
    """Why something that a message names was not had."""


@dataclass(frozen=True)
class MediaAccess:
    """What messages may name: ``MediaAccess()`` is for programs that serve others, and is nothing.

    Bytes, Pillow pictures, arrays and data: URIs are in the message itself, and always taken.

    Attributes
    ----------
    folders : sequence of path, or None
        Files are read only from these folders and those below, wherever symbolic links lead;
        None: from anywhere.
    urls : bool or sequence of str
        Whether http:// and https:// URLs are fetched, or from which hosts.
    private_addresses : bool
        Whether also from addresses of this machine and of its own network, those that are
        loopback, link-local, private or reserved. Every address that a name stands for is checked,
        again after every redirect, and the one that was checked is the one connected to. Without
        it, proxies of the environment are not used, which could not be checked.
    max_bytes : int
        The most bytes of a file or download.
    timeout_s : float
        The most seconds that a download takes, with its redirects.
    max_redirects : int
        The most redirects that are followed.

    Raises
    ------
    OptionError
        If a value is out of its range.

    Examples
    --------
    >>> access = MediaAccess(folders=["/srv/pictures"], urls=["images.example.org"])
    >>> llm = Llama("model.gguf", mmproj="mmproj.gguf", media_access=access)
    """

    folders: Sequence[str | os.PathLike[str]] | None = ()
    urls: bool | Sequence[str] = False
    private_addresses: bool = False
    max_bytes: int = 64 * _MIB
    timeout_s: float = 30.0
    max_redirects: int = 5
    _roots: tuple[Path, ...] = field(init=False, repr=False, compare=False, default=())

    def __post_init__(self) -> None:
        self._check("private_addresses", isinstance(self.private_addresses, bool), "a bool")
        for name, low in (("max_bytes", 1), ("max_redirects", 0)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= low
            self._check(name, whole, f"a whole number of at least {low}")
        timeout = self.timeout_s
        number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
        self._check("timeout_s", number and 0 < timeout <= 86400, "from 0 to 86400 seconds")
        hosts = isinstance(self.urls, bool) or _is_list(self.urls, str)
        self._check("urls", hosts, "True, False, or a list of hosts")
        paths = self.folders is None or _is_list(self.folders, (str, os.PathLike))
        self._check("folders", paths, "a list of folders, or None for all")
        if not isinstance(self.urls, bool):
            object.__setattr__(self, "urls", tuple(self.urls))
        if self.folders is not None:
            object.__setattr__(self, "folders", tuple(self.folders))
            roots = tuple(Path(folder).expanduser().resolve() for folder in self.folders)
            object.__setattr__(self, "_roots", roots)

    def _check(self, name: str, is_right: bool, accepted: str) -> None:
        if not is_right:
            value = getattr(self, name)
            raise OptionError(f"MediaAccess({name}={value!r}): {name} must be {accepted}")

    @classmethod
    def none(cls) -> MediaAccess:
        """Only what is in the messages themselves: the same as ``MediaAccess()``."""
        return cls()

    @classmethod
    def everything(cls) -> MediaAccess:
        """All files and URLs: what `Llama` takes unless it is told otherwise."""
        return cls(folders=None, urls=True, private_addresses=True, max_bytes=256 * _MIB)

    # Files.

    def file(self, path: Path) -> Path:
        """Return the file that a path leads to, if it may be read.

        Raises
        ------
        AccessError
            If it may not, or is no file.
        """
        try:
            found = path.expanduser().resolve()
            if self.folders is not None and not any(
                found.is_relative_to(root) for root in self._roots
            ):
                raise AccessError("is a file outside the folders that media_access= allows")
            mode = found.stat().st_mode
        except FileNotFoundError as error:
            raise AccessError("does not exist") from error
        except (OSError, ValueError, RuntimeError) as error:
            raise AccessError(f"cannot be read: {_words(error)}") from error
        if stat.S_ISDIR(mode):
            raise AccessError("is a folder")
        if not stat.S_ISREG(mode):
            raise AccessError("is not a regular file")
        return found

    def read(self, file: Path) -> bytes:
        """Return the bytes of what `MediaAccess.file` returned.

        Raises
        ------
        AccessError
            If they cannot be read, or are too many.
        """
        try:
            with file.open("rb") as opened:
                return self._limited(opened.read(self.max_bytes + 1))
        except OSError as error:
            raise AccessError(f"cannot be read: {_words(error)}") from error

    def _limited(self, data: bytes) -> bytes:
        if len(data) > self.max_bytes:
            size = f"{self.max_bytes / _MIB:g} MiB"
            raise AccessError(f"is larger than {size}, which media_access= allows")
        return data

    # Addresses.

    def check_url(self, url: str) -> None:
        """Check that a URL may be fetched, before its name is looked up.

        Raises
        ------
        AccessError
            If it may not.
        """
        try:
            host = (urllib.parse.urlsplit(url).hostname or "").rstrip(".").lower()
        except ValueError as error:
            raise AccessError(f"is not a URL: {error}") from error
        if not host:
            raise AccessError("is not a URL: it names no host")
        if self.urls is True:
            return
        if not self.urls:
            raise AccessError("is a URL, and media_access= allows none")
        if host not in {allowed.rstrip(".").lower() for allowed in self.urls}:
            raise AccessError(f"is on {host}, a host that media_access= does not allow")

    def fetch(self, url: str) -> bytes:
        """Return what a URL leads to.

        Raises
        ------
        AccessError
            If it may not be fetched, cannot be, or does not come whole.
        """
        self.check_url(url)
        with _deadline(self.timeout_s) as watch:
            try:
                return self._download(url, watch)
            except AccessError:
                raise
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise AccessError(self._reason(error, watch)) from error

    def _reason(self, error: Exception, watch: _Watch) -> str:
        """Return in words why a download failed, without quoting what was received."""
        if watch.is_over:
            return f"did not come within {self.timeout_s:g} s"
        if isinstance(error, urllib.error.HTTPError):
            error.close()
            return f"was refused: HTTP {error.code} {http.client.responses.get(error.code, '')}"
        if isinstance(error, urllib.error.URLError):
            return f"cannot be reached: {_words(error.reason)}"
        if isinstance(error, http.client.IncompleteRead):
            return "is cut off: the connection ended early"
        if isinstance(error, OSError):
            return f"cannot be fetched: {_words(error)}"
        return f"cannot be fetched: {type(error).__name__}"

    def _download(self, url: str, watch: _Watch) -> bytes:
        opener = urllib.request.OpenerDirector()
        handlers: list[Any] = [
            _Http(self, watch),
            _Redirects(self),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.UnknownHandler(),
        ]
        if self.private_addresses:
            handlers.append(urllib.request.ProxyHandler())
        for handler in handlers:
            opener.add_handler(handler)
        request = urllib.request.Request(_quoted(url), headers={"User-Agent": "kvmerge"})
        with opener.open(request, timeout=self.timeout_s) as response:
            announced = int(response.headers.get("Content-Length") or 0)
            if announced > self.max_bytes:
                self._limited(bytes(self.max_bytes + 1))
            data = bytearray()
            while piece := response.read(_PIECE):
                data += piece
                if watch.is_over:
                    raise AccessError(f"did not come within {self.timeout_s:g} s")
                self._limited(data)
        if len(data) < announced:
            raise AccessError(f"is cut off: {len(data)} of {announced} bytes came")
        if watch.is_over:
            raise AccessError(f"did not come within {self.timeout_s:g} s")
        return bytes(data)

    def connect(self, host: str, port: int, timeout: float | None) -> socket.socket:
        """Connect to one of the addresses of a host, all of which must be allowed.

        Raises
        ------
        AccessError
            If one is not.
        OSError
            If none can be reached.
        """
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if not self.private_addresses:
            for *_, address in found:
                if not is_public(str(address[0])):
                    raise AccessError(
                        f"is on {host}, which is an address of this machine or of its own network "
                        f"({address[0]}): media_access= does not allow private_addresses"
                    )
        failure: OSError = OSError(f"{host} has no address")
        for family, kind, protocol, _, address in found:
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(timeout)
                connection.connect(address)
                return connection
            except OSError as error:
                connection.close()
                failure = error
        raise failure


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the public internet, however it is written."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.teredo is not None or ip.is_site_local or int(ip) >> 32 == 0:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def _quoted(url: str) -> str:
    """Return a URL in which what follows the host is written as browsers do: é becomes %C3%A9."""
    scheme, host, *rest = urllib.parse.urlsplit(url)
    quoted = [urllib.parse.quote(part, safe="%/:=&?~+!$,;'@()*[]") for part in rest]
    return urllib.parse.urlunsplit((scheme, host, *quoted))


def _is_list(value: object, kind: Any) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, (str, bytes))
        and all(isinstance(each, kind) for each in value)
    )


def _words(error: object) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    words = str(error).encode("utf-8", "backslashreplace").decode()
    return words if len(words) <= 200 else words[:199] + "…"


# One download: connections that are checked, and are cut when its time is over.


class _Watch:
    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._open: list[socket.socket] = []

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._end

    def add(self, connection: socket.socket) -> None:
        self._open.append(connection)

    def cut(self) -> None:
        for connection in self._open:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # It is closed already.
                continue


@contextmanager
def _deadline(seconds: float) -> Iterator[_Watch]:
    watch = _Watch(seconds)
    timer = threading.Timer(seconds, watch.cut)
    timer.daemon = True
    timer.start()
    try:
        yield watch
    finally:
        timer.cancel()


class _Connection(http.client.HTTPConnection):
    is_secure = False

    def __init__(self, *args: Any, access: MediaAccess, watch: _Watch, **options: Any) -> None:
        super().__init__(*args, **options)
        self._access, self._watch = access, watch

    def connect(self) -> None:
        timeout = self.timeout if isinstance(self.timeout, (int, float)) else None
        self.sock = self._access.connect(self.host, self.port, timeout)
        self._watch.add(self.sock)
        tunnel: str | None = self._tunnel_host  # type: ignore[attr-defined]
        if tunnel:
            self._tunnel()  # type: ignore[attr-defined]
        if self.is_secure:
            import ssl  # A Python that was built without it has everything else.

            context = ssl.create_default_context()
            self.sock = context.wrap_socket(self.sock, server_hostname=tunnel or self.host)
            self._watch.add(self.sock)


class _SecureConnection(_Connection):
    default_port = http.client.HTTPS_PORT
    is_secure = True


class _Http(urllib.request.AbstractHTTPHandler):
    def __init__(self, access: MediaAccess, watch: _Watch) -> None:
        super().__init__()
        self._options: dict[str, Any] = {"access": access, "watch": watch}

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Connection, request, **self._options)

    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_SecureConnection, request, **self._options)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, access: MediaAccess) -> None:
        self._access = access
        self._followed = 0
        self.max_redirections = access.max_redirects + 1

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, url: str
    ) -> Any:
        self._followed += 1
        if self._followed > self._access.max_redirects:
            raise AccessError(f"leads through more than {self._access.max_redirects} redirects")
        self._access.check_url(url)
        return super().redirect_request(req, fp, code, msg, headers, url)
