# SPDX-License-Identifier: Apache-2.0
"""Laws of the remote engine: it is an engine like the embedded one, patient, and forgets nothing that it was told.

Each talks to a real server on loopback: ours over a tiny model, or one that answers as a test says.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm.data import byte_tokenizer
from jaxlm.generate import Patience, RemoteEngine, Sampler, Sampling, Server
from jaxlm.generate.journal import Journal
from jaxlm.nn import ModelConfig
from jaxlm.nn.decoder import Model

ROOT = Path(__file__).parents[2]
CHAT = [{"role": "user", "content": "hello"}]
PROMPTS = ["one", CHAT, [97, 98, 99], "two and more"]
QUICK = Patience(request_seconds=20, retries=3, first_wait=0.01)
KEY = "sk-sesame-1234567890"


@pytest.fixture(scope="module")
def sampler(quick_compiles):
    model = Model(ModelConfig(vocab_size=264, width=16, num_layers=2, num_heads=2, max_length=128))
    return Sampler(model, model.init(jax.random.key(0)), byte_tokenizer(), slots=4, chunk=8)


@pytest.fixture(scope="module")
def ours(sampler):
    """The address of our server."""
    server = Server(sampler, "tiny", port=0, log=False)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server.url
    server.stop(grace_seconds=5)


def good(body):
    """A server's answer whose text is the prompt."""
    text = body.get("prompt") or body["messages"][0]["content"]
    choices = [{"index": n, "text": f"{text}/{n}", "finish_reason": "stop"} for n in range(body["n"])]
    return 200, {}, {"choices": choices}


