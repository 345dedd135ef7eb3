"""Batched per-sample gradients equal batch-size-1 autograd, for every layer kind and loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hyperinf_kernels as hk

from . import models

RELATIVE = 1e-5


def one_by_one(
    model: nn.Module,
    batch: dict[str, Tensor],
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor],
    names: list[str],
) -> dict[str, Tensor]:
    """Ordinary autograd on each sample alone, without padding; blocks laid out by hand."""
    parameters = dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in parameters.items()}
    model.eval()
    out: dict[str, list[Tensor]] = {name: [] for name in names}
    for row in range(len(next(iter(batch.values())))):
        for p in parameters.values():
            p.requires_grad_(True)
        value = loss(model, models.row_of(batch, row)).sum()
        grads = torch.autograd.grad(value, [parameters[n] for n in names], allow_unused=True)
        for name, grad in zip(names, grads, strict=True):
            g = torch.zeros_like(parameters[name]) if grad is None else grad
            g = g.reshape(1, -1) if g.ndim == 1 else g.flatten(1)
            transposed = ".lora_B." in name or "c_attn.base_layer.weight" in name
            out[name].append(g.T if transposed else g)
    for name, p in parameters.items():
        p.requires_grad_(flags[name])
    return {name: torch.stack(rows) for name, rows in out.items()}


def causal_oracle(tokens: str) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    """The loss of one unpadded sample, written on full logits."""

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
        target, labels = batch["input_ids"][:, 1:], batch["labels"][:, 1:]
        each = nn.functional.cross_entropy(logits.mT, target, reduction="none")
        counted = {"answer": labels != -100, "prompt": labels == -100, "all": labels == labels}
        return (each * counted[tokens]).sum(1)

    return loss


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = RELATIVE) -> None:
    assert list(got) == list(want)
    for name, expected in want.items():
        assert got[name].shape == expected.shape, name
        error = float((got[name] - expected).norm() / expected.norm().clamp_min(1e-30))
        assert error <= rtol, f"{name}: relative error {error:.1e}"
        assert float(expected.norm()) > 0, f"{name} has no gradient: the test shows nothing"


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("tokens", ["answer", "prompt", "all"])
@pytest.mark.parametrize("family", [models.llama, models.gpt2], ids=["llama", "gpt2"])
def test_causal_lm_matches_single_samples(family, tokens: str, side: str) -> None:
    model, batch = family(), models.text_batch(side)
    got = hk.per_sample_gradients(model, batch, loss=hk.CausalLM(tokens))
    want = one_by_one(model, batch, causal_oracle(tokens), list(got))
    assert_same(got, want)


def test_padding_does_not_leak_whatever_the_pad_token() -> None:
    model = models.llama()
    plain = hk.per_sample_gradients(model, models.text_batch("right", pad=0), loss="causal_lm")
    other = hk.per_sample_gradients(model, models.text_batch("right", pad=17), loss="causal_lm")
    assert_same(other, plain)


def test_padding_leaks_without_its_mask() -> None:
    """The test above has teeth: with the mask gone, padding changes every gradient."""
    model, batch = models.llama(), models.text_batch("left", pad=17)
    masked = hk.per_sample_gradients(model, batch, loss=hk.CausalLM("answer"))
    del batch["attention_mask"]
    leaking = hk.per_sample_gradients(model, batch, loss=hk.CausalLM("answer"))
    with pytest.raises(AssertionError, match="relative error"):
        assert_same(leaking, masked)


def test_rslora_and_rank_one() -> None:
    for model in (models.llama(rank=8, use_rslora=True), models.llama(rank=1)):
        batch = models.text_batch("right")
        got = hk.per_sample_gradients(model, batch, loss=hk.CausalLM("all"))
        assert_same(got, one_by_one(model, batch, causal_oracle("all"), list(got)))


def test_lora_blocks_put_the_rank_first() -> None:
    got = hk.per_sample_gradients(models.llama(rank=4), models.text_batch("right"))
    for name, grad in got.items():
        assert grad.shape[1] == 4, name
    assert sum(".lora_A." in n for n in got) == sum(".lora_B." in n for n in got) == 6


def test_mean_reduction_divides_by_the_tokens_of_the_sample() -> None:
    model, batch = models.llama(), models.text_batch("right")
    total = hk.per_sample_gradients(model, batch, loss=hk.CausalLM("answer"))
    mean = hk.per_sample_gradients(model, batch, loss=hk.CausalLM("answer", "mean"))
    count = (batch["labels"][:, 1:] != -100).sum(1)
    for name in total:
        assert torch.allclose(mean[name] * count[:, None, None], total[name], rtol=1e-4, atol=1e-7)


def test_plain_parameters_by_regex_and_by_list() -> None:
    model, batch = models.gpt2(), models.text_batch("right")
    pattern = r"h\.0\.(ln_1|mlp\.c_fc|attn\.c_attn\.base_layer)|wpe"
    with pytest.raises(hk.InputError, match="wpe.*first dimension|first dimension"):
        hk.per_sample_gradients(model, batch, blocks=pattern)
    got = hk.per_sample_gradients(model, batch, blocks=pattern.removesuffix("|wpe"))
    names = list(got)
    assert len(names) == 6
    want = one_by_one(model, batch, causal_oracle("answer"), names)
    want = {n: w.mT if "mlp.c_fc.weight" in n else w for n, w in want.items()}
    assert_same(got, want)
    listed = hk.per_sample_gradients(model, batch, blocks=names[::-1])
    assert list(listed) == names


def test_embedding_and_tied_head() -> None:
    model, batch = models.llama(), models.text_batch("left")
    got = hk.per_sample_gradients(model, batch, blocks=r"embed_tokens|lm_head|norm\.weight")
    assert_same(got, one_by_one(model, batch, causal_oracle("answer"), list(got)))
    with pytest.raises(hk.InputError, match="tied"):
        hk.per_sample_gradients(models.gpt2(), batch, blocks="wte")


@pytest.mark.parametrize("labels", [3, 1], ids=["classes", "regression"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_sequence_classification_with_saved_head(labels: int, side: str) -> None:
    model = models.bert_sequence(labels)
    batch = models.text_batch(side)
    batch["labels"] = torch.tensor([2, 0, 1, 2]) if labels > 1 else torch.randn(4)
    if side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
        # BERT pools the first position, which left padding would make a padded one
        batch = models.text_batch("left", (8, 8, 8, 8)) | {"labels": batch["labels"]}

    def loss(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=row["input_ids"]).logits
        if labels == 1:
            return (logits[:, 0] - row["labels"]) ** 2
        return -logits.log_softmax(-1)[0, row["labels"]]

    got = hk.per_sample_gradients(model, batch, loss="sequence_classification")
    assert any("classifier" in name and "modules_to_save" in name for name in got)
    assert_same(got, one_by_one(model, batch, loss, list(got)))


@pytest.mark.parametrize("side", ["right", "left"])
def test_token_classification(side: str) -> None:
    model, batch = models.bert_token(), models.text_batch(side)
    batch["labels"] = torch.where(batch["labels"] == -100, -100, batch["labels"] % 5)
    if side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)

    def loss(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=row["input_ids"]).logits[0]
        kept = row["labels"][0] != -100
        each = -logits.log_softmax(-1)[kept].gather(1, row["labels"][0][kept][:, None])
        return each.sum()[None]

    got = hk.per_sample_gradients(model, batch, loss="token_classification")
    assert_same(got, one_by_one(model, batch, loss, list(got)))


def net_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "image": torch.randn(5, 3, 9, 8, generator=generator),
        "ids": torch.randint(0, 11, (5, 4), generator=generator),
        "labels": torch.randint(0, 3, (5,), generator=generator),
    }


def test_every_layer_kind_and_a_callable_loss() -> None:
    model, batch = models.Net(), net_batch()
    got = hk.per_sample_gradients(model, batch, loss=models.net_loss, blocks=".")
    assert len(got) == len(list(model.parameters()))
    assert_same(got, one_by_one(model, batch, models.net_loss, list(got)))


def test_double_precision_model_gives_double_gradients() -> None:
    model = models.Net().double()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in net_batch().items()}
    got = hk.per_sample_gradients(model, batch, loss=models.net_loss, blocks=".")
    assert_same(got, one_by_one(model, batch, models.net_loss, list(got)), rtol=1e-12)
    assert {g.dtype for g in got.values()} == {torch.float64}


def test_batch_size_does_not_matter() -> None:
    model, batch = models.llama(), models.text_batch("right")
    whole = hk.per_sample_gradients(model, batch)
    parts = [
        hk.per_sample_gradients(model, {k: v[rows] for k, v in batch.items()})
        for rows in (slice(0, 1), slice(1, 4))
    ]
    assert_same({n: torch.cat([p[n] for p in parts]) for n in whole}, whole)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    plain = hk.per_sample_gradients(models.llama(), models.text_batch("right"))
    model = models.llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    layer = model.get_base_model().model.layers[0]
    forwards = []
    layer.self_attn.register_forward_hook(lambda *args: forwards.append(1))
    got = hk.per_sample_gradients(model, models.text_batch("right"), check=False)
    assert len(forwards) == 2, "the layer was not recomputed, so nothing was checkpointed"
    assert_same(got, plain)


def test_bf16_base_weights_and_autocast_stay_close_to_fp32() -> None:
    batch = models.text_batch("right")
    exact = hk.per_sample_gradients(models.llama(), batch)
    base = models.llama()
    for name, parameter in base.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    half = hk.per_sample_gradients(base, batch)
    with torch.autocast("cpu", torch.bfloat16):
        cast = hk.per_sample_gradients(models.llama(), batch)
    for got in (half, cast):
        for name, grad in got.items():
            assert grad.dtype == torch.float32
            # bf16 carries 8 bits; two layers of it
            assert float((grad - exact[name]).norm() / exact[name].norm()) < 0.1


def test_sums_of_bf16_factors_are_fp32_under_autocast() -> None:
    """The outer product must not run in the caller's autocast dtype."""
    model, batch = models.Net(), net_batch()
    with torch.autocast("cpu", torch.bfloat16):
        got = hk.per_sample_gradients(model, batch, loss=models.net_loss, blocks=r"head\.weight")
    grad = got["head.weight"]
    assert not torch.equal(grad, grad.bfloat16().float())


