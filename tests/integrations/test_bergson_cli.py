"""bergson 2.5.1's command line on a LoRA adapter, in processes of its own, with our files."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("bergson", reason="run `make test-integrations`")

import peft
import transformers
from bergson.data import load_scores
from bergson.gradients import GradientProcessor
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers

from hyperinf_kernels import HyperINF, InputError, per_sample_gradients
from hyperinf_kernels.integrations import bergson as hkb
from hyperinf_kernels.store import bergson as store
from tests import oracle
from tests.integrations.cases import relative_error

WORDS = [f"w{k}" for k in range(50)]
COUNTS = {"train": 13, "query": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny adapter, its base and tokenizer, and two JSON data sets on disk."""
    folder = tmp_path_factory.mktemp("bergson")
    vocabulary = {"<pad>": 0, "<unk>": 1, "</s>": 2} | {w: k + 3 for k, w in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>",
        model_max_length=64,
    )  # fmt: skip
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    # loaded again, so that the adapter knows where its base is
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(base, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "adapter")
    for place in ("base", "adapter"):
        tokenizer.save_pretrained(folder / place)
        config.save_pretrained(folder / place)  # bergson asks for the adapter's as well
    draw = random.Random(0)
    for name, count in COUNTS.items():
        rows = [{"text": " ".join(draw.choices(WORDS, k=4 + k % 5))} for k in range(count)]
        Dataset.from_list(rows).to_json(folder / f"{name}.json")
    return folder


def bergson(folder: Path, command: str, output: str, *options: str) -> Path:
    """`bergson COMMAND OUTPUT ...` on the adapter, summed loss, fp32, batches of 32 tokens."""
    kind = "precision" if command == "build" else "index_cfg.precision"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", "bergson", command, output, "--model", str(folder / "adapter"),
         f"--{kind}", "fp32", "--token_batch_size", "32", "--loss_reduction", "sum", *options],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    return folder / output


def gradients(folder: Path, name: str) -> dict[str, Tensor]:
    """{parameter: (n, *shape)} in fp64, one backward pass per row of the adapter on disk."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    model = peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).double()
    names = [n for n, _ in model.named_parameters() if "lora_" in n]
    parameters = dict(model.named_parameters())
    rows: dict[str, list[Tensor]] = {n: [] for n in names}
    for row in Dataset.from_json(str(folder / f"{name}.json"), cache_dir=str(folder / "cache")):
        ids = torch.tensor([[WORDS.index(word) + 3 for word in row["text"].split()]])
        logits = model(ids).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        for n, g in zip(names, torch.autograd.grad(loss, [parameters[n] for n in names]),
                        strict=True):  # fmt: skip
            rows[n].append(g)
    return {n: torch.stack(g) for n, g in rows.items()}


def blocks(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: g.mT if "lora_B" in n else g for n, g in grads.items()}


def scored(path: Path) -> Tensor:
    return torch.from_numpy(np.array(load_scores(path)[:]))


def test_built_gradients_are_read_and_scored_with_our_query_store_and_hessian(
    folder: Path,
) -> None:
    index = bergson(
        folder, "build", "index", "--dataset", str(folder / "train.json"), "--projection_dim", "0"
    )
    train, query = (gradients(folder, name) for name in COUNTS)
    named = {hkb.module_of(n): n for n in train}
    shapes = {m: tuple(train[n].shape[1:]) for m, n in named.items()}
    found: dict[str, list[Tensor]] = {m: [] for m in named}
    for _, batch in store.read(index, shapes, batch_size=5):
        for module, grad in batch.items():
            found[module].append(grad)
    for module, parts in found.items():
        # bergson's gradients are fp32
        assert relative_error(torch.cat(parts), blocks(train)[named[module]]) < 1e-5

    # fitted on our own gradients, under our own names
    solver = HyperINF()
    for part in (slice(0, 4), slice(4, 13)):
        solver.update({n: g[part] for n, g in blocks(train).items()})
    hessian = hkb.write_hessian(folder / "hessian", solver.fit(), index=index)
    parts = [{n: g[part] for n, g in blocks(query).items()} for part in (slice(3), slice(3, 5))]
    store.write(folder / "queries", parts)
    out = bergson(
        folder, "score", "scores", "--dataset", str(folder / "train.json"),
        "--projection_dim", "0", "--query_path", str(folder / "queries"),
        "--hessian_path", str(hessian), "--inversion", "absolute_damped_inverse",
        "--damping_factor", "0", "--score_cfg.precision", "fp32", "--score", "individual",
    )  # fmt: skip
    expected = -torch.from_numpy(oracle.influence(blocks(train), blocks(query), "hyperinf")).T
    assert relative_error(scored(out), expected) < 1e-5

    partial = HyperINF()
    partial.update({n: g for n, g in blocks(train).items() if "layers.0" in n})
    with pytest.raises(InputError, match=r"no block for module model\.model\.layers\.1"):
        hkb.write_hessian(folder / "other", partial.fit(), index=index)
    foreign = HyperINF()
    foreign.update({"transformer.h.0.attn.lora_A": torch.ones(3, 4, 32).double()})
    with pytest.raises(InputError, match="has no module for block transformer"):
        hkb.write_hessian(folder / "other", foreign.fit(), index=index)


def test_a_projected_index_is_scored_with_our_dense_hessian(folder: Path) -> None:
    projection = ("--projection_dim", "4", "--projection_seed", "7")
    data = {name: str(folder / f"{name}.json") for name in COUNTS}
    index, queries = (
        bergson(folder, "build", f"projected_{name}", "--dataset", data[name], *projection)
        for name in COUNTS
    )
    square = dict.fromkeys(store.sizes(index)[1], (4, 4))
    rows: list[dict[str, Tensor]] = []
    for path in (index, queries):
        parts = [grads for _, grads in store.read(path, square, batch_size=3)]
        rows.append({m: torch.cat([p[m] for p in parts]) for m in square})
    solver = HyperINF()
    solver.update(rows[0])
    hessian = hkb.write_dense_hessian(folder / "dense", solver.fit(), GradientProcessor.load(index))
    out = bergson(
        folder, "score", "projected_scores", "--dataset", data["train"], *projection,
        "--query_path", str(queries), "--hessian_path", str(hessian),
        "--inversion", "absolute_damped_inverse", "--damping_factor", "0",
        "--score_cfg.precision", "fp32", "--score", "individual",
    )  # fmt: skip
    expected = -torch.from_numpy(oracle.influence(*rows, "hyperinf")).T
    assert relative_error(scored(out), expected) < 1e-5


def test_our_gradients_are_bergsons(folder: Path) -> None:
    """The hooks of `per_sample_gradients` on the same adapter, for users of both."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    model: Any = peft.PeftModel.from_pretrained(base, folder / "adapter").double()
    data = Dataset.from_json(str(folder / "query.json"), cache_dir=str(folder / "cache"))
    for row, text in enumerate(data["text"]):
        ids = torch.tensor([[WORDS.index(word) + 3 for word in text.split()]])
        ours = per_sample_gradients(model, {"input_ids": ids, "labels": ids})
        for name, grad in blocks(gradients(folder, "query")).items():
            assert relative_error(ours[name][0], grad[row]) < 1e-9
