"""Whether and how nvcc compiles the CUDA kernels: decided by nvcc, never by a visible GPU."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# bf16 tensor cores and asynchronous copies begin here
OLDEST = 80
DEFAULT = ("80", "90", "100")
FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "--compiler-options=-fPIC,-fvisibility=hidden",
         "--ptxas-options=-v"]  # fmt: skip


class CudaError(Exception):
    """CUDA kernels were asked for and cannot be built; the message names the remedy."""


@dataclass(frozen=True)
class Toolkit:
    """An nvcc that answers, and the architectures that it will be asked for, ascending."""

    nvcc: str
    version: str
    root: Path
    archs: tuple[str, ...]

    @property
    def targets(self) -> tuple[str, ...]:
        """Machine code for each architecture, and PTX of the newest for devices still to come."""
        return (*(f"sm_{arch}" for arch in self.archs), f"compute_{self.archs[-1]}")

    def command(self, source: Path, target: Path, flags: Sequence[str]) -> list[str]:
        codes = [(arch, f"sm_{arch}") for arch in self.archs]
        codes.append((self.archs[-1], f"compute_{self.archs[-1]}"))
        wanted = [f"-gencode=arch=compute_{arch},code={code}" for arch, code in codes]
        compiler = os.environ.get("CXX")
        host = ["-ccbin", compiler] if compiler else []
        return [self.nvcc, *FLAGS, *host, *wanted, *flags, "-c", str(source), "-o", str(target)]

    def libraries(self) -> tuple[list[str], list[str]]:
        """Folders and libraries that the binary is linked with; the runtime is static."""
        for name in ("targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib64", "lib"):
            if (self.root / name / "libcudart_static.a").exists():
                return [str(self.root / name)], ["cudart_static", "rt", "dl", "pthread"]
        raise CudaError(f"no libcudart_static.a below {self.root}; install the CUDA runtime")


def find(environment: Mapping[str, str]) -> Toolkit | str:
    """The toolkit to build with, or the reason why CUDA kernels are left out.

    Raises:
        CudaError: HYPERINF_CUDA=1 and no nvcc, or a setting that cannot be met.
    """
    mode = environment.get("HYPERINF_CUDA", "auto")
    if mode not in ("auto", "0", "1"):
        raise CudaError(f"HYPERINF_CUDA={mode} is not one of auto, 0, 1")
    if mode == "0":
        return "HYPERINF_CUDA=0"
    home = environment.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin") if home else None
    nvcc = nvcc or shutil.which("nvcc", path=environment.get("PATH"))
    if nvcc is None:
        reason = "no nvcc on PATH or in CUDA_HOME"
        if mode == "1":
            raise CudaError(f"HYPERINF_CUDA=1, but {reason}")
        return reason
    try:
        version = _ask(nvcc, "--version")
        # nvcc may be a wrapper, so its own folder says nothing
        dry = _ask(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull)
        known = set(re.findall(r"compute_(\d+)", _ask(nvcc, "--list-gpu-arch")))
        top = re.search(r"TOP=(\S+)", dry)
        release = re.search(r"release (\S+?),", version)
        if top is None or release is None:
            raise CudaError(f"{nvcc} does not answer as nvcc does")
        return Toolkit(nvcc, release[1], Path(top[1]).resolve(), architectures(environment, known))
    except CudaError as error:
        if mode == "1":
            raise
        return str(error)


def architectures(environment: Mapping[str, str], known: set[str]) -> tuple[str, ...]:
    """The architectures asked for, ascending; by default those of DEFAULT that nvcc knows.

    Raises:
        CudaError: an entry of HYPERINF_CUDA_ARCHS is unknown or too old, or nothing is left.
    """
    for name in ("HYPERINF_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        if not environment.get(name):
            continue
        entries = re.split(r"[;, ]+", environment[name].strip("; ,"))
        numbers = [re.sub(r"^(sm_)?(\d+)\.?(\d)(\+PTX)?$", r"\2\3", entry) for entry in entries]
        good = sorted({n for n in numbers if n in known and int(n) >= OLDEST}, key=int)
        # torch's list is made for other packages too: what is too old here is left out
        if good and (name == "TORCH_CUDA_ARCH_LIST" or len(good) == len(set(numbers))):
            return tuple(good)
        usable = ", ".join(sorted((n for n in known if int(n) >= OLDEST), key=int))
        raise CudaError(f"{name}={environment[name]}: this nvcc builds the kernels for {usable}")
    default = tuple(arch for arch in DEFAULT if arch in known)
    if not default:
        raise CudaError(f"this nvcc knows none of {', '.join(DEFAULT)}; a newer one is needed")
    return default


def compile_one(command: Sequence[str]) -> list[dict[str, str | int]]:
    """Run nvcc; what its assembler says about each kernel on each architecture.

    Raises:
        CudaError: nvcc fails; the message is its first complaint.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = (done.stderr + done.stdout).splitlines()
        told = [line.strip() for line in lines if "error" in line or "fatal" in line]
        raise CudaError(told[0] if told else f"{command[0]} exits {done.returncode}")
    return resources(done.stderr + done.stdout)


def resources(log: str) -> list[dict[str, str | int]]:
    """Registers, spills and shared memory of each kernel from the words of `ptxas -v`."""
    entry = re.compile(
        r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'.*?"
        r"(?P<spill>\d+) bytes spill stores, (?P<reload>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)", re.DOTALL,
    )  # fmt: skip
    found: list[dict[str, str | int]] = []
    for match in entry.finditer(log):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found.append({
            "kernel": match["kernel"],
            "arch": match["arch"],
            "registers": int(match["registers"]),
            "spill_bytes": int(match["spill"]) + int(match["reload"]),
            "shared_bytes": int(shared[1]) if shared else 0,
        })  # fmt: skip
    names = _demangled([str(facts["kernel"]) for facts in found])
    for facts, name in zip(found, names, strict=True):
        facts["kernel"] = name
    return found


def _demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return names
    done = subprocess.run(
        [tool], input="\n".join(names), capture_output=True, text=True, check=True
    )
    # void f<..>(..) -> f<..>, without this project's namespace
    plain = [re.sub(r"^void |\(.*$", "", line) for line in done.stdout.splitlines()]
    return [line.replace("hyperinf::gpu::", "") for line in plain]


def _ask(nvcc: str, *arguments: str) -> str:
    try:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise CudaError(f"{nvcc} does not run: {error.strerror}") from error
    if done.returncode != 0:
        raise CudaError(f"{nvcc} {arguments[0]} exits {done.returncode}")
    return done.stdout + done.stderr
