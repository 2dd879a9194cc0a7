# SPDX-License-Identifier: Apache-2.0
"""The committed tiny checkpoints, and the script that makes them where torch is there."""

import importlib.util
import json
import pathlib
import shutil

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="session")
def golden():
    """Variant name -> folder of a tiny checkpoint."""
    return {path.parent.name: path.parent for path in sorted((HERE / "golden").glob("*/config.json"))}


@pytest.fixture(scope="session")
def maker():
    """The module make_golden.py; skips where torch is not installed."""
    pytest.importorskip("torch", reason="live parity needs torch")
    spec = importlib.util.spec_from_file_location("make_golden", HERE / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def altered(golden, tmp_path):
    """A copy of a tiny checkpoint with keys of its config changed; the value `...` deletes a key."""

    def copy(variant, **changes):
        folder = tmp_path / variant
        shutil.copytree(golden[variant], folder)
        values = json.loads((folder / "config.json").read_text()) | changes
        values = {key: value for key, value in values.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return copy


@pytest.fixture(scope="session")
def logits_of():
    """(model, params, batch) -> logits of the real positions, [number of them, vocabulary]."""

    def logits(model, params, batch):
        hidden = model.apply(params, batch["tokens"], positions=batch["positions"], segment_ids=batch["segment_ids"])
        return np.asarray(model.logits(params, hidden))[batch["segment_ids"] > 0]

    return logits
