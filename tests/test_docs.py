# SPDX-License-Identifier: Apache-2.0
"""The documents tell the truth: their Python runs, their files and links exist."""

import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"`((?:jaxlm|scripts|configs|tests|docs|tpu)/[\w./-]+)`")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    prose = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        there = page.parent / target.partition("#")[0]
        assert there.exists(), f"{name_of(page)} links to {target}, which is not there"
    for target in NAMED.findall(prose):
        assert (ROOT / target).exists(), f"{name_of(page)} names {target}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_in_the_documents_runs(page, tmp_path, monkeypatch):
    """The blocks of a page run in order, as one program; ```python no-run marks one that needs what a test has not."""
    text = page.read_text()
    blocks = [
        ("\n" * text[: match.start(3)].count("\n")) + match[3]
        for match in FENCE.finditer(text)
        if match[1] == "python" and "no-run" not in match[2]
    ]
    if not blocks:
        return
    program = tmp_path / f"{page.stem}.py"
    lines = [""] * (text.count("\n") + 1)
    for block in blocks:
        for number, line in enumerate(block.split("\n")):
            lines[number] = line or lines[number]
    program.write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(str(program))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_the_documents_name_files_that_exist(page):
    for match in FENCE.finditer(page.read_text()):
        if match[1] in ("bash", "sh", "console", ""):
            for target in re.findall(r"(?<![\w/.-])((?:scripts|configs|tests)/[\w./-]+\.(?:py|sh))", match[3]):
                assert (ROOT / target).exists(), f"{name_of(page)} runs {target}, which is not there"