def test_model_comes_back_as_it_was() -> None:
    model = models.llama().train()
    model.get_base_model().model.layers[1].eval()
    parameters = dict(model.named_parameters())
    some = next(n for n in parameters if "lora_A" in n)
    parameters[some].grad = torch.ones_like(parameters[some])
    modes = {n: m.training for n, m in model.named_modules()}
    flags = {n: p.requires_grad for n, p in parameters.items()}
    hooks = {
        n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
    }

    def check() -> None:
        assert modes == {n: m.training for n, m in model.named_modules()}
        assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
        assert hooks == {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()
        }
        for name, p in model.named_parameters():
            if name == some:
                assert torch.equal(p.grad, torch.ones_like(p))
            else:
                assert p.grad is None

    hk.per_sample_gradients(model, models.text_batch("right"))
    check()
    with pytest.raises(RuntimeError, match="boom"):
        hk.per_sample_gradients(model, models.text_batch("right"), loss=explode)
    check()


def explode(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    model(input_ids=batch["input_ids"])
    raise RuntimeError("boom")


def test_no_gradient_of_a_weight_is_ever_computed() -> None:
    """Autograd would call a weight's hook if it computed the weight's gradient."""
    model = models.llama()
    touched = []
    for name, p in model.named_parameters():
        p.requires_grad_(True)
        p.register_hook(lambda grad, name=name: touched.append(name))
    hk.per_sample_gradients(model, models.text_batch("right"), check=False)
    assert touched == []
    loss = hk.CausalLM()(model, models.text_batch("right")).sum()
    loss.backward()
    assert touched, "the hooks do fire in ordinary training"


def test_head_runs_only_where_a_label_is() -> None:
    model, batch = models.llama(), models.text_batch("right")
    seen = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda m, args, out: seen.append(out.shape[:-1].numel()))
    hk.per_sample_gradients(model, batch, loss=hk.CausalLM("answer"), check=False)
    handle.remove()
    assert seen == [int((batch["labels"][:, 1:] != -100).sum())]


