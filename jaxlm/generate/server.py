# SPDX-License-Identifier: Apache-2.0
"""An HTTP server over the embedded sampler that speaks OpenAI's API; standard library only.

/v1/completions, /v1/chat/completions, /v1/models, /health.  A thread a connection reads and writes; one thread owns the
device (see `server_queue`).  Nothing of a request but its first line, the status and the time is ever written to a log.
"""

import hmac
import json
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from jaxlm.generate.sampler import Sampler
from jaxlm.generate.server_queue import Busy, DeviceQueue, Event, Stopping, Work
from jaxlm.generate.server_requests import Answer, Asked, BadRequest, Reader

MOST_BYTES = 16 << 20  # of a request
_LOOK_SECONDS = 0.2  # between two looks whether a client is still there


class Server(ThreadingHTTPServer):
    """The server; `serve_forever` runs it, `stop` ends it.

    Args:
      sampler: used by the server alone.
      model: the name it is asked for by.
      host: 127.0.0.1 is seen by this machine only.
      port: 0 takes a free one; see `url`.
      key_variable: the environment variable with the key that clients must show; None asks for none.
      log: whether each request is told on stderr.
      most_waiting: requests in line; more are answered with 429.
    Raises: ValueError for a key that is not set; OSError for an address that cannot be had.
    """

    daemon_threads = True
    request_queue_size = 512  # connections that come at once
    allow_reuse_address = True

    def __init__(
        self,
        sampler: Sampler,
        model: str,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        key_variable: str | None = None,
        log: bool = True,
        most_waiting: int = 1024,
    ):
        self.key = ""
        if key_variable is not None:
            self.key = os.environ.get(key_variable, "").strip()
            if not self.key:
                raise ValueError(f"the environment variable {key_variable} is not set: it must hold the key of clients")
        self.sampler, self.model, self.log, self.created = sampler, model, log, int(time.time())
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)
        self.reader = Reader(sampler, model)
        self.line = DeviceQueue(sampler, most=most_waiting)
        self._answering, self._idle = 0, threading.Condition()

    @property
    def url(self) -> str:
        """What a client is given, such as http://127.0.0.1:8000/v1."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"

    def stop(self, grace_seconds: float = 20.0) -> None:
        """Takes no more requests, refuses those in line, lets those that run end within the grace; from any thread."""
        self.shutdown()
        self.line.close(grace_seconds)
        with self._idle:
            self._idle.wait_for(lambda: self._answering == 0, timeout=5.0)
        self.server_close()

    def answering(self, change: int) -> None:
        """Counts requests that are being answered."""
        with self._idle:
            self._answering += change
            self._idle.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def serve_until_signalled(server: Server) -> None:
    """Serves until SIGTERM or Ctrl-C, then stops in order; from the main thread."""
    stopping: list[threading.Thread] = []

    def stop(*_: Any) -> None:
        if not stopping:
            stopping.append(threading.Thread(target=server.stop))
            stopping[0].start()

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.serve_forever(poll_interval=0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for thread in stopping:
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "jaxlm", ""
    timeout = 120  # seconds that a client may be silent
    disable_nagle_algorithm = True
    _sent = False  # whether an answer has begun

    def do_GET(self) -> None:
        self._answered(self._get)

    def do_POST(self) -> None:
        self._answered(self._post)

    def _answered(self, answer: Any) -> None:
        self._sent = False
        self.server.answering(1)
        try:
            answer()
        except BadRequest as error:
            self._refuse(error.status, str(error), param=error.param, code=error.code)
        except Busy as error:
            self._refuse(429, str(error), kind="rate_limit_error", retry_after=error.seconds)
        except Stopping as error:
            self._refuse(503, str(error), kind="server_error", retry_after=1)
        finally:
            self.server.answering(-1)

    def _get(self) -> None:
        path = self.path.partition("?")[0].rstrip("/")
        if path == "/health":
            alive = self.server.line.alive
            return self._json({"status": "ok" if alive else "stopped"}, 200 if alive else 503)
        self._check_key()
        model = {"id": self.server.model, "object": "model", "created": self.server.created, "owned_by": "jaxlm"}
        if path == "/v1/models":
            return self._json({"object": "list", "data": [model]})
        if path == f"/v1/models/{self.server.model}":
            return self._json(model)
        raise BadRequest(f"there is nothing to get at {path!r}: try /v1/models or /health", status=404)

    def _post(self) -> None:
        data = self._bytes()
        self._check_key()
        path = self.path.partition("?")[0].rstrip("/")
        kinds = {"/v1/completions": "completion", "/v1/chat/completions": "chat"}
        if path not in kinds:
            raise BadRequest(f"there is nothing to post to at {path!r}: try {' or '.join(kinds)}", status=404)
        if self.headers.get_content_type() != "application/json":  # a web page elsewhere cannot send this unasked
            raise BadRequest("send the body as JSON, with the header Content-Type: application/json", status=415)
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is not JSON: {error}") from error
        asked = self.server.reader.read(kinds[path], body)  # type: ignore[arg-type]
        work = Work(asked.prompts, asked.sampling, seeded=asked.seeded, streams=asked.streams)
        self.server.line.put(work)
        try:
            self._tell(asked, work)
        finally:
            work.cancelled.set()  # no-one waits any more, if it did not end

    def _bytes(self) -> bytes:
        length = "" if "Transfer-Encoding" in self.headers else self.headers.get("Content-Length", "")
        if not (length.isdecimal() and int(length) <= MOST_BYTES):
            self.close_connection = True  # what follows is no request
            if not length.isdecimal():
                raise BadRequest("send the body at once, with its Content-Length", status=411)
            raise BadRequest(f"a request may have {MOST_BYTES} bytes, got {length}", status=413)
        data = self.rfile.read(int(length))
        if len(data) != int(length):
            raise ConnectionAbortedError("the client left while it was sending")
        return data

    def _check_key(self) -> None:
        shown = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        if self.server.key and not hmac.compare_digest(shown.encode(), self.server.key.encode()):
            raise BadRequest(
                "the key is missing or wrong: send Authorization: Bearer KEY", status=401, code="invalid_api_key"
            )

    def _tell(self, asked: Asked, work: Work) -> None:
        answer = Answer(asked, self.server.sampler, self.server.model)
        begun: set[tuple[int, int]] = set()
        while True:
            event = self._next_event(work)
            if event.kind == "error":
                if not isinstance(event.value, Stopping):
                    print(f"error: {type(event.value).__name__}: {event.value}", file=sys.stderr)
                    return self._refuse(500, f"{type(event.value).__name__} while sampling", kind="server_error")
                raise event.value
            if event.kind == "text":
                place = (event.prompt, event.sample)
                self._event(answer.piece(*place, event.value, first=place not in begun))
                begun.add(place)
            elif asked.sampling is None:
                return self._json(answer.scored(event.value))
            elif not asked.streams:
                return self._json(answer.whole(event.value))
            else:
                for piece in answer.last_pieces(event.value, begun):
                    self._event(piece)
                self._event("[DONE]")
                self._chunk(b"")
                return None

    def _next_event(self, work: Work) -> Event:
        look = select.poll()
        look.register(self.connection, select.POLLIN)
        while True:
            try:
                return work.events.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                if look.poll(0) and not self.connection.recv(1, socket.MSG_PEEK):
                    raise ConnectionAbortedError("the client hung up") from None

    def _json(self, value: Any, status: int = 200, retry_after: int | None = None) -> None:
        data = json.dumps(value).encode()
        self._sent = True
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def _event(self, value: Any) -> None:
        """One event of a stream; the first one opens it."""
        if not self._sent:
            self._sent = True
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Cache-Control", "no-cache")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
        self._chunk(b"data: " + (value if isinstance(value, str) else json.dumps(value)).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _refuse(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        retry_after: int | None = None,
    ) -> None:
        error = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        if self._sent:  # a stream has begun: the error is its last event
            self._event(error)
            self._chunk(b"")
            self.close_connection = True
        else:
            self._json(error, status, retry_after)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, in OpenAI's shape."""
        self.close_connection = True
        self._refuse(code, message or "this is no request that the server can read")

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        if self.server.log:
            path = ascii(self.path.partition("?")[0])[1:-1] if getattr(self, "path", "") else "-"
            print(f"{time.strftime('%H:%M:%S')} {self.command or '-'} {path} {int(code)}", file=sys.stderr, flush=True)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing else is logged: it might hold what a client sent."""
