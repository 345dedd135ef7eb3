"""The core with torch and numpy alone: what works, what is imported, what it costs."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("triton", "transformers", "peft", "accelerate", "gguf", "typer", "rich", "pyarrow",
          "safetensors", "tokenizers", "matplotlib")  # fmt: skip

# a finder that does not find what is hidden, for imports and for questions about packages alike
HIDE = """
import importlib.machinery, importlib.util, sys

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {hidden!r}
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path[:] = [
    Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path
]
assert not any(importlib.util.find_spec(name) for name in {hidden!r})
"""
COMMAND = """
import runpy
sys.argv[1:] = {arguments!r}
runpy.run_module("hyperinf_kernels", run_name="__main__")
"""
CORE = """
import torch
import hyperinf_kernels as hk

torch.manual_seed(0)
for name in hk.__all__:
    getattr(hk, name)

# every op once
X = torch.randn(3, 20, 4)
A = X.mT @ X / 20 + torch.eye(4)
eye = torch.eye(4).expand(3, 4, 4)
torch.testing.assert_close(A @ hk.schulz_inverse(A), eye, atol=1e-4, rtol=0)
torch.testing.assert_close(A @ hk.spd_inverse(A), eye, atol=1e-4, rtol=0)
torch.testing.assert_close(hk.schulz_solve(A, A), eye, atol=1e-4, rtol=0)
act, delta = torch.randn(5, 7, 4), torch.randn(5, 7, 3)
grads = hk.per_sample_grad(delta, act)
assert grads.shape == (5, 3, 4)
norms = grads.square().sum((1, 2))
torch.testing.assert_close(hk.per_sample_norm_sq(delta, act), norms)
torch.testing.assert_close(hk.pairwise_dot(delta, act, delta, act).diagonal(), norms)
torch.testing.assert_close(hk.per_sample_dot(delta, act, grads).diagonal(), norms)
flat = grads.flatten(1)
assert hk.sherman_morrison(flat, flat, 0.1).shape == (5, 12)
assert hk.gfim_accumulate_(torch.zeros(4, 4), grads).diagonal().min() > 0
torch.testing.assert_close(hk.gram_accumulate_(torch.zeros(5, 5), flat).diagonal(), norms)
with hk.trace_backends() as plans:
    hk.per_sample_grad(delta, act)
assert plans == [hk.explain("per_sample_grad", delta, act)]

# every solver on tensors, and on a plain module
train, query = ({"w": torch.randn(n, 2, 6)} for n in (9, 3))
model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
loss = lambda module, batch: (module(batch["x"]).squeeze(1) - batch["y"]).square()
loaders = [[{"x": torch.randn(n, 6), "y": torch.randn(n)}] for n in (9, 3)]
for solver in (hk.HyperINF, hk.DataInf, hk.LiSSA, hk.Exact, hk.GradDot):
    scores = hk.influence(train, query, solver(hk.DataInfDamping(0.1) + hk.TraceDamping(0.1)))
    assert scores.values.shape == (3, 9) and scores.values.abs().min() > 0
    assert all(isinstance(entry, hk.BlockReport) for entry in scores.report)
    attributor = hk.Attributor(model, loss=loss, blocks="weight", method=solver())
    found = attributor.fit(loaders[0]).score(loaders[1])
    assert found.values.shape == (3, 9) and found.proponents(1).values.max() < 0
    assert (attributor.self_influence() <= 0).all()
assert list(hk.per_sample_gradients(model, loaders[0][0], loss=loss, blocks="bias")) == [
    "0.bias", "2.bias"]
found.to_html(sys.argv[1])
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, away from the tests' own imports."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, env=environment, timeout=120, check=False,
    )  # fmt: skip


