"""The graph of a deployed model, for formats that need one: the user's own float code, traced, with marks to replace.

    marked(bundle)      a float32 copy of the network without quantizers, with `qat::Weight` where a planned weight is
                        read, `qat::Input` where a layer's input is rounded and `qat::Folded` where a batch norm stood,
                        each with the name of what it stands for
    traced(bundle)      that as ONNX, by `torch.onnx.export`

A mark is an operation that no optimizer knows, so nothing is folded across it, and its name is an attribute of its own:
nothing has to be guessed from values or from the exporter's naming.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from qat.adapters import Adapters
from qat.convert import Bundle
from qat.errors import ExportError
from qat.export.process import silent

DOMAIN = "qat"
WEIGHT, INPUT, LINEAR, FOLDED = "Weight", "Input", "Linear", "Folded"
_GIVE = "give qat.export(..., example_inputs=a batch of the model's own inputs)"
Sizes = tuple[int, int]
# batch and tokens: a batch of two, and not of one, because torch.export takes sizes of one for constants
_SIZES: Sizes = (2, 8)


def graph_reasons(bundle: Bundle) -> list[str]:
    """Why no ONNX graph can be made of this model; empty means it can be tried (tracing itself may still fail)."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        return [f"{' and '.join(missing)} not installed; pip install 'lightning-qat[onnx]'"]
    if find_spec("torch.onnx.ops") is None:
        return [f"torch {torch.__version__} cannot mark nodes of a graph; update it to 2.8 or later"]
    return trace_reasons(bundle)


def trace_reasons(bundle: Bundle) -> list[str]:
    """Why torch.export cannot be tried on this model."""
    found = []
    live = bundle.parameters
    if any(hasattr(value, "placements") for value in live.values()):
        found.append("its weights are sharded and a graph is made in one process; export the checkpoint (qat export)")
    odd = next((name for name, value in live.items() if value.dtype in (torch.float64, torch.complex64)), None)
    if odd is not None:
        found.append(f"{odd} is {live[odd].dtype}; the graph computes in float32: cast the model before training")
    if example_of(bundle) is None:
        found.append(f"it is not known what the model is called with; {_GIVE}")
    return found


# ---- example inputs --------------------------------------------------------------------------------------------------


def example_of(bundle: Bundle, sizes: Sizes = _SIZES) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """(args, kwargs) to call the deployed module with: the bundle's, else the module's `example_input_array` (a word of
    Lightning's), else made from a transformers config, of `sizes`. None: nothing says."""
    given = bundle.example_inputs
    if given is None:
        given = getattr(bundle.module, "example_input_array", None)
    if given is None and bundle.config is not None:
        given = _from_config(bundle.module, sizes)
    if given is None:
        return None
    if isinstance(given, Mapping):
        return (), dict(given)
    return (tuple(given) if isinstance(given, tuple | list) else (given,)), {}


def _from_config(module: Any, sizes: Sizes) -> dict[str, Tensor] | None:
    """Inputs of a transformers model by the kind of its main one; None for another kind than text or images."""
    names = inspect.signature(module.forward).parameters
    config = module.config
    main = getattr(module, "main_input_name", None)
    if main == "pixel_values":
        size = getattr(config, "image_size", None)
        if size is None:
            return None
        height, width = size if isinstance(size, tuple | list) else (size, size)
        return {main: torch.rand(sizes[0], getattr(config, "num_channels", 3), height, width)}
    if main != "input_ids":
        return None
    words = getattr(config, "vocab_size", None) or config.get_text_config().vocab_size
    batch, tokens = sizes[0], min(sizes[1], getattr(config, "max_position_embeddings", sizes[1]))
    ids = torch.arange(batch * tokens).reshape(batch, tokens) % words
    found = {main: ids}
    if "attention_mask" in names:
        found["attention_mask"] = torch.ones_like(ids)
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = ids.clone()
    return found


# a leaf of the inputs -> its free dimensions, as torch.export wants them
Free = Callable[[Any], Any]


def free_dims(value: Any) -> Any:
    """Dimensions that may differ between calls: the batch, and the length of token ids and masks."""
    if not isinstance(value, Tensor):
        return None
    free = range(min(value.dim(), 2 if not value.is_floating_point() else 1))
    return {dim: torch.export.Dim.AUTO for dim in free if value.shape[dim] > 1}


# ---- the copy --------------------------------------------------------------------------------------------------------


