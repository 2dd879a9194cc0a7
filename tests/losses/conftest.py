# SPDX-License-Identifier: Apache-2.0
"""No silent promotion of dtypes in these tests."""

import jax
import pytest


@pytest.fixture(autouse=True)
def no_silent_dtype_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield
