# SPDX-License-Identifier: Apache-2.0
"""Merging folders: the arithmetic of jaxlm.weights, in little memory, and nothing half done."""

import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlm.checkpoints import merge_recipes
from jaxlm.checkpoints.hub import load
from jaxlm.checkpoints.merge_folders import merge_folders
from jaxlm.checkpoints.merge_recipes import Dare, Linear, Slerp, Soup, TaskArithmetic, Ties, Transplant
from jaxlm.weights import dare, dare_ties, linear, slerp, soup, task_arithmetic, ties, transplant

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {"model.embed_tokens.weight": (70, 33), "model.layers.0.up.weight": (33, 200), "model.norm.weight": (33,)}
CONFIG = {"model_type": "llama", "vocab_size": 70, "rope_theta": 1e4, "torch_dtype": "float32"}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch, request):
    if "memory" not in request.node.name:
        monkeypatch.setattr(merge_recipes, "PIECE", 2048)
        monkeypatch.setattr(merge_recipes, "STEP", 1024)
        monkeypatch.setattr(merge_recipes, "SMALL", 256)


def tensors(seed, near=None, step=1.0, dtype=np.float32):
    draw = np.random.default_rng(seed)
    new = {name: np.float32(step) * draw.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
    return {name: (x if near is None else near[name] + x).astype(dtype) for name, x in new.items()}


def folder(path, held, *, shard=False, **config):
    path.mkdir()
    names = list(held)
    if shard:
        files = {"model-1.safetensors": names[:1], "model-2.safetensors": names[1:]}
        for file, of_it in files.items():
            save_file({name: held[name] for name in of_it}, path / file)
        where = {name: file for file, of_it in files.items() for name in of_it}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    else:
        save_file(held, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG | config))
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    return path


def result(path):
    merged = {}
    for file in sorted(path.glob("*.safetensors")):
        merged |= load_file(file)
    return merged


BASE = tensors(0)
TUNED = [tensors(seed, near=BASE, step=0.1) for seed in (1, 2, 3)]
WEIGHTS = [0.7, 0.5, -0.2]


def close(a, b, atol=0.0):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape
        np.testing.assert_allclose(a[name], b[name], atol=atol, rtol=0, err_msg=name)


@pytest.mark.parametrize(
    ("recipe", "based", "tree"),
    [
        (Linear(weights=WEIGHTS), False, lambda base, models: linear(models, weights=WEIGHTS)),
        (Soup(), False, lambda base, models: soup(models)),
        (TaskArithmetic(weights=WEIGHTS, scale=1.5), True,
         lambda base, models: task_arithmetic(base, models, weights=WEIGHTS, scale=1.5)),
        (Ties(density=0.3, weights=WEIGHTS), True,
         lambda base, models: ties(base, models, density=0.3, weights=WEIGHTS, stacked=())),
        (Dare(density=0.3, seed=5), True, lambda base, models: dare(base, models, density=0.3, seed=5)),
        (Dare(density=0.3, rescale="norm"), True, lambda base, models: dare(base, models, density=0.3, rescale="norm")),
        (Dare(density=0.3, signs="elected"), True, lambda base, models: dare_ties(base, models, density=0.3)),
    ],
    ids=["linear", "soup", "task_arithmetic", "ties", "dare", "dare_norm", "dare_ties"],
)  # fmt: skip
def test_folders_merge_as_trees_do(tmp_path, recipe, based, tree):
    models = [folder(tmp_path / f"m{i}", model, shard=i == 1) for i, model in enumerate(TUNED)]
    base = folder(tmp_path / "base", BASE) if based else None
    merge_folders(recipe, models, tmp_path / "out", base=base)
    close(result(tmp_path / "out"), jax.tree.map(np.asarray, tree(BASE, TUNED)), atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [1.0, 1e-30])
def test_folders_slerp_as_trees_do(tmp_path, weight, size):
    a, b = ({name: np.float32(size) * x for name, x in model.items()} for model in (BASE, tensors(9)))
    b["model.norm.weight"] = -a["model.norm.weight"]  # antipodal
    a["zero"], b["zero"] = np.zeros(5, np.float32), np.ones(5, np.float32)
    a["near"] = np.ones(5, np.float32)
    b["near"] = a["near"] * np.float32(1.001)
    merge_folders(Slerp(weight=weight), [folder(tmp_path / "a", a), folder(tmp_path / "b", b)], tmp_path / "out")
    merged, expected = result(tmp_path / "out"), jax.tree.map(np.asarray, slerp(a, b, weight))
    for name in SHAPES:
        np.testing.assert_allclose(merged[name] / size, expected[name] / size, atol=1e-6)
    if weight in (0.0, 1.0):
        assert all(merged[name].tobytes() == (a, b)[int(weight)][name].tobytes() for name in a)


