"""In a process and a terminal of its own."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hyperinf_kernels.cli.terminal import Bars
from tests import folders

from .command import (
    GENERATION,
    ROOT,
    document,
)


def start(line: str, site: dict[str, Path], folder: Path, stderr: int, **more: str) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(
        [sys.executable, "-m", "hyperinf_kernels", *line.format(**site).split()],
        cwd=folder, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment,
    )  # fmt: skip


def test_stdout_is_one_json_document_whatever_the_libraries_say(
    site: dict[str, Path], tmp_path: Path
) -> None:
    rows = [{**row, "id": f"é{i}"} for i, row in enumerate(folders.sums(8, "t"))]
    folders.write_lines(tmp_path / "train.jsonl", rows)
    line = "identify --model {llama} --train train.jsonl --query {query} --epochs 2 --batch-size 4"
    process = start(
        f"{line} -m exact --output out --json", site, tmp_path, subprocess.PIPE,
        PYTHONIOENCODING="ascii:backslashreplace",
    )  # fmt: skip
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out) == document(tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["out", "train.jsonl"]
    assert "Warning" not in err


def test_stderr_is_one_line_whatever_the_libraries_say(
    site: dict[str, Path], tmp_path: Path
) -> None:
    line = f"score --model {{llama}} --adapter {{thin_adapter}} {GENERATION}"
    process = start(line, site, tmp_path, subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert re.fullmatch(r"error: the adapter in \S+ does not fit this model: it lacks \S+\n", err)
    assert os.listdir(tmp_path) == []


def test_bars_of_libraries_are_off() -> None:
    program = (
        "import contextlib, sys; sys.argv = ['hyperinf', '--help']\n"
        "from hyperinf_kernels import cli\n"
        "with contextlib.suppress(SystemExit): cli.main()\n"
        "from tqdm.auto import tqdm\n"
        "print('disabled', tqdm(range(2)).disable)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TQDM_DISABLE"}
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT,
        env=environment,
    )  # fmt: skip
    assert ran.stdout.endswith("disabled True\n")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_where_python_cannot_raise_ends_the_job_at_its_next_news() -> None:
    class Deaf:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)  # the handler runs, and what it raises is dropped

    def job() -> None:
        with Bars() as bars:
            bars.advance("train", 1, 3)
            Deaf()
            bars.advance("train", 2, 3)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        job()
    assert signal.getsignal(signal.SIGINT) is before


def terminal_text(handle: int) -> Iterator[str]:
    """What has come to a terminal so far, again after every piece, until it is closed."""
    text = ""
    while True:
        try:
            piece = os.read(handle, 4096)
        except OSError:  # how Linux tells that the other side is closed
            return
        if not piece:
            return
        text += piece.decode(errors="replace")
        yield text


def test_an_interrupt_in_the_middle(site: dict[str, Path], tmp_path: Path) -> None:
    folders.write_lines(tmp_path / "train.jsonl", folders.sums(20_000, "t"))
    near, far = pty.openpty()
    process = start(
        "score --model {llama} --adapter {adapter} --train train.jsonl --query {query} "
        "--batch-size 1 --output new/out",
        site, tmp_path, far, TERM="xterm", COLUMNS="120",
    )  # fmt: skip
    os.close(far)
    signalled, text = False, ""
    for text in terminal_text(near):
        if not signalled and re.search(r"training gradients.* \d+/20000", text):
            process.send_signal(signal.SIGINT)
            signalled = True
    os.close(near)
    assert signalled, text
    assert process.wait(timeout=60) == 130
    assert process.stdout.read() == ""
    assert "interrupted; nothing was written" in text
    assert "Traceback" not in text
    assert os.listdir(tmp_path) == ["train.jsonl"]
