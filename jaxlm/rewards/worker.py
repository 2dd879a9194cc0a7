# SPDX-License-Identifier: Apache-2.0
"""The process that runs other packages' scorers on texts nobody vouches for; `workers.py` starts and kills it.

Reads a JSON object a line, answers with one. Needs nothing of jaxlm, so that it starts quickly. The limit is on the
CPU time of an answer, kept by the kernel: SIGPROF ends the process, whatever Python or a C extension is doing.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

Score = Callable[[], float]
# Audit events that no scorer has a use for, by how they begin.
_REFUSED = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "os.putenv", "subprocess.")
_CHANGES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.ch",
    "shutil.",
)
_OUTSIDE = ("socket.", "ctypes.", "pty.", "ftplib.", "smtplib.", "urllib.", "webbrowser.")


class Refused(Exception):
    """The request cannot be scored for what it holds besides the text."""


def math() -> Callable[[dict[str, Any]], Score]:
    """Scores {"references": LaTeX or plain, "texts": ways to read it} by math-verify, whose time limits are off."""
    from math_verify import parse, verify

    def read(text: str) -> list[Any]:
        return parse(text, parsing_timeout=None)

    def prepare(request: dict[str, Any]) -> Score:
        def score() -> float:
            golds = [read(f"${reference}$") or read(reference) for reference in request["references"]]
            if not all(golds):
                raise Refused(f"math-verify reads no mathematics in the reference {request['references']!r:.80}")
            found = [read(text) for text in request["texts"]]
            return float(any(verify(gold, one, timeout_seconds=None) for gold in golds for one in found))

        return score

    check = prepare({"references": ["\\frac{1}{2}"], "texts": ["$0.5$"]})
    if check() != 1.0:
        raise ImportError("math-verify does not find 0.5 equal to 1/2: another version of it or of sympy is needed")
    return prepare


def gym() -> Callable[[dict[str, Any]], Score]:
    """Scores {"source": generator, size, seed, options; "index"; "question"; "text"} by reasoning-gym."""
    import reasoning_gym

    tasks: dict[str, Any] = {}

    def prepare(request: dict[str, Any]) -> Score:
        source = request["source"]
        name = json.dumps(source, sort_keys=True)
        if name not in tasks:
            arguments = {"size": source["size"], "seed": source["seed"], **source["options"]}
            tasks[name] = reasoning_gym.create_dataset(source["generator"], **arguments)
        item = tasks[name][request["index"]]
        if item["question"] != request["question"]:
            raise Refused("the generator makes another exercise there when asked for it alone: it cannot be scored")
        return lambda: float(tasks[name].score_answer(request["text"], entry=item))

    return prepare


KINDS = {"math": math, "gym": gym}


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: scorers compute; they start nothing, connect to nothing and write no file."""
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    if event.startswith(_REFUSED + _CHANGES + _OUTSIDE):
        raise PermissionError(f"a scorer wanted {event}")
    if event == "open" and (set(str(arguments[1] or "")) & set("wax+") or (arguments[2] or 0) & writes):
        raise PermissionError("a scorer wanted to write a file")


def main(kind: str, cpu_seconds: float, memory: int) -> None:
    """Answers until its input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints is no reply
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    signal.signal(signal.SIGPROF, signal.SIG_DFL)

    def reply(**fields: Any) -> None:
        replies.write(json.dumps(fields) + "\n")
        replies.flush()

    try:
        prepare = KINDS[kind]()
    except ImportError as error:
        reply(missing=str(error))
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    sys.addaudithook(refuse)
    reply(ready=True)
    for line in sys.stdin:
        reply(**_answer(prepare, json.loads(line), cpu_seconds))


def _answer(prepare: Callable[[dict[str, Any]], Score], request: dict[str, Any], cpu_seconds: float) -> dict[str, Any]:
    try:
        score = prepare(request)
    except Refused as error:
        return {"refused": str(error)}
    except Exception as error:  # the parent raises it: no text is to blame
        return {"failed": f"{type(error).__name__}: {error!s:.200}"}
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        return {"score": score()}
    except Refused as error:
        return {"refused": str(error)}
    except MemoryError:
        os._exit(1)  # what is left of the process is not to be trusted
    except Exception as error:  # whatever a scorer raises on a text, the text is not right
        return {"raised": f"{type(error).__name__}: {error!s:.200}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
