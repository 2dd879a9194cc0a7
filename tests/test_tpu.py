# SPDX-License-Identifier: Apache-2.0
"""The manifests of `tpu/` without a cluster: their schemas, and what must agree across files that cannot import.

Kubernetes' own parts are checked strictly (an unknown field is refused) against its published schemas, which the
package kubernetes-validate carries; JobSet's and SkyPilot's against the two schema files beside this one.
"""

import copy
import functools
import json
import math
import re
import string
import subprocess
from pathlib import Path

import jax
import jsonschema
import kubernetes_validate
import pytest
import yaml

from jaxlm.command import TRY_AGAIN, USER_ERROR
from jaxlm.config import load_config
from jaxlm.train.mesh import AXES, check_rows

ROOT = Path(__file__).resolve().parents[1]
TPU = ROOT / "tpu"
KUBERNETES = "1.33"  # the oldest that clusters of today run
CONFIG = "configs/quickstart.py"
SETTINGS = {"NAME": "my-run", "IMAGE": "registry.example/jaxlm:1", "CLAIM": "disk"}
# Hosts, accelerators of a host, and what the slice is called by those who rent it out.
SIZES = {"v5e-8": (1, 8), "v5p-64": (8, 4), "h100x8": (1, 8), "h100x16": (2, 8)}
SHARED = {"run.save_every": "100", "run.bad_checkpoint": "previous"}


@functools.cache
def lines_of(*command, **settings):
    """What a script of `tpu/` prints when it may only print."""
    env = {"PATH": "/usr/bin:/bin", "HOME": "/home/user", "DRY_RUN": "1", **settings}
    done = subprocess.run(["bash", *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def rendered(manifest, *fields):
    config = [] if manifest == "storage" else [CONFIG]
    return yaml.safe_load(
        lines_of("tpu/jobset.sh", "render", f"tpu/jobset/{manifest}.yaml", *config, *fields, **SETTINGS)
    )


def schema(name):
    return json.loads((ROOT / "tests" / f"tpu_{name}.schema.json").read_text())


def check_jobset(manifest):
    """Raises ValidationError for anything the API server would refuse or drop."""
    jsonschema.Draft202012Validator(schema("jobset")).validate(manifest)
    for job in manifest["spec"]["replicatedJobs"]:
        name = {"name": f"{manifest['metadata']['name']}-{job['name']}-0"}
        kubernetes_validate.validate(
            {"apiVersion": "batch/v1", "kind": "Job", "metadata": name, **job["template"]}, KUBERNETES, strict=True
        )


def job_of(manifest):
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]


def pod_of(manifest):
    return job_of(manifest)["template"]["spec"]


def train_of(manifest):
    (container,) = pod_of(manifest)["containers"]
    return container


def fields_of(arguments):
    return dict(word.split("=", 1) for word in arguments if re.match(r"[\w.]+=", word))


def sky(name):
    return yaml.safe_load((TPU / "sky" / f"{name}.yaml").read_text())


def default(script, variable):
    """`GRACE=${GRACE:-300}` -> 300."""
    (value,) = re.findall(rf"^{variable}=\$\{{{variable}:-(\d+)\}}", (TPU / script).read_text(), re.MULTILINE)
    return int(value)


def test_every_manifest_is_looked_at():
    assert sorted(path.stem for path in (TPU / "jobset").glob("*")) == sorted([*SIZES, "storage"])
    assert sorted(path.stem for path in (TPU / "sky").glob("*")) == ["gpu", "tpu"]
    assert not list(TPU.rglob("*.py")), "tpu/ is imported by nothing and imports nothing; Python belongs in scripts/"


@pytest.mark.parametrize("size", SIZES)
def test_jobsets_are_valid_to_the_last_field(size):
    manifest = rendered(size, "run.steps=7", "data.tasks.0.name=it's")
    check_jobset(manifest)
    assert train_of(manifest)["args"][-2:] == ["run.steps=7", "data.tasks.0.name=it's"]
    assert "${" not in json.dumps(manifest)


def test_the_claim_is_valid_and_many_hosts_may_write_it():
    claim = rendered("storage")
    kubernetes_validate.validate(claim, KUBERNETES, strict=True)
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda manifest: manifest["spec"].update(failurePolices={}),
        lambda manifest: manifest["spec"]["failurePolicy"].update(restartStrategy="Always"),
        lambda manifest: job_of(manifest).update(paralelism=2),
        lambda manifest: pod_of(manifest).update(terminationGracePeriod=300),
        lambda manifest: train_of(manifest)["env"].append({"name": "X", "valueForm": {}}),
        lambda manifest: train_of(manifest)["resources"].update(limit={}),
    ],
)
def test_a_field_that_does_not_exist_is_refused_wherever_it_stands(spoil):
    manifest = copy.deepcopy(rendered("h100x16"))
    spoil(manifest)
    with pytest.raises(jsonschema.ValidationError):
        check_jobset(manifest)


