# SPDX-License-Identifier: Apache-2.0
"""Laws of the server: what it says is what the sampler says, for whoever asks, and what it cannot do it refuses."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxlm import checkpoints
from jaxlm.data import byte_tokenizer
from jaxlm.generate import Sampler, Sampling
from jaxlm.generate.server import Server
from jaxlm.nn import ModelConfig
from jaxlm.nn.decoder import Model

ROOT = Path(__file__).parents[2]
CHAT = [{"role": "user", "content": "hello"}]
pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def sampler(quick_compiles):
    model = Model(ModelConfig(vocab_size=264, width=16, num_layers=2, num_heads=2, max_length=128))
    return Sampler(model, model.init(jax.random.key(0)), byte_tokenizer(), slots=4, chunk=8)


@contextlib.contextmanager
def running(sampler, **options):
    server = Server(sampler, "tiny", port=0, log=False, **options)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.stop(grace_seconds=5)


@pytest.fixture(scope="module")
def server(sampler):
    with running(sampler) as server:
        yield server


def ask(server, path, body=None, *, headers=(), kind="application/json"):
    """Status and parsed answer."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=120)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, data, {"Content-Type": kind, **dict(headers)})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, text if b"data: " in text[:6] else json.loads(text)


def events(text):
    lines = [line.removeprefix(b"data: ") for line in text.split(b"\n") if line]
    assert lines[-1] == b"[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_completions_are_those_of_the_embedded_sampler(server, sampler):
    how = {"n": 2, "max_tokens": 20, "temperature": 0.8, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "seed": 7}
    more = {"logprobs": 0, "return_token_ids": True, "user": "me", "frequency_penalty": 0, "suffix": None}
    status, answer = ask(server, "/v1/completions", {"model": "tiny", "prompt": ["one", "two"], **how, **more})
    assert status == 200, answer
    expected = sampler.sample(["one", "two"], Sampling(num_samples=2, **{k: v for k, v in how.items() if k != "n"}))
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    for choice, completion in zip(answer["choices"], [c for samples in expected for c in samples], strict=True):
        assert choice["text"] == completion.text and choice["finish_reason"] == completion.finish_reason
        assert choice["token_ids"] == completion.tokens.tolist()
        np.testing.assert_array_equal(np.float32(choice["logprobs"]["token_logprobs"]), completion.raw_log_probs)
        np.testing.assert_array_equal(np.float32(choice["logprobs"]["policy_logprobs"]), completion.log_probs)
    new = sum(len(completion.tokens) for samples in expected for completion in samples)
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": new, "total_tokens": 6 + new}


