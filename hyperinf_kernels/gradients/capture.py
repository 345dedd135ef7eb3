"""Per-sample gradients of a whole batch from one forward and one backward pass.

A forward hook on each layer that owns a block remembers the layer's input and asks autograd for the
gradient at its output; both together are the gradient of every sample. No parameter requires grad
meanwhile, so no weight gradient is ever computed, and backward stops at the first such layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops import per_sample_dot
from ..ops.sketch import combine_rows
from ..solvers.inputs import check_finite
from .blocks import Block, find_blocks
from .layers import bias_gradient, outer_factors
from .losses import CausalLM, Loss, make_loss
from .tokens import token_factors

TokenSink = Callable[[dict[str, list[tuple[Tensor, Tensor]]]], None]
# what is kept of one use of a layer, (B, ...): from its block, input and output gradient
Reader = Callable[[Block, Tensor, Tensor], Tensor]


def per_sample_gradients(
    model: nn.Module,
    batch: Any,
    *,
    loss: str | Loss = "causal_lm",
    blocks: str | Sequence[str] = "lora",
) -> dict[str, Tensor]:
    """The gradient of each sample's loss with respect to each block.

    Args:
        model: any module; used in eval mode and given back in the mode it had, with its hooks,
            `requires_grad` flags and `.grad` untouched.
        batch: what `loss(model, batch)` takes; tensors are moved to the model's device.
        loss: "causal_lm", "sequence_classification", "token_classification", or a callable that
            returns the (B,) losses of the samples. A sample's loss must not depend on others.
        blocks: "lora", a regular expression, or a list of parameter names (see `find_blocks`).

    Returns:
        {block: (B, r, d)} in fp32 (fp64 for a fp64 model), in the order of the parameters.

    Raises:
        InputError: unsupported blocks, a loss of the wrong shape, NaN or inf (block and row named).
    """
    chosen = find_blocks(model, blocks)
    with prepared(model):
        return batch_gradients(model, batch, make_loss(loss), chosen)


@contextlib.contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter that requires grad; everything as before on the way out."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    hook = None
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        checkpointed = [m for m, _ in modes if getattr(m, "gradient_checkpointing", False) is True]
        for module in checkpointed:
            # transformers checkpoints only in training mode; the layer's children stay in eval mode
            module.training = not _drops(module)
        if checkpointed and hasattr(model, "get_input_embeddings"):
            # reentrant checkpointing is differentiated only if an input requires grad
            embed: Any = cast(Any, model).get_input_embeddings()
            hook = embed.register_forward_hook(lambda m, args, out: out.requires_grad_())
        yield
    finally:
        if hook is not None:
            hook.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _drops(module: nn.Module) -> bool:
    """Whether the module itself would apply functional dropout in training mode."""
    own = vars(module).items()
    return any("drop" in key and isinstance(value, float) and value > 0 for key, value in own)


def batch_gradients(
    model: nn.Module, batch: Any, loss: Loss, blocks: Sequence[Block], first_row: int = 0,
    tokens: TokenSink | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """`per_sample_gradients` of a `prepared` model; errors count rows from `first_row`.

    `tokens` is called with the batch's {block: [(left (t, r), right (t, d)), ...]}, one pair per
    use of the layer (see `token_factors`).
    """
    capture = _captured(model, batch, loss, blocks, first_row, gradient_of, tokens is not None)
    found = {}
    for block in blocks:
        grad = capture.found.get(block.name)
        found[block.name] = capture.zeros(block, block.shape) if grad is None else grad
        check_finite(block.name, found[block.name], "batch", first_row)
    if tokens is not None:
        tokens({name: capture.tokens.get(name, []) for name in found})
    return found


def batch_dots(
    model: nn.Module, batch: Any, loss: Loss, blocks: Sequence[Block],
    W: Mapping[str, Tensor], first_row: int = 0, probes: Probes | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """`{name: einsum("brd,mrd->bm", grads[name], W[name])}` of `batch_gradients`.

    Each layer's gradients meet W while backward is at that layer, inside `per_sample_dot` where
    they are an outer product of its input and output gradient: a batch's gradients never exist all
    at once, and on a GPU not even one layer's.

    Args:
        W: {block: (m, r, d)}.
        probes: also takes the batch's gradients summed with its weights.

    Raises:
        InputError: a gradient holds NaN or inf (block and row named).
    """

    def dots(block: Block, x: Tensor, delta: Tensor) -> Tensor:
        stack = W[block.name]
        if block.layer.outer and not block.is_bias:
            factors = outer_factors(x, delta, block.transpose)
            if probes is not None:
                probes.add_factors(block.name, *factors)
            return per_sample_dot(*factors, stack)
        grads = gradient_of(block, x, delta)
        if probes is not None:
            probes.add(block.name, grads)
        dtype = torch.promote_types(grads.dtype, stack.dtype)
        return grads.flatten(1).to(dtype) @ stack.flatten(1).mT.to(dtype)

    capture = _captured(model, batch, loss, blocks, first_row, dots)
    found = {}
    for block in blocks:
        part = capture.found.get(block.name)
        found[block.name] = capture.zeros(block, (len(W[block.name]),)) if part is None else part
    # one question to the device for all blocks; the second pass names the block and the row, or
    # finds finite gradients whose products overflow, which is the scores' matter
    sizes = torch.stack([part.abs().sum(dtype=torch.float64) for part in found.values()])
    if not bool(torch.isfinite(sizes).all()):
        batch_gradients(model, batch, loss, blocks, first_row)
    return found


class Probes:
    """A batch's gradients summed with a few weights: X^T P (s, r, d) for X (B, s), by block.

    Args:
        draw: X of a block for so many rows, or None where a block needs none; asked once a batch.
    """

    def __init__(self, draw: Callable[[str, int], Tensor | None]) -> None:
        self._draw = draw
        self._asked: set[str] = set()
        self.drawn: dict[str, Tensor] = {}
        self.images: dict[str, Tensor] = {}

    def add(self, name: str, grads: Tensor) -> None:
        """Gradients (B, r, d) of one use of a layer."""
        X = self._weights(name, len(grads))
        if X is not None:
            self._take(name, combine_rows(X, grads.flatten(1)).view(-1, *grads.shape[1:]))

    def add_factors(self, name: str, left: Tensor, right: Tensor) -> None:
        """The same where they are left (B, T, r)^T right (B, T, d): one product over all tokens."""
        X = self._weights(name, len(left))
        if X is not None:
            dtype = torch.float64 if left.dtype == torch.float64 else torch.float32
            weighted = left.to(dtype).unsqueeze(2) * X.to(dtype)[:, None, :, None]
            image = weighted.flatten(2).flatten(0, 1).mT @ right.to(dtype).flatten(0, 1)
            self._take(name, image.view(X.shape[1], left.shape[-1], right.shape[-1]).double())

    def _weights(self, name: str, count: int) -> Tensor | None:
        if name not in self._asked:
            self._asked.add(name)
            X = self._draw(name, count)
            if X is not None:
                self.drawn[name] = X
        return self.drawn.get(name)

    def _take(self, name: str, image: Tensor) -> None:
        held = self.images.get(name)
        self.images[name] = image if held is None else held + image


def gradient_of(block: Block, x: Tensor, delta: Tensor) -> Tensor:
    """(B, r, d) from the input of the block's layer and the loss gradient at its output."""
    if block.is_bias:
        return bias_gradient(delta, block.features)
    return block.layer.weight(block.module, x, delta, block.transpose)