def marked(bundle: Bundle, linears: frozenset[str] = frozenset()) -> nn.Module:
    """The plain copy of the network, its planned weights and rounded inputs behind marks.

    linears   parameters whose layers become one mark each, without their weight
    """
    module, layers = bundle.plain()
    for name in bundle.inputs:
        layers[name].register_forward_pre_hook(_rounded(name), with_kwargs=True)
    for name, norm in bundle.norms.items():
        layers[norm].forward = MethodType(_norm(name), layers[norm])
    for name, owner in {**{name: name for name in bundle}, **bundle.tied}.items():
        layer, key = layers[name.rpartition(".")[0]], name.rpartition(".")[2]
        if owner in linears and _is_linear(layer):
            layer.forward = MethodType(_multiplied(owner), layer)
        else:
            parametrize.register_parametrization(layer, key, _Marked(owner), unsafe=True)
    config: Any = getattr(module, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    return module


def _mark(kind: str, x: Tensor, name: str, shape: Any = None) -> Tensor:
    from torch.onnx import ops

    where = x.shape if shape is None else shape
    return ops.symbolic(f"{DOMAIN}::{kind}", [x], {"name": name}, dtype=x.dtype, shape=where)


class _Marked(nn.Module):
    """A parametrization: the weight as a mark gives it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, w: Tensor) -> Tensor:
        return _mark(WEIGHT, w, self.name)


def _rounded(name: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (_mark(INPUT, args[0], name), *args[1:]), kwargs
        first, *_ = kwargs
        return args, {**kwargs, first: _mark(INPUT, kwargs[first], name)}

    return hook


def _norm(name: str) -> Any:
    def forward(norm: nn.Module, x: Tensor) -> Tensor:
        return _mark(FOLDED, x, name)

    return forward


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) or hasattr(layer, "nf")


def _multiplied(name: str) -> Any:
    """The forward of a linear layer as one mark and its bias."""

    def forward(layer: Any, x: Tensor) -> Tensor:
        outputs = layer.nf if hasattr(layer, "nf") else layer.out_features
        y = _mark(LINEAR, x, name, (*x.shape[:-1], outputs))
        return y if layer.bias is None else y + layer.bias

    return forward


# ---- tracing ---------------------------------------------------------------------------------------------------------


def call_of(
    bundle: Bundle, module: nn.Module, free: Free = free_dims, sizes: Sizes = _SIZES
) -> tuple[tuple[Any, Any], Any]:
    """((args, kwargs) to trace `module` with, floats in fp32; the dimensions of each that are free), by name where its
    forward has names. Raises ExportError if it is not known what it is called with."""
    example = example_of(bundle, sizes)
    if example is None:
        raise ExportError(f"it is not known what the model is called with; {_GIVE}")
    args, kwargs = pytree.tree_map_only(Tensor, _as_float, example)
    dims = pytree.tree_map(free, (args, kwargs), is_leaf=lambda v: v is None or isinstance(v, Tensor))
    return _by_name(module, args, kwargs, dims)


@contextlib.contextmanager
def tracing(bundle: Bundle) -> Iterator[None]:
    """Whatever goes wrong inside is an ExportError; the exporter's notices stay inside."""
    try:
        with torch.no_grad(), silent():
            yield
    except Exception as problem:
        why = " ".join(str(problem.__cause__ or problem).split())[:300]
        raise ExportError(
            f"{type(bundle.module).__name__} cannot be traced with these example inputs ({type(problem).__name__}: "
            f"{why}); torch.export says what a model has to look like"
        ) from None


def parameters_read(exported: Any) -> set[str]:
    """Parameters and buffers that a `torch.export` program reads."""
    signature = exported.graph_signature
    held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    return {
        held[node.name]
        for node in exported.graph.nodes
        if node.op == "placeholder" and node.users and node.name in held
    }


def traced(bundle: Bundle, opset: int, linears: frozenset[str] = frozenset()) -> tuple[Any, dict[str, str]]:
    """(`onnx_ir.Model` with marks, float parameter -> the initializer that holds it).

    A float parameter that the graph does not read (a pooler that nothing uses, a counter) is in neither. Batch sizes
    and lengths of token ids are free where the model allows it. Raises ExportError if the model cannot be traced.
    """
    import onnx_ir as ir

    module = marked(bundle, linears)
    names, shapes = call_of(bundle, module)
    with tracing(bundle):
        program: Any = torch.onnx.export(
            module,
            names[0],
            kwargs=names[1],
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes,
            optimize=False,
            verbose=False,
        )
        _simplify(program.model)
    exported = program.exported_program
    model: ir.Model = program.model
    _name_outputs(model, exported)
    _name_dims(model, {**dict(zip(inspect.signature(module.forward).parameters, names[0], strict=False)), **names[1]})
    rename = Adapters(bundle.module).name
    return model, _floats(bundle, model, {rename(name) for name in parameters_read(exported)}, rename)


def _as_float(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype)


def _by_name(module: nn.Module, args: Any, kwargs: Any, dims: Any) -> tuple[tuple[Any, Any], Any]:
    """((args, kwargs), their free dimensions), by the names of the forward's parameters where it has them."""
    parameters = inspect.signature(module.forward).parameters
    kinds = {p.kind: name for name, p in parameters.items()}
    rest = kinds.get(inspect.Parameter.VAR_KEYWORD)
    shapes = {name: value for name, value in dims[1].items() if name in parameters}
    others = {name: value for name, value in dims[1].items() if name not in parameters}
    if rest is not None and others:
        shapes[rest] = others
    star = kinds.get(inspect.Parameter.VAR_POSITIONAL)
    if star is not None and args:
        before = list(parameters).index(star)
        return (args, kwargs), {
            **dict(zip(parameters, dims[0][:before], strict=False)),
            star: dims[0][before:],
            **shapes,
        }
    if len(args) > len(parameters):
        raise ExportError(f"{len(args)} example inputs for a forward of {len(parameters)}")
    named = dict(zip(parameters, args, strict=False))
    return ((), {**named, **kwargs}), {**dict(zip(parameters, dims[0], strict=False)), **shapes}


def _name_outputs(model: Any, exported: Any) -> None:
    """Outputs are called as the model's own: by key of a dict, by field of a transformers output."""
    outputs = list(model.graph.outputs)
    spec = exported.call_spec.out_spec
    paths = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(spec.num_leaves)), spec))[0]
    if len(paths) != len(outputs):
        return
    taken = {value.name for node in model.graph for value in node.outputs} | set(model.graph.initializers)
    taken |= {value.name for value in model.graph.inputs}
    for (path, _), value in zip(paths, outputs, strict=True):
        name = "_".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) or "output"
        name = f"output_{name}" if name.isdigit() else name
        if name not in taken and value not in model.graph.inputs:
            value.name = name
            taken.add(name)


