"""Adapters of peft inside the rounding, in a Lightning run: fit, resume, export.

Mutation: the optimizer whose steps count found by its planned weights, not by what is trained of them: red.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from lit_small import Language, recipe, tokens, trainer

import qat
from qat.callbacks import DistillationCallback, ExportCallback, QATCallback
from qat.export import get_format
from qat.state import require_state

peft = pytest.importorskip("peft")

SLOT = {"bits": 4, "granularity": "group", "group_size": 32}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Adapted(Language):
    """Only the adapter is given to the optimizer, and the scales if there are any."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = peft.get_peft_model(self.model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=ALL))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        # by the step, whatever the loader of a resumed run begins with
        return super().training_step(list(tokens(32))[self.global_step % 8], batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def linears(quantizer: str, *targets: str, **more: Any) -> Any:
    rules = {
        "linears": {"types": ["Linear"], "weight": {**SLOT, "quantizer": quantizer}},
        "head": {"match": ["lm_head"], "keep_float": True},
    }
    return qat.recipes.from_dict({"name": "lora", "rules": rules, "export": {"targets": list(targets)}, **more})


@pytest.mark.consumer
@pytest.mark.parametrize("quantizer", ["lsq", "absmax"])
def test_fit_and_export(tmp_path: Path, quantizer: str) -> None:
    import transformers

    module = Adapted()
    export = ExportCallback(tmp_path / "out")
    callbacks = QATCallback(linears(quantizer, "compressed-tensors")), DistillationCallback(), export
    trainer(tmp_path, *callbacks, max_steps=6).fit(module, tokens(32), tokens())
    assert require_state(module).record.step == 6 and export.receipts
    qat.verify(tmp_path / "out")
    served = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    batch = next(iter(tokens()))
    module.eval()
    with torch.no_grad():
        ours, theirs = module.model(**batch).logits, served(**batch).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_gguf_holds_the_codes_of_the_sum(tmp_path: Path) -> None:
    module = Adapted()
    qat.prepare(module, linears("absmax"))
    optimizer = module.configure_optimizers()
    for batch in tokens(16):
        Language.training_step(module, batch, 0)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        qat.after_optimizer_step(module, optimizer)
    bundle, fmt = qat.convert(module), get_format("gguf")
    for name, tensor in bundle.items():
        back = fmt.unpack(fmt.pack(name, tensor), tensor.spec, tensor.layout, tensor.out_dtype)
        assert torch.equal(back.dequantize(), tensor.dequantize())
    assert not fmt.check(bundle.plan)
    assert not [why for why in fmt.check(bundle) if "token" not in why]


def test_a_resumed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole, first, second = Adapted(), Adapted(), Adapted()
    trainer(tmp_path, QATCallback(linears("lsq")), max_steps=6).fit(whole, tokens(12))
    t = trainer(tmp_path, QATCallback(linears("lsq")), max_steps=3, enable_checkpointing=True)
    t.fit(first, tokens(12))
    path = tmp_path / "x.ckpt"
    t.save_checkpoint(path)
    trainer(tmp_path, QATCallback(linears("lsq")), max_steps=6).fit(second, tokens(12), ckpt_path=path)
    ours, theirs = qat.convert(second), qat.convert(whole)
    assert all(torch.equal(ours[name].dequantize(), theirs[name].dequantize()) for name in theirs)
    back = qat.convert(qat.load_from_checkpoint(path, Adapted().model))
    assert all(torch.equal(back[name].codes, tensor.codes) for name, tensor in qat.convert(first).items())


def test_a_frozen_head_is_quantized_as_it_is(tmp_path: Path) -> None:
    module = Adapted()
    head = module.model.base_model.model.lm_head.weight.detach().clone()
    trainer(tmp_path, QATCallback(recipe()), max_steps=2).fit(module, tokens(16))
    assert torch.equal(module.model.base_model.model.lm_head.weight, head)
    assert "lm_head.weight" in qat.convert(module)
