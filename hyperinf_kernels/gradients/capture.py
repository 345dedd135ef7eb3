"""Per-sample gradients of a whole batch from one forward and one backward pass.

A forward hook on each layer that owns a block remembers the layer's input and asks autograd for the
gradient at its output; both together are the gradient of every sample. No parameter requires grad
meanwhile, so no weight gradient is ever computed, and backward stops at the first such layer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from ..errors import BadRowError, InputError
from ..ops import per_sample_dot
from ..ops.sketch import combine_rows
from ..solvers.inputs import check_finite
from .blocks import Block, block_parameters, find_blocks
from .inputs import local
from .layers import bias_gradient, outer_factors
from .losses import CausalLM, Loss, make_loss
from .own_loss import check_own_loss
from .scaling import scaled
from .tokens import token_factors
from .verify import verify_first_batch

TokenSink = Callable[[dict[str, list[tuple[Tensor, Tensor]]]], None]
# what is kept of one use of a layer, (B, ...): from its block, input and output gradient
Reader = Callable[[Block, Tensor, Tensor], Tensor]
# and of a block's gradients (B, r, d), where they come whole
Keeper = Callable[[Block, Tensor], Tensor]


def per_sample_gradients(
    model: nn.Module,
    batch: Any,
    *,
    loss: str | Loss = "causal_lm",
    blocks: str | Sequence[str] = "lora",
    check: bool = True,
) -> dict[str, Tensor]:
    """The gradient of each sample's loss with respect to each block.

    Args:
        model: any module; used in eval mode and given back in the mode it had, with its hooks,
            `requires_grad` flags and `.grad` untouched.
        batch: what `loss(model, batch)` takes; tensors are moved to the model's device.
        loss: "causal_lm", "masked_lm", "seq2seq_lm", "sequence_classification",
            "token_classification", or a callable that returns the (B,) losses of the samples. A
            sample's loss must not depend on others.
        blocks: "lora", a regular expression, or a list of parameter names (see `find_blocks`).
        check: compare the loss with the model's own and the gradients with autograd's, which
            takes two more backward passes; switch it off after a first batch of the same kind.

    Returns:
        {block: (B, r, d)} in fp32 (fp64 for a fp64 model), in the order of the parameters.

    Raises:
        InputError: unsupported blocks, a loss of the wrong shape, NaN or inf (block and row named).
    """
    chosen, made = find_blocks(model, blocks), make_loss(loss)
    with prepared(model):
        if not check:
            return batch_gradients(model, batch, made, chosen)
        batch = move(batch, next(model.parameters()).device)
        check_own_loss(model, batch, made)
        grads = batch_gradients(model, batch, made, chosen)
        verify_first_batch(model, batch, made, chosen, grads)
        return grads


@contextlib.contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter that requires grad; everything as before on the way out."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    checkpointed = [m for m, _ in modes if getattr(m, "gradient_checkpointing", False) is True]
    functions = [(m, m._gradient_checkpointing_func) for m in checkpointed
                 if hasattr(m, "_gradient_checkpointing_func")]  # fmt: skip
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for module in checkpointed:
            # transformers checkpoints only in training mode; the layer's children stay in eval mode
            module.training = not _drops(module)
        for module, _ in functions:
            # a reentrant checkpoint is differentiated only where its input requires grad
            module._gradient_checkpointing_func = functools.partial(  # type: ignore[assignment]
                torch.utils.checkpoint.checkpoint, use_reentrant=False
            )
        yield
    finally:
        for module, function in functions:
            module._gradient_checkpointing_func = function
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _drops(module: nn.Module) -> bool:
    """Whether the module itself would apply functional dropout in training mode."""
    own = vars(module).items()
    return any("drop" in key and isinstance(value, float) and value > 0 for key, value in own)


def batch_gradients(
    model: nn.Module, batch: Any, loss: Loss, blocks: Sequence[Block],
    tokens: TokenSink | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """`per_sample_gradients` of a `prepared` model.

    `tokens` is called with the batch's {block: [(left (t, r), right (t, d)), ...]}, one pair per
    use of the layer (see `token_factors`).
    """
    capture = _captured(
        model, batch, loss, blocks, gradient_of, lambda block, grads: grads, tokens is not None
    )
    found = {}
    for block in blocks:
        grad = capture.found.get(block.name)
        found[block.name] = capture.zeros(block, block.shape) if grad is None else grad
        _check_gradients(block.name, found[block.name])
    if tokens is not None:
        tokens({name: capture.tokens.get(name, []) for name in found})
    return found


def batch_dots(
    model: nn.Module, batch: Any, loss: Loss, blocks: Sequence[Block],
    W: Mapping[str, Tensor], probes: Probes | None = None,
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
        return products(block, gradient_of(block, x, delta))

    def products(block: Block, grads: Tensor) -> Tensor:
        stack = W[block.name]
        if probes is not None:
            probes.add(block.name, grads)
        dtype = torch.promote_types(grads.dtype, stack.dtype)
        return grads.flatten(1).to(dtype) @ stack.flatten(1).mT.to(dtype)

    restart = None if probes is None else probes.restart
    capture = _captured(model, batch, loss, blocks, dots, products, restart=restart)
    found = {}
    for block in blocks:
        part = capture.found.get(block.name)
        found[block.name] = capture.zeros(block, (len(W[block.name]),)) if part is None else part
    # one question to the device for all blocks; the second pass names the block and the row, or
    # finds finite gradients whose products overflow, which is the scores' matter
    sizes = torch.stack([part.abs().sum(dtype=torch.float64) for part in found.values()])
    if not bool(torch.isfinite(sizes).all()):
        batch_gradients(model, batch, loss, blocks)
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

    def restart(self) -> None:
        """Forget the images, of a pass that is run again; the weights stay."""
        self.images.clear()

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


def _check_gradients(name: str, grads: Tensor) -> None:
    """Name the first row whose gradient holds NaN or inf."""
    try:
        check_finite(name, grads, "batch")
    except InputError:
        row = int(torch.nonzero(~torch.isfinite(grads).flatten(1).all(1))[0])
        raise BadRowError(row, f"has a gradient with NaN or inf (block {name})") from None


def gradient_of(block: Block, x: Tensor, delta: Tensor) -> Tensor:
    """(B, r, d) from the input of the block's layer and the loss gradient at its output."""
    if block.is_bias:
        return bias_gradient(delta, block.features)
    return block.layer.weight(block.module, x, delta, block.transpose)


