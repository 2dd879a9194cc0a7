# SPDX-License-Identifier: Apache-2.0
"""Answers on disk, one JSON line each, so that a batch of requests that was killed goes on where it was.

The first line names the batch; each other line holds the key of one request and its answer.  A line is written by one
call and reaches the disk before the next request of its thread is asked.  A last line that was torn is dropped.
"""

import fcntl
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

_OPENS = b'{"jaxlm_journal": 1, "batch": "'


def request_key(path: str, body: Mapping[str, Any]) -> str:
    """SHA-256 of all that decides an answer: where it is asked, model, prompt, sampling, seed.  Not the host.

    >>> request_key("/completions", {"a": 1, "b": 2}) == request_key("/completions", {"b": 2, "a": 1})
    True
    """
    return hashlib.sha256(json.dumps([path, body], sort_keys=True).encode()).hexdigest()


def batch_key(keys: Sequence[str]) -> str:
    """SHA-256 of the keys of all requests of a batch, in order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


class Journal:
    """The file of one batch; a context manager, open in one process at a time.

    Args:
      path: made if it is not there, with its folder.
      keys: of the requests of the batch.
    Attributes:
      answers: key -> answer, of what is finished.
    Raises: ValueError for a file that is no journal, is another batch's, is broken before its last line, or is in use.

    >>> import tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "batch.jsonl"
    >>> with Journal(path, ["k"]) as journal:
    ...     journal.add("k", [1, 2])
    >>> with Journal(path, ["k"]) as journal:
    ...     print(journal.answers)
    {'k': [1, 2]}
    """

    def __init__(self, path: str | os.PathLike[str], keys: Sequence[str]):
        self._path = pathlib.Path(path)
        self._lock = threading.Lock()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            self.answers = self._read(batch_key(keys), set(keys))
        except (ValueError, OSError):
            os.close(self._file)
            raise

    def add(self, key: str, answer: Any) -> None:
        """Writes one answer; it is on the disk when this returns."""
        self._write(json.dumps({"key": key, "answer": answer}).encode() + b"\n")

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def _write(self, line: bytes) -> None:
        with self._lock:
            written = os.write(self._file, line)
            if written != len(line):  # the rest of a torn line would run into the next one
                os.ftruncate(self._file, os.fstat(self._file).st_size - written)
                raise OSError(f"{self._path}: {written} of {len(line)} bytes were written: free space on the disk")
            os.fsync(self._file)

    def _read(self, batch: str, keys: set[str]) -> dict[str, Any]:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{self._path} is in use by another process: wait for it, or name another file") from error
        first = _OPENS + batch.encode() + b'"}\n'
        data = self._path.read_bytes()
        if not data.startswith(_OPENS[: len(data)]):
            raise ValueError(f"{self._path} is no journal of requests: name another file")
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._file, whole)
        lines = data[:whole].splitlines(keepends=True)
        if not lines:
            self._write(first)
        elif lines[0] != first:
            raise ValueError(
                f"{self._path} holds another batch (other prompts, model, sampling or seed): name another file, or "
                "delete it to ask everything anew"
            )
        answers = {}
        for number, line in enumerate(lines[1:], 2):
            try:
                record = json.loads(line)
                key, answer = record["key"], record["answer"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self._path}:{number} is no record of an answer: delete that line") from error
            if key not in keys:
                raise ValueError(f"{self._path}:{number} answers a request that the batch has not: delete that line")
            answers[key] = answer
        return answers
