# SPDX-License-Identifier: Apache-2.0
"""Processes go on only if they say the same; here what one process can see of it, in test_launch.py two."""

import pytest

from jaxlm.train.agreement import agree, differences, facts, gather, source_digest, summary_page, together
from jaxlm.train.mesh import make_mesh
from jaxlm.train.options import MeshOptions, RunOptions


def test_a_difference_is_told_with_who_has_which_value():
    hosts = ["a", "a", "b", "c", "d", "e"]
    said = [{"jax": "1", "rows": 4}] * 6
    assert differences(said, hosts) == []
    said = [{"jax": "1", "rows": 4}] * 5 + [{"jax": "2"}]
    shown = "on process 0 (a), process 1 (a), process 2 (b), process 3 (c) and 1 more"
    assert differences(said, hosts) == [
        f"jax is '1' {shown} and '2' on process 5 (e)",
        f"rows is 4 {shown} and missing on process 5 (e)",
    ]


def test_one_process_agrees_with_itself_and_keeps_its_errors():
    said = {"text": "\u00e4" * 5000, "number": 0.1, "none": None}
    assert gather(said) == [said]
    assert len(agree(facts(), remedy="")) == 1

    def fails():
        raise FileNotFoundError("no such file: x")

    with pytest.raises(FileNotFoundError, match=r"^no such file: x$"):
        together("opening the data", fails)


def test_the_source_digest_sees_a_byte_and_a_name(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a.py").write_text("x = 1\n")
    digests = [source_digest.__wrapped__(tmp_path)]
    (tmp_path / "inner" / "notes.txt").write_text("not code")
    assert source_digest.__wrapped__(tmp_path) == digests[0]
    (tmp_path / "inner" / "a.py").write_text("x = 2\n")
    digests.append(source_digest.__wrapped__(tmp_path))
    (tmp_path / "inner" / "a.py").rename(tmp_path / "inner" / "b.py")
    digests.append(source_digest.__wrapped__(tmp_path))
    assert len(set(digests)) == 3


def test_the_summary_says_what_lies_where():
    page = summary_page(make_mesh(MeshOptions(fsdp=2)), RunOptions(steps=1, batch_size=16, directory="r"), ["a", "b"])
    assert "processes  2; hosts a (0), b (1)\n" in page
    assert "mesh       data=4 inside a process, fsdp=2 inside a process\n" in page
    assert "batch      16 rows, 16 a process, in 1 parts\nsaves      at the end in r\nwatchdog   3600 s" in page
