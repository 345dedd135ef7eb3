"""Built-in losses are the model's own, checked before any score, and wrappers change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import hyperinf_kernels as hk

from . import families, models

NAMED = {str(f): f for f in families.FAMILIES}
ROWS = range(3)


def batch_of(family: families.Family, side: str = "right") -> dict[str, Tensor]:
    return family.collate([family.row(i) for i in ROWS], side)


@pytest.mark.parametrize(
    ("family", "loss", "message"),
    [
        ("BART seq2seq_lm", "causal_lm", "encoder-decoder.*seq2seq_lm"),
        ("BERT masked_lm", "causal_lm", "BertForMaskedLM's own loss"),
        ("Llama causal_lm", "masked_lm", "LlamaForCausalLM's own loss"),
        ("Llama causal_lm", "seq2seq_lm", "no encoder-decoder"),
        ("Llama causal_lm", "token_classification", "LlamaForCausalLM's own loss"),
        ("BERT token_classification", "sequence_classification", "needs logits"),
    ],
)
def test_a_loss_that_does_not_fit_the_model_is_refused(family, loss: str, message: str) -> None:
    chosen = NAMED[family]
    batch = chosen.collate([chosen.row(1)] * 2, "right")
    if family == "Llama causal_lm":
        # labels that either reading could take
        batch["labels"][:, -2:] = -100
    with pytest.raises(hk.InputError, match=message):
        hk.Attributor(chosen.tuned(), loss=loss).fit([batch])
    with pytest.raises(hk.InputError, match=message):
        hk.per_sample_gradients(chosen.tuned(), batch, loss=loss)


def classifier(labels: int, problem: str | None) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(models.bert_config(labels))
    model.config.problem_type = problem
    return model


@pytest.mark.parametrize(
    ("outputs", "problem", "labels"),
    [
        (1, "multi_label_classification", torch.tensor([[0.0], [1.0], [1.0], [0.0]])),
        (1, None, torch.tensor([0.5, -1.0, 2.0, 0.0])),
        (3, "regression", torch.randn(4, 3, generator=torch.Generator().manual_seed(0))),
        (3, "multi_label_classification", torch.eye(4, 3).long()),
        (3, None, torch.eye(4, 3)),
        (3, None, torch.tensor([[2], [0], [1], [2]])),
        (3, "single_label_classification", torch.tensor([2, 0, 1, 2])),
    ],
)
def test_a_classifiers_problem_type_decides(outputs: int, problem, labels: Tensor) -> None:
    model, batch = classifier(outputs, problem), models.text_batch("right")
    batch["labels"] = labels
    got = hk.per_sample_gradients(
        model, batch, loss="sequence_classification", blocks="classifier.weight"
    )["classifier.weight"]
    model.eval()
    floats = problem in ("regression", "multi_label_classification") or outputs == 1
    for i in range(4):
        model.zero_grad()
        target = labels[i : i + 1].float() if floats else labels[i : i + 1]
        row = {k: batch[k][i : i + 1] for k in ("input_ids", "attention_mask")}
        model(**row, labels=target).loss.backward()
        assert torch.allclose(got[i], model.classifier.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("outputs", "problem", "labels", "message"),
    [
        (1, "single_label_classification", torch.zeros(4).long(), "always 0"),
        (3, None, torch.eye(4, 3).long(), "several labels a row"),
        (3, "regression", torch.randn(4), "do not fit regression with 3 outputs"),
        (3, "other", torch.randn(4, 3), "'other' is not known"),
        (3, None, torch.tensor([0, 1, 3, 0]), "row 2 .*label 3, the model knows 0 to 2"),
    ],
)
def test_labels_that_contradict_a_problem_type_are_refused(outputs, problem, labels, message):
    batch = models.text_batch("right") | {"labels": labels}
    with pytest.raises(hk.InputError, match=message):
        hk.per_sample_gradients(
            classifier(outputs, problem), batch, loss="sequence_classification",
            blocks="classifier.weight",
        )  # fmt: skip


def test_a_loss_that_the_configuration_adds_to_is_refused() -> None:
    model = NAMED["Mixtral causal_lm"].tuned()
    batch = batch_of(NAMED["Mixtral causal_lm"])
    hk.Attributor(model).fit([batch])
    model.get_base_model().config.output_router_logits = True
    with pytest.raises(hk.InputError, match="router losses"):
        hk.Attributor(model).fit([batch])


def test_the_first_batch_of_queries_and_of_a_pool_is_checked_too() -> None:
    """Padding that a row can see, in batches that fit did not have."""
    family = NAMED["BERT sequence_classification"]
    model = family.tuned()
    attributor = hk.Attributor(model, loss=family.loss).fit([batch_of(family)])
    with pytest.raises(hk.InputError, match=r"row 2.*padding"):
        attributor.score([batch_of(family, "left")])
    with pytest.raises(hk.InputError, match=r"row 2.*padding"):
        attributor.score([batch_of(family)], [batch_of(family, "left")])


def test_a_custom_cut_checks_every_row_of_packed_images() -> None:
    family = NAMED["Qwen2-VL causal_lm"]
    model, cut = family.tuned(), []

    def one_row(batch: Any, i: int) -> Any:
        cut.append(i)
        return family.row(i)

    hk.Attributor(model, one_row=one_row).fit([batch_of(family, "left")])
    assert cut[:3] == [0, 1, 2]
    with pytest.raises(hk.InputError, match="row 0: the loss"):
        hk.Attributor(model, one_row=lambda batch, i: family.row(2 - i)).fit([batch_of(family)])


def mask_4d(batch: dict[str, Tensor]) -> Tensor:
    rows, width = batch["input_ids"].shape
    return torch.ones(width, width).tril().bool().expand(rows, 1, width, width)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_mask_of_four_dimensions_leaves_counting_to_the_labels(rows: int) -> None:
    model, batch = models.llama(), models.text_batch("right", (9,) * rows)
    want = hk.per_sample_gradients(model, batch)
    got = hk.per_sample_gradients(model, batch | {"attention_mask": mask_4d(batch)})
    for name in want:
        assert torch.allclose(got[name], want[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(hk.InputError, match=rf"attention mask is \({rows}, 1, 9, 9\)"):
        hk.per_sample_gradients(
            model, batch | {"attention_mask": mask_4d(batch)}, loss=hk.CausalLM("all")
        )


def test_batches_that_do_not_fit_have_one_clear_line() -> None:
    model, batch = models.llama(), models.text_batch("right")
    with pytest.raises(hk.InputError, match=r"labels of the shape .*\(4, 12\), got \(4, 5\)"):
        hk.per_sample_gradients(model, batch | {"labels": batch["labels"][:, :5]})
    with pytest.raises(hk.InputError, match="'input_ids' of the batch is a list"):
        hk.per_sample_gradients(model, {k: v.tolist() for k, v in batch.items()})
    with pytest.warns(UserWarning, match="LlamaForCausalLM takes no weights"):
        hk.per_sample_gradients(model, batch | {"weights": torch.ones(4)})


def test_a_layer_called_by_keyword_is_read() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(input=x).square().sum(1)

    x = torch.randn(3, 8)
    got = hk.per_sample_gradients(Keyword(), {"x": x}, loss=lambda m, b: m(b["x"]), blocks="weight")
    assert got["a.weight"].shape == (3, 4, 8)


def test_a_loss_that_draws_noise_is_told_so() -> None:
    def noisy(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"] + torch.randn_like(batch["x"])).square().sum(1)

    with pytest.raises(hk.InputError, match="two calls of the loss .* differ"):
        hk.Attributor(nn.Linear(8, 4), loss=noisy, blocks="weight").fit([{"x": torch.randn(5, 8)}])


def test_distributed_wrappers_change_nothing(tmp_path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model, batch = models.llama(), models.text_batch("right")
        want = hk.per_sample_gradients(model, batch)
        wrapped = nn.parallel.DistributedDataParallel(models.llama())
        for _ in range(2):
            got = hk.per_sample_gradients(wrapped, batch)
            for name in want:
                assert torch.equal(got[f"module.{name}"], want[name])
        from torch.distributed.fsdp import fully_shard

        with pytest.raises(hk.InputError, match="sharded over processes"):
            hk.per_sample_gradients(fully_shard(models.llama()), batch)
    finally:
        torch.distributed.destroy_process_group()


def test_replicas_of_a_data_parallel_wrapper_are_not_run() -> None:
    """On several GPUs they are other modules, without our hooks."""
    ran = []
    wrapped = nn.DataParallel(models.llama())
    wrapped.register_forward_hook(lambda *args: ran.append(1))
    hk.Attributor(wrapped).fit([models.text_batch("right")])
    assert not ran


def test_weights_that_are_not_all_here_are_refused_by_name() -> None:
    model = models.llama()
    with pytest.raises(hk.InputError, match=r"embed_tokens.weight is on the meta device"):
        hk.Attributor(model.to("meta"))
    offload = pytest.importorskip("accelerate").cpu_offload
    model = models.llama().get_base_model()
    offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(hk.InputError, match="offloaded by accelerate"):
        hk.Attributor(model, blocks="lora_A")


def test_layers_that_run_without_gradients_are_named() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.a(x)
            return self.b(h).square().sum(1)

    x = torch.randn(3, 8)
    with pytest.raises(hk.InputError, match=r"a\.weight.*ran without gradients"):
        hk.per_sample_gradients(Frozen(), {"x": x}, loss=lambda m, b: m(b["x"]), blocks="weight")


@pytest.mark.parametrize("model", [models.llama, models.gpt2])
def test_small_gradients_of_an_fp16_model_do_not_vanish(model) -> None:
    """A loss so small that fp16 would round its gradients to zero."""
    half, batch = model().half(), models.text_batch("right")

    def tiny(scale: float):
        return lambda m, b: hk.CausalLM()(m, b) * scale

    want = hk.per_sample_gradients(half, batch)
    got = hk.per_sample_gradients(half, batch, loss=tiny(2.0**-22))
    for name in want:
        # rounding once more where a scale of 2^14 still leaves subnormals
        error = (got[name] * 2.0**22 - want[name]).norm() / want[name].norm()
        assert float(error) < 0.1, name
    huge = hk.per_sample_gradients(half, batch, loss=tiny(2.0**8))
    for name in want:
        error = (huge[name] / 2.0**8 - want[name]).norm() / want[name].norm()
        assert float(error) < 1e-2, name