@pytest.mark.parametrize("size", SIZES)
def test_hosts_times_chips_are_the_slice(size):
    hosts, chips = SIZES[size]
    manifest = rendered(size)
    job, pod, container = job_of(manifest), pod_of(manifest), train_of(manifest)
    assert job["parallelism"] == job["completions"] == hosts
    assert job["completionMode"] == "Indexed", "a process needs to know which one it is"
    (resource,) = container["resources"]["limits"]
    assert container["resources"]["requests"] == container["resources"]["limits"] == {resource: str(chips)}
    assert resource in [toleration["key"] for toleration in pod["tolerations"]]
    mesh = fields_of(container["args"])
    assert int(mesh["mesh.data"]) * int(mesh["mesh.fsdp"]) == hosts * chips
    if resource == "google.com/tpu":
        topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        assert math.prod(int(side) for side in topology.split("x")) == hosts * chips
        assert pod["nodeSelector"]["node.kubernetes.io/instance-type"].endswith(f"-{chips}t")
        # v5e is named for its chips, v5p for its TensorCores, of which a chip has two.
        generation, number = size.split("-")
        assert int(number) == hosts * chips * {"v5e": 1, "v5p": 2}[generation]
    else:
        assert int(mesh["mesh.fsdp"]) == chips, "fsdp stays inside a node, where the links are fast"
        assert int(size.removeprefix("h100x")) == hosts * chips


@pytest.mark.parametrize("size", SIZES)
def test_every_process_of_a_gpu_job_can_find_the_others(size):
    env = {entry["name"]: entry for entry in train_of(rendered(size))["env"]}
    if size.startswith("h100"):
        assert env["JAX_NUM_PROCESSES"]["value"] == str(SIZES[size][0])
        index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
        assert env["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"] == index
        names = list(env)
        assert names.index("COORDINATOR_HOST") < names.index("JAX_COORDINATOR_ADDRESS"), "expanded in this order"
        assert env["JAX_COORDINATOR_ADDRESS"]["value"].startswith("$(COORDINATOR_HOST):")
        assert rendered(size)["spec"]["coordinator"]["replicatedJob"] == "worker"
    else:
        assert not {"JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} & set(env), "GKE tells the hosts of a slice itself"


@pytest.mark.parametrize("size", SIZES)
def test_a_saved_run_restarts_and_a_failed_program_does_not(size):
    manifest = rendered(size)
    job, policy = job_of(manifest), manifest["spec"]["failurePolicy"]
    drained, failed = job["podFailurePolicy"]["rules"]
    assert drained == {"action": "Count", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert failed["action"] == "FailJob" and failed["onExitCodes"]["operator"] == "NotIn"
    assert failed["onExitCodes"]["containerName"] == train_of(manifest)["name"]
    restarts = failed["onExitCodes"]["values"]
    assert TRY_AGAIN in restarts
    assert not {1, USER_ERROR, 130} & set(restarts)
    assert [code for code in restarts if code != TRY_AGAIN] == [128 + signal for signal in (6, 9, 11, 15)]
    (rule,) = policy["rules"]
    assert rule["action"] == "FailJobSet" and rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert policy["maxRestarts"] > 0 and policy["restartStrategy"] == "BlockingRecreate"
    assert job["backoffLimit"] == 0 and pod_of(manifest)["restartPolicy"] == "Never"


def test_sigterm_reaches_python_and_a_save_gets_the_same_time_everywhere():
    header = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (TPU / "slurm.sh").read_text(), re.MULTILINE))
    shell, lead = re.fullmatch(r"(B):TERM@(\d+)", header["signal"]).groups()
    assert shell == "B", "the batch shell hears it and passes it on, and only it can queue the job again"
    assert {"requeue", "open-mode", "time"} <= set(header) and header["open-mode"] == "append"
    assert header["ntasks-per-node"] == "1", "one process a node, as everywhere here"
    assert re.search(rf"^GRACE={lead} ", (TPU / "slurm.sh").read_text(), re.MULTILINE)
    for size in SIZES:
        container = train_of(rendered(size))
        assert container["command"] == ["python3", "scripts/train.py"], "a shell as process 1 would keep the signal"
        assert pod_of(rendered(size))["terminationGracePeriodSeconds"] >= int(lead)
    for script in ("pod.sh", "worker.sh", "xpk.sh"):
        assert default(script, "GRACE") >= int(lead)
    for task in ("tpu", "gpu"):
        assert "\nexec ~/jaxlm-venv/bin/python scripts/train.py " in sky(task)["run"]


