# SPDX-License-Identifier: Apache-2.0
"""A run is the same run on one device, on eight, on two processes of four and on four of two: data, masks, bits."""

import numpy as np
import pytest

METHODS = ("sft", "epi", "lora", "hope", "capsule")
ONE, EIGHT = {"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}
SHAPES = {"1x1": (1, 1, ONE), "1x8": (1, 8, EIGHT), "2x4": (2, 4, EIGHT), "4x2": (4, 2, EIGHT)}


def go(pods, folder, shape, steps, out):
    count, devices, mesh = SHAPES[shape]
    folder.mkdir(exist_ok=True)
    told = {"names": METHODS, "steps": steps, "mesh": mesh, "into": str(out)}
    codes, said = pods.wait(pods.start(folder, "methods", count=count, devices=devices, variables=count > 1, **told), 400)
    assert codes == [0] * count, said
    return {name: dict(np.load(out / f"{name}.npz")) for name in METHODS}


@pytest.fixture(scope="module")
def ends(pods, tmp_path_factory):
    """The states after six updates, of each shape."""
    folder = tmp_path_factory.mktemp("ends")
    return {shape: go(pods, folder / shape, shape, 6, folder / shape) for shape in SHAPES}


def test_x(ends):
    for shape in ("1x1","2x4","4x2"):
        for name in METHODS:
            a,b=ends["1x8"][name], ends[shape][name]
            print(shape, name, len(a), max(float(np.max(np.abs(a[k].astype(float)-b[k]))) for k in a if a[k].size), sum(a[k].tobytes()!=b[k].tobytes() for k in a), [k for k in a if a[k].dtype==bool and (a[k]!=b[k]).any()])