@contextlib.contextmanager
def scripted(answer):
    """A server: `answer(number of the request, its body, its headers)` gives status, headers and body or bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked.append(body)
                number = len(asked)
            status, headers, found = answer(number, body, self.headers)
            data = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(data))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            """Says nothing."""

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 100

        def handle_error(self, *_):
            """The client may have gone."""

    asked, lock = [], threading.Lock()
    with Quiet(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
        finally:
            server.shutdown()


def same(one, two):
    assert one.text == two.text and one.finish_reason == two.finish_reason
    np.testing.assert_array_equal(one.tokens, two.tokens)
    # How many prompts a server reads at once depends on when they come, and rounding on that.
    np.testing.assert_allclose(one.log_probs, two.log_probs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(one.raw_log_probs, two.raw_log_probs, rtol=1e-5, atol=1e-6)


def test_nobody_can_tell_it_from_the_embedded_sampler(ours, sampler):
    engine = RemoteEngine(ours, "tiny", tokenizer=byte_tokenizer(), concurrency=3)
    how = Sampling(num_samples=2, max_tokens=16, temperature=0, stop=("e",))
    for mine, theirs in zip(engine.sample(PROMPTS, how), sampler.sample(PROMPTS, how), strict=True):
        for one, two in zip(mine, theirs, strict=True):
            assert one.text == two.text and one.finish_reason == two.finish_reason
            np.testing.assert_array_equal(one.tokens, two.tokens)
            np.testing.assert_allclose(one.raw_log_probs, two.raw_log_probs, rtol=1e-5)
            assert not one.log_probs.any() and one.log_probs.shape == two.log_probs.shape
    scores = engine.score(["one", CHAT, [97, 98]], ["two", "three", [99, 100, 101]])
    for mine, theirs in zip(
        scores, sampler.score(["one", CHAT, [97, 98]], ["two", "three", [99, 100, 101]]), strict=True
    ):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, theirs, rtol=1e-5)


def test_draws_follow_the_seed_and_the_place(ours):
    engine = RemoteEngine(ours, "tiny")
    how = Sampling(num_samples=2, max_tokens=12, temperature=0.9, top_k=40, seed=3)
    once = engine.sample(["a", "a", "b"], how)
    for mine, again in zip(once, engine.sample(["a", "a", "b"], how), strict=True):
        for one, two in zip(mine, again, strict=True):
            same(one, two)
            assert np.isfinite(one.log_probs).all() and (one.log_probs >= one.raw_log_probs - 1).all()
    assert len({completion.text for samples in once for completion in samples}) == 6
    assert engine.sample(["a"], Sampling(max_tokens=12, seed=4))[0][0].text != once[0][0].text


def test_a_stream_hands_out_the_same_text(ours):
    engine, said = RemoteEngine(ours, "tiny"), Counter()

    def stream(prompt, sample, text):
        said[prompt, sample] = (said[prompt, sample] or "") + text

    how = Sampling(num_samples=2, max_tokens=30, seed=1)
    for i, samples in enumerate(engine.sample(PROMPTS, how, stream=stream)):
        for n, (one, two) in enumerate(zip(samples, engine.sample(PROMPTS, how)[i], strict=True)):
            assert said[i, n] == one.text
            same(one, two)


def test_at_temperature_0_one_answer_is_all_samples():
    said = []
    with scripted(lambda n, body, _: stream_of("ab", body, end=True) if "stream" in body else good(body)) as (
        url,
        asked,
    ):
        engine, how = RemoteEngine(url, "m"), Sampling(num_samples=3, temperature=0)
        assert [completion.text for completion in engine.sample(["x"], how)[0]] == ["x/0"] * 3
        streamed = engine.sample(["x"], how, stream=lambda i, n, text: said.append((n, text)))
        assert [completion.text for completion in streamed[0]] == ["ab"] * 3
    assert [body["n"] for body in asked] == [1, 1]
    assert said == [(n, text) for text in "ab" for n in range(3)]


def test_what_the_server_does_not_tell_is_marked():
    told = {"token_logprobs": [-1.0, -2.0], "tokens": ["a", "b"]}
    choice = {"index": 0, "text": "ab", "finish_reason": "stop", "logprobs": told}
    with scripted(lambda *_: (200, {}, {"choices": [choice]})) as (url, _):
        engine = RemoteEngine(url, "m")
        [[plain]], [[hot]] = engine.sample(["x"], Sampling()), engine.sample(["x"], Sampling(temperature=0.5))
        for completion in (plain, hot):
            assert completion.tokens.tolist() == [-1, -1] and completion.raw_log_probs.tolist() == [-1, -2]
        assert plain.log_probs.tolist() == [-1, -2] and np.isnan(hot.log_probs).all()
        with pytest.raises(ValueError, match="told 2 log-probs of 3 tokens: it does not score prompts"):
            engine.score([[1, 2]], [[3]])
        with pytest.raises(ValueError, match="needs the model's tokenizer"):
            engine.score(["a"], ["b"])
        plain_server = RemoteEngine(url, "m", dialect="openai")
        with pytest.raises(ValueError, match="do not tell log-probs"):
            plain_server.score([[1]], [[2]])
        with pytest.raises(ValueError, match="top_k is not known"):
            plain_server.sample(["x"], Sampling(top_k=3))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_fails_twice_is_asked_three_times(status):
    with scripted(lambda n, body, _: (status, {}, {"error": "later"}) if n < 3 else good(body)) as (url, asked):
        assert RemoteEngine(url, "m", patience=QUICK).sample(["x"], Sampling())[0][0].text == "x/0"
        assert len(asked) == 3 and asked[0] == asked[2]


def test_broken_answers_are_asked_again():
    def answer(number, body, __):
        status, _, found = good(body)
        broken = {1: b"", 2: b"{nonsense", 3: json.dumps(found).encode()[:-5]}
        return status, ({"Content-Length": "500"} if number in (1, 3) else {}), broken.get(number, found)

    with scripted(answer) as (url, asked):
        assert RemoteEngine(url, "m", patience=QUICK).sample(["x"], Sampling())[0][0].text == "x/0"
        assert len(asked) == 4


def test_the_server_says_how_long_to_wait():
    with scripted(lambda n, body, _: (429, {"Retry-After": "1"}, {}) if n == 1 else good(body)) as (url, _):
        start = time.monotonic()
        RemoteEngine(url, "m", patience=QUICK).sample(["x"], Sampling())
        assert time.monotonic() - start >= 1


def test_what_cannot_go_well_is_not_asked_again():
    with scripted(lambda *_: (400, {}, {"error": {"message": "no such model"}})) as (url, asked):
        with pytest.raises(ValueError, match=r"400 .*no such model"):
            RemoteEngine(url, "m", patience=QUICK).sample(["x"], Sampling())
        assert len(asked) == 1
    with scripted(lambda *_: (503, {}, {"error": "full"})) as (url, asked):
        with pytest.raises(ConnectionError, match=r"failed 4 times, at last: 503 .*full"):
            RemoteEngine(url, "m", patience=QUICK).sample(["x"], Sampling())
        assert len(asked) == 4
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(ConnectionError, match="ConnectionRefusedError"):
            RemoteEngine(address, "m", patience=QUICK).sample(["x"], Sampling())


def test_time_limits_hold():
    leave = threading.Event()
    slow = Patience(request_seconds=0.3, retries=1, first_wait=0.01)
    with scripted(lambda _, body, __: good(body) if leave.wait(30) else None) as (url, asked):
        start = time.monotonic()
        with pytest.raises(ConnectionError, match=r"no answer within 0\.3 s"):
            RemoteEngine(url, "m", patience=slow).sample(["x"], Sampling())
        assert time.monotonic() - start < 5 and len(asked) == 2
        with pytest.raises(TimeoutError, match="the time for all requests is over"):
            RemoteEngine(url, "m", total_seconds=0.3).sample(["x"], Sampling())
        leave.set()


def test_a_trickle_is_no_answer():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def trickle():
            wire, _ = listening.accept()
            with wire, contextlib.suppress(OSError):
                wire.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                while True:
                    wire.sendall(b" ")
                    time.sleep(0.05)

        thread = threading.Thread(target=trickle)
        thread.start()
        patience = Patience(request_seconds=0.5, retries=0)
        engine = RemoteEngine(f"http://127.0.0.1:{listening.getsockname()[1]}", "m", patience=patience)
        start = time.monotonic()
        with pytest.raises(ConnectionError, match="no answer within"):
            engine.sample(["x"], Sampling())
        assert time.monotonic() - start < 5
        thread.join()


def test_no_more_are_asked_at_a_time_than_allowed():
    now, most, lock = Counter(), [], threading.Lock()

    def answer(_, body, __):
        with lock:
            now["asked"] += 1
            most.append(now["asked"])
        time.sleep(0.03)
        with lock:
            now["asked"] -= 1
        return good(body)

    with scripted(answer) as (url, _):
        RemoteEngine(url, "m", concurrency=4).sample([f"{i}" for i in range(24)], Sampling())
    assert max(most) == 4


def stream_of(text, body, end):
    pieces = [{"choices": [{"index": 0, "text": piece, "finish_reason": None}]} for piece in text]
    pieces.append({"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
    lines = b"".join(b"data: " + json.dumps(piece).encode() + b"\n\n" for piece in pieces)
    return 200, {"Content-Length": "100000"} if not end else {}, lines + (b"data: [DONE]\n\n" if end else b"")


def test_a_stream_that_breaks_goes_on_where_it_was():
    said = []
    with scripted(lambda n, body, _: stream_of("ab" if n == 1 else "abcd", body, end=n > 1)) as (url, asked):
        engine = RemoteEngine(url, "m", patience=QUICK)
        [[completion]] = engine.sample(["x"], Sampling(), stream=lambda i, n, text: said.append(text))
        assert completion.text == "".join(said) == "abcd" and len(asked) == 2
    for other in ("xy", "a", ""):
        answer = lambda n, body, _, other=other: stream_of("ab" if n == 1 else other, body, end=n > 1)  # noqa: E731
        with scripted(answer) as (url, _), pytest.raises(ConnectionError, match="said another text"):
            RemoteEngine(url, "m", patience=QUICK).sample(["x"], Sampling(), stream=lambda *_: None)


def test_what_is_answered_is_not_asked_again(tmp_path):
    with scripted(lambda n, body, _: good(body) if n != 3 else (400, {}, {})) as (url, asked):
        engine = RemoteEngine(url, "m", concurrency=1, journals=tmp_path)
        prompts, how = ["a", "b", "c", "d"], Sampling(num_samples=2)
        with pytest.raises(ValueError, match="400"):
            engine.sample(prompts, how)
        found = engine.sample(prompts, how)
        assert [[c.text for c in samples] for samples in found] == [[f"{p}/0", f"{p}/1"] for p in prompts]
        assert Counter(body["prompt"] for body in asked) == {"a": 1, "b": 1, "c": 2, "d": 1}
        assert len(list(tmp_path.iterdir())) == 1
        for changed in (Sampling(num_samples=2, seed=1), Sampling(num_samples=2, temperature=0.5)):
            engine.sample(prompts, changed)
        assert len(list(tmp_path.iterdir())) == 3 and len(asked) == 5 + 8
        said = []
        engine.sample(prompts, how, stream=lambda *new: said.append(new))
        assert said[0] == (0, 0, "a/0") and len(said) == 8 and len(asked) == 13


def test_a_torn_last_line_is_dropped_and_other_damage_refused(tmp_path):
    path = tmp_path / "batch.jsonl"
    with Journal(path, ["a", "b"]) as journal:
        journal.add("a", 1)
        with pytest.raises(ValueError, match="in use by another process"):
            Journal(path, ["a", "b"])
        journal.add("b", 2)
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:-cut])
        with Journal(path, ["a", "b"]) as journal:
            left = journal.answers
            assert left == ({"a": 1} if cut <= len(whole.splitlines(True)[-1]) else {})
            for key, answer in {"a": 1, "b": 2}.items():
                if key not in left:
                    journal.add(key, answer)
        assert path.read_bytes() == whole
    with pytest.raises(ValueError, match="holds another batch"):
        Journal(path, ["a", "c"])
    first, second, third = whole.splitlines(True)
    path.write_bytes(first + second[:-5] + b"\n" + third)
    with pytest.raises(ValueError, match=r"batch\.jsonl:2 is no record"):
        Journal(path, ["a", "b"])
    path.write_bytes(b"my notes")
    with pytest.raises(ValueError, match="is no journal"):
        Journal(path, ["a", "b"])
    assert path.read_bytes() == b"my notes"


PROGRAM = """
import sys
from jaxlm.generate import RemoteEngine, Sampling
engine = RemoteEngine(sys.argv[1], "m", concurrency=2, key_variable="TEST_KEY")
for [one] in engine.sample([str(i) for i in range(12)], Sampling(), journal=sys.argv[2]):
    print(one.text)