def _captured(
    model: nn.Module, batch: Any, loss: Loss, blocks: Sequence[Block],
    read: Reader, keep: Keeper, with_tokens: bool = False,
    restart: Callable[[], None] | None = None,
) -> Capture:  # fmt: skip
    """One forward and one backward pass of a batch, read at every layer that owns a block."""
    device = next(model.parameters()).device
    batch = move(batch, device)
    model = local(model)
    capture = Capture(blocks, read, keep, with_tokens)
    alone = [block for block in blocks if not block.layer.hooked]

    def one_pass(scale: float) -> Capture:
        if restart is not None:
            restart()
        with (
            capture.hooked(scale),
            requiring_grad(alone),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            if isinstance(loss, CausalLM):
                losses = loss(model, batch, protected=capture.modules)
            else:
                losses = loss(model, batch)
            check_losses(losses)
            if not losses.requires_grad:
                raise InputError("the loss does not depend on any of the chosen blocks")
            capture.samples = len(losses)
            # hooks run inside backward and must not inherit a caller's autocast
            with torch.autocast(device.type, enabled=False):
                if capture.modules:
                    losses.backward(torch.full_like(losses, scale), retain_graph=bool(alone))
                if alone:
                    capture.differentiate(alone, losses, scale)
        return capture

    scaled(model, one_pass, lambda found: found.found.values())
    capture.check_all_seen()
    return capture


@contextlib.contextmanager
def requiring_grad(blocks: Sequence[Block]) -> Iterator[None]:
    """Parameters of a `prepared` model that autograd differentiates itself."""
    parameters = block_parameters(blocks).values()
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def check_losses(losses: Any) -> None:
    """One finite number per sample, or an InputError that says what there is instead."""
    if not isinstance(losses, Tensor) or losses.ndim != 1:
        what = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise InputError(
            f"the loss must return one number per sample, shape (B,), got {what}; a mean over "
            "the batch cannot be attributed"
        )
    bad = torch.nonzero(~torch.isfinite(losses.detach())).flatten()
    if len(bad):
        raise BadRowError(int(bad[0]), f"has loss {float(losses.detach()[bad[0]])}")


def move(batch: Any, device: torch.device) -> Any:
    """Every tensor of a dict, list or tuple on `device`."""
    if isinstance(batch, Tensor):
        # detached, so that backward leaves no .grad on a caller's tensor
        with torch.inference_mode(False):
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
    """What one backward pass of a batch shows at the blocks' layers."""

    def __init__(
        self, blocks: Sequence[Block], read: Reader, keep: Keeper, with_tokens: bool = False
    ) -> None:
        self.read, self.keep, self.with_tokens = read, keep, with_tokens
        self.of: dict[nn.Module, list[Block]] = {}
        for block in blocks:
            if block.layer.hooked:
                self.of.setdefault(block.module, []).append(block)
        self.modules = frozenset(self.of)
        self.samples: int | None = None
        self._forget(1.0)

    def _forget(self, scale: float) -> None:
        self.scale = scale
        self.found: dict[str, Tensor] = {}
        self.tokens: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self.blind: set[nn.Module] = set()
        self.listening = True

    @contextlib.contextmanager
    def hooked(self, scale: float) -> Iterator[None]:
        """Hooks on the layers for one pass whose losses are multiplied by `scale`."""
        self._forget(scale)
        handles = [
            module.register_forward_hook(self._after_forward, with_kwargs=True)
            for module in self.of
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def differentiate(self, blocks: Sequence[Block], losses: Tensor, scale: float) -> None:
        """Blocks without a layer to listen at: one backward pass per sample, of the same graph."""
        self.listening = False
        parameters = block_parameters(blocks)
        held = {name: p.grad for name, p in parameters.items()}
        rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
        try:
            for i, loss in enumerate(losses):
                for p in parameters.values():
                    p.grad = None
                loss.backward(torch.full_like(loss, scale), retain_graph=i + 1 < len(losses))
                for block in blocks:
                    grad = parameters[block.name].grad
                    grad = torch.zeros_like(parameters[block.name]) if grad is None else grad
                    wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
                    rows[block.name].append(block.layout(wide / scale))
        finally:
            for name, p in parameters.items():
                p.grad = held[name]
        for block in blocks:
            self.found[block.name] = self.keep(block, torch.stack(rows.pop(block.name)))

    def check_all_seen(self) -> None:
        """Raise InputError for a layer that ran, but only where no gradient is recorded."""
        for module in self.blind:
            raise InputError(
                f"block {self.of[module][0].name}: its layer ran without gradients (torch.no_grad, "
                "or a reentrant checkpoint whose input requires none: use_reentrant=False); leave "
                "it out of blocks"
            )

    def _after_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> Tensor | None:
        # the first pass of a reentrant checkpoint runs without grad and is repeated with it
        if not torch.is_grad_enabled():
            self.blind.add(module)
            return None
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not given or not isinstance(out, Tensor):
            raise InputError(
                f"block {self.of[module][0].name}: its layer takes {len(given)} tensors and "
                f"returns a {type(out).__name__}; one tensor each is supported"
            )
        x = given[0].detach()
        version = x._version

        def collect(delta: Tensor) -> None:
            if x._version != version:
                raise InputError(
                    f"block {self.of[module][0].name}: the input of its layer was changed in place "
                    "after the layer ran, so its gradient cannot be formed"
                )
            if self.listening:
                self._collect(module, x, delta)

        source = out if out.requires_grad else out.detach().requires_grad_()
        tapped: Tensor = Tap.apply(source, collect)
        return tapped

    def _collect(self, module: nn.Module, x: Tensor, delta: Tensor) -> None:
        self.blind.discard(module)
        if self.scale != 1:
            delta = delta.to(torch.promote_types(delta.dtype, torch.float32)) / self.scale
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
        parameter = block_parameters([block])[block.name]
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        return torch.zeros(self.samples or 0, *shape, dtype=dtype, device=parameter.device)
