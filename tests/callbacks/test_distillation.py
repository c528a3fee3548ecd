"""The float model teaches without a change to training_step, in any order of callbacks."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lit_small import InConfigureModel, Language, Lit, Net, data, delayed, recipe, tokens, trainer
from torch import Tensor, nn
from torch.nn import functional as F

import qat
from qat import distill
from qat.callbacks import DistillationCallback, QATCallback
from qat.distill import blocks_of, cakld, cosine, fingerprint, hidden, kl, kl_topk, mse, tap_of, token_mask
from qat.state import require_state


def fit(path: Path, module: Any, distillation: Any, the_recipe: Any = None, first: bool = False, **kwargs: Any) -> Any:
    callbacks = [QATCallback(the_recipe or recipe()), distillation]
    settings = {"max_steps": 4, "limit_val_batches": 1, **kwargs}
    t = trainer(path, *(reversed(callbacks) if first else callbacks), **settings)
    loader = tokens() if isinstance(module, Language) else data()
    t.fit(module, loader, loader, ckpt_path=settings.get("ckpt"))
    return t


# ---- numbers -------------------------------------------------------------------------------------------------------


def test_losses_by_hand() -> None:
    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    p, q = F.softmax(t / 2, -1), F.softmax(s / 2, -1)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    by_hand = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(kl(s, t, mask, 2.0), (4 * by_hand[mask].mean()).float())
    torch.testing.assert_close(
        kl(s, t), (F.softmax(t, -1) * (F.softmax(t, -1) / F.softmax(s, -1)).log()).sum(-1).mean().float()
    )
    sure = F.softmax(t, -1).amax(-1)[mask].mean()
    one, other = (
        (F.softmax(a, -1) * (F.log_softmax(a, -1) - F.log_softmax(b, -1))).sum(-1)[mask].mean()
        for a, b in ((s, t), (t, s))
    )
    torch.testing.assert_close(cakld(s, t, mask), (sure * one + (1 - sure) * other).float())
    torch.testing.assert_close(mse(s, t, mask), ((s - t) ** 2).mean(-1)[mask].mean().float())
    angles = (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))
    torch.testing.assert_close(cosine(s, t, mask), (1 - angles)[mask].mean().float())


def test_kl_of_the_likeliest_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the three likeliest and the rest. Mutation: the rest left out."""
    torch.manual_seed(1)
    s, t = torch.randn(4, 7, 20), 3 * torch.randn(4, 7, 20)
    assert torch.allclose(kl_topk(s, t), kl(s, t), atol=1e-6)
    monkeypatch.setattr(distill, "TOP_K", 3)
    p, q = F.softmax(t / 2, -1), F.softmax(s / 2, -1)
    at = p.topk(3, -1).indices
    p, q = (torch.cat([r.gather(-1, at), 1 - r.gather(-1, at).sum(-1, keepdim=True)], -1) for r in (p, q))
    found = kl_topk(s, t, temperature=2.0)
    torch.testing.assert_close(found, 4 * (p * (p / q).log()).sum(-1).mean(), rtol=1e-4, atol=1e-5)
    assert 0 < float(found) < float(kl(s, t, temperature=2.0))
    # a teacher that is sure leaves nothing for the rest
    assert bool(torch.isfinite(kl_topk(s, 1000.0 * t)))


def test_masked_positions_count_for_nothing_even_if_nan() -> None:
    s, t = torch.randn(1, 3, 5), torch.randn(1, 3, 5)
    mask = torch.tensor([[True, True, False]])
    wanted = kl(s[:, :2], t[:, :2])
    s[:, 2] = torch.nan
    s.requires_grad_()
    found = kl(s, t, mask)
    assert torch.equal(found, wanted)
    assert kl(s, t, torch.zeros_like(mask)) == 0.0