@pytest.mark.parametrize(
    ("blocks", "change", "message"),
    [
        ("lora", lambda: models.Net(), "no LoRA layer"),
        ("lora", lambda: two_adapters(), "2 adapters are active"),
        ("lora", lambda: merged(), "merged"),
        ("nothing_like_this", lambda: models.llama(), "matches none"),
        ("(", lambda: models.llama(), "not a regular expression"),
        (["lm_heat.weight"], lambda: models.llama(), "no parameter 'lm_heat.weight'.*lm_head"),
        ([], lambda: models.llama(), "empty"),
    ],
    ids=["no-lora", "two-adapters", "merged", "no-match", "bad-regex", "typo", "empty"],
)
def test_unsupported_blocks_have_one_clear_error(blocks, change, message: str) -> None:
    with pytest.raises(hk.InputError, match=message):
        hk.per_sample_gradients(change(), models.text_batch("right"), blocks=blocks)


def two_adapters() -> nn.Module:
    import peft

    model = models.llama()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    return model


def merged() -> nn.Module:
    model = models.llama()
    model.merge_adapter()
    return model


def test_errors_name_the_row_and_the_block() -> None:
    model, batch = models.llama(), models.text_batch("right")
    with pytest.raises(hk.InputError, match="one number per sample"):
        hk.per_sample_gradients(model, batch, loss=lambda m, b: m(b["input_ids"]).logits.mean())
    batch["labels"][2] = -100
    with pytest.raises(hk.InputError, match="row 2 .* no answer token"):
        hk.per_sample_gradients(model, batch)

    def spoiled(value: float) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
        def loss(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
            losses = hk.CausalLM("all")(m, b)
            return losses * torch.tensor([1.0, 1.0, 1.0, value])

        return loss

    with pytest.raises(hk.InputError, match="row 3 of the batch has loss nan"):
        hk.per_sample_gradients(model, batch, loss=spoiled(float("nan")))

    class Burst(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, grad: Tensor) -> Tensor:
            grad = grad.clone()
            grad[1] = float("inf")
            return grad

    def burst(m: nn.Module, b: dict[str, Tensor]) -> Tensor:
        return Burst.apply(hk.CausalLM("all")(m, b))

    with pytest.raises(hk.InputError, match=r"row 1 of the batch .*NaN or inf .block .*lora_A"):
        hk.per_sample_gradients(model, batch, loss=burst)


class InPlace(nn.Module):
    """A first and a second layer whose outputs are changed in place, 3-D and 4-D."""

    def __init__(self, change: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.change = change
        self.conv = nn.Conv2d(2, 3, 3)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.changed(self.conv(x))
        h = self.changed(self.first(h.flatten(2)))
        return self.changed(self.second(h)).pow(2).sum((1, 2))

    def changed(self, h: Tensor) -> Tensor:
        if self.change == "relu_":
            return nn.functional.relu_(h)
        if self.change == "add_":
            h += 0.5
            return h
        if self.change == "through a view":
            h.view(-1).mul_(2)
            return h
        return h.mul_(1.5)


@pytest.mark.parametrize("change", ["relu_", "add_", "mul_", "through a view"])
def test_outputs_changed_in_place_keep_their_gradient(change: str) -> None:
    model = InPlace(change)
    batch = {"x": torch.randn(4, 2, 5, 4)}

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(batch["x"])

    got = hk.per_sample_gradients(model, batch, loss=loss, blocks=".")
    assert_same(got, one_by_one(model, batch, loss, list(got)))


def test_an_input_changed_after_its_layer_is_refused() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1.0
            out = self.layer(x)
            x.zero_()
            return out.sum(1)

    with pytest.raises(hk.InputError, match=r"layer.weight.*changed in place"):
        hk.per_sample_gradients(
            Late(), {"x": torch.randn(2, 3)}, loss=lambda m, b: m(b["x"]), blocks="weight"
        )


def test_it_works_inside_inference_mode_and_leaves_no_grad_on_inputs() -> None:
    model = InPlace("mul_")
    x = torch.randn(2, 2, 5, 4, requires_grad=True)
    want = hk.per_sample_gradients(model, {"x": x}, loss=lambda m, b: m(b["x"]), blocks=".")
    assert x.grad is None
    with torch.inference_mode():
        got = hk.per_sample_gradients(
            model, {"x": x.detach().clone()}, loss=lambda m, b: m(b["x"]), blocks="."
        )
    assert_same(got, want)


def test_label_values_are_the_targets_of_answer_tokens() -> None:
    model, batch = models.llama(), models.text_batch("right")
    counted = batch["labels"] != -100
    other = batch | {"labels": torch.where(counted, (batch["labels"] + 7) % 61, -100)}
    got = hk.CausalLM("answer")(model.eval(), other)
    reference = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=other["labels"]
    ).loss
    count = (other["labels"][:, 1:] != -100).sum()
    assert float(got.sum()) == pytest.approx(float(reference * count), rel=1e-5)


def test_double_precision_language_model_stays_double() -> None:
    model, batch = models.llama().double(), models.text_batch("left")
    got = hk.per_sample_gradients(model, batch)
    assert_same(got, one_by_one(model, batch, causal_oracle("answer"), list(got)), rtol=1e-10)
