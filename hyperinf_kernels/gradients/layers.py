"""Per-sample gradients of one layer's parameters from its input and its output gradient.

A layer kind is one entry of `LAYERS`. `x` is the layer's input and `delta` the loss gradient at its
output, both with the samples first. Gradients come as (B, r, d), the layout of their block:
matrices as (out, in), transposed for LoRA B so that the rank comes first, vectors as (1, d).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import per_sample_grad
from ..ops.checks import accumulation_dtype


@dataclass(frozen=True)
class Layer:
    """How to differentiate one kind of layer.

    `weight(module, x, delta, transpose)` gives (B, r, d); `features` is the dimension of delta that
    a bias belongs to; `refuse` names an option of the module that is not supported; `outer` says
    that the weight's gradient is delta^T x, summed over all dimensions between sample and feature;
    `hooked` that its input and output show a sample's gradient at all.
    """

    kind: str
    accepts: Callable[[nn.Module], bool]
    weight: Callable[[nn.Module, Tensor, Tensor, bool], Tensor]
    shape: Callable[[nn.Module], tuple[int, int]]
    features: int = -1
    refuse: Callable[[nn.Module], str | None] = lambda module: None
    outer: bool = False
    hooked: bool = True


def bias_gradient(delta: Tensor, features: int) -> Tensor:
    """(B, 1, O): delta summed over everything but the sample and the feature dimension."""
    summed = delta.to(accumulation_dtype(delta)).movedim(features, -1)
    return summed.reshape(len(delta), -1, summed.shape[-1]).sum(1, keepdim=True)


def outer_factors(x: Tensor, delta: Tensor, transpose: bool) -> tuple[Tensor, Tensor]:
    """left (B, T, r) and right (B, T, d) with gradients left^T right, of an `outer` layer."""
    x = x.reshape(len(x), -1, x.shape[-1])
    delta = delta.reshape(len(delta), -1, delta.shape[-1])
    return (x, delta) if transpose else (delta, x)


def _outer(x: Tensor, delta: Tensor, transpose: bool) -> Tensor:
    return per_sample_grad(*outer_factors(x, delta, transpose))


def _linear(module: nn.Module, x: Tensor, delta: Tensor, transpose: bool) -> Tensor:
    return _outer(x, delta, transpose)


def _conv2d(module: nn.Module, x: Tensor, delta: Tensor, transpose: bool) -> Tensor:
    assert isinstance(module, nn.Conv2d)
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), (0, 0)
    else:
        padding = (module.padding[0], module.padding[1])
    columns = F.unfold(
        x.to(accumulation_dtype(x)), module.kernel_size, module.dilation, padding, module.stride
    )
    delta = delta.flatten(2).mT
    groups = module.groups
    if groups == 1:
        return _outer(columns.mT, delta, transpose)
    parts = zip(columns.chunk(groups, 1), delta.chunk(groups, 2), strict=True)
    whole = torch.cat([_outer(c.mT, d, False) for c, d in parts], dim=1)
    return whole.mT if transpose else whole


def _embedding(module: nn.Module, ids: Tensor, delta: Tensor, transpose: bool) -> Tensor:
    assert isinstance(module, nn.Embedding)
    delta = delta.to(accumulation_dtype(delta)).reshape(len(ids), -1, module.embedding_dim)
    flat = ids.reshape(len(ids), -1)
    if module.padding_idx is not None:
        delta = delta.masked_fill((flat == module.padding_idx)[..., None], 0)
    size = (len(ids), module.num_embeddings, module.embedding_dim)
    grads = torch.zeros(size, dtype=delta.dtype, device=delta.device)
    grads.scatter_add_(1, flat[..., None].expand_as(delta), delta)
    return grads.mT if transpose else grads


def normalised(module: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """The layer's output before its scale and shift, and the feature dimension."""
    x = x.to(accumulation_dtype(x))
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, None, None, module.eps), -1
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, None, None, module.eps), 1
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        shape = [1, -1] + [1] * (x.ndim - 2)
        assert module.running_mean is not None
        assert module.running_var is not None
        scale = (module.running_var + module.eps).rsqrt()
        return (x - module.running_mean.view(shape)) * scale.view(shape), 1
    eps = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    if eps is None:
        eps = torch.finfo(x.dtype).eps
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps), -1


def _norm(module: nn.Module, x: Tensor, delta: Tensor, transpose: bool) -> Tensor:
    scaled, features = normalised(module, x)
    return bias_gradient(scaled * delta, features)


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D: a linear layer that stores its weight as (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_norm(module: nn.Module) -> bool:
    known = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    return isinstance(module, known) or type(module).__name__.endswith("RMSNorm")


def _refuse_norm(module: nn.Module) -> str | None:
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return "LayerNorm over several dimensions"
    if isinstance(module, nn.RMSNorm) and len(module.normalized_shape) != 1:
        return "RMSNorm over several dimensions"
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.track_running_stats:
        return "BatchNorm without running statistics, which mixes the samples of a batch"
    return None


def _refuse_embedding(module: nn.Module) -> str | None:
    assert isinstance(module, nn.Embedding)
    if module.scale_grad_by_freq:
        return "Embedding(scale_grad_by_freq=True), whose gradient depends on the batch"
    return "Embedding(max_norm=...)" if module.max_norm is not None else None


def _matrix_shape(module: nn.Module) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0]), int(weight[0].numel())


def _vector_shape(module: nn.Module) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return 1, int(weight.numel())


LAYERS = (
    Layer("linear", lambda m: isinstance(m, nn.Linear), _linear, _matrix_shape, outer=True),
    Layer("conv1d", _is_conv1d, _linear, lambda m: _matrix_shape(m)[::-1], outer=True),
    Layer("conv2d", lambda m: isinstance(m, nn.Conv2d), _conv2d, _matrix_shape, features=1),
    Layer(
        "embedding", lambda m: isinstance(m, nn.Embedding), _embedding, _matrix_shape,
        refuse=_refuse_embedding,
    ),
    Layer("norm", _is_norm, _norm, _vector_shape, refuse=_refuse_norm),
)  # fmt: skip


def _unread(module: nn.Module, x: Tensor, delta: Tensor, transpose: bool) -> Tensor:
    raise AssertionError("there is no layer to read")


# experts that see routed tokens, patches of images, weights that are composed: one backward pass
# per sample, which needs nothing of the layer
ONE_BY_ONE = Layer("one by one", lambda m: False, _unread, _matrix_shape, hooked=False)


def layer_of(module: nn.Module) -> Layer | None:
    """The entry that differentiates this module, if any."""
    return next((layer for layer in LAYERS if layer.accepts(module)), None)


def features_of(module: nn.Module, layer: Layer) -> int:
    """The dimension of delta that a bias of this module belongs to."""
    channels_first = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    return 1 if isinstance(module, channels_first) else layer.features
