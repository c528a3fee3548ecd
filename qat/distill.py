"""Learning from the float model: losses, the teacher's place, and a fingerprint that tells one teacher from another.

    kl     mean over tokens of sum_c p_c (log p_c - log q_c), p teacher, q student, both softmax(logits / T), times T^2
           so that gradients keep their size (Hinton et al. 2015)
    kl_topk   the same over the teacher's TOP_K likeliest classes and one for all the rest, which needs no second
           [..., C] of probabilities: for vocabularies above 100,000
    cakld  b KL(q || p) + (1 - b) KL(p || q) with b the teacher's mean confidence (BitDistiller, Du et al. 2024), here
           the mean of max p over the batch: a teacher that is sure is followed where it is sure
    mse    mean over tokens and features of (student - teacher)^2
    cosine mean over rows of 1 - cos(student, teacher), for embeddings
    hidden mean over blocks of |student - teacher|^2 / |teacher - mean|^2 of what a block returns, with a weight of its
           own beside one of the above; each block hears of its own error, not only of what the last layer makes of it

`attach` swaps the class of the module to distil. Its forward then runs the teacher on the same arguments and keeps the
loss, which `distill_loss` hands out; training code stays as it is. The teacher is no child of anything: it is in no
state dict, in no optimizer and in no checkpoint.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from qat.errors import QATError
from qat.fake_quant_kernels.dispatch import uncompiled
from qat.layers import original_class
from qat.prepare import unprepare
from qat.state import CHILD

_TAP = "_qat_tap"
_IGNORED_LABEL = -100
# Where a model's output may keep what is compared, in this order.
_OUTPUTS = ("logits", "sentence_embedding", "pooler_output", "last_hidden_state")
# Classes whose logits at position t are compared with the label at t + 1.
_SHIFTS = re.compile(r"(CausalLM|LMHeadModel|LMHead)$")
_SAMPLED = 256
# of the likeliest classes, `kl_topk` tells this many apart
TOP_K = 256


# ---- losses --------------------------------------------------------------------------------------------------------


def kl(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Logits [..., C] of any float dtype, mask [...] bool (True counts) -> fp32 scalar, >= 0 up to rounding."""
    p = F.log_softmax(teacher.float() / temperature, -1)
    q = F.log_softmax(student.float() / temperature, -1)
    return _mean((p.exp() * (p - q)).sum(-1), mask) * temperature**2


