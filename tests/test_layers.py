# SPDX-License-Identifier: Apache-2.0
"""The house rules about files: who may import whom, what may stand in a file, what may never be called."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROWS = (
    ("_lazy", "overrides", "command"),  # standard library only
    ("weights", "kernels", "resampling", "drill"),
    ("nn", "losses", "transforms", "data", "watermark"),
    ("checkpoints",),
    ("train", "generate", "rewards", "retrieval"),
    ("methods", "evaluation_options"),
    ("config", "evaluation_samples"),
    ("evaluation_metrics",),
    ("run", "shrink", "plan", "evaluation_page"),
    ("evaluation", "comparison"),
    ("comparison_report", "comparison_lengths", "comparison_plans"),
    ("comparison_page", "comparison_lengths_report", "comparison_plans_report"),
    ("comparison_lengths_page",),
)
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}
FLAX = {"nn", "checkpoints"}
OPTAX = {"transforms", "train", "methods"}
OPTIONAL = {
    "gguf",
    "lm_eval",
    "math_verify",
    "reasoning_gym",
    "torch",
}  # what extras install; imported where used, with an error naming the extra
HEAVY = {"datasets"}  # seconds to import, and most runs never need it
SLOW = {"jaxlm.kernels.pallas_attention"}  # pallas takes a quarter of a second to import, and one device kind uses it
# Files that a config or `--help` needs without waiting for jax may import the heavy rest where they use it.
LIGHT = {"jaxlm/_lazy.py", "jaxlm/config.py", "jaxlm/checkpoints/__init__.py", "jaxlm/data/__init__.py"}
LIBRARY = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "jaxlm").rglob("*.py"))
TOP = [ROOT / name for name in ("scripts", "configs", "tests", "tpu", "docs")]
ALL = LIBRARY + sorted(path.relative_to(ROOT).as_posix() for folder in TOP for path in folder.rglob("*.py"))


def part(path):
    """`jaxlm/nn/norm.py` -> `nn`; `jaxlm/run.py` -> `run`."""
    return Path(path).parts[1].removesuffix(".py")


def tree(path):
    return ast.parse((ROOT / path).read_text(), path)


def imported(node):
    """Module names of one import statement."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "import by the full name: from jaxlm.nn.norm import ..."
        return [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "jaxlm" else [node.module]
    return []


def imports(path):
    return [name for node in ast.walk(tree(path)) for name in imported(node)]


@pytest.mark.parametrize("path", [path for path in LIBRARY if path != "jaxlm/__init__.py"])
def test_imports_point_down(path):
    assert part(path) in RANK, f"{path}: add {part(path)!r} to a row of ROWS, as low as its imports allow"
    for name in imports(path):
        if not name.startswith("jaxlm."):
            continue
        there = name.split(".")[1]
        if there in RANK:
            assert there == part(path) or RANK[there] < RANK[part(path)], (
                f"{path} imports {name}, which is not below it: pass a callable, or move the shared piece down a row"
            )


@pytest.mark.parametrize("path", LIBRARY)
def test_flax_and_optax_stay_where_they_belong(path):
    names = {name.partition(".")[0] for name in imports(path)}
    if part(path) not in FLAX:
        assert "flax" not in names, f"{path} imports flax: only {sorted(FLAX)} may; take params and a function instead"
    if part(path) not in OPTAX:
        assert "optax" not in names, f"{path} imports optax: only {sorted(OPTAX)} may; take a transformation instead"
    if RANK.get(part(path)) == 0:
        assert not names & {"jax", "numpy", "jaxlm"}, f"{path} must stay light: standard library only"


@pytest.mark.parametrize("path", [path for path in LIBRARY if path not in LIGHT])
def test_imports_stand_at_the_top(path):
    for function in ast.walk(tree(path)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            for name in imported(node):
                assert name in SLOW or name.partition(".")[0] in OPTIONAL | HEAVY, (
                    f"{path}:{node.lineno} imports {name} inside {function.name}: move it to the top of the file; "
                    "an optional package goes into OPTIONAL, a file that must not wait for jax into LIGHT"
                )


@pytest.mark.parametrize("path", LIBRARY)
def test_optional_packages_are_imported_where_used(path):
    for node in tree(path).body:
        for name in imported(node):
            assert name.partition(".")[0] not in OPTIONAL, (
                f"{path}:{node.lineno} imports {name} at the top, but a plain install has it not: import it in the "
                "function that uses it, and say which extra installs it"
            )


@pytest.mark.parametrize("path", ALL)
def test_a_file_opens_with_its_licence_and_what_it_is_and_stays_short(path):
    lines = (ROOT / path).read_text().splitlines()
    assert lines[0] == "# SPDX-License-Identifier: Apache-2.0", f"{path}: the first line names the licence"
    assert ast.get_docstring(tree(path)), f"{path}: say in one to six lines what is in it"
    assert len(lines) <= 500, f"{path} has {len(lines)} lines: cut it where it changes its subject"
    shown = [number for number, line in enumerate(lines, 1) if not line.isascii()]
    assert not shown or path.startswith("tests/"), f"{path}:{shown[0]} is not ASCII"


@pytest.mark.parametrize("path", ALL)
def test_there_is_no_room_for_things_without_a_name(path):
    vague = {"utils", "util", "common", "helpers", "misc", "manager", "lib"}
    words = {word for piece in Path(path).with_suffix("").parts for word in piece.split("_")}
    assert not words & vague, f"{path}: name the file for what is in it, or move each function to what uses it"


CALLS = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}


@pytest.mark.parametrize("path", ALL)
def test_nothing_runs_text_or_unpickles_a_file(path):
    for node in ast.walk(tree(path)):
        for name in imported(node):
            assert name.partition(".")[0] not in MODULES, f"{path}:{node.lineno} imports {name}: store arrays or JSON"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        where = f"{path}:{node.lineno}"
        assert called not in CALLS, f"{where} calls {called}: parse the text instead of running it"
        assert called not in {"os.system", "os.popen"}, f"{where} calls {called}: subprocess.run([...]) without a shell"
        assert called != "torch.load", f"{where} calls torch.load, which unpickles: read safetensors"
        for keyword in node.keywords:
            on = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
            assert not (keyword.arg in {"shell", "trust_remote_code", "allow_pickle"} and on), (
                f"{where} sets {keyword.arg}: never run a shell or code that came with a file"
            )


@pytest.mark.parametrize("path", ALL)
def test_errors_are_caught_by_name(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno} catches everything: name the error you expect"
        if isinstance(node, ast.FunctionDef | ast.Lambda):
            mutable = [d for d in node.args.defaults if isinstance(d, ast.List | ast.Dict | ast.Set)]
            assert not mutable, f"{path}:{node.lineno} has a mutable default, shared by all calls"


PACKAGES = [path for path in LIBRARY if path.endswith("/__init__.py") and path != "jaxlm/__init__.py"]


@pytest.mark.parametrize("path", PACKAGES)
def test_a_public_name_is_not_the_name_of_a_file(path):
    for call in (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)):
        names = ast.literal_eval(call.args[1]) if ast.unparse(call.func) == "attach" else {}
        there = {file.stem for file in (ROOT / path).parent.glob("*.py")}
        assert not names.keys() & there, (
            f"{path}: once {sorted(names.keys() & there)} is imported as a file, the package's name means the file and "
            "no longer what is in it: rename the file"
        )
        assert set(names.values()) <= there, f"{path} names files that are not there: {set(names.values()) - there}"
