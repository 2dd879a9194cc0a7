# SPDX-License-Identifier: Apache-2.0
"""Laws of plans: bytes of the state are exact, the rest stays near XLA's figures, and nothing is allocated."""

import dataclasses
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxlm.config import RunConfig
from jaxlm.data import DataConfig, Procedural, Task
from jaxlm.methods import METHODS, Epi, Sft
from jaxlm.nn.axes import logical_axes
from jaxlm.nn.config import Lora, ModelConfig
from jaxlm.overrides import override
from jaxlm.plan import activations
from jaxlm.plan.bounds import by_kind, mfu_bounds, training_flops
from jaxlm.plan.compiled import compile_step
from jaxlm.plan.hlo import Collective, read_program
from jaxlm.plan.memory import Memory, estimate
from jaxlm.plan.outline import device_bytes, make_outline
from jaxlm.plan.table import fits, memory_table, remedy, verdict
from jaxlm.train.chips import CHIPS, find_chip
from jaxlm.train.loop import plan
from jaxlm.train.options import MeshOptions, RunOptions

ROOT = Path(__file__).resolve().parents[1]
ONE = (MeshOptions(), 1)
FSDP = (MeshOptions(data=1, fsdp=8), 8)
BOTH = (MeshOptions(data=1, fsdp=4, tensor=2), 8)
TINY = ModelConfig(vocab_size=64, width=16, num_layers=2, num_heads=4, num_kv_heads=2, mlp_width=24, tied=False)


def make_config(model=TINY, method=None, mesh=ONE, rows=8, length=16, parts=1):
    task = Task(name="sorting", train=Procedural(generator="sorting", size=10))
    return RunConfig(
        model=model,
        tokenizer="bytes",
        data=DataConfig(tasks=(task,), length=length),
        method=Sft() if method is None else method,
        run=RunOptions(steps=10, batch_size=rows, micro_batches=parts),
        mesh=mesh[0],
    )


def outline_of(*, mesh=ONE, **fields):
    return make_outline(make_config(mesh=mesh, **fields), num_devices=mesh[1])


def held_on_the_first_device(tree):
    first = jax.devices()[0]
    total = 0
    for leaf in jax.tree.leaves(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        total += sum(shard.data.nbytes for shard in leaf.addressable_shards if shard.device == first)
    return total


@pytest.mark.parametrize("mesh", [ONE, BOTH], ids=["one device", "fsdp 4 x tensor 2"])
@pytest.mark.parametrize(
    "method",
    [Sft(), Epi(), Epi(importance_source="adam_nu"), Sft(lora=Lora(rank=4))],
    ids=["sft", "epi by gradients", "epi by adam", "lora"],
)
def test_the_state_takes_the_planned_bytes(method, mesh):
    outline = outline_of(method=method, mesh=mesh)
    params = jax.jit(outline.model.init)(jax.random.key(0))
    axes = {"axes": logical_axes, "first_step": 0, "stage": "train", "seed": 0}
    state = plan(outline.phase, params, mesh=outline.mesh, **axes)[1]()
    memory = estimate(outline)
    assert memory.state == held_on_the_first_device(state)
    assert memory.parameters == held_on_the_first_device(state.params)
    assert (memory.isolation > 0) == isinstance(method, Epi)


def test_isolation_costs_a_byte_an_entry_and_its_average_four():
    plain, nu, average = (
        estimate(outline_of(method=method)) for method in (Sft(), Epi(importance_source="adam_nu"), Epi())
    )
    entries = plain.parameters // 4
    assert plain.isolation == 0 and average.isolation - nu.isolation == 4 * entries
    assert entries <= nu.isolation <= entries + 1024  # counters of the drift beside the mask
    assert plain.optimizer <= nu.optimizer <= plain.optimizer + 64


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize(
    "fields",
    [{}, {"gated": False, "norm": "layer"}, {"norm_placement": "both", "query_key_norm": "head"}],
    ids=["llama", "plain", "norms everywhere"],
)
def test_what_is_saved_is_what_jax_saves(remat, fields):
    config = dataclasses.replace(TINY, remat=remat, **fields)
    outline = outline_of(model=config, length=64)
    model = outline.model
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (outline.state.params, outline.batch))
    loss = lambda params, batch: jnp.sum(model.apply(params, batch["tokens"]))  # noqa: E731
    jaxpr = jax.make_jaxpr(jax.grad(loss))(*shapes)
    forward = next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    inside = forward.params["jaxpr"].jaxpr.outvars  # what is carried has no leading axis outside either
    stacked = [v.aval for v, one in zip(forward.outvars, inside, strict=True) if v.aval.shape != one.aval.shape]
    rows = outline.batch["tokens"].shape[0]
    tokens = rows * 64  # products are saved as rows of tokens
    ours = [x for x in stacked if x.shape[0] == config.num_layers and x.shape[1] in (rows, tokens)]
    work = activations.Work(config, rows, 64, 1, 1, False, True)
    assert sum(x.size * x.dtype.itemsize for x in ours) == activations.saved(work)


