"""`Bundle`: what leaves training."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.adapters import Adapters, refuse_later, wrappers
from qat.attention import takes_cache
from qat.errors import ExportError, QATError
from qat.fold.rotate import restructure
from qat.layers import QATLayer, activation_quantizers, original_class, weight_quantizers
from qat.layout import Layout
from qat.norm_fold import folds_of
from qat.plan import Plan, deployed, has_config
from qat.prepare import prepare, unprepare
from qat.qtensor import QTensor
from qat.quantizers import Fields, Quantizer, make_quantizer
from qat.recipes import from_dict
from qat.recipes.schema import Network
from qat.specs import QuantSpec
from qat.state import CHILD, find_record, folded, require_folded, require_state, rotations
from qat.steps import apply_schedule, full, latents, qat_layers, remember_dtypes, schedule_of, whole_quantizer


class Bundle(Mapping[str, QTensor]):
    """Parameter name -> QTensor, computed when asked for (one tensor in memory at a time), the rest beside it.

    Names are relative to the module that a deployment format knows: the outermost one with a Hugging Face config, or
    the prepared root. When weights are sharded every access is collective: all ranks go through the bundle in order.

    module      that module (still prepared; never changed by an export)
    config      its Hugging Face config, or None
    tied        parameter name -> the name under which the same parameter is listed
    inputs      layer name -> (spec, stored fields of a static range or None)
    caches      name of attention -> the same of its keys (k) and values (v)
    plan        the plan with the names of the prepared root; `prefix` is what to strip from them
    recipe, step, weights   for the receipt; `weights` says which ones these are: last, best or ema
    example_inputs          what the module is called with, for formats that trace a graph: see `qat.export`
    """

    example_inputs: Any = None

    def __init__(self, model: nn.Module, weights: str = "last") -> None:
        state = require_state(model)
        root = next(name for name, module in model.named_modules() if module is state)[: -len(CHILD)]
        inner, self.module = deployed(model)
        self.prefix = inner.removeprefix(root)
        self.config: Any = getattr(self.module, "config", None) if has_config(self.module) else None
        self.plan: Plan = state.known_plan()
        self.recipe: dict[str, Any] = state.record.recipe
        self.step: int = state.record.step
        self.weights = weights
        refuse_later(model)
        self._adapters = adapters = Adapters(self.module)
        # the record names layers as the prepared root does
        self._dtypes = {
            adapters.name(f"{root}{name}".removeprefix(inner)): dtypes for name, dtypes in state.record.dtypes.items()
        }
        self._where: dict[str, tuple[QATLayer, str, Quantizer]] = {}
        self.tied: dict[str, str] = {}
        owners: dict[int, str] = {}
        for name, layer in qat_layers(self.module).items():
            for key, quantizer in weight_quantizers(layer).items():
                parameter = adapters.name(f"{name}.{key}" if name else key)
                owner = owners.setdefault(id(layer._parameters[key]), parameter)
                if owner == parameter:
                    self._where[parameter] = (layer, key, quantizer)
                else:
                    self.tied[parameter] = owner

    def __getitem__(self, name: str) -> QTensor:
        layer, key, quantizer = self._where[name]
        latent, out = self.dtypes(name)
        kept = quantizer.live_spec
        try:
            quantizer.set_bits(None)
            with whole_quantizer(quantizer, latent):
                return quantizer.integers(latents(layer, key, latent), out)
        except QATError as problem:
            raise ExportError(f"{name}: {problem}") from None
        finally:
            quantizer.live_spec = kept

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def dtypes(self, name: str) -> tuple[torch.dtype, torch.dtype]:
        """(dtype that the quantizer read, dtype that it gave) in the last quantized forward of its layer."""
        layer, key, _ = self._where[name]
        parameter = layer._parameters[key]
        assert parameter is not None
        known = self._dtypes.get(name.rpartition(".")[0])
        if known is None:
            reparam = layer._qat.reparams.get(key)
            return parameter.dtype if reparam is None else reparam.factors[0].dtype, parameter.dtype
        return getattr(torch, known[0]), getattr(torch, known[1])

    def latents(self, name: str) -> Tensor:
        """What is rounded, whole: the weight, or its sum with its adapter."""
        layer, key, _ = self._where[name]
        return latents(layer, key)

    def specs(self) -> dict[str, QuantSpec]:
        """Parameter name -> spec, without computing a code."""
        return {name: quantizer.spec for name, (_, _, quantizer) in self._where.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name -> shape of the whole parameter."""
        return {name: tuple(layer._parameters[key].shape) for name, (layer, key, _) in self._where.items()}  # type: ignore[union-attr]

    @property
    def inputs(self) -> dict[str, tuple[QuantSpec, Fields | None]]:
        return {name: given["input"] for name, given in self._activations() if "input" in given}

    @property
    def caches(self) -> dict[str, dict[str, tuple[QuantSpec, Fields | None]]]:
        return {name: {"k": given["key"], "v": given["value"]} for name, given in self._activations() if "key" in given}

    @property
    def attention(self) -> dict[str, nn.Module]:
        """Name -> module of all attention that takes a cache, quantized or not."""
        found = self.module.named_modules()
        return {self._adapters.name(name): module for name, module in found if takes_cache(module) is not None}

    def _activations(self) -> Iterator[tuple[str, dict[str, tuple[QuantSpec, Fields | None]]]]:
        for layer_name, layer in qat_layers(self.module).items():
            name = self._adapters.name(layer_name)
            found: dict[str, tuple[QuantSpec, Fields | None]] = {}
            for what, quantizer in activation_quantizers(layer).items():
                fields = None
                if quantizer.static_activations:
                    known = self._dtypes.get(name)
                    with whole_quantizer(quantizer, getattr(torch, known[0]) if known else None):
                        fields = quantizer.kept()
                found[what] = (quantizer.spec, fields)
            yield name, found

    @property
    def floats(self) -> Mapping[str, Tensor]:
        """Everything else that the deployed model needs: parameters and persistent buffers that stay in float."""
        quantized = {*self._where, *self.tied}
        return _Floats({name: value for name, value in self.parameters.items() if name not in quantized})

    @property
    def parameters(self) -> dict[str, Tensor]:
        """State-dict entries outside quantizers and adapters as they are now, latents of quantized ones included; of a
        folded norm nothing but the bias of its layer."""
        own = [
            name
            for name, child in self.module.named_modules()
            if isinstance(child, Quantizer) or name.endswith(CHILD) or id(child) in self._adapters.inner
        ]
        own += [self._local(fold.names[1]) for fold in folds_of(self.module)]
        found = {
            self._adapters.name(name): value
            for name, value in self.module.state_dict(keep_vars=True).items()
            if isinstance(value, Tensor) and not any(name.startswith(f"{prefix}.") for prefix in own)
        }
        with torch.no_grad():
            return found | {f"{self._local(fold.names[0])}.bias": fold.folded_bias() for fold in folds_of(self.module)}

    def _local(self, name: str) -> str:
        """A module's name in the bundle from that in the plan."""
        return self._adapters.name(name.removeprefix(self.prefix))

    @property
    def norms(self) -> dict[str, str]:
        """Layer -> the batch norm that is folded into it, and that a deployed model does not have."""
        return {self._local(fold.names[0]): self._local(fold.names[1]) for fold in folds_of(self.module)}

    def layouts(self) -> dict[str, Layout]:
        """Parameter name -> how its rows are taken."""
        return {name: quantizer.layout for name, (_, _, quantizer) in self._where.items()}

    def plain(self) -> tuple[nn.Module, dict[str, nn.Module]]:
        """(a float32 copy of the module on the CPU, in eval mode and without quantizers and adapters; its layers by the
        names of the bundle). Planned weights are zeros that take no memory: what they are is in the bundle."""
        live = self.parameters
        memo: dict[int, Any] = {
            id(live[name]): nn.Parameter(torch.zeros(1).expand(live[name].shape), requires_grad=False)
            for name in (*self._where, *self.tied)
        }
        # a trainer that the module knows is not copied with it
        others = (
            value for m in self.module.modules() for value in (m.__dict__.get("_trainer"), m.__dict__.get("_fabric"))
        )
        memo |= {id(value): value for value in others if value is not None}
        module = copy.deepcopy(self.module, memo)
        adapters = Adapters(module)
        layers = {adapters.name(name): m for name, m in module.named_modules() if id(m) not in adapters.inner}
        unprepare(module)
        for name, norm in self.norms.items():
            layers[name]._parameters["bias"] = nn.Parameter(live[f"{name}.bias"].clone(), requires_grad=False)
            parent, _, last = norm.rpartition(".")
            module.get_submodule(parent)._modules[last] = layers[norm] = nn.Identity()
        for name, wrapper in wrappers(module).items():
            parent, _, last = name.rpartition(".")
            module.get_submodule(parent)._modules[last] = wrapper._modules["base_layer"]
        for value in (*module.parameters(), *module.buffers()):
            value.requires_grad_(False)
            value.data = value.data.to("cpu", torch.float32 if value.is_floating_point() else value.dtype)
        return module.eval(), layers

    @property
    def linears(self) -> list[str]:
        """Names of all Linear and Conv1D layers, quantized or not."""
        inner, name_of = self._adapters.inner, self._adapters.name
        return [
            name_of(name)
            for name, module in self.module.named_modules()
            if (isinstance(module, nn.Linear) or original_class(module).__name__ == "Conv1D")
            and id(module) not in inner
        ]


