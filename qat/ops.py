"""What a layer computes with its weight, forward and backward: one class per kind of layer, no quantization here.

    forward(module, inputs, weights)                    -> y
    backward(module, grad, inputs, weights, needs)      -> gradients of inputs, gradients of weights

`inputs` are the tensors of the call (x, then the bias), `weights` the weights to use instead of the module's own.
`needs` says for each input and then for each weight whether its gradient is wanted (None is returned otherwise).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qat.errors import QATError

Tensors = tuple[Tensor | None, ...]


class LayerOp:
    """Stateless; `kinds` maps each weight's name to its `qat.layout.Layout` kind."""

    # backward runs the forward again, which must see the same random numbers
    replays: bool = False
    # the gradient of the weight needs no weight and that of x no x: they are found one after the other, in new memory
    separable: bool = False

    def kinds(self, module: nn.Module) -> dict[str, str]:
        raise TypeError(f"{type(self).__name__} has no kinds")

    def reasons(self, module: nn.Module) -> list[str]:
        """Why this module cannot run with a replaced weight; empty means it can."""
        return []

    def inputs(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensors:
        """The tensors of one call, ready for `forward`: x first (differentiable preparation, as padding, is done)."""
        (x,) = args if args else tuple(kwargs.values())
        return x, module.bias

    def given(self, module: Any, count: int) -> int:
        """How many of `count` inputs the caller gave (the others are parameters of the module)."""
        return 1

    def autocasts(self) -> bool:
        """Whether torch's autocast would run this layer in its lower dtype."""
        return True

    def needs_x(self, needs: Sequence[bool]) -> bool:
        """Whether backward reads x; `needs` says which weights' gradients are wanted."""
        return True

    def forward(self, module: Any, inputs: Tensors, weights: Sequence[Tensor]) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no forward")

    def backward(
        self, module: Any, grad: Tensor, inputs: Tensors, weights: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensors, Tensors]:
        raise TypeError(f"{type(self).__name__} has no backward")


class LinearOp(LayerOp):
    """y = x w^T + b with w [O, I]; `transposed`: y = x w + b with w [I, O] (Conv1D of GPT-2)."""

    separable = True

    def __init__(self, transposed: bool = False) -> None:
        self.transposed = transposed

    def kinds(self, module: nn.Module) -> dict[str, str]:
        return {"weight": "transposed" if self.transposed else "linear"}

    def needs_x(self, needs: Sequence[bool]) -> bool:
        return any(needs)

    def forward(self, module: Any, inputs: Tensors, weights: Sequence[Tensor]) -> Tensor:
        x, bias = inputs
        assert x is not None
        if not self.transposed:
            return F.linear(x, weights[0], bias)
        rows = x.reshape(-1, x.shape[-1])
        y = rows @ weights[0] if bias is None else torch.addmm(bias, rows, weights[0])
        return y.view(*x.shape[:-1], weights[0].shape[1])

    def backward(
        self, module: Any, grad: Tensor, inputs: Tensors, weights: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensors, Tensors]:
        x = inputs[0]
        need_x, need_bias, need_w = needs
        rows = grad if grad.dim() == 2 else grad.reshape(-1, grad.shape[-1])
        dx = None
        if need_x:
            dx = torch.mm(rows, weights[0].t() if self.transposed else weights[0])
            if grad.dim() != 2:
                dx = dx.view(*grad.shape[:-1], dx.shape[1])
        dbias = rows.sum(0) if need_bias else None
        dw = None
        if need_w:
            assert x is not None
            x_BI = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
            dw = torch.mm(x_BI.t(), rows) if self.transposed else torch.mm(rows.t(), x_BI)
        return (dx, dbias), (dw,)


class EmbeddingOp(LayerOp):
    """y = w[x] with w [V, D] and integer x of any shape."""

    def kinds(self, module: nn.Module) -> dict[str, str]:
        return {"weight": "embedding"}

    def reasons(self, module: Any) -> list[str]:
        found = []
        if module.max_norm is not None:
            found.append("max_norm renormalises the weight in place during the forward; set max_norm=None")
        if module.sparse:
            found.append("sparse=True gives sparse gradients, which a quantizer cannot pass on; set sparse=False")
        return found

    def inputs(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensors:
        (x,) = args if args else tuple(kwargs.values())
        return (x,)

    def autocasts(self) -> bool:
        return False

    def forward(self, module: Any, inputs: Tensors, weights: Sequence[Tensor]) -> Tensor:
        x = inputs[0]
        assert x is not None
        return F.embedding(x, weights[0], module.padding_idx, None, 2.0, module.scale_grad_by_freq, False)

    def backward(
        self, module: Any, grad: Tensor, inputs: Tensors, weights: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensors, Tensors]:
        if not needs[1]:
            return (None,), (None,)
        padding = -1 if module.padding_idx is None else module.padding_idx
        count = weights[0].shape[0]
        dw = torch.ops.aten.embedding_dense_backward(grad, inputs[0], count, padding, module.scale_grad_by_freq)
        return (None,), (dw,)


class ConvOp(LayerOp):
    """Convolutions of 1 to 3 dimensions and their transposes; padding that is not plain zeros is applied before."""

    def __init__(self, dims: int, transposed: bool = False) -> None:
        self.dims = dims
        self.transposed = transposed

    def kinds(self, module: nn.Module) -> dict[str, str]:
        return {"weight": "deconv" if self.transposed else "conv"}

    def inputs(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensors:
        x = args[0] if args else kwargs["input"]
        if not self.transposed and self._pads_first(module):
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        if self.transposed:
            size = args[1] if len(args) > 1 else kwargs.get("output_size")
            padding = module._output_padding(
                x, size, module.stride, module.padding, module.kernel_size, self.dims, module.dilation
            )
            # the sizes travel as a tensor on the host so that backward sees what forward used
            return x, module.bias, torch.tensor(padding)
        return x, module.bias

    @staticmethod
    def _pads_first(module: Any) -> bool:
        return module.padding_mode != "zeros" or isinstance(module.padding, str)

    def _geometry(self, module: Any, inputs: Tensors) -> tuple[Any, ...]:
        """stride, padding, dilation, transposed, output_padding, groups: the order of aten::convolution."""
        padding = (0,) * self.dims if not self.transposed and self._pads_first(module) else module.padding
        output_padding = (0,) * self.dims
        if self.transposed:
            sizes = inputs[2]
            assert sizes is not None
            output_padding = tuple(sizes.tolist())
        return module.stride, padding, module.dilation, self.transposed, output_padding, module.groups

    def forward(self, module: Any, inputs: Tensors, weights: Sequence[Tensor]) -> Tensor:
        x, bias = inputs[:2]
        assert x is not None
        batched = x if x.dim() == self.dims + 2 else x.unsqueeze(0)
        y = torch.convolution(batched, weights[0], bias, *self._geometry(module, inputs))
        return y if batched is x else y.squeeze(0)

    def backward(
        self, module: Any, grad: Tensor, inputs: Tensors, weights: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensors, Tensors]:
        x, bias = inputs[:2]
        assert x is not None
        single = x.dim() != self.dims + 2
        if single:
            x, grad = x.unsqueeze(0), grad.unsqueeze(0)
        mask = [needs[0], needs[-1], needs[1]]
        sizes = None if bias is None else list(bias.shape)
        dx, dw, dbias = torch.ops.aten.convolution_backward(
            grad, x, weights[0], sizes, *self._geometry(module, inputs), mask
        )
        if single and dx is not None:
            dx = dx.squeeze(0)
        rest: Tensors = (None,) if self.transposed else ()
        return (dx, dbias, *rest), (dw,)


class ExpertsOp(LayerOp):
    """Experts kept as 3-D parameters: the module's own forward runs with the replaced weights.

    Backward runs it once more (nothing inside is kept alive between the two), so any routing implementation of the
    model library works; the price is one more forward of the experts.
    """

    replays = True

    def kinds(self, module: nn.Module) -> dict[str, str]:
        kind = "experts_t" if self._transposed(module) else "experts"
        return {name: kind for name, value in module.named_parameters(recurse=False) if value.dim() == 3}

    @staticmethod
    def _transposed(module: nn.Module) -> bool:
        """Whether weights lie as [E, I, O]: the module says so, or the shapes of its two projections do."""
        said = getattr(module, "is_transposed", None)
        up, down = module._parameters.get("gate_up_proj"), module._parameters.get("down_proj")
        if said is not None or up is None or down is None:
            return bool(said)
        return up.shape[2] == 2 * down.shape[1] and up.shape[1] == down.shape[2]

    def inputs(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensors:
        if kwargs:
            call = inspect.signature(module._qat.original.forward).bind(module, *args, **kwargs)
            call.apply_defaults()
            args = call.args[1:]
        for value in args:
            if value is not None and not isinstance(value, Tensor):
                raise QATError(
                    f"{type(module).__name__} was called with a {type(value).__name__}; experts are quantized only "
                    "where all arguments are tensors: keep them with a rule that has keep_float: true"
                )
        return (*args, *(p for _, p in self._others(module)))

    def given(self, module: Any, count: int) -> int:
        return count - len(self._others(module))

    def _others(self, module: nn.Module) -> list[tuple[str, nn.Parameter]]:
        names = self.kinds(module)
        return [(name, p) for name, p in module.named_parameters(recurse=False) if name not in names]

    def forward(self, module: Any, inputs: Tensors, weights: Sequence[Tensor]) -> Tensor:
        others = [name for name, _ in self._others(module)]
        count = len(inputs) - len(others)
        names = [*self.kinds(module), *others]
        live = dict(zip(names, [*weights, *inputs[count:]], strict=True))
        kept = {name: module._parameters[name] for name in names}
        forward: Callable[..., Tensor] = module._qat.original.forward
        module._parameters.update(live)
        try:
            return forward(module, *inputs[:count])
        finally:
            module._parameters.update(kept)

    def backward(
        self, module: Any, grad: Tensor, inputs: Tensors, weights: Sequence[Tensor], needs: Sequence[bool]
    ) -> tuple[Tensors, Tensors]:
        with torch.enable_grad():
            fresh = [
                None if t is None else t.detach().requires_grad_(need)
                for t, need in zip([*inputs, *weights], needs, strict=True)
            ]
            y = self.forward(module, tuple(fresh[: len(inputs)]), fresh[len(inputs) :])  # type: ignore[arg-type]
            wanted = [t for t, need in zip(fresh, needs, strict=True) if need and t is not None]
            found = iter(torch.autograd.grad(y, wanted, grad, allow_unused=True))
        grads = tuple(next(found) if need else None for need in needs)
        return grads[: len(inputs)], grads[len(inputs) :]


def random_state(layer: nn.Module) -> tuple[Tensor, int | None, Tensor | None]:
    """State of the host's random numbers, and of the GPU that the layer lies on."""
    device = next(p.device for p in layer.parameters())
    if device.type != "cuda":
        return torch.get_rng_state(), None, None
    return torch.get_rng_state(), device.index, torch.cuda.get_rng_state(device)


@contextlib.contextmanager
def replayed(state: tuple[Tensor, int | None, Tensor | None] | None) -> Iterator[None]:
    """Inside, random numbers are those of `state`; outside, they go on as if nothing had happened."""
    if state is None:
        yield
        return
    host, index, device = state
    with torch.random.fork_rng(devices=[] if index is None else [index]):
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(device, index)  # type: ignore[arg-type]
        yield


def no_view(y: Tensor) -> Tensor:
    """The same numbers in the same memory, but free to be changed in place (`nn.ReLU(inplace=True)` after a layer):
    autograd refuses that for views that a Function hands out."""
    if torch.compiler.is_compiling():
        free: Tensor = torch.ops.aten._unsafe_view(y, y.shape)
        return free
    if not y._is_view():
        return y
    return torch.ops.aten._unsafe_view(y, y.shape) if y.is_contiguous() else y.clone()