def command(*arguments: str, hidden: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    return run(HIDE.format(hidden=hidden) + COMMAND.format(arguments=list(arguments)))


def test_the_core_needs_torch_and_numpy_only(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    ran = run(HIDE.format(hidden=EXTRAS) + CORE, str(page))
    assert ran.returncode == 0, ran.stderr
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_importing_brings_in_no_extra_and_costs_little() -> None:
    ran = run(f"""
import json, sys, time
import torch

before, start = set(sys.modules), time.process_time()
import hyperinf_kernels as hk
bare = time.process_time() - start
for name in hk.__all__:
    getattr(hk, name)
whole = time.process_time() - start
brought = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(json.dumps([bare, whole, sorted(brought & set({EXTRAS!r}))]))
""")
    assert ran.returncode == 0, ran.stderr
    bare, whole, brought = json.loads(ran.stdout)
    assert brought == []
    # processor seconds beyond torch; about 0.002 and 0.08 here, so the bounds hold on slow machines
    assert bare < 0.5
    assert whole < 1.0


def test_torch_is_not_imported_before_a_name_is_used() -> None:
    ran = run("import sys, hyperinf_kernels; sys.exit('torch' in sys.modules)")
    assert ran.returncode == 0, ran.stderr


# from the top of the house down; a module beside the rooms stands below all of them
ROOMS = ("__main__", "cli", "jobs", "integrations", "experiments", "workloads", "runs",
         "attribution", "report", "store", "gradients", "solvers", "ops")  # fmt: skip


def imports() -> Iterator[tuple[str, str]]:
    """(module, module it imports) inside the package, those inside functions too."""
    # wherever it is installed
    package = importlib.util.find_spec("hyperinf_kernels")
    assert package is not None and package.origin is not None  # noqa: PT018
    home = Path(package.origin).parent
    modules = {}
    for path in home.rglob("*.py"):
        parts = path.relative_to(home.parent).with_suffix("").parts
        modules[".".join(parts).removesuffix(".__init__")] = path
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted = [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*(base if node.level else []), *filter(None, [node.module])])
                wanted = [(source, alias.name) for alias in node.names]
            else:
                continue
            for source, member in wanted:
                if source.partition(".")[0] == "hyperinf_kernels":
                    inner = f"{source}.{member}"
                    yield name, inner if inner in modules else source


def test_imports_go_only_downwards() -> None:
    found = list(imports())
    rooms = [tuple(f"{name}.".split(".")[1] for name in pair) for pair in found]
    assert {room for pair in rooms for room in pair if room} <= {*ROOMS, "errors"}
    assert ("cli", "jobs") in rooms
    floor = {room: level for level, room in enumerate(ROOMS)}
    climbs = [
        pair
        for pair, (above, below) in zip(found, rooms, strict=True)
        if floor.get(above, len(ROOMS)) > floor.get(below, len(ROOMS))
    ]
    assert climbs == []


def test_no_import_goes_in_a_circle() -> None:
    needs: dict[str, set[str]] = {}
    for name, other in imports():
        # a package's own door: the rest of the room stands behind it
        if name != other and not name.startswith(f"{other}."):
            needs.setdefault(name, set()).add(other)
    while needs:
        free = [name for name, others in needs.items() if not others & needs.keys()]
        assert free, f"a circle among {sorted(needs)}"
        for name in free:
            del needs[name]


def test_info_works_without_the_extras() -> None:
    ran = command("info", hidden=EXTRAS)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "typer missing" in ran.stdout
    assert "pip install 'hyperinf_kernels[cli]'" in ran.stdout
    facts = json.loads(command("info", "--json", hidden=EXTRAS).stdout)
    assert set(facts["extras"]["hf"].values()) == {None}
    assert facts["ops"]["spd_inverse"]["torch"] == "yes"


@pytest.mark.parametrize(
    ("hidden", "said"),
    [
        (
            EXTRAS,
            "the command line needs typer, rich, pyarrow: pip install 'hyperinf_kernels[cli]'",
        ),
        (("pyarrow",), "the command line needs pyarrow: pip install 'hyperinf_kernels[cli]'"),
        (("transformers",), "transformers is not installed: pip install 'hyperinf_kernels[hf]'"),
        (("peft",), "peft is not installed: pip install 'hyperinf_kernels[hf]'"),
    ],
)
def test_a_missing_extra_is_one_line_that_names_it(
    tmp_path: Path, hidden: tuple[str, ...], said: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "p", "answer": "a"}\n')
    files = ("--train", str(rows), "--query", str(rows), "--output", str(tmp_path / "out"))
    ran = command("score", "--model", "smollm2", "--adapter", "none", *files, hidden=hidden)
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", f"error: {said}\n")
    assert os.listdir(tmp_path) == ["rows.jsonl"]