def test_a_prompt_may_be_token_ids_and_a_chat_goes_through_the_template(server, sampler):
    how = {"max_tokens": 9, "temperature": 0}
    [[expected]] = sampler.sample([[111, 110, 101]], Sampling(**how))
    assert ask(server, "/v1/completions", {"prompt": [111, 110, 101], **how})[1]["choices"][0]["text"] == expected.text
    [[expected]] = sampler.sample([CHAT], Sampling(**how))
    [choice] = ask(server, "/v1/chat/completions", {"messages": CHAT, **how})[1]["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}


def test_pieces_of_a_stream_make_the_whole_text(server, sampler):
    how = {"n": 2, "max_tokens": 40, "temperature": 1.0, "seed": 3, "stop": ["e"]}
    body = {"prompt": "abc", **how, "stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    found = events(ask(server, "/v1/completions", body)[1])
    [expected] = sampler.sample(["abc"], Sampling(num_samples=2, max_tokens=40, seed=3, stop=("e",)))
    assert found[-1]["choices"] == [] and found[-1]["usage"]["completion_tokens"] == sum(
        len(c.tokens) for c in expected
    )
    for n, completion in enumerate(expected):
        pieces = [event["choices"][0] for event in found[:-1] if event["choices"][0]["index"] == n]
        assert "".join(piece["text"] for piece in pieces) == completion.text
        assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + [completion.finish_reason]
        assert pieces[-1]["token_ids"] == completion.tokens.tolist()
    chat = {"messages": CHAT, "max_tokens": 40, "temperature": 0}
    deltas = [e["choices"][0]["delta"] for e in events(ask(server, "/v1/chat/completions", chat | {"stream": True})[1])]
    assert deltas[0]["role"] == "assistant" and not any("role" in delta for delta in deltas[1:])
    whole = ask(server, "/v1/chat/completions", chat)[1]["choices"][0]["message"]["content"]
    assert "".join(delta.get("content", "") for delta in deltas) == whole


def test_echo_tells_the_log_probs_of_a_prompt(server, sampler):
    body = {"prompt": ["abcd", "xyz"], "echo": True, "max_tokens": 0, "logprobs": 0}
    choices = ask(server, "/v1/completions", body)[1]["choices"]
    for choice, expected in zip(choices, sampler.score(["a", "x"], ["bcd", "yz"]), strict=True):
        first, *others = choice["logprobs"]["token_logprobs"]
        assert first is None
        np.testing.assert_allclose(others, expected, rtol=1e-5)
    assert choices[0]["logprobs"]["tokens"] == ["a", "b", "c", "d"] and choices[0]["text"] == "abcd"
    assert choices[0]["logprobs"]["text_offset"] == [0, 1, 2, 3]


PROMPT, MESSAGES = {"prompt": "a"}, {"messages": CHAT}
BAD = [
    ("completions", [1], 400, "must be a JSON object"),
    ("completions", b"{nonsense", 400, "not JSON"),
    ("completions", {}, 400, "prompt must be a string"),
    ("completions", {"prompt": ""}, 400, "has no tokens"),
    ("completions", {"prompt": [1, 999]}, 400, "whole numbers from 0 to 263"),
    ("completions", {"prompt": [1, True]}, 400, "whole numbers"),
    ("completions", PROMPT | {"best_off": 2}, 400, "unsupported field 'best_off'"),
    ("completions", PROMPT | {"presence_penalty": 0.5}, 400, "unsupported field 'presence_penalty'"),
    ("completions", PROMPT | {"temperature": "hot"}, 400, "temperature must be a number, got 'hot'"),
    ("completions", b'{"prompt": "a", "temperature": 1e999}', 400, "temperature must be a number"),
    ("completions", PROMPT | {"temperature": -1}, 400, "temperature must be at least 0"),
    ("completions", PROMPT | {"top_p": 0}, 400, "top_p must be in (0, 1]"),
    ("completions", PROMPT | {"n": 0}, 400, "n must be at least 1"),
    ("completions", PROMPT | {"n": True}, 400, "n must be a whole number"),
    ("completions", PROMPT | {"n": 10**9}, 400, "may ask for 1024 samples"),
    ("completions", PROMPT | {"seed": 2**64}, 400, "seed must have 64 bits"),
    ("completions", PROMPT | {"stop": 3}, 400, "stop must be a string"),
    ("completions", PROMPT | {"stop": [""]}, 400, "a stop string is empty"),
    ("completions", PROMPT | {"max_tokens": 500}, 400, "exceed the 128 that this server holds"),
    ("completions", PROMPT | {"logprobs": 5}, 400, "logprobs must be 0"),
    ("completions", PROMPT | {"echo": True}, 400, "echo scores a prompt"),
    ("completions", PROMPT | {"model": "other"}, 404, "only 'tiny'"),
    ("completions", PROMPT | {"messages": CHAT}, 400, "unsupported field 'messages'"),
    ("chat/completions", {}, 400, "messages must be a list"),
    ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, 400, "a role of system, user"),
    ("chat/completions", {"messages": [{"role": "user"}]}, 400, "content that is text"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only text"),
    ("chat/completions", MESSAGES | {"tools": [{"type": "function"}]}, 400, "unsupported field 'tools'"),
    ("chat/completions", MESSAGES | {"top_logprobs": 2}, 400, "top_logprobs must be 0"),
    ("embeddings", PROMPT, 404, "nothing to post to"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), BAD)
def test_what_it_cannot_do_is_refused_with_a_reason(server, path, body, status, message):
    found, answer = ask(server, f"/v1/{path}", body)
    assert found == status and message in answer["error"]["message"], answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"


def test_bodies_that_are_no_requests_are_refused(server):
    assert ask(server, "/v1/completions", b"prompt=a", kind="application/x-www-form-urlencoded")[0] == 415
    assert ask(server, "/v1/nothing")[0] == 404
    with socket.create_connection(server.server_address[:2], timeout=20) as wire:
        wire.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n")
        assert b" 413 " in wire.recv(100)
    with socket.create_connection(server.server_address[:2], timeout=20) as wire:
        wire.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
        assert b" 411 " in wire.recv(100)
    with socket.create_connection(server.server_address[:2], timeout=20) as wire:
        wire.sendall(b"nonsense\r\n\r\n")
        assert b'"error"' in wire.recv(1000)
    assert ask(server, "/health") == (200, {"status": "ok"})


def test_two_hundred_at_once_are_all_answered_and_none_mixed_up(server, sampler):
    prompts = [f"question {i}" for i in range(200)]
    how = {"max_tokens": 4, "temperature": 0}
    expected = [samples[0].text for samples in sampler.sample(prompts, Sampling(**how))]
    with ThreadPoolExecutor(200) as pool:
        found = list(pool.map(lambda prompt: ask(server, "/v1/completions", {"prompt": prompt, **how}), prompts))
    assert [status for status, _ in found] == [200] * 200
    assert [answer["choices"][0]["text"] for _, answer in found] == expected


def test_a_draw_with_a_seed_does_not_depend_on_who_else_asks(server, sampler):
    prompts = [f"word {i}" for i in range(12)]
    body = {"max_tokens": 6, "seed": 5}
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda prompt: ask(server, "/v1/completions", {"prompt": prompt, **body})[1], prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["choices"][0]["text"] == sampler.sample([prompt], Sampling(max_tokens=6, seed=5))[0][0].text


def test_without_a_seed_the_same_prompt_gets_different_answers(server):
    with ThreadPoolExecutor(8) as pool:
        body = {"prompt": "same", "max_tokens": 12}
        answers = list(pool.map(lambda _: ask(server, "/v1/completions", body)[1]["choices"][0]["text"], range(8)))
    assert len(set(answers)) == 8


def test_a_client_that_hangs_up_frees_the_device(server):
    long, short = {"prompt": "a", "n": 200, "max_tokens": 100, "seed": 1}, {"prompt": "a", "max_tokens": 2}
    for body in (short, long | {"n": 8}):
        assert ask(server, "/v1/completions", body)[0] == 200  # compiles what it needs
    start = time.monotonic()
    assert ask(server, "/v1/completions", long)[0] == 200
    whole = time.monotonic() - start
    data = json.dumps(long).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
    for stream in (False, True):
        with socket.create_connection(server.server_address[:2], timeout=20) as wire:
            sent = json.dumps(long | {"stream": True}).encode() if stream else data
            wire.sendall(head.replace(str(len(data)), str(len(sent))).encode() + b"\r\n\r\n" + sent)
            time.sleep(0.1)
        start = time.monotonic()
        assert ask(server, "/v1/completions", short)[0] == 200
        assert time.monotonic() - start < whole / 2, "the sampler went on for a client that had left"


def test_more_than_may_wait_are_told_to_come_back(sampler):
    with running(sampler, most_waiting=1) as server, ThreadPoolExecutor(12) as pool:
        bodies = [{"prompt": "a", "n": 8, "max_tokens": 60, "seed": i} for i in range(12)]
        found = list(pool.map(lambda body: ask(server, "/v1/completions", body), bodies))
    assert {status for status, _ in found} == {200, 429}
    assert all(answer["error"]["type"] == "rate_limit_error" for status, answer in found if status == 429)


def test_a_stopping_server_ends_what_runs_and_refuses_the_rest(sampler):
    with running(sampler) as server, ThreadPoolExecutor(8) as pool:
        bodies = [{"prompt": "a", "n": 64, "max_tokens": 60, "seed": i} for i in range(6)]
        asked = [pool.submit(ask, server, "/v1/completions", body) for body in bodies]
        time.sleep(0.3)
        server.stop(grace_seconds=30)
        found = [answered.result() for answered in asked]
    statuses = sorted(status for status, _ in found)
    assert statuses[0] == 200 and statuses[-1] == 503, statuses


def test_a_key_is_asked_for_where_one_is_set(sampler, monkeypatch):
    with pytest.raises(ValueError, match="TINY_KEY is not set"):
        Server(sampler, "tiny", port=0, key_variable="TINY_KEY")
    monkeypatch.setenv("TINY_KEY", "sesame")
    with running(sampler, key_variable="TINY_KEY") as server:
        assert ask(server, "/health")[0] == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            status, answer = ask(server, "/v1/models", headers=headers)
            assert status == 401 and "sesame" not in json.dumps(answer)
            assert ask(server, "/v1/completions", PROMPT, headers=headers)[0] == 401
        status, answer = ask(server, "/v1/models", headers={"Authorization": "Bearer sesame"})
        assert status == 200 and [model["id"] for model in answer["data"]] == ["tiny"]


@pytest.mark.filterwarnings("default")  # the client's dependencies warn as they like
def test_the_official_client_works(server, sampler):
    openai = pytest.importorskip("openai", reason="the official client is in the test extra: pip install openai")
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        how = {"model": "tiny", "max_tokens": 12, "temperature": 0}
        [[expected]] = sampler.sample([CHAT], Sampling(max_tokens=12, temperature=0))
        answer = client.chat.completions.create(messages=CHAT, logprobs=True, **how)
        assert answer.choices[0].message.content == expected.text
        told = [token.logprob for token in answer.choices[0].logprobs.content]
        np.testing.assert_array_equal(np.float32(told), expected.raw_log_probs)
        pieces = client.chat.completions.create(messages=CHAT, stream=True, **how)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected.text
        [[expected]] = sampler.sample(["abc"], Sampling(max_tokens=12, temperature=0))
        assert client.completions.create(prompt="abc", **how).choices[0].text == expected.text
        pieces = client.completions.create(prompt="abc", stream=True, **how)
        assert "".join(piece.choices[0].text for piece in pieces) == expected.text
        with pytest.raises(openai.BadRequestError, match="temperature must be at least 0"):
            client.completions.create(prompt="abc", model="tiny", temperature=-1)


@pytest.fixture(scope="module")
def folder(sampler, tmp_path_factory):
    """The tiny model as a Hugging Face folder."""
    target = tmp_path_factory.mktemp("tiny") / "tiny"
    checkpoints.save(target, sampler.model, sampler.params, tokenizer=sampler.tokenizer)
    return target


def test_the_script_says_the_same_from_disk_and_from_a_server(server, sampler, folder, generate, tmp_path):
    how = ("--max-tokens", 12, "--temperature", 0)
    here = generate(folder, "--chat", "hello", *how)
    [[expected]] = sampler.sample([CHAT], Sampling(max_tokens=12, temperature=0))
    assert here == (0, expected.text + "\n", "")
    assert generate("tiny", "--server", server.url, "--chat", "hello", *how) == here
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "abc"}) + "\n" + json.dumps({"messages": CHAT}) + "\n")
    code, printed, _ = generate("tiny", "--server", server.url, "--file", prompts, "--json", *how)
    lines = [json.loads(line) for line in printed.splitlines()]
    assert code == 0 and [line["prompt"] for line in lines] == ["abc", CHAT]
    assert lines[1]["completions"][0]["text"] == expected.text
    assert lines[1]["completions"][0]["tokens"] == expected.tokens.tolist()
    prompts.write_text('{"prompt": 3}\n')
    code, _, errors = generate(folder, "--file", prompts)
    assert code == 2 and 'prompts.jsonl:1 must be {"prompt": text}' in errors


def test_sigterm_ends_the_script_in_order(folder):
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "NPROC")}
    command = [sys.executable, "scripts/serve.py", str(folder), "--port", "0"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    ) as process:
        told = process.stdout.readline()
        assert told.startswith("serving tiny at http://127.0.0.1:")
        port = int(told.rpartition(":")[2].removesuffix("/v1\n"))
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as connection:
            connection.request("GET", "/v1/models")
            assert json.loads(connection.getresponse().read())["data"][0]["id"] == "tiny"
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and rest == "stopped\n"
