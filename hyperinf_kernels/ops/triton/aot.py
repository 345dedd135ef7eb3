"""Every shipped configuration compiled ahead of time, on any machine, for each architecture.

`python -m hyperinf_kernels.ops.triton.aot` prints what the compiler says about each: registers,
spills, shared memory, occupancy, instruction mix, compile time. Needs Triton, no GPU; must run in a
process without TRITON_INTERPRET.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .configs import Config, table
from .launch import interpreting

# bytes of shared memory one block may use, and of one multiprocessor
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
SHARED_TOTAL = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
RESERVED_SHARED = 1 << 10
INSTRUCTIONS = re.compile(
    r"\b(HMMA|HGMMA|UTC\w*MMA|FFMA2?|LDGSTS|LDG|STG|LDS|LDSM|STS|LDL|STL|BAR|SHFL)\b"
)
MATRIX = re.compile(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync")
# what each architecture multiplies matrices with
EXPECTED = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def rows(
    configs: Sequence[Config] | None = None, change: Callable[[Any], Any] = lambda variant: variant
) -> Iterator[dict[str, Any]]:
    """One dict per configuration and variant, compiled one after another.

    Args:
        configs: the shipped ones by default.
        change: applied to each variant before it is compiled.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 in this process, or no Triton.
    """
    if interpreting():
        raise RuntimeError("TRITON_INTERPRET=1 turns the compiler off; unset it in this process")
    try:
        from triton import knobs

        from . import signatures
    except ImportError as error:
        raise RuntimeError(f"compiling needs Triton 3.6 or later: {error}") from None

    with tempfile.TemporaryDirectory() as cache, knobs.cache.scope(), knobs.nvidia.scope():
        knobs.cache.dir = cache
        knobs.nvidia.dump_ptxas_log = True
        for config in table() if configs is None else configs:
            for variant in signatures.variants(config):
                yield _compiled(config, change(variant), Path(cache))


def total() -> int:
    """Compilations of the whole table. Needs Triton."""
    from . import signatures

    return sum(len(list(signatures.variants(config))) for config in table())


def _compiled(config: Config, variant: Any, folder: Path) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in variant.aligned}
    source = ASTSource(
        fn=variant.kernel, signature=variant.signature, constexprs=variant.constants, attrs=aligned
    )
    options = {
        "num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True
    }  # fmt: skip
    log = io.StringIO()
    start = _processor_seconds()
    with contextlib.redirect_stdout(log):
        kernel = triton.compile(source, target=GPUTarget("cuda", config.arch, 32), options=options)
    seconds = _processor_seconds() - start
    registers = int(_found(r"Used (\d+) registers", log.getvalue()))
    shared = int(kernel.metadata.shared)
    return {
        "kernel": config.kernel,
        "arch": f"sm_{config.arch}",
        "config": {
            "precision": config.precision, "up_to": config.up_to, **config.blocks,
            "num_warps": config.num_warps, "num_stages": config.num_stages, **variant.label,
        },
        "registers": registers,
        "spill_bytes": int(_found(r"(\d+) bytes spill stores", log.getvalue())),
        "shared_bytes": shared,
        "occupancy": occupancy(config.arch, registers, shared, config.num_warps),
        "compile_s": round(seconds, 2),
        "matrix": sorted(set(MATRIX.findall(kernel.asm["ptx"]))),
        "wide_products": len(re.findall(r"arith\.muli[^\n]*i64", kernel.asm["ttir"])),
        "instructions": _instructions(kernel.asm["cubin"], folder / "kernel.cubin"),
    }  # fmt: skip


def _processor_seconds() -> float:
    """Of this process and its finished children, ptxas among them; load does not change it."""
    return sum(os.times()[:4])


def _found(pattern: str, log: str) -> str:
    match = re.search(pattern, log)
    if match is None:
        raise RuntimeError(f"ptxas did not report {pattern!r}: {log!r}")
    return match.group(1)


def occupancy(arch: int, registers: int, shared: int, num_warps: int) -> float:
    """Resident warps over the most a multiprocessor holds."""
    # registers are given to warps in units of 256
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * num_warps)
    by_shared = SHARED_TOTAL[arch] // (shared + RESERVED_SHARED)
    blocks = min(by_registers, by_shared, WARPS // num_warps, BLOCKS)
    return round(blocks * num_warps / WARPS, 3)


def _instructions(cubin: bytes, path: Path) -> dict[str, int]:
    import triton.backends.nvidia

    path.write_bytes(cubin)
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-sass", path], capture_output=True, text=True, check=True).stdout
    counts: Mapping[str, int] = collections.Counter(INSTRUCTIONS.findall(text))
    return dict(sorted(counts.items()))


def main() -> None:
    """Print the table as text, as Markdown (--markdown) or as JSON (--json)."""
    if "--json" in sys.argv:
        print(json.dumps(list(rows())))
        return
    if "--markdown" in sys.argv:
        print(_markdown(list(rows())))
        return
    for row in rows():
        settings = " ".join(f"{k}={v}" for k, v in row["config"].items() if v is not None)
        mix = " ".join(f"{k}:{v}" for k, v in row["instructions"].items())
        print(
            f"{row['kernel']:12} {row['arch']:6} {row['registers']:3} registers, "
            f"{row['spill_bytes']} spilled, {row['shared_bytes']:6} shared, occupancy "
            f"{row['occupancy']:.2f}, {row['compile_s']:.1f} s  {settings}  {mix}",
            flush=True,
        )


def _markdown(found: Sequence[Mapping[str, Any]]) -> str:
    """One line per kernel and setting, its figures on sm_80 / sm_90 / sm_100 side by side."""
    lines: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in found:
        tells = ("precision", "up_to", "symmetric", "op", "rows")
        told = [f"{k} {row['config'][k]}" for k in tells if row["config"].get(k) is not None]
        lines.setdefault((row["kernel"], ", ".join(told)), []).append(row)
    head = ("kernel", "variant", "registers", "spilled", "shared KB", "occupancy",
            "matrix instructions", "compile s")  # fmt: skip
    table = [head, ("---",) * len(head)]
    for (kernel, variant), group in lines.items():
        cells = [
            [str(r["registers"]) for r in group],
            [str(r["spill_bytes"]) for r in group],
            [f"{r['shared_bytes'] / 1024:.0f}" for r in group],
            [f"{r['occupancy']:.2f}" for r in group],
            [str(sum(n for name, n in r["instructions"].items() if name.endswith("MMA")))
             for r in group],
            [f"{r['compile_s']:.1f}" for r in group],
        ]  # fmt: skip
        table.append((kernel, variant, *(" / ".join(values) for values in cells)))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:
        sys.exit(str(error))
