"""Files of one directory on a server: http(s) by the standard library, s3 through fsspec; nothing else."""

import http.client
import random
import re
import ssl
import string
import threading
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import IO, Any
from urllib.parse import quote, urlsplit, urlunsplit

from mde_dist.data.config import PATIENCE
from mde_dist.utils.console import say_once
from mde_dist.utils.errors import RankError, UserError
from mde_dist.utils.urls import public_url, whole_url

SCHEMES = ("http", "https", "s3")
TIMEOUT = 10.0
"""Seconds for a connection to open, and for each of its answers."""

_SLOWEST = 1024  # bytes a second: with fewer a server counts as away, too
_WORTH = 16 * 1024  # bytes that are news, however long they took
_SAY_AFTER = 5.0  # seconds of waiting before the first word about it; then twice as long each time
_CHUNK = 256 * 1024  # bytes of a read: enough to be quick, little enough to look up from
_PIECE = 8 * 1024 * 1024  # bytes of a request to S3
_PAUSES = (0.25, 0.5, 1, 2, 4, 5)  # seconds before the next try; the last one repeats
_jitter = random.Random()  # of its own: the global generator may belong to somebody's experiment


class NotThere(RankError):
    """The file is not there, or not for us; asking again is no use."""


class ServerUnavailable(RankError):
    """The server stayed away for longer than our patience."""


class RetryableError(Exception):
    """The server failed in a way that may pass. The text says what happened."""


class RangeError(Exception):
    """The file is shorter than where we wanted to go on: what we have is no start of it."""


class Cancelled(Exception):
    """The caller's `closing` was set meanwhile."""


class Remote(ABC):
    """The files of one directory on a server. Threads may share it."""

    def __init__(self, location: str):
        self.location = location
        self.silent_since: float | None = None
        """Time of its first failure since it last sent something (`time.monotonic`); shared by all that ask it."""
        self.last_failure = 0.0

    @abstractmethod
    def url(self, name: str) -> str:
        """The address of a file, as messages show it."""

    @abstractmethod
    def read(self, name: str, start: int = 0) -> Iterator[bytes]:
        """The bytes of a file from `start` on, in chunks of at most 1 MiB; a chunk may be empty.

        Raises RetryableError where it is worth asking again, RangeError where the file ends before `start`, else
        NotThere.
        """


def open_remote(location: str, timeout: float = TIMEOUT) -> Remote:
    """The directory at a URL; nothing is asked of the server yet. `timeout`: seconds. Raises UserError."""
    location = whole_url(location)
    kind, shown = location.partition("://")[0].lower(), public_url(location)
    if kind not in SCHEMES:
        raise UserError(f"{shown}: cannot be read from; give a directory or {'://, '.join(SCHEMES)}://")
    try:
        parts = urlsplit(location)
        _ = parts.port if kind != "s3" else None  # asking for it checks it; an ARN in a bucket's place has colons too
    except ValueError as error:
        raise UserError(f"{shown}: not a URL ({error})") from None
    if "@" in parts.netloc:
        raise UserError(f"{shown}: user:password@ in a URL is not supported; leave it out")
    if not parts.hostname:
        raise UserError(f"{shown}: names no {'bucket' if kind == 's3' else 'host'}")
    if kind == "s3" and shown != location:
        raise UserError(f"{shown}: an s3:// URL takes no query; the AWS settings hold the key")
    return _S3(location, timeout) if kind == "s3" else _Http(location, timeout)


def read_whole(remote: Remote, name: str, limit: int, patience: float = PATIENCE) -> bytes:
    """A small file of unknown size. `limit`: bytes; `patience`: seconds.

    Raises UserError, NotThere or ServerUnavailable.

    Every try begins anew: the file may have been replaced meanwhile, and nobody would notice a mixture. So what a try
    brings is news only beyond what another one brought.
    """
    waiting = RetryPolicy(remote, name, patience, threading.Event(), aloud=True)
    furthest = 0
    while True:
        data = bytearray()
        try:
            for chunk in remote.read(name):
                data += chunk
                if len(data) > limit:
                    raise UserError(f"{remote.url(name)}: more than {limit} bytes; is it the right file?")
                waiting.progress(max(0, len(data) - furthest))
                furthest = max(furthest, len(data))
            return bytes(data)
        except RetryableError as reason:
            waiting.pause(reason)


def with_retries(remote: Remote, name: str, start: int, patience: "RetryPolicy") -> Iterator[bytes]:
    """The bytes of a file from `start` on, asked for again from where they stopped.

    Raises NotThere, RangeError, ServerUnavailable, and Cancelled soon after the `closing` of the patience is set (a
    silent server is waited for up to its time-out).
    """
    patience.begin()
    while not patience.closing.is_set():
        try:
            for chunk in remote.read(name, start):
                if patience.closing.is_set():
                    raise Cancelled
                if chunk:
                    start += len(chunk)
                    yield chunk
                    patience.progress(len(chunk))
            return
        except RetryableError as reason:
            patience.pause(reason)
    raise Cancelled