@pytest.mark.parametrize("overlap", ["largest", "mean", "last"])
def test_cores_are_transplanted_as_in_trees(tmp_path, overlap):
    draw = np.random.default_rng(7)
    cores = [{name: draw.random(shape) < 0.4 for name, shape in SHAPES.items()} for _ in TUNED]
    for i, core in enumerate(cores):
        save_file(core, tmp_path / f"core{i}.safetensors")
    fused = tensors(8)
    models = [folder(tmp_path / f"m{i}", model) for i, model in enumerate(TUNED)]
    origin = str(folder(tmp_path / "origin", BASE)) if overlap == "largest" else None
    recipe = Transplant(
        cores=[str(tmp_path / f"core{i}.safetensors") for i in range(3)], overlap=overlap, origin=origin
    )
    merge_folders(recipe, models, tmp_path / "out", base=folder(tmp_path / "fused", fused))
    sizes = [{name: np.abs(model[name] - BASE[name]) for name in SHAPES} for model in TUNED]
    expected = transplant(fused, TUNED, cores, sizes=sizes, overlap=overlap)
    close(result(tmp_path / "out"), jax.tree.map(np.asarray, expected), atol=1e-7 if overlap == "mean" else 0)


def test_equal_changes_are_cut_by_the_same_hash_as_in_trees(tmp_path):
    """In bfloat16 most task vector entries have equals; the share is exact all the same."""
    base = tensors(0, dtype=ml_dtypes.bfloat16)
    model = {
        name: (x.astype(np.float32) + np.random.default_rng(1).integers(-3, 4, x.shape) * 2.0**-4)
        for name, x in base.items()
    }
    model = {name: x.astype(np.float32) for name, x in model.items()}
    start = {name: x.astype(np.float32) for name, x in base.items()}
    merge_folders(
        Ties(density=0.3), [folder(tmp_path / "m", model)], tmp_path / "out", base=folder(tmp_path / "b", start)
    )
    merged = result(tmp_path / "out")
    close(merged, jax.tree.map(np.asarray, ties(start, [model], density=0.3, stacked=())))
    for name, x in merged.items():
        assert (x != start[name]).sum() == int(0.3 * x.size)


def test_types_are_widened_or_as_asked_and_the_config_tells(tmp_path):
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in TUNED[0].items()}
    paths = [folder(tmp_path / "half", half), folder(tmp_path / "full", TUNED[1])]
    merge_folders(Soup(), paths, tmp_path / "wide")
    assert {x.dtype for x in result(tmp_path / "wide").values()} == {np.dtype(np.float32)}
    line = merge_folders(Soup(), paths, tmp_path / "narrow", dtype="bfloat16")
    narrow = result(tmp_path / "narrow")
    assert {x.dtype for x in narrow.values()} == {np.dtype(ml_dtypes.bfloat16)}
    wide = result(tmp_path / "wide")
    assert all(narrow[name].tobytes() == x.astype(ml_dtypes.bfloat16).tobytes() for name, x in wide.items())
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (tmp_path / "narrow" / "tokenizer.json").exists() and "3 tensors, 0.0 MB in 1 files" in line