def test_hidden_states(tmp_path: Path) -> None:
    """By hand, with hooks that are gone afterwards, through the callback. Mutations: the teacher's blocks taken for the
    student's, the mask left out: red."""
    g = torch.Generator().manual_seed(0)
    theirs = [torch.randn(2, 3, 4, generator=g) for _ in range(2)]
    mine = [t + 0.1 * torch.randn(t.shape, generator=g) for t in theirs]
    mask = torch.tensor([[True, True, False], [True, False, False]])
    pairs = [(a, b, (b - b[mask].mean())[mask].square().mean()) for a, b in zip(mine, theirs, strict=True)]
    wanted = sum(float((a - b)[mask].square().mean() / spread) for a, b, spread in pairs)
    assert float(hidden(mine, theirs, mask)) == pytest.approx(wanted / 2)
    assert float(hidden(theirs, theirs)) == 0.0

    def first_loss(weight: float) -> float:
        module = Language()
        callback = DistillationCallback(hidden=weight)
        slot = {"group_size": 32, "bits": 2}
        t = trainer(tmp_path, QATCallback(recipe(slot)), callback, max_steps=1, limit_val_batches=0)
        t.fit(module, tokens())
        assert blocks_of(module) == ["model.model.layers.0", "model.model.layers.1"]
        assert not any(module.get_submodule(name)._forward_hooks for name in blocks_of(module))
        return float(t.callback_metrics["train_distill_loss"])

    without, once, twice = (first_loss(weight) for weight in (0.0, 1.0, 2.0))
    assert once - without > 0.01 and twice - once == pytest.approx(once - without, rel=1e-4)
    with pytest.raises(qat.QATError, match=r"Net has no nn.ModuleList"):
        trainer(tmp_path, QATCallback(recipe()), DistillationCallback(hidden=1.0), max_steps=1).fit(Lit(), data())
    with pytest.raises(qat.QATError, match="must not be negative"):
        DistillationCallback(hidden=-1.0)


def test_token_mask() -> None:
    labels, attention = torch.tensor([[-100, 1, 2, -100]]), torch.tensor([[1, 1, 1, 0]])
    shape = torch.Size([1, 4, 9])
    assert token_mask(shape, {"labels": labels}, shifts=False).tolist() == [[False, True, True, False]]
    # position t is judged by the label of t + 1 (mutation: no shift -> red)
    assert token_mask(shape, {"labels": labels}, shifts=True).tolist() == [[True, True, False, False]]
    assert token_mask(shape, {"attention_mask": attention}, shifts=True).tolist() == [[True, True, True, False]]
    assert token_mask(torch.Size([1, 9]), {"labels": labels}, shifts=False) is None


# ---- in a run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_the_loss_is_the_mix(tmp_path: Path, first: bool, weight: float) -> None:
    class ByHand(Lit):
        teacher: Any = None

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            found = self.net(batch[0])
            own = F.mse_loss(found, batch[1])
            self.losses.append(own.item())
            with torch.no_grad():
                wanted = self.teacher[0](batch[0])
            distilled = kl(found, wanted, temperature=2.0)
            return distilled if weight == 1.0 else (1 - weight) * own + weight * distilled

    by_hand, module = ByHand(), Lit()
    by_hand.teacher = [copy.deepcopy(by_hand.net).eval()]
    before = set(by_hand.state_dict())
    trainer(tmp_path, QATCallback(recipe()), max_steps=4, limit_val_batches=0).fit(by_hand, data())
    t = fit(tmp_path, module, DistillationCallback("kl", weight, 2.0), first=first)
    assert module.losses == by_hand.losses
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), by_hand.parameters(), strict=True))
    # no trace: neither in the state dict, nor in the optimizer, nor on the instance
    assert {key for key in module.state_dict() if "quantizer" not in key and "qat_state" not in key} == before
    assert sum(len(group["params"]) for group in t.optimizers[0].param_groups) == len(list(module.parameters()))
    assert type(module.net) is Net and tap_of(module) is None and "training_step" not in module.__dict__


def test_dict_output_bf16_and_live_gap(tmp_path: Path) -> None:
    module = Language()
    t = fit(tmp_path, module, DistillationCallback(), precision="bf16-mixed", max_epochs=2, max_steps=-1)
    gap, loss = t.callback_metrics["val_distill_loss"], t.callback_metrics["train_distill_loss"]
    assert 0.0 < gap < 0.1 and 0.0 < loss < 0.1
    assert require_state(module).record.dtypes["model.lm_head"] == ["float32", "bfloat16"]