class RetryPolicy:
    """Pauses between the tries for a file, and the limit after which they end."""

    def __init__(self, remote: Remote, name: str, seconds: float, closing: threading.Event, aloud: bool = False):
        """`seconds` without a new byte of this file, or without any of the server since it failed, are too many; so are
        they with a byte now and then. `aloud`: say now and then what is waited for."""
        self.closing = closing
        self._remote, self._name, self._seconds = remote, name, seconds
        self._since, self._tries = time.monotonic(), 0
        self._began, self._bytes = self._since, 0
        self._say_after = _SAY_AFTER if aloud else float("inf")

    def begin(self) -> None:
        """Start the clock of this reader; others may have read before."""
        if not self._bytes:
            self._began = time.monotonic()

    def progress(self, count: int, ours: bool = True) -> None:
        """Reset the retry timer where `count` new bytes are worth the time they took.

        Raises ServerUnavailable where they are not, and the read is `ours`.
        """
        now = time.monotonic()
        self._bytes += count
        if self._bytes and self._bytes >= min(_WORTH, _SLOWEST * (now - self._since)):
            self._since, self._tries, self._bytes = now, 0, 0
            self._remote.silent_since = None
            return
        seconds = now - max(self._since, self._began)
        if ours and seconds >= self._seconds:
            raise ServerUnavailable(
                f"{self._remote.url(self._name)}: {self._bytes} bytes in {seconds:.0f} s; check the server and the "
                "network, then start again"
            )
        self._speak(now, f"{self._bytes} bytes")

    def _speak(self, now: float, what: str) -> None:
        if now - self._since >= self._say_after:
            self._say_after *= 2
            say_once(f"waiting for {self._remote.url(self._name)}: {what} in {now - self._since:.0f} s")

    def pause(self, reason: RetryableError) -> None:
        """Wait for the next try. Raises ServerUnavailable or Cancelled."""
        now = time.monotonic()
        nobody_asked = self._tries == 0 and self._since - self._remote.last_failure > self._seconds
        if self._remote.silent_since is None or nobody_asked:
            # the first failure, or the first after nobody asked for long; it counts from when this file was asked for
            self._remote.silent_since = max(self._since, self._began)
        self._remote.last_failure = now
        silent = now - min(self._since, self._remote.silent_since)
        if silent >= self._seconds:
            url = self._remote.url(self._name)
            raise ServerUnavailable(
                f"{url}: no new byte for {silent:.0f} s ({reason}); check the server and the network, then start again"
            ) from None
        self._speak(now, f"no new byte ({reason})")
        pause = _PAUSES[min(self._tries, len(_PAUSES) - 1)] * _jitter.uniform(0.8, 1.2)
        self._tries += 1
        if self.closing.wait(min(pause, self._seconds - silent)):
            raise Cancelled from None