def test_large_results_go_to_several_files_with_an_index(tmp_path):
    models = [folder(tmp_path / f"m{i}", model) for i, model in enumerate(TUNED)]
    merge_folders(Soup(), models, tmp_path / "one")
    merge_folders(Soup(), models, tmp_path / "many", max_shard_bytes=30_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    close(result(tmp_path / "many"), result(tmp_path / "one"))
    again = merge_folders(Soup(), [tmp_path / "many", tmp_path / "one"], tmp_path / "again")
    assert "Soup() of 2 models" in again


def test_a_merged_model_loads(tmp_path, golden):
    source = golden[min(golden)]
    merge_folders(Slerp(weight=0.5), [source, source], tmp_path / "out")
    one, two = (load(path)[1] for path in (source, tmp_path / "out"))
    assert [x.tobytes() for x in map(np.asarray, jax.tree.leaves(one))] == [
        x.tobytes() for x in map(np.asarray, jax.tree.leaves(two))
    ]


def test_what_does_not_fit_is_refused_by_name_and_nothing_is_left(tmp_path):
    one = folder(tmp_path / "one", BASE)
    ones, table, norm = np.ones, "model.embed_tokens.weight", "model.norm.weight"
    refused = {
        "lacks model.norm.weight": {name: BASE[name] for name in SHAPES if name != norm},
        r"has head.weight, which .* lacks": BASE | {"head.weight": ones(3, np.float32)},
        r"vocabularies differ: 71 tokens in .*two.*, 70 in": BASE | {table: ones((71, 33), np.float32)},
        r"model.norm.weight is \(34,\) in .*two.* and \(33,\) in": BASE | {norm: ones(34, np.float32)},
        "model.norm.weight holds a NaN or an infinity in .*two": BASE | {norm: np.nan * ones(33, np.float32)},
        "model.norm.weight is float32 in .* and not in all others": BASE | {norm: ones(33, np.int32)},
    }
    for number, (message, held) in enumerate(refused.items()):
        two = folder(tmp_path / f"two{number}", held)
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ValueError, match=message):
            merge_folders(Soup(), [one, two], tmp_path / "out")
        assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(ValueError, match=r"rope_theta is 1000000.0 in .*other.* and 10000.0 in"):
        merge_folders(Soup(), [one, folder(tmp_path / "other", BASE, rope_theta=1e6)], tmp_path / "out")
    words = folder(tmp_path / "words", BASE)
    (words / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 1, "b": 0}}}))
    with pytest.raises(ValueError, match=r"'a' is token 1 of 2 in .*words, 0 of 2 in"):
        merge_folders(Soup(), [one, words], tmp_path / "out")
    with pytest.raises(ValueError, match="is not an empty folder"):
        merge_folders(Soup(), [one, one], one)
    with pytest.raises(ValueError, match="ties needs the common base"):
        merge_folders(Ties(), [one], tmp_path / "out")
    with pytest.raises(ValueError, match="slerp merges two models, got 3"):
        merge_folders(Slerp(), [one] * 3, tmp_path / "out")
    with pytest.raises(ValueError, match="got 2 weights for 3 models"):
        merge_folders(Linear(weights=[1, 2]), [one] * 3, tmp_path / "out")
    broken = folder(tmp_path / "broken", BASE)
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(ValueError, match=re.escape(str(broken / "model.safetensors"))):
        merge_folders(Soup(), [one, broken], tmp_path / "out")


def anonymous_bytes():
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    "recipe",
    [Slerp(weight=0.3), Ties(density=0.3), Dare(density=0.3, rescale="norm", signs="elected")],
    ids=lambda r: type(r).__name__,
)
def test_memory_stays_below_twice_the_largest_tensor(tmp_path, recipe):
    """Beyond the maps of the files. The merge runs once on a small tensor first: compilers need memory too."""
    size = 12_000_000
    for name, entries in (("small", merge_recipes.PIECE + 5), ("large", size)):
        for i in range(3):
            draw = np.random.default_rng(i)
            save_file({"w": draw.standard_normal(entries, np.float32)}, tmp_path / f"{name}{i}.safetensors")
    peak, done = 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes())
            time.sleep(0.001)

    def merge(name):
        base, *models = (tmp_path / f"{name}{i}.safetensors" for i in range(3))
        merge_folders(recipe, models, tmp_path / f"{name}_out", base=base if recipe.based else None)

    merge("small")
    before = anonymous_bytes()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        merge("large")
    finally:
        done.set()
        thread.join()
    assert peak - before < 2 * 4 * size, f"{(peak - before) / 1e6:.0f} MB for a tensor of {4 * size / 1e6:.0f}"


def test_the_script_merges_and_tells_what_a_method_reads(tmp_path):
    one, two = folder(tmp_path / "one", BASE), folder(tmp_path / "two", TUNED[0])

    def run(*words):
        command = [sys.executable, "scripts/merge.py", *map(str, words), "--to", str(tmp_path / "out")]
        return subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)

    for words, message in (
        (("slurp", one, two), "did you mean slerp?"),
        (("slerp", one, two, "--density", 0.3), "slerp has no --density; it reads weight, eps"),
        (("dare_ties", two, "--base", one), "dare_ties needs --density"),
    ):
        done = run(*words)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    done = run("linear", one, two, "--weights", "3,1", "--normalize", "yes")
    assert done.returncode == 0 and "Linear(weights=(3.0, 1.0), normalize=True) of 2 models: 3 tensors" in done.stdout
    close(result(tmp_path / "out"), jax.tree.map(np.asarray, linear([BASE, TUNED[0]], weights=[3, 1])), atol=1e-6)
