# SPDX-License-Identifier: Apache-2.0
"""What every arm in a process of its own needs: a line of JSON for each answer, its memory, its libraries."""

import json
import os
import resource
import sys
from collections.abc import Callable


def answers() -> Callable[..., None]:
    """`answer(**fields)`, a line of JSON on what was stdout; what libraries print goes to stderr from now on."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields) -> None:
        print(json.dumps(fields), file=out, flush=True)

    return answer


def peak_gib() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def versions() -> dict[str, str]:
    """Of what was imported of jax and torch."""
    return {name: sys.modules[name].__version__ for name in ("jax", "torch") if name in sys.modules}