def _name_dims(model: Any, given: dict[str, Any]) -> None:
    """Free dimensions of inputs are called batch and sequence, wherever the exporter's own names for them stand."""
    import onnx_ir as ir

    words: dict[str, str] = {}
    for value in model.graph.inputs:
        tensor = given.get(value.name)
        if value.shape is not None and isinstance(tensor, Tensor):
            for dim in free_dims(tensor):
                words.setdefault(str(value.shape[dim]), ("batch", "sequence")[dim])
    for value in [*model.graph.inputs, *(v for node in model.graph.all_nodes() for v in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([words.get(str(d), d) if isinstance(d, ir.SymbolicDim) else d for d in value.shape])


def _simplify(model: Any) -> None:
    """onnxscript's optimizer, to which the numbers of parameters are unknown: a bias that is zero stays, no batch norm
    is folded into a convolution, equal norms stay two."""
    from onnxscript import optimizer

    hidden = dict(model.graph.initializers)
    numbers = {name: value.const_value for name, value in hidden.items()}
    for value in hidden.values():
        value.const_value = None
    optimizer.optimize(model)
    for name, value in hidden.items():
        value.const_value = numbers[name]


def _floats(bundle: Bundle, model: Any, used: set[str], rename: Any) -> dict[str, str]:
    """Float parameter -> its initializer; one that the model has under two names is in the graph once.

    Raises ExportError for one that the graph reads and that is in no initializer.
    """
    stored = {rename(name): name for name in model.graph.initializers}
    live = bundle.parameters
    twins = {id(value): stored[name] for name, value in live.items() if name in stored}
    found = {}
    for name in bundle.floats:
        if id(live[name]) in twins:
            found[name] = twins[id(live[name])]
        elif name in used and live[name].is_floating_point():
            raise ExportError(f"{name} was merged into another tensor while the graph was made")
    return found