class _Floats(Mapping[str, Tensor]):
    """Tensors that are gathered when asked for; a tied one is listed under each name."""

    def __init__(self, found: dict[str, Tensor]) -> None:
        self._found = found

    def __getitem__(self, name: str) -> Tensor:
        return full(self._found[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def example(spec: QuantSpec, layout: Layout, out_dtype: torch.dtype) -> QTensor:
    """A tensor on a grid, for what depends on grid and shape alone."""
    # one that searches nothing
    spec = replace(spec, quantizer="absmax" if spec.zero_point == "none" else "minmax", percentile=None)
    return make_quantizer(spec, layout).integers(torch.ones(layout.shape), out_dtype)


def convert(model: nn.Module, *, weights: str = "last", require_final: bool = True) -> Bundle:
    """The trained integers of a prepared model, which is left as it is.

    Raises QATError if the model is not prepared, and ExportError if (`require_final`) the schedule has not yet brought
    the quantization fully on: such weights were not trained on the grid that would be packed.
    """
    state = require_state(model)
    remember_dtypes(model)
    if require_final:
        require_folded(state)
    if require_final and not apply_schedule(model).final:
        first = schedule_of(model).first_final_step()
        when = f"it is from step {first} on" if first is not None else "no phase of the recipe brings it fully on"
        raise ExportError(f"at step {state.record.step} the quantization is not fully on ({when}); train on first")
    for fold in folds_of(model):
        fold.refresh()
    for name, layer in qat_layers(model).items() if require_final else ():
        for what, quantizer in activation_quantizers(layer).items():
            seen = getattr(quantizer, "seen", None)
            if isinstance(seen, Tensor) and not bool(seen):
                raise ExportError(
                    f"{name}: the range of its {what} was never seen; train at least one step (in train mode), then "
                    "export"
                )
    return Bundle(model, weights)


def load_from_checkpoint(path: str | PathLike[str], model: nn.Module) -> nn.Module:
    """Prepare `model` with the recipe found in a checkpoint and load it; needs neither script nor callback.

    `path` is a Lightning checkpoint or a plain state dict (read with weights_only=True); `model` is the same
    architecture in float, or the part of it that a deployment needs: a Hugging Face model that the checkpoint holds
    under `model.`, say. Returns a module that holds `model`. Raises QATError if they do not belong together.
    """
    if not Path(path).is_file():
        raise QATError(f"there is no checkpoint file {path}; a folder of shards must be consolidated first")
    try:
        with warnings.catch_warnings():
            # about pickles of another protocol; whether it can be read is what counts
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:
        why = str(problem).partition("\n")[0].partition(". ")[0] or type(problem).__name__
        raise QATError(f"{path} is not a checkpoint that can be read without running code: {why}") from None
    found = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(found, dict):
        raise QATError(f"{path} holds no state dict but a {type(loaded if found is None else found).__name__}")
    entries: dict[str, Any] = {key: value for key, value in found.items() if isinstance(key, str)}
    prefix, record = find_record(entries)
    entries = {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}
    for entry in rotations(record.folded):
        if entry not in folded(model):
            described = entry["network"]
            restructure(model, entry["seed"], None if described is None else Network(**described))
    holder = _holder(model, entries, path)
    prepare(holder, from_dict(record.recipe), search=False)
    wanted = holder.state_dict()
    missing = [key for key in wanted if key not in entries]
    if missing:
        raise QATError(f"{path} lacks {len(missing)} entries that the model has, {missing[0]!r} for one")
    inside = next(name for name, module in holder.named_modules() if module is model)
    extra = [key for key in entries if key.startswith(f"{inside}." if inside else "") and key not in wanted]
    if extra:
        raise QATError(
            f"{path} has {len(extra)} entries that the model lacks, {extra[0]!r} for one; is it another model?"
        )
    for key, value in holder.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and value.is_floating_point() and isinstance(entries[key], Tensor):
            # the dtype that was trained, not the one that `model` happens to have: copying would round
            value.data = value.data.to(entries[key].dtype)
    try:
        holder.load_state_dict({key: entries[key] for key in wanted})
    except RuntimeError as problem:
        first = next((line.strip() for line in str(problem).splitlines()[1:]), str(problem))
        raise QATError(f"{path} does not fit the model: {first}") from None
    apply_schedule(holder)
    return holder


def _holder(model: nn.Module, entries: dict[str, Any], path: str | PathLike[str]) -> nn.Module:
    """`model` itself, or a plain module that holds it where the checkpoint does."""
    keys = [key for key, value in model.state_dict().items() if isinstance(value, Tensor)]
    sample = keys[0] if keys else ""
    found = sorted({key[: -len(sample)] for key in entries if sample and key.endswith(sample)}, key=len)
    found.sort(key=lambda prefix: sum(prefix + key not in entries for key in keys))
    if not found:
        raise QATError(f"{path} has no entry {sample!r}; is this the model that was trained?")
    if found[0] == "":
        return model
    holder = nn.Module()
    place = holder
    *parents, last = found[0].rstrip(".").split(".")
    for name in parents:
        place.add_module(name, nn.Module())
        place = place.get_submodule(name)
    place.add_module(last, model)
    return holder
