# SPDX-License-Identifier: Apache-2.0
"""A pod that one process leaves in the lurch ends, says which one it was, and can be started again.

JAXLM_STEP_TIMEOUT is the time-out of these runs in seconds (default 8); raise it on a machine that is very busy.
"""

import os
import re
import signal

import pytest

from jaxlm.train.watchdog import blamed, watching

TIMEOUT = float(os.environ.get("JAXLM_STEP_TIMEOUT", "8"))
ENOUGH = 60 + 15 * TIMEOUT


def verdict(text):
    """The one sentence of a process that the watchdog ended."""
    found = re.findall("^stopped: (.*)$", text, re.MULTILINE)
    assert len(found) == 1, text
    return found[0]


def test_heartbeats_decide_who_is_to_blame():
    def beat(step, place):
        return {"step": step, "place": place}

    hosts = ["a", "b", "c"]
    waiting = beat(7, "update")
    assert blamed([waiting, None, waiting], [1], hosts) == (
        "lost, killed or stopped: process 1 (b), last before its first heartbeat"
    )
    assert blamed([waiting, waiting, beat(6, "save")], [], hosts) == (
        "process 2 (c) is behind, in 'save' at step 6, and the others wait for it in 'update' at step 7"
    )
    assert blamed([waiting] * 3, [], hosts).startswith("all processes are alive and in 'update' at step 7: look at the")


def test_a_negative_time_out_is_refused():
    with pytest.raises(ValueError, match="0 for none, got -1"), watching(None, -1.0):
        pass


def test_a_killed_process_and_a_stopped_one_are_named_by_those_who_are_left(pods, tmp_path):
    """The first process is killed in no case: jax's own service lives in it, and aborts the others at once."""
    folders = {deed: tmp_path / deed for deed in ("kill", "stop")}
    running = {}
    for deed, folder in folders.items():
        folder.mkdir()
        running[deed] = pods.start(folder, "train", deed=deed, timeout=TIMEOUT)
    for deed, pod in running.items():
        codes, said = pods.wait(pod[:1], ENOUGH)
        assert codes == [75], said
        sentence = verdict(said[0])
        assert re.match(r"nothing was heard of process 1 for \d+ s|a collective broke off", sentence)
        assert re.search(r"; lost, killed or stopped: process 1 \(.+\), last in '\w+' at step \d", sentence), sentence
        assert sentence.endswith("; the same command goes on")
        stacks = (folders[deed] / "heartbeats" / "stacks-0.txt").read_text()
        assert "in _watch" in stacks and "loop.py" in stacks
    assert pods.wait(running["kill"][1:])[0] == [-signal.SIGKILL]
    os.kill(running["stop"][1][0], signal.SIGCONT)
    assert pods.wait(running["stop"][1:], ENOUGH)[0][0] in (75, -signal.SIGABRT)
    # Started again, it goes on and ends as one that nobody killed.
    codes, said = pods.wait(pods.start(folders["kill"], "train", timeout=TIMEOUT), ENOUGH)
    assert codes == [0, 0], said
    (tmp_path / "whole").mkdir()
    whole = pods.wait(pods.start(tmp_path / "whole", "train", timeout=TIMEOUT), ENOUGH)[1]
    sums = {re.search(r"^sum (.*)$", text, re.MULTILINE).group(1) for text in (*said, *whole)}
    assert len(sums) == 1


def test_a_process_that_hangs_is_named_by_all_with_its_stack(pods, tmp_path):
    codes, said = pods.wait(pods.start(tmp_path, "train", deed="hang", timeout=TIMEOUT), ENOUGH)
    assert codes == [75, 75], said
    sentence, other = map(verdict, said)
    assert sentence == other
    assert re.search(
        r"; process 1 \(.+\) is behind, in 'batch' at step 4, and the others wait for it in 'update'", sentence
    )
    assert "in hang" in (tmp_path / "heartbeats" / "stacks-1.txt").read_text()


def test_an_error_of_one_process_ends_the_others_too(pods, tmp_path):
    codes, said = pods.wait(pods.start(tmp_path, "train", deed="raise", timeout=TIMEOUT), ENOUGH)
    assert codes == [2, 2], said
    expected = r"an error on process 1 \(.+\) at step 4: this record is no record"
    assert all(re.match(expected, verdict(text)) for text in said), said


def test_a_loss_that_is_not_finite_ends_all_with_one_sentence(pods, tmp_path):
    codes, said = pods.wait(pods.start(tmp_path, "train", deed="nan", timeout=TIMEOUT), ENOUGH)
    assert codes == [2, 2], said
    errors = [re.findall("^error: (.*)$", text, re.MULTILINE) for text in said]
    assert errors[0] == errors[1] and errors[0][0].startswith("step 4 is not finite"), said
    assert "task 0 record 400" in errors[0][0] and "task 0 record 404" in errors[0][0], "records of both processes"


def test_a_run_directory_that_not_all_see_is_refused(pods, tmp_path):
    (tmp_path / "other").mkdir()
    each = {1: {"folder": str(tmp_path / "other")}}
    codes, said = pods.wait(pods.start(tmp_path, "train", timeout=TIMEOUT, each=each), ENOUGH)
    assert codes == [2, 2], said
    assert all("must be one folder that all processes share" in text for text in said), said


def test_when_the_first_process_is_killed_no_other_stays(pods, tmp_path):
    """jax aborts them (134 in a shell), or the watchdog was faster."""
    codes, said = pods.wait(pods.start(tmp_path, "train", deed="kill", who=0, timeout=TIMEOUT), ENOUGH)
    assert codes[0] == -signal.SIGKILL and codes[1] in (75, -signal.SIGABRT), said


@pytest.mark.parametrize("who", [-1, 1])
def test_a_full_disk_ends_all_processes_with_path_and_remedy(pods, tmp_path, who):
    told = {"deed": "fill", "who": who, "at": 5, "width": 2048, "retries": 0, "timeout": TIMEOUT}
    codes, said = pods.wait(pods.start(tmp_path, "train", **told), ENOUGH)
    assert codes == [2, 2], said
    for text in said:
        error = re.findall("^error: (.*)$", text, re.MULTILINE)[0]
        assert re.search(
            r"saving failed .*step 6 could not be written to .*; free space on the disk.*tried 1 times", error
        )
