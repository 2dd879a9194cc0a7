# SPDX-License-Identifier: Apache-2.0
"""Eight virtual devices on any machine, and strict settings: set before jax is imported."""

import gc
import os
import pathlib

# jax < 0.12 deadlocks when eight devices share few cores, unless its thread pool is told to be large.
os.environ.setdefault("NPROC", "16")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_collective_call_terminate_timeout_seconds=300"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Linux gives a process 65,530 mappings, a compiled program takes some nine: without them the compiler crashes.
MAPPINGS = pathlib.Path("/proc/self/maps")
MANY = 15_000


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Forgets compiled programs, when there are many, before the next file."""
    yield
    if MAPPINGS.is_file() and MAPPINGS.read_text().count("\n") > MANY:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def quick_compiles():
    """Half of the time of these tests would go into machine code that runs for milliseconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
