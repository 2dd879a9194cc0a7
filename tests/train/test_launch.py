# SPDX-License-Identifier: Apache-2.0
"""What the environment says about the processes of a run, and what becomes of them."""

import json
import re

import pytest

from jaxlm.train.launch import alone, find_launch

SLURM = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "3", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_LOCALID": "1"}
EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "h0:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
ORTE = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
NUMBERS = {"num_processes": 4, "process_id": 3}
ADDRESS = {"coordinator_address": "h0:1234"}
ALONE = ("alone", 1, {})


@pytest.mark.parametrize(
    ("environ", "on_tpu", "installed", "expected"),
    [
        ({}, False, (), ALONE),
        (EXPLICIT, False, (), ("variables", 4, ADDRESS | NUMBERS)),
        (EXPLICIT | SLURM | {"SLURM_STEP_NUM_TASKS": "8"}, True, (), ("variables", 4, ADDRESS | NUMBERS)),
        (EXPLICIT | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, True, (), ALONE),
        ({"JAX_NUM_PROCESSES": "1"} | POD, True, (), ALONE),
        (SLURM | {"SLURM_NTASKS": "8"}, False, (), ALONE),  # the batch script itself, outside of srun
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, False, (), ALONE),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, False, (), ("Slurm", 4, NUMBERS)),
        (MPI | ORTE, False, (), ("Open MPI", 4, NUMBERS)),
        (MPI, False, ("mpi4py",), ("Open MPI", 4, {"cluster_detection_method": "mpi4py"})),
        (MPI | {"JAX_COORDINATOR_ADDRESS": "h0:1234"}, False, (), ("Open MPI", 4, NUMBERS | ADDRESS)),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, False, (), ALONE),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"} | POD, True, (), ("Cloud TPU", 2, {})),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "4"}, True, (), ("Cloud TPU", 8, {})),
        ({"TPU_WORKER_HOSTNAMES": "localhost"} | POD, True, (), ALONE),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False, (), ALONE),  # no chips, or JAX_PLATFORMS without them
        ({}, True, (), ("Cloud TPU", None, {})),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, (), ALONE),
        (POD, False, ("kubernetes",), ("Kubernetes", None, {})),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False, (), ALONE),
    ],
)
def test_the_environment_decides(environ, on_tpu, installed, expected):
    launch = find_launch(environ, on_tpu=on_tpu, installed=lambda name: name in installed)
    assert (launch.by, launch.num_processes, dict(launch.options)) == expected


