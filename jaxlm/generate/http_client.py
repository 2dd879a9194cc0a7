# SPDX-License-Identifier: Apache-2.0
"""One request to an HTTP server that speaks JSON: time limits, retries with back-off, streams of events.

Standard library only.  The key of a server is read from the environment when it is sent, and is kept nowhere.
"""

import contextlib
import dataclasses
import email.utils
import http.client
import json
import math
import os
import random
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_AGAIN = {408, 425, 429, 500, 502, 503, 504}  # may go well the next time
_SHOWN = 500  # characters of a server's message


class _TryAgain(Exception):
    """What may go well the next time; `wait` seconds at least, as the server asks."""

    def __init__(self, reason: str, wait: float = 0.0):
        super().__init__(reason)
        self.wait = wait


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a request is tried.

    Attributes:
      request_seconds: of one try, from connecting to the last byte.
      retries: after the first try, on 408, 425, 429, 5xx, a broken connection or one that is too slow.
      first_wait: seconds before the first retry; twice as many before each next one, with jitter of half of it.
      longest_wait: seconds at most, unless the server's Retry-After asks for more.
    """

    request_seconds: float = 600.0
    retries: int = 6
    first_wait: float = 0.5
    longest_wait: float = 60.0

    def __post_init__(self):
        if self.request_seconds <= 0 or self.retries < 0 or self.first_wait < 0 or self.longest_wait < 0:
            raise ValueError(f"time limits are above 0 and waits and retries at least 0, got {self}")

    def wait(self, retry: int) -> float:
        """Seconds before the retry of that number, from 0."""
        return min(self.first_wait * 2.0**retry, self.longest_wait) * random.uniform(0.5, 1.0)


class HttpClient:
    """Asks one server; used by many threads.

    Args:
      url: such as http://127.0.0.1:8000/v1, without user or key.
      key_variable: the environment variable that holds the key, or None to send none.
      patience: how long.
    Raises: ValueError for a URL that is none, or a key that is not set.
    """

    def __init__(self, url: str, *, key_variable: str | None, patience: Patience):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"a server's address begins with http:// or https://, got {url.rpartition('@')[2]!r}")
        if parts.username or parts.password or parts.query:
            raise ValueError("the server's address holds a user, a key or a query: put the key into a variable instead")
        self._host, self._port, self._secure = parts.hostname, parts.port, parts.scheme == "https"
        self._base = parts.path.rstrip("/")
        self.url = f"{parts.scheme}://{parts.netloc}{self._base}"
        self._key_variable, self._patience = key_variable, patience
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._key()

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        deadline: float = math.inf,
        stopped: threading.Event,
        event: Callable[[Any], None] | None = None,
        restart: Callable[[], None] = lambda: None,
    ) -> Any:
        """The server's answer, parsed; tried again as `Patience` says.

        Args:
          path: after the address, such as "/completions".
          body: JSON.
          deadline: on `time.monotonic`, for all tries together.
          stopped: set from outside to give up waiting.
          event: the answer is a stream, and this is called with each of its events; then None is returned.
          restart: called before each try, so that `event` can begin again.
        Raises: ValueError for a request that the server refuses; ConnectionError or TimeoutError when all tries failed.
        """
        for retry in range(self._patience.retries + 1):
            restart()
            try:
                return self._once(path, body, deadline, event)
            except _TryAgain as failed:
                reason, wait = str(failed), max(failed.wait, self._patience.wait(retry))
            if retry == self._patience.retries:
                break
            if time.monotonic() + wait > deadline:
                raise TimeoutError(f"{self.url}{path}: no time is left for another try ({reason}): allow more seconds")
            if stopped.wait(wait):
                raise ConnectionError(f"{self.url}{path}: stopped while waiting to try again ({reason})")
        raise ConnectionError(f"{self.url}{path} failed {retry + 1} times, at last: {reason}")

    def close(self) -> None:
        """Breaks all connections, so that threads that wait for an answer go on."""
        with self._lock:
            for connected in self._open:
                with contextlib.suppress(OSError):  # it was closed already
                    connected.shutdown(socket.SHUT_RDWR)

    def _once(self, path: str, body: Mapping[str, Any], deadline: float, event: Callable[[Any], None] | None) -> Any:
        limit = min(deadline, time.monotonic() + self._patience.request_seconds)
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        headers = self._headers()
        with contextlib.ExitStack() as used:
            with self._failures(path, deadline):
                connection = used.enter_context(contextlib.closing(kind(self._host, self._port, timeout=_left(limit))))
                connection.connect()
                connected = connection.sock
                used.enter_context(self._may_be_broken(connected))
                connection.request("POST", self._base + path, json.dumps(body).encode(), headers)
                connected.settimeout(_left(limit))
                response = used.enter_context(contextlib.closing(connection.getresponse()))
                if response.status != 200:
                    raise self._refusal(response, _all(response, connected, limit))
                if event is None:
                    return json.loads(_all(response, connected, limit))
            events = _events(response, connected, limit)
            while True:
                with self._failures(path, deadline):  # what `event` raises is not the server's failure
                    found = next(events, None)
                if found is None:
                    return None
                event(found)

    @contextlib.contextmanager
    def _may_be_broken(self, connected: socket.socket) -> Iterator[None]:
        """Within, `close` breaks the connection."""
        with self._lock:
            self._open.add(connected)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(connected)

    @contextlib.contextmanager
    def _failures(self, path: str, deadline: float) -> Iterator[None]:
        """Turns what can go wrong on the way into `_TryAgain`."""
        try:
            yield
        except TimeoutError as error:
            if time.monotonic() >= deadline:
                raise TimeoutError(f"{self.url}{path}: the time for all requests is over: allow more seconds") from None
            raise _TryAgain(f"no answer within {self._patience.request_seconds:g} s") from error
        except json.JSONDecodeError as error:
            raise _TryAgain(f"the answer is not JSON ({error})") from error
        except (http.client.HTTPException, OSError) as error:
            raise _TryAgain(f"{type(error).__name__}: {error}") from error

    def _refusal(self, response: http.client.HTTPResponse, data: bytes) -> Exception:
        """The error of an answer that is not 200."""
        text = data.decode("utf-8", "replace")
        try:
            found = json.loads(text)
            error = found.get("error", found)
            text = str(error.get("message", error) if isinstance(error, dict) else error)
        except (ValueError, AttributeError):
            text = text.strip()
        key = self._key()
        if key:
            text = text.replace(key, "[the key]")
        told = f"{response.status} {response.reason}: {text[:_SHOWN]}"
        if response.status in _AGAIN or response.status >= 500:
            return _TryAgain(told, _retry_after(response.getheader("Retry-After")))
        return ValueError(f"{self.url} refused a request with {told}")

    def _headers(self) -> dict[str, str]:
        key = self._key()
        return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def _key(self) -> str:
        if self._key_variable is None:
            return ""
        key = os.environ.get(self._key_variable, "").strip()
        if not key:
            raise ValueError(f"the environment variable {self._key_variable} is not set: it must hold the server's key")
        if not (key.isascii() and key.isprintable()):  # http.client's own error would show the key
            raise ValueError(f"the key in {self._key_variable} holds characters that no header can")
        return key


def _left(limit: float) -> float:
    left = limit - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _pieces(response: http.client.HTTPResponse, connected: socket.socket, limit: float) -> Iterator[bytes]:
    """What arrives, as it does; a slow trickle ends at the limit too."""
    while not response.isclosed():  # the socket too is closed with its last byte, by newer Pythons
        connected.settimeout(_left(limit))
        piece = response.read1(1 << 16)
        if not piece:
            return
        yield piece


def _all(response: http.client.HTTPResponse, connected: socket.socket, limit: float) -> bytes:
    return b"".join(_pieces(response, connected, limit))  # one that was cut short is no JSON


def _events(response: http.client.HTTPResponse, connected: socket.socket, limit: float) -> Iterator[Any]:
    """The events of a stream, up to [DONE]."""
    rest = b""
    for piece in _pieces(response, connected, limit):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            found = json.loads(data)
            if isinstance(found, dict) and "error" in found:
                error = found["error"]
                raise _TryAgain(str(error.get("message", error) if isinstance(error, dict) else error)[:_SHOWN])
            yield found
    raise http.client.IncompleteRead(b"")


def _retry_after(text: str | None) -> float:
    """Seconds that a Retry-After header asks for: a number, or a date.

    >>> _retry_after("3"), _retry_after(None), _retry_after("Wed, 21 Oct 2015 07:28:00 GMT"), _retry_after("soon")
    (3.0, 0.0, 0.0, 0.0)
    """
    if text is None:
        return 0.0
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return 0.0