class _SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows redirects within a scheme. (The parent refuses what is not http, https or ftp with an HTTPError.)"""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new != old:
            fp.close()
            what = "give the https URL instead" if (old, new) == ("http", "https") else f"only {old} is followed"
            raise NotThere(f"{public_url(req.full_url)}: sent on to {_line(public_url(newurl))}; {what}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Http(Remote):
    def __init__(self, location: str, timeout: float):
        super().__init__(location)
        self._parts, self._timeout = urlsplit(location), timeout
        self._opener = urllib.request.OpenerDirector()  # `build_opener` would add file:, ftp: and data:
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.UnknownHandler(),
            _SameScheme(),
        ):
            self._opener.add_handler(handler)

    def url(self, name: str) -> str:
        return public_url(self._address(name))

    def _address(self, name: str) -> str:
        scheme, host, directory, query, _ = self._parts
        path = f"{quote(directory.rstrip('/'), safe=string.punctuation)}/{quote(name)}"  # what is quoted stays so
        return urlunsplit((scheme, host, path, quote(query, safe=string.punctuation), ""))

    def read(self, name: str, start: int = 0) -> Iterator[bytes]:
        url = self.url(name)
        headers = {"Accept-Encoding": "identity", "User-Agent": "mde_dist"}  # some servers turn Python-urllib away
        if start:
            headers["Range"] = f"bytes={start}-"
        try:
            request = urllib.request.Request(self._address(name), headers=headers)
            with self._opener.open(request, timeout=self._timeout) as response:
                yield from _body(url, response, start)
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(url, error.code, error.reason) from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLCertVerificationError):
                raise NotThere(f"{url}: {_line(error.reason)}; SSL_CERT_FILE names other certificates") from None
            raise RetryableError(_line(error.reason)) from None
        except (http.client.InvalidURL, UnicodeError) as error:
            raise NotThere(f"{url}: not a URL ({_line(error)})") from None
        except (OSError, http.client.HTTPException) as error:
            raise RetryableError(_line(error)) from None


def _body(url: str, response: http.client.HTTPResponse, start: int) -> Iterator[bytes]:
    """The body from byte `start` of the file on. Raises RetryableError, and NotThere for an answer without a file."""
    skip, left = start, response.length  # a server may send the whole file all the same
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if not match or int(match[1]) != start:
            raise RetryableError(
                f"asked for bytes from {start} on, it sent {_line(response.headers.get('Content-Range'))}"
            )
        skip = 0
        if match[2] != "*":
            left = int(match[2]) - start
    elif response.status != 200:
        raise _refusal(url, response.status, response.reason)
    while left is None or left > 0:
        chunk = response.read1(_CHUNK if left is None else min(_CHUNK, left))
        if not chunk and left is None:
            return
        if not chunk:
            raise RetryableError(f"the connection was cut {left} bytes before the end")
        if left is not None:
            left -= len(chunk)
        yield chunk[skip:]
        skip -= min(skip, len(chunk))


class _S3(Remote):
    def __init__(self, location: str, timeout: float):
        super().__init__(location)
        try:
            import fsspec  # type: ignore[import-untyped,unused-ignore]  # with what hangs on it a second: only on demand

            self._files = fsspec.filesystem(
                "s3",
                skip_instance_cache=True,
                use_listings_cache=False,
                config_kwargs={
                    "connect_timeout": timeout,
                    "read_timeout": timeout,
                    "retries": {"total_max_attempts": 1},  # ours go over them, and know when to stop
                },
            )
        except ImportError as error:
            raise UserError(f"{location}: s3:// needs s3fs ({error}); pip install 'mde_dist[s3]'") from None
        self._files.retries = 1

    def url(self, name: str) -> str:
        return f"s3://{self.location.partition('://')[2].rstrip('/')}/{name}"

    def read(self, name: str, start: int = 0) -> Iterator[bytes]:
        import aiohttp
        import botocore.exceptions as boto  # type: ignore[import-untyped,import-not-found,unused-ignore]
        from botocore.parsers import ResponseParserError  # type: ignore[import-untyped,import-not-found,unused-ignore]

        url = self.url(name)
        try:
            info = self._files.info(url)
            if info["type"] != "file":
                raise NotThere(f"{url}: a folder, not a file")
            if start > info["size"]:
                raise RangeError
            while start < info["size"]:
                piece = self._files.cat_file(url, start=start, end=min(start + _PIECE, info["size"]))
                if not piece:
                    raise RetryableError(f"no byte came where the object has {info['size'] - start} more")
                start += len(piece)
                yield from (piece[at : at + _CHUNK] for at in range(0, len(piece), _CHUNK))
        except FileNotFoundError:
            raise NotThere(f"{url}: no such bucket or file; check the URL") from None
        except PermissionError as error:
            raise NotThere(f"{url}: {_line(error)}; check the URL and the AWS credentials") from None
        except boto.NoCredentialsError:
            raise NotThere(f"{url}: no AWS credentials; a public bucket takes FSSPEC_S3_ANON=true") from None
        except OSError as error:  # s3fs makes them of S3's answers
            answer = getattr(error.__cause__, "response", {}).get("ResponseMetadata", {})
            if "HTTPStatusCode" in answer and not isinstance(error, TimeoutError):
                raise _refusal(url, answer["HTTPStatusCode"], str(error)) from None
            raise RetryableError(_line(error)) from None
        except (boto.ConnectionError, boto.HTTPClientError, boto.IncompleteReadError) as error:
            raise RetryableError(_line(error)) from None
        except (ResponseParserError, aiohttp.ClientError) as error:
            raise RetryableError(_line(error)) from None
        except (boto.BotoCoreError, ValueError) as error:  # a profile or an endpoint that makes no sense
            raise NotThere(f"{url}: {_line(error)}; check the AWS settings") from None


def _refusal(url: str, status: int, reason: str) -> Exception:
    """Error for an HTTP status other than success: NotThere, RangeError or RetryableError."""
    said = _line(f"{status} {reason}")
    if status in (408, 429) or status >= 500:
        return RetryableError(said)
    if status == 416:
        return RangeError()
    # with a key that is wrong, that has expired or that is missing, servers answer one of these
    signed = status in (400, 401, 403, 409) and url.startswith("http")
    hint = "; a signed URL is given whole, with a query that still holds: no run notes it down" if signed else ""
    return NotThere(f"{url}: the server says {said}; check the URL and that it may be read from here{hint}")


def _line(what: object) -> str:
    """Words of a server or library, fit for one line of a terminal."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(what))
    return " ".join(text.split())[:200] or type(what).__name__
