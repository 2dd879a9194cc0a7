# SPDX-License-Identifier: Apache-2.0
"""The shell scripts of `tpu/`: linted, and what they would do, as --dry-run prints it."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tpu").rglob("*.sh"))
CONFIG = "configs/quickstart.py"
PLACE = {"PROJECT": "my-project", "ZONE": "my-zone", "NAME": "my-run", "STORAGE": "gs://my-bucket"}
CLUSTER = {"CLUSTER": "my-cluster", "IMAGE": "registry.example/jaxlm:1", "CLAIM": "disk", "VENV": "/venv"}
# For each script: variables that it cannot do without, and words that make it look at them.
NEEDS = {
    "tpu/pod.sh": (["PROJECT", "ZONE", "NAME"], ["status"]),
    "tpu/worker.sh": (["NAME"], ["start", CONFIG]),
    "tpu/jobset.sh": (["NAME", "IMAGE", "CLAIM"], ["render", "tpu/jobset/v5e-8.yaml", CONFIG]),
    "tpu/xpk.sh": (["PROJECT", "ZONE", "CLUSTER", "NAME", "IMAGE", "STORAGE"], ["apply", CONFIG]),
    "tpu/slurm.sh": (["NAME", "STORAGE", "VENV"], [CONFIG]),
}


def call(script, *words, **settings):
    env = {"PATH": "/usr/bin:/bin", "HOME": "/home/user", **settings}
    return subprocess.run(["bash", script, *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def dry(script, *words, **settings):
    """The commands, each as its words."""
    done = call(script, *words, "--dry-run", **PLACE | CLUSTER | settings)
    assert done.returncode == 0, done.stderr
    again = call(script, *words, DRY_RUN="1", **PLACE | CLUSTER | settings)
    scratch = re.compile(r"/tmp/[\w.]+/")
    assert scratch.sub("", again.stdout) == scratch.sub("", done.stdout), "--dry-run and DRY_RUN=1 are one"
    return [shlex.split(line) for line in done.stdout.splitlines()]


def lint(text_or_path, *options):
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent) or shutil.which("shellcheck")
    assert shellcheck, "shellcheck is not installed: pip install -e '.[test]'"
    return subprocess.run([shellcheck, *options, text_or_path], cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_script_is_looked_at():
    assert sorted(NEEDS) == SCRIPTS


@pytest.mark.parametrize("script", [*SCRIPTS, "tpu/command.bash"])
def test_shellcheck_has_nothing_to_say(script):
    rules = "--enable=quote-safe-variables,check-unassigned-uppercase"
    done = lint(script, rules, "--severity=style", "--external-sources")
    assert done.returncode == 0, done.stdout + done.stderr
    assert subprocess.run(["bash", "-n", script], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("task", ["tpu", "gpu"])
@pytest.mark.parametrize("part", ["setup", "run"])
def test_shellcheck_has_nothing_to_say_about_skypilot(task, part, tmp_path):
    """But that FIELDS is split into words, which it says is on purpose."""
    text = yaml.safe_load((ROOT / "tpu" / "sky" / f"{task}.yaml").read_text())[part]
    (tmp_path / "part.sh").write_text(text)
    done = lint(str(tmp_path / "part.sh"), "--shell=bash", "--exclude=SC2086")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_variable_that_is_missing_is_named_with_the_remedy(script):
    names, words = NEEDS[script]
    for name in names:
        settings = {key: value for key, value in (PLACE | CLUSTER).items() if key != name}
        done = call(script, *words, DRY_RUN="1", **settings)
        assert done.returncode == 2 and f"{name} is not set: " in done.stderr, (name, done)
        assert done.stdout == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_project_of_ours_stands_in_a_script(script):
    """Names, places and addresses come from the environment; what has a default is a size or a time."""
    text = (ROOT / script).read_text()
    for name in ("PROJECT", "ZONE", "NAME", "STORAGE", "IMAGE", "CLUSTER", "CLAIM", "VENV"):
        for value in re.findall(rf"^{name}=(.*?)(?:\s+#.*)?$", text, re.MULTILINE):
            assert value in (f"${{{name}:-}}", "${VENV:-$HOME/jaxlm-venv}"), f"{script} sets {name}={value}"
    assert text.startswith("#!/usr/bin/env bash\n# SPDX-License-Identifier: Apache-2.0\n")
    assert "\nset -euo pipefail\n" in text


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "tpu/slurm.sh"])
def test_an_unknown_command_is_told_which_there_are(script):
    done = call(script, "strat", **PLACE | CLUSTER)
    assert done.returncode == 2 and "unknown command 'strat'; there are " in done.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_config_that_is_not_there_stops_before_anything_is_paid_for(script):
    words = [word.replace(CONFIG, "configs/quikstart.py") for word in NEEDS[script][1]]
    if script == "tpu/pod.sh":
        words = ["run", "configs/quikstart.py"]
    done = call(script, *words, DRY_RUN="1", **PLACE | CLUSTER | {"STORAGE": "/shared"})
    assert done.returncode == 2 and "config" in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    ("capacity", "request_", "expected"),
    [
        ("on-demand", "queued", ["queued-resources", "create", "my-run", "--node-id=my-run"]),
        ("spot", "queued", ["queued-resources", "create", "my-run", "--node-id=my-run"]),
        ("reserved", "queued", ["queued-resources", "create", "my-run", "--node-id=my-run"]),
        ("on-demand", "direct", ["tpu-vm", "create", "my-run"]),
        ("spot", "direct", ["tpu-vm", "create", "my-run"]),
    ],
)
def test_a_slice_is_asked_for_as_wanted(capacity, request_, expected):
    first, *rest = dry("tpu/pod.sh", "create", CAPACITY=capacity, REQUEST=request_, ACCELERATOR="v5p-64")
    assert first[: 3 + len(expected)] == ["gcloud", "compute", "tpus", *expected]
    assert {"--accelerator-type=v5p-64", "--project=my-project", "--zone=my-zone"} <= set(first)
    image = "--runtime-version=v2-alpha-tpuv5" if request_ == "queued" else "--version=v2-alpha-tpuv5"
    assert image in first
    assert [word for word in first if word in ("--spot", "--reserved")] == (
        [] if capacity == "on-demand" else [f"--{capacity}"]
    )
    assert [words[3:5] for words in rest] == ([["queued-resources", "describe"]] if request_ == "queued" else [])


def test_an_unknown_accelerator_or_capacity_is_refused():
    for settings, said in (
        ({"ACCELERATOR": "v9-8"}, "ACCELERATOR=v9-8: set RUNTIME"),
        ({"CAPACITY": "cheap"}, "CAPACITY must be on-demand, spot or reserved, got 'cheap'"),
        ({"REQUEST": "soon"}, "REQUEST must be queued or direct, got 'soon'"),
    ):
        done = call("tpu/pod.sh", "create", DRY_RUN="1", **PLACE | settings)
        assert done.returncode == 2 and said in done.stderr and done.stdout == ""
    (first, _) = dry("tpu/pod.sh", "create", ACCELERATOR="v9-8", RUNTIME="my-image")
    assert "--runtime-version=my-image" in first


def on_workers(words):
    """The command that `gcloud ... tpu-vm ssh` runs, as its words, and on which workers."""
    (line,) = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    (which,) = [word.removeprefix("--worker=") for word in words if word.startswith("--worker=")]
    return which, shlex.split(line)


def test_all_workers_get_one_commit_and_the_same_command():
    archive, copy, unpack, install = dry("tpu/pod.sh", "install")
    assert archive[:2] == ["git", "-C"] and archive[-1] == "HEAD"
    assert copy[3:5] == ["tpu-vm", "scp"] and copy[6] == "my-run:jaxlm.tar.gz" and "--worker=all" in copy
    assert on_workers(unpack)[0] == on_workers(install)[0] == "all"
    fields = ["run.steps=7", "data.tasks.0.name=it's one; rm -rf"]
    (run,) = dry("tpu/pod.sh", "run", CONFIG, *fields)
    which, command = on_workers(run)
    assert which == "all"
    assert command[-6:] == ["bash", "jaxlm/tpu/worker.sh", "start", CONFIG, *fields], "no word is split on the way"
    assert "STORAGE=gs://my-bucket" in command and "NAME=my-run" in command


def test_the_run_outlives_the_session_and_is_stopped_with_time_to_save():
    (start,) = dry("tpu/worker.sh", "start", CONFIG, "run.steps=7", GRACE="123")
    assert start[:2] == ["sudo", "systemd-run"]
    assert {"--property=KillSignal=SIGTERM", "--property=TimeoutStopSec=123"} <= set(start)
    # At a shutdown the network and the storage are still there while the run saves.
    assert {"--property=After=network-online.target", "--property=RequiresMountsFor=/mnt/jaxlm"} <= set(start)
    assert start[-1] == "run.steps=7"
    (stop,) = dry("tpu/worker.sh", "stop")
    assert stop == ["sudo", "systemctl", "stop", "jaxlm"]
    for command, which in (("stop", "all"), ("status", "all"), ("logs", "0")):
        (words,) = dry("tpu/pod.sh", command)
        assert on_workers(words)[0] == which and on_workers(words)[1][-1] == command


@pytest.mark.parametrize(
    ("storage", "mount"),
    [
        ("gs://my-bucket", ["gcsfuse", "--implicit-dirs", "my-bucket", "/mnt/jaxlm"]),
        ("nfs://10.0.0.2/share/x", ["sudo", "mount", "-t", "nfs", "-o", "hard", "10.0.0.2:/share/x", "/mnt/jaxlm"]),
    ],
)
def test_storage_is_mounted_before_anything_is_installed(storage, mount):
    words = dry("tpu/worker.sh", "install", STORAGE=storage)
    assert words.index(mount) < min(i for i, line in enumerate(words) if "pip" in line)
    done = call("tpu/worker.sh", "install", DRY_RUN="1", STORAGE="/local")
    assert done.returncode == 2 and "gs://BUCKET or nfs://SERVER/SHARE, got '/local'" in done.stderr


def test_a_slice_that_was_taken_away_is_asked_for_again_and_goes_on():
    words = dry("tpu/pod.sh", "resume", CONFIG, "run.steps=7")
    assert words[0][3:5] == ["queued-resources", "delete"]
    assert [line[3:5] for line in words[1:3]] == [["queued-resources", "create"], ["queued-resources", "describe"]]
    assert words[3:] == words[3:7] + dry("tpu/pod.sh", "run", CONFIG, "run.steps=7"), "the command of the first time"


def test_delete_takes_the_machines_and_not_the_run():
    assert dry("tpu/pod.sh", "delete")[0][3:8] == ["queued-resources", "delete", "my-run", "--force", "--quiet"]
    assert dry("tpu/pod.sh", "delete", REQUEST="direct")[0][3:7] == ["tpu-vm", "delete", "my-run", "--quiet"]
    assert dry("tpu/jobset.sh", "delete") == [["kubectl", "delete", "jobset", "my-run"]]
    assert dry("tpu/xpk.sh", "delete")[0][:3] == ["xpk", "workload", "delete"]


def test_a_jobset_is_stopped_by_suspending_it():
    for command, suspended in (("stop", "true"), ("resume", "false")):
        (words,) = dry("tpu/jobset.sh", command)
        assert words[:4] == ["kubectl", "patch", "jobset", "my-run"]
        assert words[-1] == f'--patch={{"spec":{{"suspend":{suspended}}}}}'
    for name in ("My-run", "1run", "a" * 41, "run-"):
        done = call("tpu/jobset.sh", "render", "tpu/jobset/v5e-8.yaml", CONFIG, **CLUSTER, NAME=name)
        assert done.returncode == 2 and f"got '{name}'" in done.stderr


def test_xpk_restarts_a_saved_run_and_gives_it_time():
    (words,) = dry("tpu/xpk.sh", "apply", CONFIG, DEVICE="v5p-64", NUM="2", GRACE="123")
    assert words[:3] == ["xpk", "workload", "create"]
    wanted = {"--device-type=v5p-64", "--num-slices=2", "--restart-on-exit-codes=75", "--storage=gs://my-bucket"}
    assert wanted | {"--termination-grace-period-seconds=123"} <= set(words)
    assert words[-1].startswith("--command=exec python3 scripts/train.py "), "xpk signals the shell that runs it"
    (words,) = dry("tpu/xpk.sh", "apply", CONFIG, DEVICE="h100-80gb-8", NUM="2")
    assert "--num-nodes=2" in words
    assert words[-1].index("JAX_NUM_PROCESSES=$NNODES JAX_PROCESS_ID=$NODE_RANK; exec python3 ") > 0


def test_slurm_queues_a_saved_run_again_with_all_gpus_of_a_node():
    step, requeue = dry("tpu/slurm.sh", CONFIG, "run.steps=7", STORAGE="/shared", SLURM_JOB_ID="42")
    assert step[:3] == ["srun", "--kill-on-bad-exit=0", "--wait=300"] and step[-1] == "run.steps=7"
    assert requeue == ["scontrol", "requeue", "42"]
    done = call("tpu/slurm.sh", CONFIG, DRY_RUN="1", **PLACE | CLUSTER)
    assert done.returncode == 2 and "STORAGE must be an absolute path, got 'gs://my-bucket'" in done.stderr