@pytest.mark.parametrize(
    ("tasks", "visible", "devices"),
    [("1(x2)", "0,1,2,3", [0, 1, 2, 3]), ("1,1", "0,1", [0, 1]), ("2(x2)", "0,1", None), ("1(x2)", "0", None)],
)
def test_the_only_task_of_a_node_gets_all_its_gpus(tasks, visible, devices):
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": tasks, "CUDA_VISIBLE_DEVICES": visible}
    assert find_launch(SLURM | step).options.get("local_device_ids") == devices
    assert "local_device_ids" not in find_launch(SLURM | step | {"JAX_LOCAL_DEVICE_IDS": "0"}).options


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_NUM_PROCESSES is not set: set all three, or"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS and JAX_PROCESS_ID are not set: set all three"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1"}, "JAX_NUM_PROCESSES and JAX_PROCESS_ID are not set and no scheduler"),
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, r"JAX_PROCESS_ID=4 must be in \[0, JAX_NUM_PROCESSES=4\)"),
        (EXPLICIT | {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID must be a number, got 'one'"),
        (MPI, "Open MPI started 4 processes and names no address to meet at: mpirun -x JAX_COORDINATOR_ADDRESS"),
        (POD, "this pod is number 0 of an Indexed Job, which does not say of how many: set JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_half_an_answer_is_refused_with_what_is_missing(environ, message):
    with pytest.raises(ValueError, match=message):
        find_launch(environ)


def test_what_is_one_process_refuses_to_be_several(monkeypatch):
    alone("a comparison is one process")
    for name, value in EXPLICIT.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="a comparison is one process, and variables started 4: start it once, or set"):
        alone("a comparison is one process")


CONFIG = """
from jaxlm.config import RunConfig
from jaxlm.data import DataConfig, JsonLines, Task
from jaxlm.methods import Sft
from jaxlm.nn import ModelConfig
from jaxlm.train import AdamW, RunOptions

def get_config():
    train, test = JsonLines(path="train.jsonl"), JsonLines(path="test.jsonl")
    return RunConfig(
        model=ModelConfig(vocab_size=320, width=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_width=16),
        tokenizer="bytes",
        data=DataConfig(tasks=(Task(name="copy", train=train, test=test),), length=32),
        method=Sft(optimizer=AdamW(learning_rate=1e-2)),
        run=RunOptions(steps=2, batch_size=4, directory="run", step_timeout=60.0),
    )
"""


def write(folder, name="copy"):
    folder.mkdir(exist_ok=True)
    (folder / "config.py").write_text(CONFIG)
    lines = [json.dumps({"prompt": f"{name} {i}=", "completion": str(i)}) + "\n" for i in range(12)]
    for split, some in (("train", lines[:8]), ("test", lines[8:])):
        (folder / f"{split}.jsonl").write_text("".join(some))
    return folder


def test_scripts_train_runs_two_processes_as_one(pods, tmp_path):
    write(tmp_path)
    argv = ["config.py", "mesh.fsdp=2", "run.profile=2:3"]
    codes, said = pods.wait(pods.start(tmp_path, "script", argv=argv), 240)
    assert codes == [0, 0], said
    page = r"processes  2; hosts .* \(0, 1\)\ndevices    2 x cpu each, 4 in all, backend cpu\nmesh       data=2 across "
    assert re.search(
        page + r"processes, fsdp=2 inside a process\nversions   jaxlm .* \(source \w{12}\), Python", said[0]
    )
    assert "batch      4 rows, 2 a process" in said[0] and "batch      4 rows" not in said[1]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    assert "\ngoodput " in said[0] and "goodput" not in said[1]
    traces = list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 0, "process 0 alone is traced"


@pytest.mark.parametrize(
    ("each", "message"),
    [
        (
            {1: {"argv": ["config.py", "run.seed=5"]}},
            r"disagree: config run.seed is 0 on process 0 \(.*\) and 5 on process 1",
        ),
        ({1: {"devices": 1}}, r"disagree: devices is '2 x cpu' on process 0 \(.*\) and '1 x cpu' on process 1"),
    ],
    ids=["config", "devices"],
)
def test_processes_that_differ_end_with_one_sentence_that_says_who(pods, tmp_path, each, message):
    write(tmp_path)
    codes, said = pods.wait(pods.start(tmp_path, "script", argv=["config.py"], each=each))
    assert codes == [2, 2], said
    errors = [re.findall("^error: .*$", text, re.MULTILINE) for text in said]
    assert errors[0] == errors[1] and len(errors[0]) == 1 and re.search(message, errors[0][0]), said


def test_hosts_with_other_copies_of_the_data_end_with_one_sentence(pods, tmp_path):
    """The same relative path, on each host another file."""
    folders = [str(write(tmp_path / name, name)) for name in ("a", "b")]
    argv = ["config.py", f"run.directory={tmp_path / 'run'}"]
    each = {process: {"folder": folder} for process, folder in enumerate(folders)}
    codes, said = pods.wait(pods.start(tmp_path, "script", argv=argv, each=each))
    assert codes == [2, 2], said
    errors = [re.findall("^error: .*$", text, re.MULTILINE) for text in said]
    assert errors[0] == errors[1] and "training data is" in errors[0][0], said
    assert "held-out data is" in errors[0][0] and "Copy the same source files" in errors[0][0]


def test_a_second_start_compiles_nothing_that_the_first_left_in_the_cache(pods, tmp_path):
    said = []
    for _ in range(2):
        codes, (text,) = pods.wait(pods.start(tmp_path, "compile", count=1, variables=False))
        assert codes == [0], text
        said.append(tuple(map(int, text.split()[-2:])))
    (hits, misses), (hits_again, misses_again) = said
    assert hits == 0 and misses > 0 and (hits_again, misses_again) == (misses, 0)
