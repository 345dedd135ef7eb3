"""Per-sample losses: `loss(model, batch) -> (B,)`, the loss of each sample on its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError

Loss = Callable[[nn.Module, Any], Tensor]
IGNORED = -100
# of the model's own, never passed to its forward
SIDE_KEYS = ("labels", "id", "ids")


class CausalLM:
    """Cross-entropy of next tokens, summed over the chosen tokens of each sample.

    A batch holds `input_ids` (B, T), `attention_mask` (B, T; none means no padding) and `labels`
    (B, T) with -100 outside the answer. The first token after padding is never predicted, and the
    head is evaluated only where a label is.

    Args:
        tokens: "answer" for labels other than -100, "prompt" for attended tokens whose label is
            -100, "all" for every attended token.
        reduction: over the tokens of one sample; "mean" gives long and short samples equal weight.
    """

    def __init__(
        self,
        tokens: Literal["answer", "prompt", "all"] = "answer",
        reduction: Literal["sum", "mean"] = "sum",
    ) -> None:
        _one_of("tokens", tokens, ("answer", "prompt", "all"))
        _one_of("reduction", reduction, ("sum", "mean"))
        self.tokens, self.reduction = tokens, reduction

    def __str__(self) -> str:
        return f"causal LM, {self.tokens} tokens, {self.reduction} per example"

    def targets(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(B, T-1) token to predict at each position, and whether it counts."""
        ids = _need(batch, "input_ids", self)
        attended = batch.get("attention_mask")
        attended = torch.ones_like(ids) if attended is None else attended
        counted, target = attended.bool(), ids
        if self.tokens != "all":
            labels = _need(batch, "labels", self)
            answer = labels != IGNORED
            counted = counted & (answer if self.tokens == "answer" else ~answer)
            target = torch.where(answer, labels, ids)
        # a token is predicted from the one before it, which must not be padding
        return target[:, 1:], counted[:, 1:] & attended[:, :-1].bool()

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], protected: Collection[nn.Module] = ()
    ) -> Tensor:
        """Losses (B,). The head is left whole when it holds a module in `protected`."""
        target, counted = self.targets(batch)
        empty = torch.nonzero(~counted.any(1)).flatten()
        if len(empty):
            raise InputError(
                f"row {int(empty[0])} of the batch has no {self.tokens} token to score"
            )
        rows, columns = torch.nonzero(counted, as_tuple=True)
        head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        trim = head is not None and not any(m in set(protected) for m in head.modules())
        inputs = forward_inputs(model, batch)
        if trim:
            hook = head.register_forward_pre_hook(
                lambda module, args: (args[0][rows, columns].unsqueeze(0), *args[1:])
            )
            try:
                logits = model(**inputs).logits[0]
            finally:
                hook.remove()
        else:
            logits = model(**inputs).logits[rows, columns]
        losses = F.cross_entropy(widened(logits), target[rows, columns], reduction="none")
        total = losses.new_zeros(len(target)).index_add(0, rows, losses)
        return total / counted.sum(1) if self.reduction == "mean" else total


class SequenceClassification:
    """Cross-entropy of one label per sample; squared error when the model has one output."""

    def __str__(self) -> str:
        return "sequence classification"

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        labels = _need(batch, "labels", self)
        logits = model(**forward_inputs(model, batch)).logits
        logits = widened(logits)
        if logits.shape[-1] == 1:
            return (logits.squeeze(-1) - labels.reshape(-1).to(logits.dtype)).square()
        if labels.ndim == 2:
            problem = getattr(getattr(model, "config", None), "problem_type", None)
            if problem == "regression":
                return (logits - labels.to(logits.dtype)).square().mean(1)
            targets = labels.to(logits.dtype)
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
        bad = torch.nonzero((labels < 0) | (labels >= logits.shape[-1])).flatten()
        if len(bad):
            raise InputError(
                f"row {int(bad[0])} of the batch has label {int(labels[bad[0]])}, the model knows "
                f"0 to {logits.shape[-1] - 1}"
            )
        return F.cross_entropy(logits, labels, reduction="none")


class TokenClassification:
    """Cross-entropy of one label per token, -100 ignored, summed (or averaged) per sample."""

    def __init__(self, reduction: Literal["sum", "mean"] = "sum") -> None:
        _one_of("reduction", reduction, ("sum", "mean"))
        self.reduction = reduction

    def __str__(self) -> str:
        return f"token classification, {self.reduction} per example"

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        labels = _need(batch, "labels", self)
        logits = model(**forward_inputs(model, batch)).logits
        logits = widened(logits)
        losses = F.cross_entropy(logits.mT, labels, reduction="none", ignore_index=IGNORED)
        count = (labels != IGNORED).sum(1)
        empty = torch.nonzero(count == 0).flatten()
        if len(empty):
            raise InputError(f"row {int(empty[0])} of the batch has no labelled token")
        return losses.sum(1) / count if self.reduction == "mean" else losses.sum(1)


NAMED: dict[str, Callable[[], Loss]] = {
    "causal_lm": CausalLM,
    "sequence_classification": SequenceClassification,
    "token_classification": TokenClassification,
}


def make_loss(loss: str | Loss) -> Loss:
    """A loss by name, or the callable itself."""
    if not isinstance(loss, str):
        return loss
    if loss not in NAMED:
        raise ValueError(f"unknown loss {loss!r}; known: {', '.join(NAMED)}, or a callable")
    return NAMED[loss]()


OWN = (CausalLM, SequenceClassification, TokenClassification)


def described(loss: Loss) -> str | None:
    """What a loss of this module computes, in words; None for a callable of the user's."""
    return str(loss) if isinstance(loss, OWN) else None


def forward_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a batch that the model's forward takes, without labels and ids.

    Rows padded on the left get position ids that start at their first token.
    """
    accepted = _accepted(model)
    inputs = {
        key: value
        for key, value in batch.items()
        if key not in SIDE_KEYS
        and (key in accepted or ("kwargs" in accepted and key in _TEXT_KEYS))
    }
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    mask: Any = batch.get("attention_mask")
    left_padded = mask is not None and mask.ndim == 2 and bool((mask[:, 0] == 0).any())
    if left_padded and "position_ids" in accepted and "position_ids" not in inputs:
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
    return inputs


def widened(logits: Tensor) -> Tensor:
    """Logits in at least fp32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


_TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def _accepted(model: nn.Module) -> set[str]:
    base = getattr(model, "get_base_model", lambda: model)()
    return set(inspect.signature(base.forward).parameters)


def _need(batch: Mapping[str, Tensor], key: str, loss: object) -> Tensor:
    if key not in batch:
        raise InputError(f"the loss ({loss}) needs {key!r} in every batch, got {sorted(batch)}")
    return batch[key]


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
