# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: whole or nothing, any mesh, and a refusal that names what is wrong."""

import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.checkpoints.runs import RunCheckpoints

TX = optax.adam(1e-3)


def mesh(count):
    return jax.make_mesh((count,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def make(seed=0, width=8):
    """A state in miniature: numbers of all kinds, a NamedTuple of an optimizer, a typed key."""
    params = {"blocks": {"kernel": jax.random.normal(jax.random.key(seed), (64, width))}, "scale": jnp.full(3, -0.0)}
    return {"step": jnp.int32(seed), "params": params, "opt_state": TX.init(params), "rng": jax.random.key(seed)}


def places(count, tree):
    """Matrices divided over the devices, the rest whole on each."""
    divided = NamedSharding(mesh(count), P("fsdp"))
    whole = NamedSharding(mesh(count), P())
    return jax.tree.map(lambda x: divided if len(x.shape) == 2 else whole, tree)


def like(count=1, dtype=None, **changed):
    """What a run on `count` devices asks for."""
    shapes = jax.eval_shape(lambda: make(**changed))
    floating = lambda x: dtype if dtype and jnp.issubdtype(x.dtype, jnp.floating) else x.dtype  # noqa: E731
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, floating(x), sharding=s), shapes, places(count, shapes)
    )


def bits(tree):
    raw = jax.tree.map(lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(raw)]


@pytest.fixture
def saved(tmp_path):
    """A folder with the steps 1 and 2."""
    saves = RunCheckpoints(tmp_path, config={"width": 8})
    for step in (1, 2):
        saves.save(step, make(step), data_state={"row": step}, metrics={"loss": step}, background=False)
    saves.close()
    return tmp_path


def restore(folder, like, **options):
    saves = RunCheckpoints(folder, **options)
    try:
        return saves.restore(like)
    finally:
        saves.close()


def largest(folder):
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def test_eight_devices_save_and_one_or_two_restore(tmp_path):
    state = make(7)
    saves = RunCheckpoints(tmp_path)
    saves.save(7, jax.device_put(state, places(8, state)), data_state={"row": 3}, metrics={"loss": 0.5})
    for count in (1, 2):
        wanted = like(count)
        found = saves.restore(wanted)
        assert (found.step, found.data_state, found.metrics) == (7, {"row": 3}, {"loss": 0.5})
        assert bits(found.state) == bits(state)
        assert [x.sharding for x in jax.tree.leaves(found.state)] == [x.sharding for x in jax.tree.leaves(wanted)]
        assert jax.tree.structure(found.state) == jax.tree.structure(state)
    saves.close()


def test_a_save_is_of_the_state_it_was_given_though_the_next_update_deletes_it(tmp_path):
    saves = RunCheckpoints(tmp_path)
    update = jax.jit(lambda x: x * 1.5, donate_argnums=0)
    for count in (1, 8):
        x = jax.device_put(jnp.ones((1024, 1024)), NamedSharding(mesh(count), P("fsdp")))
        saves.save(count, {"x": x})
        for _ in range(20):
            x = jax.block_until_ready(update(x))
        asked = {"x": jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=NamedSharding(mesh(1), P()))}
        assert np.all(np.asarray(saves.restore(asked).state["x"]) == 1)
    saves.close()


def test_floats_are_cast_on_load(saved):
    found = restore(saved, like(dtype=jnp.bfloat16)).state["params"]["blocks"]["kernel"]
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, make(2)["params"]["blocks"]["kernel"].astype(jnp.bfloat16))


def test_the_last_and_the_best_stay(tmp_path):
    saves = RunCheckpoints(tmp_path, keep_last=2, keep_best="loss")
    for step, loss in enumerate([5.0, 1.0, float("nan"), 3.0, 2.0]):
        saves.save(step, {"x": jnp.zeros(1)}, metrics={"loss": loss})
    saves.wait()
    assert saves.steps() == [1, 3, 4] and saves.best() == 1.0 and saves.latest() == 4
    saves.close()


def test_an_unfinished_save_is_no_checkpoint(saved):
    (saved / "2").rename(saved / "tmp-2")
    assert restore(saved, like()).step == 1
    assert not (saved / "tmp-2").exists()


def test_nothing_on_disk_restores_nothing(tmp_path):
    assert restore(tmp_path / "none", like()) is None


def truncate(folder):
    with largest(folder / "2").open("r+b") as stream:
        stream.truncate(largest(folder / "2").stat().st_size // 2)


def flip(folder):
    file = largest(folder / "2")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def remove(folder):
    largest(folder / "2").unlink()


def empty_record(folder):
    (folder / "2" / "checkpoint.json").write_text("")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"2 is damaged: state/.* has \d+ bytes, \d+ were written"),
        (flip, r"2 is damaged: the bytes of state/.* are not those"),
        (remove, r"2 is damaged: its file state/.* is missing"),
        (empty_record, r"checkpoint.json is broken"),
    ],
)
def test_a_damaged_checkpoint_is_refused_or_passed_over(saved, damage, message, capsys):
    damage(saved)
    with pytest.raises(ValueError, match=message + ".*bad_checkpoint=previous would go on"):
        restore(saved, like())
    assert bits(restore(saved, like(), bad_checkpoint="previous").state) == bits(make(1))
    assert "warning: passing over a checkpoint" in capsys.readouterr().err
    assert (saved / "bad-2").is_dir() and restore(saved, like()).step == 1


def changed(change):
    """What to ask for so that the checkpoint is of another model."""
    tree = like()
    change(tree)
    return tree


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["params"].update(bias=t["params"]["scale"]), "lacks 'params/bias', which this run has"),
        (lambda t: t["params"].pop("scale"), "has 'params/scale', which this run lacks"),
        (lambda t: t["params"].update(scale=t["step"]), r"'params/scale' has shape \(3,\), this run needs \(\)"),
        (lambda t: t.update(step=t["rng"]), "'step' is int32, this run needs key<fry>"),
        (
            lambda t: t["params"].update(block=t["params"].pop("blocks")),
            "lacks 'params/block/kernel', which this run has",
        ),
    ],
)
def test_a_foreign_checkpoint_is_refused_with_the_name_of_a_leaf(saved, change, message):
    with pytest.raises(ValueError, match=message):
        restore(saved, changed(change))
    with pytest.raises(ValueError, match=message + ".*no earlier checkpoint can be read either"):
        restore(saved, changed(change), bad_checkpoint="previous")
    assert restore(saved, like()).step == 2


def test_a_checkpoint_of_another_config_is_refused_with_both_values(saved):
    with pytest.raises(ValueError, match=r"another model \(width: 8 there, 16 here\)"):
        restore(saved, like(), config={"width": 16})
    with pytest.raises(ValueError, match=r"shape \(64, 8\), this run needs \(64, 16\)"):
        restore(saved, like(width=16))


# Orbax's own thread raises too, besides the error that reaches us.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_leaves_the_previous_checkpoint(saved, background):
    """A limit on the size of a file stands for the full disk: the same writes fail, with another number."""
    saves = RunCheckpoints(saved)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"x": jax.random.normal(jax.random.key(0), (512, 512))}
    message = r"step 3 could not be written to .*File too large.*checkpoint of step 2 is intact; free space"
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=message):
            saves.save(3, big, background=background)
            saves.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(p.name for p in saved.iterdir()) == ["1", "2"]
    assert bits(saves.restore(like()).state) == bits(make(2))
    saves.close()


def test_the_record_tells_a_reader_without_jax_what_is_inside(saved):
    record = json.loads((saved / "2" / "checkpoint.json").read_text())
    assert record["step"] == 2 and record["config"] == {"width": 8}
    assert record["leaves"]["params/blocks/kernel"] == [[64, 8], "float32"]
    assert record["leaves"]["opt_state/0/mu/blocks/kernel"] == [[64, 8], "float32"]


def test_no_checkpoint_at_all_is_refused():
    with pytest.raises(ValueError, match="keep_last must be at least 1, got 0"):
        RunCheckpoints("anywhere", keep_last=0)
