"""Every model family against one-by-one autograd of its own loss, or refused in one line.

`python -m tests.test_families` writes the table in docs/models.md that these tests check.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hyperinf_kernels as hk
from tests.families import FAMILIES, Family, own_gradients

LIMIT = 1e-5  # fp32, against autograd in fp32
DOCUMENT = Path(__file__).parent.parent / "docs" / "models.md"
MARKS = ("<!-- table -->\n", "<!-- end -->\n")
LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Anything(nn.Module):
    """A wrapper whose signature says nothing."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **anything: Any) -> Any:
        return self.inner(**anything)


def checkpointed(model: Any) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return model


WRAPPERS: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "DataParallel": ("module.", nn.DataParallel),
    "`**anything`": ("inner.", Anything),
    "torch.compile": ("_orig_mod.", functools.partial(torch.compile, backend="eager")),
    "checkpointing": ("", checkpointed),
}
COLUMNS = ("right", "left", *WRAPPERS, *LOW)
# text of the refusal expected, where there is one
REFUSED = {
    ("BERT sequence_classification", "left"): "depends on padding",
    ("BART seq2seq_lm", "left"): "alone and without padding",
}


@functools.cache
def reference(family: Family, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return own_gradients(family.tuned().to(dtype), [family.row(i) for i in range(3)])


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest relative error of a block."""
    assert set(got) == set(want)
    assert any(bool(w.any()) for w in want.values())
    return max(
        float((got[n].double() - w).norm() / w.norm().clamp_min(1e-300)) for n, w in want.items()
    )


def cell(family: Family, column: str) -> str:
    """An error relative to one-by-one autograd, or the text of the refusal."""
    if column == "left" and not family.padded:
        return "no padding"
    model, prefix = family.tuned(), ""
    torch.compiler.reset()
    if column in WRAPPERS:
        prefix, wrap = WRAPPERS[column]
        if column == "checkpointing" and not model.get_base_model().supports_gradient_checkpointing:
            return "has none"
        model = wrap(model)
    model = model.to(LOW.get(column, torch.float32))
    batch = family.collate(
        [family.row(i) for i in range(3)], "left" if column == "left" else "right"
    )
    if column in LOW:
        batch = {k: v.to(LOW[column]) if v.is_floating_point() else v for k, v in batch.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # every shape that the checks run would be compiled anew
            check = column != "torch.compile"
            found = hk.per_sample_gradients(model, batch, loss=family.loss, check=check)
        except hk.InputError as error:
            return str(error)
    found = {name.removeprefix(prefix): grad for name, grad in found.items()}
    return f"{worst(found, reference(family)):.0e}"


COMPILED = ("Llama causal_lm", "Qwen2-VL causal_lm", "BERT token_classification")


CELLS = [
    (family, column)
    for family in FAMILIES
    for column in COLUMNS
    # tracing takes seconds; the command below fills the whole column
    if column != "torch.compile" or str(family) in COMPILED
]


@pytest.mark.parametrize(
    ("family", "column"), CELLS, ids=lambda part: str(getattr(part, "name", part))
)
def test_gradients_are_those_of_the_models_own_loss(family: Family, column: str) -> None:
    result = cell(family, column)
    refusal = REFUSED.get((str(family), column))
    if refusal is not None:
        assert re.search(refusal, result), result
    elif column in LOW:
        # our fp32 sums of low-precision factors, against autograd all in that precision
        own = worst(reference(family, LOW[column]), reference(family))
        assert float(result) <= max(2 * own, 1e-2)
    elif result not in ("no padding", "has none"):
        assert float(result) <= LIMIT


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_the_documented_table_has_no_empty_cell(family: Family) -> None:
    line = next(
        line for line in DOCUMENT.read_text().splitlines() if line.startswith(f"| {family.name} |"
        f" {family.loss} |")
    )  # fmt: skip
    cells = [text.strip() for text in line.strip("|").split("|")][2:]
    assert len(cells) == len(COLUMNS)
    for column, text in zip(COLUMNS, cells, strict=True):
        assert text
        if re.fullmatch(r"[0-9.e+-]+", text) and column not in LOW:
            assert float(text) <= LIMIT
        elif column not in LOW and text not in ("no padding", "has none"):
            assert REFUSED[str(family), column] in text


def table() -> str:
    lines = [
        "| model | loss | " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * (len(COLUMNS) + 2),
    ]
    for family in FAMILIES:
        cells = [cell(family, column) for column in COLUMNS]
        lines.append(f"| {family.name} | {family.loss} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    text = DOCUMENT.read_text()
    head, _, rest = text.partition(MARKS[0])
    DOCUMENT.write_text(head + MARKS[0] + table() + MARKS[1] + rest.partition(MARKS[1])[2])


if __name__ == "__main__":
    main()
