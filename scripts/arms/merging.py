# SPDX-License-Identifier: Apache-2.0
"""Merges the same folders with scripts/merge.py's function and with mergekit, in turns, and prints a Markdown table.

python scripts/arms/merging.py /tmp/models --mergekit-python mergekit/bin/python

The folder gets a base and two models of SmolLM2-135M's shape with random weights. Every run is a process of its own
that merges twice; imports are not timed, compiling is: it is in the first merge. Memory is what is not a map of a file.
Torch's threads wait without spinning, so that CPU seconds mean work on a busy machine too.
"""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
METHODS = ("linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties")
MODELS = ("base", "one", "two")


def make(folder: pathlib.Path, dtype: str) -> None:
    """Three checkpoints."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    width, size, vocab, key = 576, 1536, 49152, 192
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    for layer in range(30):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{x}_proj.weight": (key if x in "kv" else width, width) for x in "qkvo"}
        shapes |= {f"{at}.mlp.{x}_proj.weight": (size, width) for x in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (width, size)}
        shapes |= {f"{at}.{x}_layernorm.weight": (width,) for x in ("input", "post_attention")}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab, "hidden_size": width}
    config |= {"intermediate_size": size, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    config |= {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 1e5, "torch_dtype": dtype}
    base: dict = {}
    for seed, name in enumerate(MODELS):
        draw = np.random.default_rng(seed)
        held = {name: np.float32(0.04) * draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        base = base or held
        tuned = held if held is base else {name: base[name] + np.float32(0.5) * x for name, x in held.items()}
        kind = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
        (folder / name).mkdir(parents=True)
        save_file({name: x.astype(kind) for name, x in tuned.items()}, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text(json.dumps(config))


def ours(method: str, folder: pathlib.Path, out: pathlib.Path, dtype: str) -> None:
    """One merge with jaxlm."""
    from jaxlm.checkpoints.merge_folders import merge_folders
    from jaxlm.checkpoints.merge_recipes import METHODS as RECIPES

    numbers: dict = {"slerp": {"weight": 0.3}, "ties": {"density": 0.3}, "task_arithmetic": {}, "linear": {}}
    numbers |= {name: {"density": 0.3, "rescale": "norm"} for name in ("dare_linear", "dare_ties")}
    recipe, fixed = RECIPES[method]
    base, *models = (folder / name for name in MODELS)
    based = method not in ("linear", "slerp")
    merge_folders(recipe(**numbers[method], **fixed), models, out, base=base if based else None, dtype=dtype)


def mergekit(method: str, folder: pathlib.Path, out: pathlib.Path, dtype: str) -> None:
    """One merge with mergekit."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    base, *models = (str(folder / name) for name in MODELS)
    numbers = {} if method == "slerp" else {"weight": 1.0}
    if method.startswith(("ties", "dare")):
        numbers["density"] = 0.3
    config: dict = {"merge_method": method, "dtype": dtype, "parameters": {"t": 0.3} if method == "slerp" else {}}
    config["models"] = [{"model": model, "parameters": numbers} for model in models]
    if method != "linear":
        config["base_model"] = models[0] if method == "slerp" else base
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(config), str(out), options)


def work(arm: str, method: str, folder: pathlib.Path, dtype: str) -> None:
    """Two timed merges; prints one line of JSON."""
    if arm == "ours":
        import jaxlm.checkpoints.merge_folders  # noqa: F401
    else:
        import mergekit.merge  # noqa: F401
    peak, done = 0, threading.Event()

    def now() -> int:
        return int(re.search(r"RssAnon:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, now())
            time.sleep(0.005)

    before, seconds, cpu = now(), [], []
    threading.Thread(target=watch, daemon=True).start()
    for _ in range(2):
        out = folder / f"out_{arm}"
        shutil.rmtree(out, ignore_errors=True)
        start, used = time.perf_counter(), time.process_time()
        {"ours": ours, "mergekit": globals()["mergekit"]}[arm](method, folder, out, dtype)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    done.set()
    print(json.dumps({"seconds": seconds, "cpu": cpu, "bytes": peak - before}))


def main() -> None:
    """Makes the models, runs the arms in turns, prints the table."""
    folder, python, dtype = pathlib.Path(sys.argv[1]), sys.argv[3], (sys.argv[4:] or ["float32"])[0]
    if not folder.exists():
        make(folder, dtype)
    size = (folder / "one" / "model.safetensors").stat().st_size
    print(
        "| method | arm | first merge, s | second, s | CPU, s | MB/s | peak memory, MB |\n|---|---|---|---|---|---|---|"
    )
    for method in METHODS:
        rows: dict[str, list[dict]] = {"ours": [], "mergekit": []}
        for _ in range(1 if method == "ties" else 3):  # mergekit sorts every tensor: minutes
            for arm, program in (("ours", sys.executable), ("mergekit", python)):
                command = [program, __file__, "work", arm, method, str(folder), dtype]
                environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
                done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
                rows[arm].append(json.loads(done.stdout.strip().splitlines()[-1]))
        for arm, runs in rows.items():
            first, second = (sorted(run["seconds"][i] for run in runs)[len(runs) // 2] for i in (0, 1))
            cpu = sorted(run["cpu"][1] for run in runs)[len(runs) // 2]
            peak = max(run["bytes"] for run in runs) / 1e6
            rate = size / second / 1e6
            print(
                f"| {method} | {arm} | {first:.2f} | {second:.2f} | {cpu:.2f} | {rate:.0f} | {peak:.0f} |", flush=True
            )


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work(sys.argv[2], sys.argv[3], pathlib.Path(sys.argv[4]), sys.argv[5])
    else:
        main()
