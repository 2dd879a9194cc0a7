# SPDX-License-Identifier: Apache-2.0
"""Layers state every change of dtype: silent promotion raises here."""

import jax
import pytest


@pytest.fixture(autouse=True)
def no_silent_dtype_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield
