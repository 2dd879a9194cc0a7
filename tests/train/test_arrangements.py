# SPDX-License-Identifier: Apache-2.0
"""A run is the same run on one device, on eight, on two processes of four and on four of two.

Each by `jaxlm.run` from streams of records to the export; arrangements.py also compares the copies that processes hold.
"""

import numpy as np
import pytest

from jaxlm.transforms.isolation import HELD

METHODS = ("sft", "epi", "lora", "hope", "capsule")
ONE, EIGHT = {"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}
SHAPES = {"1x1": (1, 1, ONE), "1x8": (1, 8, EIGHT), "2x4": (2, 4, EIGHT), "4x2": (4, 2, EIGHT)}
ACROSS = {"tokens": (2, 2, {"data": 1, "sequence": 4})}  # pieces of every row on both processes
STEPS = 6
# Of parameters and moments after STEPS updates, of which each moves an entry by up to 1e-2: sums over devices are
# taken in another order. Seen: 3e-7 for eight devices in other processes, 5e-6 for one (capsule: 8e-6 and 2.5e-5).
CLOSE = {"capsule": 1e-4}


def go(pods, folder, shape, steps, into, names=METHODS):
    """Trains in `folder` as that shape, on from where it stands; the states."""
    count, devices, mesh = (SHAPES | ACROSS)[shape]
    told = {"names": names, "steps": steps, "mesh": mesh, "into": str(into)}
    pod = pods.start(folder, "methods", count=count, devices=devices, variables=count > 1, **told)
    codes, said = pods.wait(pod, 500)
    assert codes == [0] * count, said
    states = {}
    for name in names:
        with np.load(into / f"{name}.npz") as state:
            states[name] = dict(state)
    return states


def same(state, other, name):
    assert list(state) == list(other)
    for path, values in state.items():
        if np.issubdtype(values.dtype, np.floating):
            np.testing.assert_allclose(
                other[path], values, rtol=0, atol=CLOSE.get(name, 1e-5), err_msg=f"{name} {path}"
            )
        else:  # masks, counters, keys
            np.testing.assert_array_equal(other[path], values, err_msg=f"{name} {path}")


@pytest.fixture(scope="module")
def ends(pods, tmp_path_factory):
    """The states of each shape at the end; EPI and the capsule on several processes are in the test that moves them."""
    folder = tmp_path_factory.mktemp("ends")
    found = {}
    for shape in SHAPES:
        (folder / shape).mkdir()
        names = METHODS if SHAPES[shape][0] == 1 else ("sft", "lora", "hope")
        found[shape] = go(pods, folder / shape, shape, STEPS, folder / shape, names)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_processes_and_devices_do_not_change_a_run(ends, name):
    for shape in SHAPES:
        if name in ends[shape]:
            same(ends["1x8"][name], ends[shape][name], name)
    path = "params/blocks/attention/query/" + ("lora_b" if name == "lora" else "kernel")
    moved = np.abs(
        ends["1x8"][name]["params/blocks/attention/query/kernel"]
        - ends["1x8"]["sft"]["params/blocks/attention/query/kernel"]
    )
    assert np.any(ends["1x8"][name][path]) and (name == "sft" or np.max(moved) > 1e-3), (
        "runs that differ look different"
    )


def test_isolation_holds_the_same_entries_everywhere(ends):
    masks = {path for path, values in ends["1x8"]["epi"].items() if values.dtype == np.uint8}
    held = sum(np.count_nonzero(ends["1x8"]["epi"][path] & HELD) for path in masks)
    assert held > 100
    assert all(np.array_equal(ends["1x1"]["epi"][path], ends["1x8"]["epi"][path]) for path in masks)


def test_a_run_moves_between_all_shapes_and_ends_as_if_it_had_not(pods, tmp_path, ends):
    """Two updates on one device, two on two processes, two on four; then nothing is left to do for one with eight."""
    names = ("epi", "capsule")
    for step, shape in ((2, "1x1"), (4, "2x4"), (6, "4x2"), (6, "1x8")):
        states = go(pods, tmp_path, shape, step, tmp_path / shape, names)
    for name in names:
        same(ends["1x8"][name], states[name], name)


def test_the_tokens_of_a_row_may_lie_on_several_processes(pods, tmp_path, ends):
    same(ends["1x8"]["hope"], go(pods, tmp_path, "tokens", STEPS, tmp_path, ("hope",))["hope"], "hope")
