"""Per-sample losses: `loss(model, batch) -> (B,)`, the loss of each sample on its own.

The built-in ones are the losses that transformers' models have of their own: the sum over a batch
is `model(**batch).loss` times the count that it averages over, which `own_loss` checks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import BadRowError, InputError
from .inputs import forward_inputs, tensor_column, unwrapped

Loss = Callable[[nn.Module, Any], Tensor]
IGNORED = -100


@runtime_checkable
class OwnLoss(Protocol):
    """A loss that the model has of its own when it is given labels."""

    reduction: str

    def own_labels(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Labels with -100 wherever the loss does not look, and each sample's count (B,)."""


class CausalLM:
    """Cross-entropy of next tokens, summed over the chosen tokens of each sample.

    A batch holds `input_ids` (B, T), `attention_mask` (B, T; none means no padding) and `labels`
    (B, T) with -100 outside the answer. The first token after padding is never predicted, and the
    head is evaluated only where a label is. With a mask of four dimensions (packing, prefix LM)
    labels alone say which tokens count.

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
        ids = tensor_column(batch, "input_ids", self)
        attended = self._attended(batch, ids)
        counted, target = attended.bool(), ids
        if self.tokens != "all":
            labels = tensor_column(batch, "labels", self)
            if labels.shape != ids.shape:
                raise InputError(
                    f"the loss ({self}) needs labels of the shape of input_ids "
                    f"{tuple(ids.shape)}, got {tuple(labels.shape)}; give -100 where no token is "
                    "to be predicted"
                )
            answer = labels != IGNORED
            counted = counted & (answer if self.tokens == "answer" else ~answer)
            target = torch.where(answer, labels, ids)
        # a token is predicted from the one before it, which must not be padding
        return target[:, 1:], counted[:, 1:] & attended[:, :-1].bool()

    def _attended(self, batch: Mapping[str, Tensor], ids: Tensor) -> Tensor:
        mask = batch.get("attention_mask")
        if mask is None:
            return torch.ones_like(ids)
        if isinstance(mask, Tensor) and mask.shape == ids.shape:
            return mask
        if isinstance(mask, Tensor) and mask.ndim == 4 and self.tokens == "answer":
            return torch.ones_like(ids)
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"the attention mask is {shape}, which does not say which of the {tuple(ids.shape)} "
            f"tokens are padding; the loss ({self}) needs a mask of their shape"
        )

    def _decoder(self, model: nn.Module) -> nn.Module:
        inner = unwrapped(model)
        if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
            raise InputError(
                f"{type(inner).__name__} is an encoder-decoder, whose labels belong to the "
                "decoder: use loss='seq2seq_lm', not 'causal_lm'"
            )
        return inner

    def own_labels(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        self._decoder(model)
        target, counted = self.targets(batch)
        labels = F.pad(torch.where(counted, target, IGNORED), (1, 0), value=IGNORED)
        return labels, counted.sum(1)

    def __call__(
        self, model: nn.Module, batch: Mapping[str, Tensor], protected: Collection[nn.Module] = ()
    ) -> Tensor:
        """Losses (B,). The head is left whole when it holds a module in `protected`."""
        inner = self._decoder(model)
        target, counted = self.targets(batch)
        _need_tokens(counted, f"{self.tokens} token to score")
        rows, columns = torch.nonzero(counted, as_tuple=True)
        head: Any = getattr(inner, "get_output_embeddings", lambda: None)()
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


class _LabelledTokens:
    """Cross-entropy of one label per position of the logits, -100 ignored, summed per sample.

    Args:
        reduction: over the positions of one sample.
    """

    name: str
    what = "labelled token"

    def __init__(self, reduction: Literal["sum", "mean"] = "sum") -> None:
        _one_of("reduction", reduction, ("sum", "mean"))
        self.reduction = reduction

    def __str__(self) -> str:
        return f"{self.name}, {self.reduction} per example"

    def own_labels(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        labels = tensor_column(batch, "labels", self)
        return labels, (labels != IGNORED).sum(1)

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        return model(**forward_inputs(model, batch)).logits  # type: ignore[no-any-return]

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        labels = tensor_column(batch, "labels", self)
        count = (labels != IGNORED).sum(1)
        _need_tokens(labels != IGNORED, self.what)
        logits = widened(self.logits(model, batch, labels))
        if logits.shape[:2] != labels.shape:
            raise InputError(
                f"the model gives logits {tuple(logits.shape)} for labels {tuple(labels.shape)}; "
                f"the loss ({self}) needs one label at each position"
            )
        losses = F.cross_entropy(logits.mT, labels, reduction="none", ignore_index=IGNORED)
        return losses.sum(1) / count if self.reduction == "mean" else losses.sum(1)


class TokenClassification(_LabelledTokens):
    """Cross-entropy of one label per token, -100 ignored, summed (or averaged) per sample."""

    name = "token classification"


class MaskedLM(_LabelledTokens):
    """Cross-entropy of the masked tokens, each predicted at its own place, summed per sample.

    A batch holds `labels` (B, T) with the original token where it was masked and -100 elsewhere.
    """

    name = "masked LM"
    what = "masked token to predict (every label is -100)"


class Seq2SeqLM(_LabelledTokens):
    """Cross-entropy of a decoder's tokens, summed per sample, for encoder-decoders.

    A batch holds the encoder's inputs (`input_ids`, `input_features`, ...) and `labels` (B, T) with
    -100 for padding. The model makes the decoder's inputs from the labels by its own rule, unless
    the batch holds `decoder_input_ids`.
    """

    name = "sequence to sequence"
    what = "target token (every label is -100)"

    def logits(self, model: nn.Module, batch: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        inner = unwrapped(model)
        if not getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
            raise InputError(
                f"{type(inner).__name__} is no encoder-decoder: use loss='causal_lm' or 'masked_lm'"
            )
        return model(**forward_inputs(model, batch), labels=labels).logits  # type: ignore[no-any-return]


class SequenceClassification:
    """The loss of a classifier, by its `problem_type`.

    Cross-entropy of one label per sample (B,) or (B, 1); squared error, or binary cross-entropy of
    every output, for labels (B, outputs), averaged over the outputs. A model that does not say its
    problem type has the one that transformers gives it: regression for one output, one label where
    labels are whole numbers, several where they are not.
    """

    reduction = "sum"

    def __str__(self) -> str:
        return "sequence classification"

    def _problem(self, model: nn.Module, labels: Tensor, outputs: int) -> str:
        problem = getattr(getattr(unwrapped(model), "config", None), "problem_type", None)
        if problem is None:
            if outputs == 1:
                return "regression"
            whole = not labels.is_floating_point()
            problem = "single_label_classification" if whole else "multi_label_classification"
        if problem == "single_label_classification" and outputs == 1:
            raise InputError(
                "the model has one output and problem_type='single_label_classification', a loss "
                "that is always 0: set config.problem_type to what it was trained with"
            )
        return str(problem)

    def own_labels(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        labels = tensor_column(batch, "labels", self)
        config = getattr(unwrapped(model), "config", None)
        problem = self._problem(model, labels, getattr(config, "num_labels", 2))
        count = torch.ones(len(labels), dtype=torch.long, device=labels.device)
        if problem == "single_label_classification":
            return labels.reshape(len(labels), -1), count
        weights = next(p for p in model.parameters() if p.is_floating_point())
        return labels.to(weights.dtype), count

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        labels = tensor_column(batch, "labels", self)
        logits = widened(model(**forward_inputs(model, batch)).logits)
        if logits.ndim != 2 or len(logits) != len(labels):
            raise InputError(
                f"the model gives logits {tuple(logits.shape)} for labels {tuple(labels.shape)}; "
                f"the loss ({self}) needs logits (B, outputs)"
            )
        problem = self._problem(model, labels, logits.shape[-1])
        if problem == "single_label_classification":
            return self._single(logits, labels)
        if labels.numel() != logits.numel():
            raise InputError(
                f"labels {tuple(labels.shape)} do not fit {problem} with {logits.shape[-1]} outputs"
            )
        targets = labels.reshape(logits.shape).to(logits.dtype)
        if problem == "regression":
            return (logits - targets).square().mean(1)
        if problem == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
        raise InputError(f"config.problem_type={problem!r} is not known")

    def _single(self, logits: Tensor, labels: Tensor) -> Tensor:
        if labels.is_floating_point() or labels.numel() != len(logits):
            raise InputError(
                f"labels {tuple(labels.shape)} of {labels.dtype} do not fit one of "
                f"{logits.shape[-1]} classes per row; for several labels a row set "
                "config.problem_type='multi_label_classification'"
            )
        labels = labels.reshape(-1)
        bad = torch.nonzero((labels < 0) | (labels >= logits.shape[-1])).flatten()
        if len(bad):
            raise BadRowError(
                int(bad[0]),
                f"has label {int(labels[bad[0]])}, the model knows 0 to {logits.shape[-1] - 1}",
            )
        return F.cross_entropy(logits, labels, reduction="none")


NAMED: dict[str, Callable[[], Loss]] = {
    "causal_lm": CausalLM,
    "masked_lm": MaskedLM,
    "seq2seq_lm": Seq2SeqLM,
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


def described(loss: Loss) -> str | None:
    """What a built-in loss computes, in words; None for a callable of the user's."""
    return str(loss) if isinstance(loss, OwnLoss) else None


def widened(logits: Tensor) -> Tensor:
    """Logits in at least fp32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _need_tokens(counted: Tensor, what: str) -> None:
    """Name the first row of (B, T) in which nothing counts."""
    empty = torch.nonzero(~counted.any(1)).flatten()
    if len(empty):
        raise BadRowError(int(empty[0]), f"has no {what}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