def commands():
    """What each path would run on a host: words from `scripts/train.py` on."""
    fields = ["run.steps=7", "mesh.data=1"]
    slurm = lines_of("tpu/slurm.sh", CONFIG, *fields, NAME="my-run", STORAGE="/shared", VENV="/venv")
    worker = lines_of("tpu/worker.sh", "start", CONFIG, *fields, NAME="my-run")
    cluster = {"PROJECT": "p", "ZONE": "z", "CLUSTER": "c", "STORAGE": "s"}
    for device in ("v5litepod-8", "h100-80gb-8"):
        xpk = lines_of("tpu/xpk.sh", "apply", CONFIG, *fields, DEVICE=device, NUM="2", **SETTINGS, **cluster)
        yield f"xpk {device}", re.search(r"scripts/train.py.*", xpk.replace("\\ ", " "))[0].split()
    yield "slurm", re.search(r"scripts/train.py.*", slurm)[0].split()
    yield "worker", re.search(r"scripts/train.py.*", worker)[0].split()
    for size in SIZES:
        container = train_of(rendered(size, *fields))
        yield size, [*container["command"][1:], *container["args"]]
    for name in ("tpu", "gpu"):
        task = sky(name)
        words = task["run"][task["run"].index("scripts/train.py") :].replace("\\\n", " ").replace('"', "").split()
        envs = task["envs"] | {"NAME": "my-run", "FIELDS": task["envs"]["FIELDS"] + " " + " ".join(fields)}
        yield name, string.Template(" ".join(words)).substitute(envs).split()


def test_every_path_runs_the_same_script_with_fields_that_the_config_has():
    """Later fields win, so that what a user adds decides."""
    seen = dict(commands())
    assert len(seen) == 10
    for path, (script, config, *fields) in seen.items():
        assert (script, config) == ("scripts/train.py", CONFIG), path
        loaded = load_config(ROOT / config, fields)
        assert loaded.run.steps == 7 and loaded.mesh.data == 1, path
        assert loaded.run.directory.endswith("/runs/my-run") and loaded.run.directory.startswith("/"), path
        assert {name: fields_of(fields)[name] for name in SHARED} == SHARED, path


@pytest.mark.parametrize("size", SIZES)
def test_the_rows_of_an_update_divide_over_the_slice(size):
    run = load_config(ROOT / CONFIG, train_of(rendered(size))["args"][1:])
    check_rows(jax.sharding.AbstractMesh((run.mesh.data, run.mesh.fsdp, 1, 1), AXES), run.run.batch_size)


def test_no_path_falls_back_to_the_cpu_or_forgets_the_compile_cache():
    texts = [json.dumps(rendered(size)) for size in SIZES]
    texts += [(TPU / name).read_text() for name in ("worker.sh", "xpk.sh", "slurm.sh", "sky/tpu.yaml", "sky/gpu.yaml")]
    for text in texts:
        assert re.search(r"JAX_PLATFORMS\W+(?:value\W+)?(tpu|cuda|\$platform),cpu", text)
        assert "JAX_COMPILATION_CACHE_DIR" in text and "compile_cache" in text


@pytest.mark.parametrize("name", ["tpu", "gpu"])
def test_skypilot_tasks_use_fields_that_exist_and_recover_from_a_save(name):
    task = sky(name)
    jsonschema.Draft202012Validator(schema("skypilot")).validate(task)
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [TRY_AGAIN]
    used = set(re.findall(r"\$\{?([A-Z_]+)", json.dumps(task)))
    made = set(re.findall(r"([A-Z_]+)=", task["run"]))
    given = {"SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"}
    assert used <= set(task["envs"]) | made | given
    assert task["run"].startswith("export ") and f"[{'cuda' if name == 'gpu' else 'tpu'}]" in task["setup"]


def test_the_image_holds_what_the_manifests_name():
    text = (TPU / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), f"tpu/Dockerfile copies {source}, which is not there"
    (workdir,) = re.findall(r"^WORKDIR (\S+)$", text, re.MULTILINE)
    assert {train_of(rendered(size))["workingDir"] for size in SIZES} == {workdir}