"""


def test_killed_and_started_again_nothing_is_asked_twice_and_nothing_lost(tmp_path):
    waiting, leave = threading.Semaphore(0), threading.Event()

    def answer(number, body, _):
        if number > 7:  # the last two of the first life are never answered
            waiting.release()
            leave.wait(60)
        return good(body)

    environment = os.environ | {"PYTHONPATH": str(ROOT), "TEST_KEY": KEY}
    path = tmp_path / "batch.jsonl"
    with scripted(answer) as (url, asked):
        command = [sys.executable, "-c", PROGRAM, url, str(path)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
            assert waiting.acquire(timeout=60) and waiting.acquire(timeout=60)
            process.send_signal(signal.SIGKILL)
            assert process.communicate()[0] == b""
        before = [body["prompt"] for body in asked]
        lines = path.read_bytes().splitlines(keepends=True)
        assert len(lines) == 1 + 7
        path.write_bytes(b"".join(lines) + b'{"key": "to')  # killed in the middle of a line
        leave.set()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [f"{i}/0" for i in range(12)]
        after = [body["prompt"] for body in asked[len(before) :]]
    assert len(before) == 9 and len(after) == 5
    assert set(after) & set(before) == set(before[7:]), "only what was never answered is asked again"
    assert KEY not in path.read_text() + done.stdout + done.stderr


def test_the_key_is_sent_and_seen_nowhere_else(tmp_path, monkeypatch, capfd):
    with pytest.raises(ValueError, match="TEST_KEY is not set"):
        RemoteEngine("http://127.0.0.1:1/v1", "m", key_variable="TEST_KEY")
    monkeypatch.setenv("TEST_KEY", KEY)
    shown = []

    def answer(number, body, headers):
        shown.append(headers["Authorization"])
        return good(body) if number == 1 else (401 if number == 2 else 500, {}, {"error": {"message": f"bad {KEY}"}})

    with scripted(answer) as (url, _):
        engine = RemoteEngine(url, "m", key_variable="TEST_KEY", patience=QUICK, journals=tmp_path)
        engine.sample(["x"], Sampling())
        told = [repr(engine), repr(vars(engine)), repr(vars(engine._client))]
        for kind in (ValueError, ConnectionError):
            with pytest.raises(kind) as error:
                engine.sample(["y"], Sampling())
            told.append("".join(map(repr, (error.value, error.value.__cause__, error.value.__context__))))
            assert "[the key]" in told[-1]
    assert set(shown) == {f"Bearer {KEY}"}
    told += [file.read_text() for file in tmp_path.iterdir()] + list(capfd.readouterr())
    assert KEY not in "".join(told)
    monkeypatch.setenv("TEST_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(ValueError, match="characters that no header can") as error:
        engine.sample(["z"], Sampling())
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://x/v1", f"http://me:{KEY}@x/v1", f"x://me:{KEY}@y", "http://x/?key=1"]
)
def test_an_address_that_is_none_is_refused_and_no_key_in_it_shown(url):
    with pytest.raises(ValueError, match="address") as error:
        RemoteEngine(url, "m")
    assert KEY not in str(error.value)