def test_delayed_start_has_nothing_to_teach(tmp_path: Path) -> None:
    seen: list[float] = []

    class Seen(DistillationCallback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            seen.append(outputs["loss"].item())

    fit(tmp_path, Language(), Seen(), recipe(phases=delayed(1)), max_steps=2, max_epochs=1)
    assert seen[0] == 0.0 and seen[1] > 0.0


def test_bf16_true_teacher_follows(tmp_path: Path) -> None:
    t = fit(tmp_path, Language(), DistillationCallback(), precision="bf16-true", max_steps=2)
    assert t.callback_metrics["train_distill_loss"] >= 0.0


def test_by_hand_in_manual_optimization(tmp_path: Path) -> None:
    class Manual(Lit):
        asks = True

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            self.net(batch[0])
            loss = qat.distill_loss(self) if self.asks else self.loss(batch)
            self.losses.append(loss.item())
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    module = Manual()
    fit(tmp_path, module, DistillationCallback("mse"))
    assert all(loss > 0.0 for loss in module.losses)
    silent = Manual()
    silent.asks = False
    with pytest.raises(qat.QATError, match="has to ask for the loss with"):
        fit(tmp_path, silent, DistillationCallback("mse"))


def test_resume_checks_the_teacher(tmp_path: Path) -> None:
    # mutation: no comparison in DistillationCallback.on_train_start -> red
    whole, module = Lit(), Lit()
    fit(tmp_path, whole, DistillationCallback("mse"), max_epochs=2, max_steps=-1)
    t = fit(tmp_path, module, DistillationCallback("mse"), max_epochs=1, max_steps=-1)
    t.save_checkpoint(tmp_path / "x.ckpt")
    assert require_state(module).record.teacher == fingerprint(Lit().net)
    resumed = Lit()
    resume(tmp_path, resumed, DistillationCallback("mse"))
    assert resumed.losses == whole.losses[8:]
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    other = Lit()
    nn.init.normal_(other.net.a.weight)
    with pytest.raises(qat.QATError, match="not the one this run began with"):
        resume(tmp_path, other, DistillationCallback("mse"))
    resume(tmp_path, other, DistillationCallback("mse", teacher=Lit().net))  # given, it is the same again


def resume(path: Path, module: Lit, distillation: Any) -> None:
    t = trainer(path, QATCallback(recipe()), distillation, max_epochs=2, limit_val_batches=1)
    t.fit(module, data(), data(), ckpt_path=path / "x.ckpt")


def test_teacher_from_a_folder(tmp_path: Path) -> None:
    module = Language()
    module.model.save_pretrained(tmp_path / "teacher")
    wanted = fingerprint(module.model)
    fit(tmp_path, module, DistillationCallback(teacher=str(tmp_path / "teacher")), max_steps=1)
    assert require_state(module).record.teacher == wanted
    with pytest.raises(qat.QATError, match="Net is no class of transformers"):
        fit(tmp_path, Lit(), DistillationCallback(teacher="folder"))


def test_a_teacher_is_neither_downloaded_nor_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # mutation: type(student).from_pretrained(teacher) -> red: it asks the network, and reads the pickle
    monkeypatch.chdir(tmp_path)
    with pytest.raises(qat.QATError, match=r"teacher='someone/model': model folder .* does not exist"):
        fit(tmp_path, Language(), DistillationCallback(teacher="someone/model"))
    module = Language()
    module.model.config.save_pretrained(tmp_path / "pickled")
    torch.save(module.model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(qat.QATError, match=r"as a pickle only \(pytorch_model\.bin\)"):
        fit(tmp_path, module, DistillationCallback(teacher=tmp_path / "pickled"))


def test_layers_made_in_configure_model(tmp_path: Path) -> None:
    late, plain = InConfigureModel(), Lit()
    for first in (False, True):
        fit(tmp_path, late := InConfigureModel(), DistillationCallback("mse"), first=first)
        fit(tmp_path, plain := Lit(), DistillationCallback("mse"), first=first)
        assert late.losses == plain.losses
        assert require_state(late).record.teacher == require_state(plain).record.teacher


def test_compiled_child(tmp_path: Path) -> None:
    plain, compiled = Lit(), Lit()
    compiled.net = torch.compile(compiled.net, backend="eager")
    for module in (plain, compiled):
        fit(tmp_path, module, DistillationCallback("mse"))
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_refusals(tmp_path: Path) -> None:
    class Two(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(8, 8)

    class NotCalled(Lit):
        def loss(self, batch: Any) -> Tensor:
            return F.mse_loss(self.net.b(self.net.a(batch[0])), batch[1])

    for kwargs, said in [
        ({"loss": "l1"}, "loss='l1' is unknown"),
        ({"weight": 0.0}, "weight=0.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ]:
        with pytest.raises(qat.QATError, match=said):
            DistillationCallback(**kwargs)  # type: ignore[arg-type]
    with pytest.raises(qat.QATError, match=r"not below one child of Two \(net, other\)"):
        fit(tmp_path, Two(), DistillationCallback())
    fit(tmp_path, Two(), DistillationCallback(module="net"))
    with pytest.raises(qat.QATError, match="names no module"):
        fit(tmp_path, Two(), DistillationCallback(module="nett"))
    with pytest.raises(qat.QATError, match="was not called in this step"):
        fit(tmp_path, NotCalled(), DistillationCallback())
    with pytest.raises(qat.QATError, match="needs a QATCallback"):
        trainer(tmp_path, DistillationCallback(), max_steps=1).fit(Lit(), data())
    with pytest.raises(qat.QATError, match="is not being distilled"):
        qat.distill_loss(Lit())