SMALL = {
    "kept": (ModelConfig(vocab_size=4096, width=256, num_layers=4, num_heads=4, num_kv_heads=2, mlp_width=688), 8, 256),
    "dots": (
        ModelConfig(vocab_size=1024, width=768, num_layers=6, num_heads=12, mlp_width=3072, remat="dots"),
        16,
        128,
    ),
    "full": (
        ModelConfig(
            vocab_size=8192, width=512, num_layers=8, num_heads=8, num_kv_heads=4, mlp_width=1376, remat="full"
        ),
        8,
        512,
    ),
}


@pytest.mark.parametrize(
    ("shape", "mesh"), [("dots", ONE), ("full", FSDP), ("kept", BOTH)], ids=["one", "fsdp 8", "fsdp 4 x tensor 2"]
)
def test_the_estimate_is_within_a_tenth_of_the_compilers_figure(shape, mesh, quick_compiles):
    """Three cells of the nine in docs/benchmarks/plan.md, one of each shape and mesh."""
    model, rows, length = SMALL[shape]
    model = dataclasses.replace(model, tied=shape == "full")
    outline = outline_of(model=model, mesh=mesh, rows=rows, length=length)
    memory, compiled = estimate(outline, on_cpu=True), compile_step(outline)
    assert compiled.arguments == pytest.approx(memory.state + memory.batch, abs=256)
    assert abs(memory.step / compiled.step - 1) < 0.1, (memory, compiled.temporary)
    program = read_program(compiled.text)
    assert bool(program.collectives) == (mesh is not ONE) and not program.unknown_loops
    # Attention in blocks makes some scores of the future too, and remat "dots" makes attention twice.
    expected = training_flops(outline, executed=True) / outline.mesh.size
    assert 0.98 < program.flops / expected < 1.2


def test_divided_tokens_divide_what_is_planned_and_stay_near_the_compilers_figure(quick_compiles):
    model, mesh = dataclasses.replace(SMALL["kept"][0], tied=False), (MeshOptions(data=1, sequence=2), 2)
    outline = outline_of(model=model, mesh=mesh, rows=2, length=1024)
    memory, compiled = estimate(outline, on_cpu=True), compile_step(outline)
    assert compiled.arguments == pytest.approx(memory.state + memory.batch, abs=256)
    assert abs(memory.step / compiled.step - 1) < 0.1, (memory, compiled.temporary)
    whole = estimate(outline_of(model=model, rows=2, length=1024), on_cpu=True)
    assert memory.saved == whole.saved / 2 and memory.layer < whole.layer
    assert memory.state == pytest.approx(whole.state / 2, rel=0.01), "what follows the residual stream is divided too"


def test_loops_and_groups_of_collectives_are_counted():
    mesh = outline_of(mesh=BOTH).mesh

    def five_products(x, kernels):  # the contracted dimension lies on two devices: a sum over both in each turn
        def turn(x, kernel):
            mine = jax.lax.dynamic_slice_in_dim(x, 32 * jax.lax.axis_index("tensor"), 32, axis=1)
            return jnp.tanh(jax.lax.psum(mine @ kernel, "tensor")), None

        return jax.lax.scan(turn, x, kernels)[0]

    divided = jax.shard_map(five_products, mesh=mesh, in_specs=(P(), P(None, "tensor")), out_specs=P())
    shapes = jax.ShapeDtypeStruct((32, 64), jnp.float32), jax.ShapeDtypeStruct((5, 64, 64), jnp.float32)
    text = jax.jit(divided).lower(*shapes).compile().as_text()
    program = read_program(text)
    assert by_kind(program.collectives) == {"all-reduce": (5, 5 * 32 * 64 * 4, 5 * 32 * 64 * 4)}
    assert program.flops == 5 * 2 * 32 * 32 * 64 and program.unknown_loops == 0
    assert {one.groups for one in program.collectives} == {((0, 1), (2, 3), (4, 5), (6, 7))}


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="as_text"):
        read_program("module { func.func }")


def test_groups_that_leave_a_node_go_over_the_slower_network():
    outline, chip = outline_of(), CHIPS["h100"]._replace(joined=2)
    near, far = (Collective("all-gather", 1000, groups, 3, False) for groups in (((0, 1), (2, 3)), ((0, 2), (1, 3))))
    assert near.sent == far.sent == 500.0 and not near.leaves(2) and far.leaves(2) and not far.leaves(0)
    seconds = [mfu_bounds(outline, chip, [one], flops=1.0).collective for one in (near, far)]
    assert seconds == pytest.approx([1500 / 450e9, 1500 / 50e9])
    branch = near._replace(sometimes=True)
    assert mfu_bounds(outline, chip, [branch], flops=1.0).collective == 0 and by_kind([branch]) == {}


def test_without_collectives_the_bound_is_what_recomputation_leaves():
    full = outline_of(model=dataclasses.replace(TINY, remat="full"))
    executed = training_flops(full, executed=True)
    bounds = mfu_bounds(full, CHIPS["v5p"], [], flops=executed)
    assert bounds.overlapped == bounds.apart == pytest.approx(training_flops(full, executed=False) / executed)
    assert 0.75 < bounds.apart < 1  # three of four forward passes' worth, the head not made again


def test_micro_batches_divide_activations_and_double_gradients():
    one, four = (estimate(outline_of(model=SMALL["kept"][0], rows=8, length=128, parts=parts)) for parts in (1, 4))
    assert four.saved == one.saved / 4 and four.gradients == 2 * one.gradients and four.state == one.state


def test_frozen_leaves_have_no_gradients_in_the_plan():
    memory = estimate(outline_of(method=Sft(lora=Lora(rank=4))))
    outline = outline_of(method=Sft(lora=Lora(rank=4)))
    adapters = [
        x for path, x in jax.tree.leaves_with_path(outline.state.params) if "lora" in jax.tree_util.keystr(path)
    ]
    assert memory.gradients == device_bytes(adapters)


@pytest.mark.parametrize(
    ("mesh", "fields", "message"),
    [
        ((MeshOptions(data=1, fsdp=3), 8), {}, "change mesh.data, mesh.fsdp, mesh.sequence or mesh.tensor"),
        (
            (MeshOptions(data=1, tensor=8), 8),
            {"model": dataclasses.replace(TINY, mlp_width=20)},
            "choose another mesh.ten",
        ),
        (FSDP, {"rows": 12}, "nearest that fit are 8 and 16"),
        ((MeshOptions(), 4096), {}, "virtual ones do"),
        (ONE, {"method": METHODS["grpo"]()}, "plan its parameters"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_remedy(mesh, fields, message):
    with pytest.raises(ValueError, match=message):
        outline_of(mesh=mesh, **fields)


def test_unknown_chips_and_shapes_are_refused_with_those_there_are():
    with pytest.raises(ValueError, match="v5e, v5p, v6e, h100, h200"):
        find_chip("v9")
    with pytest.raises(ValueError, match="llama-8b, llama-70b"):
        make_outline(make_config(), num_devices=1, shape="llama-9b")


def test_a_remedy_is_itself_a_plan_that_fits():
    config = make_config(model=SMALL["kept"][0], mesh=(MeshOptions(data=8), 8), rows=64, length=256)
    memory = estimate(make_outline(config, num_devices=8))
    small = CHIPS["v5e"]._replace(memory_gb=memory.total / 1e9 / 2)
    assert not fits(memory, small) and verdict(memory, "small", small).startswith("does not fit small")
    advice = remedy(config, small, num_devices=8)
    changed = override(config, advice.removeprefix("set ").split())
    assert "mesh.fsdp=8" in advice and fits(estimate(make_outline(changed, num_devices=8)), small)
    hopeless = small._replace(memory_gb=memory.state / 1e9 / 8)
    assert "devices with mesh.fsdp" in remedy(config, hopeless, num_devices=8)


def test_the_table_adds_up_to_its_total():
    outline = outline_of(method=Epi(), mesh=BOTH)
    memory = estimate(outline)
    counted = [
        float(line.split()[-1]) for line in memory_table(outline, memory).splitlines()[3:-1] if "moment" not in line
    ]
    assert sum(counted) == pytest.approx(memory.total / 2**30, abs=0.01)
    assert memory.total == memory.state + memory.batch + memory.kept + memory.temporary


def test_a_70b_plan_allocates_nothing():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory: Memory = estimate(
        make_outline(make_config(rows=8, length=4096, mesh=FSDP), num_devices=8, shape="llama-70b")
    )
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert memory.state * 8 == pytest.approx(12 * 70.55e9, rel=0.01)
    assert grown < 2**20, f"{grown / 2**20:.1f} GiB"  # ru_maxrss counts KiB


def test_isolation_of_more_entries_than_an_int32_counts_is_planned():
    epi = make_config(method=Epi(importance_source="adam_nu"), rows=8, length=128, mesh=FSDP)
    memory = estimate(make_outline(epi, num_devices=8, shape="llama-8b"))
    assert 2**31 < 8 * memory.parameters // 4 < 8 * memory.isolation


def test_the_script_plans_and_tells_by_its_exit_code():
    command = [
        sys.executable,
        "scripts/plan.py",
        "configs/quickstart.py",
        "--devices",
        "16",
        "mesh.fsdp=16",
        "mesh.data=1",
    ]
    done = subprocess.run([*command, "--chip", "v5e"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "fits v5e" in done.stdout and "16 devices (data=1 fsdp=16" in done.stdout
    done = subprocess.run([*command, "--chip", "v4e"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "choose one of v5e" in done.stderr
