"""`hyperinf show`: rows as the model sees them."""

import json
import sys
from typing import Annotated

from ..workloads.rows import Fields, read_rows
from .options import Adapter, Json, Length, Model, Train, option, reads_rows
from .terminal import quiet_libraries


@reads_rows
def show(
    model: Model,
    train: Train,
    adapter: Adapter = None,
    tokens: Annotated[str, option("Tokens in the loss: answer, prompt or all.")] = "answer",
    row: Annotated[list[str], option("Id of a row to show. Repeat for several.", "--row")] = [],  # noqa: B006
    limit: Annotated[int, option("Show this many rows, from the first on.", "--limit")] = 5,
    max_length: Length = None,
    as_json: Json = False,
    fields: Fields = Fields(),  # noqa: B008
) -> None:
    """The tokens of rows, decoded, and which of them carry loss; needs no weights."""
    quiet_libraries()
    # only now: these import torch and transformers
    from ..errors import InputError
    from ..jobs.preparation import Settings, losses_of
    from ..workloads import models
    from ..workloads.encoding import Encoder, warn_of_difference
    from ..workloads.shown import as_text, shown
    from ..workloads.text import encode

    for name, value in (("--limit", limit), ("--max-length", max_length)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    rows = read_rows(train, fields=fields)
    missing = sorted(set(row) - {r.id for r in rows})
    if missing:
        raise InputError(f"--row {missing[0]}: {train} has no row of this id")
    kind = rows[0].kind
    (loss,) = losses_of(Settings(model, tokens=(tokens,)), kind).values()
    classes = models.label_names([r.label for r in rows if r.answer is None])
    chosen = [r for r in rows if r.id in row] if row else rows[:limit]
    tokenizer = models.load_tokenizer(model, kind=kind, adapter=adapter)
    encoded = encode(chosen, tokenizer, classes=classes, max_length=max_length)
    warn_of_difference(
        Encoder(tokenizer, tokenizer.eos_token_id),
        [(r.id, r.prompt, r.answer) for r in chosen],
        [e.input_ids for e in encoded],
    )
    entries = shown(encoded, tokenizer, loss if kind == "generation" else None)  # type: ignore[arg-type]
    if as_json:
        # ASCII goes through a pipe of any encoding
        print(json.dumps({"format": 1, "command": "show", "rows": entries}))
        return
    encoding = sys.stdout.encoding or "utf-8"
    for text in map(as_text, entries):
        print(text.encode(encoding, "backslashreplace").decode(encoding))
