"""Quality tables on the papers' own data: `python -m benchmarks.quality sentences math sst2`.

Reads the data folder named by HYPERINF_DATA (default: data). Each table is one `hyperinf`
command, printed before it runs; its figures go to benchmarks/results/quality-NAME.csv.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
METHODS = "-m grad_dot -m datainf -m hyperinf -m hyperinf:mode=paper -m exact"
IDENTIFY = (
    "identify --model smollm2 --train {data}/{set}.train.jsonl --query {data}/{set}.test.jsonl "
    "--lora-rank 8 --lora-alpha 32 --bf16 --reduction mean "
)
MATH = f"--tokens prompt --tokens answer --damping 0.1 {METHODS}"
TABLES = {
    "sentences": IDENTIFY.replace("{set}", "sentence_transformations")
    + "--epochs 5 --tokens prompt --tokens all --tokens answer --damping 0.1 --damping 0.01 "
    + f"--damping 1 {METHODS} -m lissa:iterations=10",
    "math": IDENTIFY.replace("{set}", "math_without_reason") + f"--epochs 3 {MATH}",
    "math-reason": IDENTIFY.replace("{set}", "math_with_reason") + f"--epochs 2 {MATH}",
    "sst2": (
        "mislabeled --model minilm --train {data}/sst2.train.jsonl "
        "--query {data}/sst2.validation.jsonl --limit 2000 --flip 0.2 --epochs 10 "
        "--learning-rate 3e-4 --lora-rank 16 --lora-alpha 32 --damping 0.1 "
        f"{METHODS} -m lissa"
    ),
}


def run(name: str, data: Path, output: Path) -> dict[str, Any]:
    """Run one table's command and return its report document."""
    words = shlex.split(TABLES[name].format(data=data))
    command = [sys.executable, "-m", "hyperinf_kernels", *words, "--output", str(output), "--json"]
    print("$ hyperinf", " ".join(words), file=sys.stderr)
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout))


def write(name: str, document: dict[str, Any]) -> Path:
    """One row per method and metric group, the trivial detectors and the model's skill included."""
    path = RESULTS / f"quality-{name}.csv"
    rows = []
    for entry in [*document["methods"], *document.get("baselines", [])]:
        for group, values in entry["metrics"].items():
            figures = {k: f"{v:.4f}" for k, v in values.items()}
            certificate = entry.get("certificate", {}).get("summary", "")
            label = entry.get("label") or entry["name"]
            rows.append({"method": label, "group": group, **figures, "certificate": certificate})
    skill = document["model"]["skill"]
    for row in rows:
        row |= {
            "accuracy_before": f"{skill['base']:.3f}",
            "accuracy_after": f"{skill['tuned']:.3f}",
        }
    RESULTS.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def main() -> None:
    """Run the tables named on the command line, all of them by default."""
    data = Path(os.environ.get("HYPERINF_DATA", "data"))
    if not data.is_dir():
        sys.exit(f"no data folder at {data}: set HYPERINF_DATA to the folder of the JSONL files")
    for name in sys.argv[1:] or TABLES:
        if name not in TABLES:
            sys.exit(f"unknown table {name!r}; known: {', '.join(TABLES)}")
        print(write(name, run(name, data, Path("quality-output") / name)))


if __name__ == "__main__":
    main()