def kl_topk(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Logits [..., C], mask [...] -> fp32 scalar, at most `kl` and equal to it for C <= TOP_K."""
    wide, mine = teacher.float() / temperature, student.float() / temperature
    top, at = wide.topk(min(TOP_K, wide.shape[-1]), -1)
    p = top - wide.logsumexp(-1, keepdim=True)
    q = mine.gather(-1, at) - mine.logsumexp(-1, keepdim=True)
    found = (p.exp() * (p - q)).sum(-1)
    if top.shape[-1] < wide.shape[-1]:
        rest_p, rest_q = (torch.log1p(-t.exp().sum(-1).clamp(max=1.0 - 1e-6)) for t in (p, q))
        found = found + rest_p.exp() * (rest_p - rest_q)
    return _mean(found, mask) * temperature**2


def cakld(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Logits [..., C], mask [...] -> fp32 scalar, >= 0 up to rounding."""
    p = F.log_softmax(teacher.float() / temperature, -1)
    q = F.log_softmax(student.float() / temperature, -1)
    sure = _mean(p.amax(-1).exp(), mask)
    backward, forward = (q.exp() * (q - p)).sum(-1), (p.exp() * (p - q)).sum(-1)
    return (sure * _mean(backward, mask) + (1.0 - sure) * _mean(forward, mask)) * temperature**2


def mse(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Features [..., C], mask [...] -> fp32 scalar; the temperature means nothing here."""
    return _mean((student.float() - teacher.float()).square().mean(-1), mask)


def cosine(student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Embeddings [..., C], mask [...] -> fp32 scalar in 0..2; the temperature means nothing here."""
    return _mean(1.0 - F.cosine_similarity(student.float(), teacher.float(), dim=-1), mask)


def hidden(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Outputs of the blocks [..., C], mask [...] -> fp32 scalar, 0 where they are equal and 1 for a student that knows
    only the mean."""
    found = []
    for mine, theirs in zip(student, teacher, strict=True):
        wide = theirs.float()
        fits = mask if mask is not None and mask.shape == wide.shape[:-1] else None
        error = _mean((mine.float() - wide).square().mean(-1), fits)
        middle = _mean(wide.mean(-1), fits)
        spread = _mean((wide - middle).square().mean(-1), fits)
        found.append(error / spread.clamp_min(torch.finfo(torch.float32).tiny))
    return torch.stack(found).mean()


LOSSES = {"kl": kl, "kl_topk": kl_topk, "cakld": cakld, "mse": mse, "cosine": cosine}


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    # not values * mask: a padded position may hold NaN
    kept = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
    return kept.sum() / mask.sum().clamp(min=1)


def shifts(module: nn.Module) -> bool:
    """Whether the module predicts the next token, so that its output at t is judged by the label at t + 1."""
    return bool(_SHIFTS.search(type(module).__name__))


def token_mask(shape: torch.Size, kwargs: Mapping[str, Any], shifts: bool) -> Tensor | None:
    """Which positions of an output of `shape` [..., C] count, from the arguments of the call; None: all of them.

    Labels of -100 do not count; where the model predicts the next token (`shifts`), position t is judged by label t + 1
    and the last one not at all. Without labels, padding by `attention_mask` does not count.
    """
    labels, attention = kwargs.get("labels"), kwargs.get("attention_mask")
    if isinstance(labels, Tensor) and labels.shape == shape[:-1]:
        mask = labels != _IGNORED_LABEL
        if shifts:
            mask = torch.cat([mask[..., 1:], torch.zeros_like(mask[..., :1])], -1)
        return mask
    if isinstance(attention, Tensor) and attention.shape == shape[:-1]:
        return attention.bool()
    return None


def output_of(found: Any) -> Tensor:
    """The tensor to compare in a model's output: itself, its logits or embedding, or the first tensor with features.

    Raises QATError if there is none.
    """
    if isinstance(found, Tensor):
        return found
    for name in _OUTPUTS:
        value = found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)
        if isinstance(value, Tensor):
            return value
    values: Iterable[Any] = (
        found.values() if isinstance(found, Mapping) else found if isinstance(found, tuple | list) else ()
    )
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2:
            return value
    raise QATError(
        f"the module to distil returns a {type(found).__name__} without logits or embedding to compare; choose another "
        "one with module="
    )


# ---- teacher -------------------------------------------------------------------------------------------------------


def frozen_copy(module: nn.Module) -> nn.Module:
    """A float copy of a module, prepared or not: eval mode, no gradients. Raises QATError for sharded weights."""
    for name, parameter in module.named_parameters():
        if parameter.device.type == "meta" or hasattr(parameter, "placements"):
            state = "on the meta device" if parameter.device.type == "meta" else "sharded"
            raise QATError(
                f"{name} is {state}, so no teacher can be copied from it; give the teacher (a module or a folder)"
            )
    teacher = copy.deepcopy(module)
    unprepare(teacher)
    return freeze(teacher)


def freeze(teacher: nn.Module) -> nn.Module:
    """Eval mode for good, no gradients."""
    return teacher.requires_grad_(False).eval()


def fingerprint(module: nn.Module) -> str:
    """sha256 (hex) over names, shapes and a sample of the values of every parameter and buffer, as fp32."""
    digest = hashlib.sha256()
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        flat = value.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED].float().cpu()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


# ---- the tap -------------------------------------------------------------------------------------------------------


class Tap:
    """Beside a module: its teacher, and the losses of the forwards since `open`."""

    def __init__(
        self, teacher: nn.Module, loss: str, temperature: float, shifts: bool, hidden: float, blocks: list[str]
    ) -> None:
        self.teacher, self.temperature, self.shifts = teacher, temperature, shifts
        # its weight, and the names of the blocks in both networks
        self.hidden, self.blocks = hidden, blocks
        self.loss = LOSSES[loss]
        self.listening = False
        self.kept: list[Tensor] = []
        self.asked = False

    @contextmanager
    def open(self) -> Iterator[None]:
        """Forwards inside are compared (a recomputed forward in backward is not)."""
        self.kept, self.listening, self.asked = [], True, False
        try:
            yield
        finally:
            self.listening = False

    def take(self) -> Tensor:
        """The mean over the forwards since `open`; raises QATError if there was none."""
        self.asked = True
        if not self.kept:
            raise QATError("the module to distil was not called in this step; name the one that is, with module=")
        kept, self.kept = self.kept, []
        return torch.stack(kept).mean()

    @uncompiled
    def teach(self, args: Any, kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """The teacher's output, and those of its blocks where they are compared."""
        with torch.no_grad(), self.caught(self.teacher) as blocks:
            return output_of(self.teacher(*args, **kwargs)).detach(), blocks

    @contextmanager
    def caught(self, module: nn.Module) -> Iterator[list[Tensor]]:
        """Inside, forwards of the module's blocks leave their outputs in the list."""
        found: list[Tensor] = []
        if not self.hidden:
            yield found
            return
        # for this forward alone: a forward that is run again in backward leaves nothing
        blocks = [module.get_submodule(name) for name in self.blocks]
        hooks = [block.register_forward_hook(lambda _, __, out: found.append(output_of(out))) for block in blocks]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    @uncompiled
    def keep(
        self, student: Any, taught: tuple[Tensor, list[Tensor]], blocks: list[Tensor], kwargs: Mapping[str, Any]
    ) -> None:
        mine, teacher = output_of(student), taught[0]
        if mine.shape != teacher.shape:
            raise QATError(f"the teacher's output is {list(teacher.shape)} and the student's {list(mine.shape)}")
        with torch.autocast(device_type=mine.device.type, enabled=False):
            mask = token_mask(mine.shape, kwargs, self.shifts)
            if self.hidden and not len(blocks) == len(taught[1]) > 0:
                raise QATError(
                    f"distill.hidden: {len(blocks)} blocks of the student returned something and {len(taught[1])} of "
                    "the teacher; the two have to be of one architecture, or set distill.hidden=0"
                )
            loss = self.loss(mine, teacher, mask, self.temperature)
            self.kept.append(loss + self.hidden * hidden(blocks, taught[1], mask) if self.hidden else loss)


class _Tapped(nn.Module):
    """First base of a swapped class."""

    def __reduce__(self) -> tuple[Any, ...]:
        # a copy or a pickle is the user's plain module
        return _revive, (type(self).__mro__[2],), {key: value for key, value in self.__dict__.items() if key != _TAP}


def _revive(original: type[nn.Module]) -> nn.Module:
    return original.__new__(original)


_tapped: dict[type[nn.Module], Any] = {}


def _tapped_class(original: type[nn.Module]) -> Any:
    """A class with the name, attributes and signature of `original`; made once."""
    if original not in _tapped:

        @functools.wraps(original.forward)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            tap: Tap | None = self.__dict__.get(_TAP)
            if tap is None or not tap.listening:
                return original.forward(self, *args, **kwargs)
            # the teacher goes first, so that its activations are gone before the student's are kept; containers are
            # copied because some models write their results into the dict that they are given
            taught = tap.teach(*tree_map(lambda leaf: leaf, (args, kwargs)))
            if not tap.hidden:
                out = original.forward(self, *args, **kwargs)
                tap.keep(out, taught, [], kwargs)
                return out
            if torch.compiler.is_compiling():
                raise QATError("distill.hidden looks into the network between its blocks; do not compile it")
            with tap.caught(self) as blocks:
                out = original.forward(self, *args, **kwargs)
            tap.keep(out, taught, blocks, kwargs)
            return out

        names = {"forward": forward, "__module__": original.__module__, "__qualname__": original.__qualname__}
        _tapped[original] = type(original.__name__, (_Tapped, original), names)
    return _tapped[original]


def blocks_of(module: nn.Module) -> list[str]:
    """Names of the repeated blocks of a network: the entries of its longest outermost nn.ModuleList, or nn.Sequential
    of modules of one class. Raises QATError if it has none."""
    lists = {n: m for n, m in module.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and _repeats(m)}
    outermost = [
        name for name in lists if not any(name.startswith(f"{other}.") or other == "" < name for other in lists)
    ]
    if not outermost:
        raise QATError(
            f"distill.hidden compares what blocks return, and {type(module).__name__} has no nn.ModuleList of blocks; "
            "set distill.hidden=0"
        )
    name = max(outermost, key=lambda found: len(lists[found]._modules))
    return [f"{name}.{entry}".lstrip(".") for entry, _ in lists[name].named_children() if entry != CHILD]


def _repeats(container: nn.Module) -> bool:
    classes = {original_class(entry) for name, entry in container.named_children() if name != CHILD}
    return len(classes) == 1


def attach(
    module: nn.Module, teacher: nn.Module, *, loss: str = "kl", temperature: float = 1.0, hidden: float = 0.0
) -> Tap:
    """Let `module` be compared with `teacher` while the tap is open, with `hidden` as the weight of that loss. Raises
    QATError for an unknown loss, and for hidden states of a network without blocks."""
    if loss not in LOSSES:
        raise QATError(f"distillation loss {loss!r} is unknown; use one of {', '.join(LOSSES)}")
    if temperature <= 0:
        raise QATError(f"distillation temperature {temperature} must be positive")
    if hidden < 0:
        raise QATError(f"distillation hidden={hidden} must not be negative")
    blocks = blocks_of(module) if hidden else []
    missing = next((name for name in blocks if name not in dict(teacher.named_modules())), None)
    if missing is not None:
        raise QATError(f"distill.hidden: the teacher has no {missing}; it has to be of the student's architecture")
    detach(module)
    tap = Tap(teacher, loss, temperature, shifts(module), hidden, blocks)
    module.__class__ = _tapped_class(type(module))
    module.__dict__[_TAP] = tap
    return tap


def detach(module: nn.Module) -> None:
    """Undo `attach`."""
    module.__dict__.pop(_TAP, None)
    # a class that sharding put on top stays; without its tap the forward is the module's own
    if type(module) in _tapped.values():
        module.__class__ = type(module).__mro__[2]


def tap_of(model: nn.Module) -> Tap | None:
    """The tap of `model` or of something below it."""
    return next((m.__dict__[_TAP] for m in model.modules() if _TAP in m.__dict__), None)


def distill_loss(model: nn.Module) -> Tensor:
    """The distillation loss of the forwards so far in this training step, for manual optimization; a scalar with grad.

    Raises QATError if `model` is not being distilled, or was not called in this step.
    """
    tap = tap_of(model)
    if tap is None:
        raise QATError("this model is not being distilled; add DistillationCallback to the trainer's callbacks")
    return tap.take()


def module_to_distil(model: nn.Module, planned: Iterable[str], name: str | None = None) -> str:
    """Name of the module called `name`, or of the outermost child of `model` that holds every planned layer.

    Raises QATError if there is no such module.
    """
    if name is not None:
        if name and name in dict(model.named_modules()):
            return name
        raise QATError(f"module={name!r} names no module below {type(model).__name__}")
    holders = {layer.partition(".")[0] for layer in planned}
    if len(holders) == 1 and (only := holders.pop()):
        inner = f"{only}._orig_mod"
        return inner if hasattr(model.get_submodule(only), "_orig_mod") else only
    raise QATError(
        f"the planned layers are not below one child of {type(model).__name__} ({', '.join(sorted(holders))}); say "
        "with module= which one to distil"
    )
