"""Installs the wheel as users would, in environments of their own, and runs the tests there.

    python -m tests.installs pure hidden no-triton [--suite core|all]
    python -m tests.installs cuda --python OTHER/bin/python

pure       a wheel without the extension (HYPERINF_CPU=0 HYPERINF_CUDA=0)
hidden     a full wheel whose extension cannot be loaded
no-triton  a full wheel where triton cannot be imported
cuda       the same wheel, built against this interpreter's torch, in an environment with a CUDA
           build of torch; then a wheel that is built there

The package comes from the wheel alone: tests run in a copy of the sources that lacks it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = ["tests/test_ops_*.py", "tests/test_native_*.py", "tests/test_dispatch.py",
        "tests/test_solvers.py", "tests/test_import.py", "tests/test_cuda_build.py"]  # fmt: skip
ON_CUDA_TORCH = ["tests/test_cuda_build.py", "tests/test_cuda_kernels.py",
                 "tests/test_native_*.py", "tests/test_ops_per_sample.py"]  # fmt: skip
FACTS = """
import torch
from hyperinf_kernels.ops import native
print(torch.__version__, "|", native.missing() or ", ".join(native.isas() + native.cuda_archs()))
"""


def run(*command: object, cwd: Path, **environment: str) -> None:
    print("$", *command, *(f"{k}={v}" for k, v in environment.items()), flush=True)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(list(map(str, command)), cwd=cwd, env={**clean, **environment}, check=True)


def sources(folder: Path) -> Path:
    """A copy of the tracked and new files."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def wheel(python: object, folder: Path, **environment: str) -> Path:
    tree, out = sources(folder / "sources"), folder / "wheel"
    run(python, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--no-build-isolation", "--wheel-dir", out, tree, cwd=folder, **environment)  # fmt: skip
    (found,) = out.glob("*.whl")
    print(f"{found.name}, {found.stat().st_size >> 10} KiB", flush=True)
    return found


def environment_beside(folder: Path) -> Path:
    """A new environment that also sees this one's packages; its interpreter."""
    # no pip of its own: a venv brings an old setuptools along, which would hide the other one
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    (packages(python) / "beside.pth").write_text(sysconfig.get_paths()["purelib"])
    return python


def packages(python: object) -> Path:
    asked = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return Path(asked.stdout.strip())


def install(python: object, built: Path, folder: Path) -> None:
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--force-reinstall", built, cwd=folder)  # fmt: skip


def test(python: object, patterns: list[str], folder: Path) -> None:
    tree = sources(folder / "tree")
    shutil.rmtree(tree / "hyperinf_kernels")
    files = sorted(str(p.relative_to(tree)) for pattern in patterns for p in tree.glob(pattern))
    run(python, "-c", FACTS, cwd=tree)
    quiet = ["-q", "-p", "no:cacheprovider", "--override-ini", "addopts=--strict-markers"]
    run(python, "-m", "pytest", *quiet, *files, cwd=tree)


def check(kind: str, suite: str, folder: Path, built: Path | None) -> Path | None:
    """Run one of the installs beside this environment; the full wheel, to be used again."""
    patterns = CORE if suite == "core" else ["tests/test_*.py"]
    python = environment_beside(folder / "env")
    if kind == "pure":
        pure = wheel(sys.executable, folder, HYPERINF_CPU="0", HYPERINF_CUDA="0")
        install(python, pure, folder)
    else:
        built = built or wheel(sys.executable, folder)
        install(python, built, folder)
    site = packages(python)
    if kind == "hidden":
        for binary in site.glob("hyperinf_kernels/_C*.so"):
            binary.unlink()
    if kind == "no-triton":
        (site / "no_triton.pth").write_text("import sys; sys.modules['triton'] = None\n")
    test(python, patterns, folder)
    return built


def check_cuda(python: Path, folder: Path) -> None:
    asks = "import torch; assert torch.version.cuda, f'torch {torch.__version__} has no CUDA'"
    run(python, "-c", asks, cwd=folder)
    for name, builder in (("built here", sys.executable), ("built there", python)):
        print(f"== {name}", flush=True)
        place = folder / name.replace(" ", "-")
        place.mkdir()
        install(python, wheel(builder, place), folder)
        test(python, ON_CUDA_TORCH, place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("kinds", nargs="+", choices=("pure", "hidden", "no-triton", "cuda"))
    parser.add_argument("--suite", choices=("core", "all"), default="core")
    parser.add_argument("--python", type=Path, help="interpreter with a CUDA build of torch")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hyperinf-installs-") as name:
        built = None
        for kind in arguments.kinds:
            print(f"== {kind}", flush=True)
            folder = Path(name) / kind
            folder.mkdir()
            if kind == "cuda":
                if arguments.python is None:
                    parser.error("cuda needs --python")
                check_cuda(arguments.python.absolute(), folder)
            else:
                built = check(kind, arguments.suite, folder, built)


if __name__ == "__main__":
    main()