def _captured(
    model: nn.Module, batch: Any, loss: Loss, blocks: Sequence[Block], first_row: int,
    read: Reader, with_tokens: bool = False,
) -> Capture:  # fmt: skip
    """One forward and one backward pass of a batch, read at every layer that owns a block."""
    device = next(model.parameters()).device
    batch = move(batch, device)
    with (
        Capture(blocks, read, with_tokens) as capture,
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        if isinstance(loss, CausalLM):
            losses = loss(model, batch, protected=capture.modules)
        else:
            losses = loss(model, batch)
        if not isinstance(losses, Tensor) or losses.ndim != 1:
            what = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise InputError(
                f"the loss must return one number per sample, shape (B,), got {what}; a mean over "
                "the batch cannot be attributed"
            )
        check_losses(losses.detach(), first_row)
        if not losses.requires_grad:
            raise InputError("the loss does not depend on any of the chosen blocks")
        capture.samples = len(losses)
        # hooks run inside backward and must not inherit a caller's autocast
        with torch.autocast(device.type, enabled=False):
            losses.sum().backward()
    return capture


def check_losses(losses: Tensor, first_row: int = 0) -> None:
    """Name the first row whose loss is NaN or inf."""
    bad = torch.nonzero(~torch.isfinite(losses)).flatten()
    if len(bad):
        raise InputError(
            f"the loss of row {first_row + int(bad[0])} is {float(losses[bad[0]])} "
            f"({len(bad)} of {len(losses)} rows in this batch)"
        )


def move(batch: Any, device: torch.device) -> Any:
    """Every tensor of a dict, list or tuple on `device`."""
    if isinstance(batch, Tensor):
        # detached, so that backward leaves no .grad on a caller's tensor
        return (batch.clone() if batch.is_inference() else batch.detach()).to(device)
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(move(value, device) for value in batch)
    return batch


class Tap(torch.autograd.Function):
    """Identity that shows its gradient to a function.

    The copy makes it safe against operations that change the layer's output in place, which would
    leave a hook on the output itself behind on a dead node.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, collect: Callable[[Tensor], None]) -> Tensor:
        ctx.collect = collect
        return out.clone()

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.collect(delta.detach())
        return delta, None


class Capture:
    """Hooks on the blocks' layers for the duration of one forward and backward pass."""

    def __init__(self, blocks: Sequence[Block], read: Reader, with_tokens: bool = False) -> None:
        self.read, self.with_tokens = read, with_tokens
        self.tokens: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.of: dict[nn.Module, list[Block]] = {}
        for block in blocks:
            self.of.setdefault(block.module, []).append(block)
        self.modules = frozenset(self.of)
        self.samples: int | None = None
        self.found: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Capture:
        for module in self.of:
            self._handles.append(module.register_forward_hook(self._after_forward))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _after_forward(
        self, module: nn.Module, args: tuple[Any, ...], out: Tensor
    ) -> Tensor | None:
        # the first pass of a reentrant checkpoint runs without grad and is repeated with it
        if not torch.is_grad_enabled():
            return None
        x = args[0].detach()
        version = x._version

        def collect(delta: Tensor) -> None:
            if x._version != version:
                raise InputError(
                    f"block {self.of[module][0].name}: the input of its layer was changed in place "
                    "after the layer ran, so its gradient cannot be formed"
                )
            self._collect(module, x, delta)

        source = out if out.requires_grad else out.detach().requires_grad_()
        tapped: Tensor = Tap.apply(source, collect)
        return tapped

    def _collect(self, module: nn.Module, x: Tensor, delta: Tensor) -> None:
        for block in self.of[module]:
            if len(delta) != self.samples or len(x) != self.samples:
                raise InputError(
                    f"block {block.name}: its layer sees {len(x)} rows and returns {len(delta)} "
                    f"for {self.samples} samples; the first dimension must be the sample"
                )
            value = self.read(block, x, delta)
            if self.with_tokens:
                self.tokens.setdefault(block.name, []).append(token_factors(block, x, delta))
            before = self.found.get(block.name)
            # a layer used several times in one forward pass has the sum of its uses' gradients
            self.found[block.name] = value if before is None else before + value

    def zeros(self, block: Block, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape) for a block that the loss did not reach."""
        parameter = getattr(block.module, block.name.rpartition(".")[2])
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        return torch.zeros(self.samples or 0, *shape, dtype=dtype, device=parameter.device)
