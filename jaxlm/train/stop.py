# SPDX-License-Identifier: Apache-2.0
"""A polite stop: SIGTERM ends the run at the next update, on all processes at the same one."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL: start the same command again


class Preempted(Exception):
    """The run was told to stop and can be resumed; scripts exit with `exit_code`."""

    exit_code = EXIT_CODE


class Notice:
    """Listens for SIGTERM while the loop runs.

    One process installs a handler, and only in the main thread, where Python allows it; the old one comes back on
    exit. With several processes jax listens itself and agrees on the update that all of them stop at.
    """

    def __init__(self) -> None:
        self._told = False
        self._old: Any = None
        self._installed = False

    def __enter__(self) -> "Notice":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._old = signal.signal(signal.SIGTERM, self._hear)
            self._installed = True
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._old)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def reached(self, step: int) -> bool:
        """Whether to stop now. Every process asks after every update."""
        return self._told if jax.process_count() == 1 else multihost_utils.reached_preemption_sync_point(step)
