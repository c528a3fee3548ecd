"""Run by test_distributed.py in two processes: `torchrun --nproc-per-node 2 dist_run.py FOLDER CASE ...`.

Each case writes what rank 0 found to FOLDER/<case>.json; an assertion that fails ends the run with an error.
"""

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)

import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from lit_small import Lit, Net, data, delayed, recipe, trainer  # noqa: E402
from pytorch_lightning.strategies import ModelParallelStrategy  # noqa: E402
from torch import Tensor  # noqa: E402

import qat  # noqa: E402
from qat.callbacks import QATCallback  # noqa: E402
from qat.state import require_state  # noqa: E402
from qat.steps import full  # noqa: E402

torch.set_num_threads(1)
FOLDER, CASES = Path(sys.argv[1]), sys.argv[2:]
EMA_INPUT = {"bits": 8, "granularity": "tensor", "quantizer": "ema", "zero_point": "int"}
STEPS = 6


class Halves(Lit):
    """Each rank trains on its part of the step's batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = list(data())[self.global_step % 8]
        part = slice(self.global_rank, None, self.trainer.world_size)
        return super().training_step((x[part], y[part]), batch_idx)


class Sharded(Halves):
    sharded = False

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if not self.sharded:
            mesh = self.device_mesh["data_parallel"]
            for part in (self.net.a, self.net):
                fully_shard(part, mesh=mesh)
            self.sharded = True


class ShardedInside(Sharded):
    """Makes its layers in configure_model, where it shards them."""

    prepared_by_user = False

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(0)
            self.net = Net()
            if self.prepared_by_user:
                qat.prepare(self, RECIPE)
        super().configure_model()


RECIPE = recipe(input=EMA_INPUT, phases=delayed(2))


def fit(module: Any, strategy: Any, steps: int = STEPS, ckpt: Any = None, **kwargs: Any) -> pl.Trainer:
    t = trainer(
        FOLDER, QATCallback(RECIPE), devices=2, strategy=strategy, max_steps=steps, limit_val_batches=1, **kwargs
    )
    t.fit(module, data(), data(), ckpt_path=ckpt)
    return t


def same_on_all_ranks(module: torch.nn.Module) -> None:
    for name, value in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
        mine = full(value).contiguous()
        if "scratch" in name or "norm" in name:
            continue
        first = mine.clone()
        dist.broadcast(first, 0)
        assert torch.equal(mine, first), name


def mean_losses(module: Lit) -> list[float]:
    joint = torch.tensor(module.losses)
    dist.all_reduce(joint)
    return (joint / 2).tolist()


def done(case: str, **found: Any) -> None:
    if dist.get_rank() == 0:
        (FOLDER / f"{case}.json").write_text(json.dumps(found))
    dist.barrier()


def saved_equals_trained(module: Lit, path: Path, alone: Lit | None = None) -> int:
    """The gathered integers are those that one process makes from the checkpoint."""
    bundle = qat.convert(module)
    gathered = {name: bundle[name] for name in bundle}
    floats = {name: bundle.floats[name] for name in bundle.floats}
    if dist.get_rank() == 0:
        mine = qat.convert(qat.load_from_checkpoint(path, alone or Lit()))
        assert gathered.keys() == set(mine)
        for name, q in mine.items():
            assert torch.equal(q.codes, gathered[name].codes), name
            assert torch.equal(q.scale, gathered[name].scale), name
        assert floats.keys() == set(mine.floats)
        assert all(torch.equal(value, floats[name]) for name, value in mine.floats.items())
    dist.barrier()
    return len(gathered)


def ddp() -> None:
    module = Halves()
    t = fit(module, "ddp")  # default flags: an unused parameter would be an error
    same_on_all_ranks(module)
    t.save_checkpoint(FOLDER / "ddp.ckpt")
    done("ddp", losses=mean_losses(module), tensors=saved_equals_trained(module, FOLDER / "ddp.ckpt"))


def adapted(module: Any) -> Any:
    """With an adapter of peft on both layers, which alone is trained."""
    import peft

    torch.manual_seed(0)
    module.net = peft.get_peft_model(module.net, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["a", "b"]))
    return module


def lora() -> None:
    losses = []
    for kind, strategy in ((Halves, "ddp"), (Sharded, parallel(whole_file=True))):
        module = adapted(kind())
        t = fit(module, strategy)
        same_on_all_ranks(module)
        t.save_checkpoint(FOLDER / "lora.ckpt")
        assert saved_equals_trained(module, FOLDER / "lora.ckpt", adapted(Lit())) == 2
        assert all(float(full(p).abs().sum()) > 0 for name, p in module.named_parameters() if "lora_B" in name)
        losses.append(mean_losses(module))
    done("lora", losses=losses)


def parallel(whole_file: bool) -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=not whole_file
    )


def fsdp2() -> None:
    module = Sharded()
    t = fit(module, parallel(whole_file=True))
    assert all(hasattr(p, "placements") for p in module.net.parameters())
    same_on_all_ranks(module)
    t.save_checkpoint(FOLDER / "fsdp2.ckpt")
    resumed = Sharded()
    fit(resumed, parallel(whole_file=True), steps=STEPS + 1, ckpt=FOLDER / "fsdp2.ckpt")
    assert require_state(resumed).record.step == STEPS + 1
    done("fsdp2", losses=mean_losses(module), tensors=saved_equals_trained(module, FOLDER / "fsdp2.ckpt"))


def fsdp2_resume() -> None:
    whole = Sharded()
    fit(whole, parallel(whole_file=False))
    half = Sharded()
    t = fit(half, parallel(whole_file=False), steps=4)
    t.save_checkpoint(FOLDER / "half.ckpt")
    assert (FOLDER / "half.ckpt").is_dir()
    resumed = Sharded()
    for parameter in resumed.parameters():
        parameter.data.normal_()
    fit(resumed, parallel(whole_file=False), ckpt=FOLDER / "half.ckpt")
    assert resumed.losses == whole.losses[4:], (resumed.losses, whole.losses)
    assert require_state(resumed).record == require_state(whole).record
    for (name, a), b in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(full(a), full(b)), name
    done("fsdp2_resume", losses=mean_losses(whole))


def fsdp2_inside() -> None:
    module = ShardedInside()
    try:
        fit(module, parallel(whole_file=True))
        raise AssertionError("layers that were sharded before they were prepared have to be refused")
    except qat.QATError as refused:
        said = str(refused)
    module = ShardedInside()
    module.prepared_by_user = True
    fit(module, parallel(whole_file=True))
    same_on_all_ranks(module)
    done("fsdp2_inside", said=said, losses=mean_losses(module))


def init() -> None:
    """Ranks see other batches and start from the same weights; shards are refused."""
    start = recipe(init={"method": "gptq_latent", "batches": 2})
    module, before = Halves(), Halves().net.a.weight
    trainer(FOLDER, QATCallback(start), devices=2, strategy="ddp", max_steps=1).fit(module, data())
    same_on_all_ranks(module)
    assert float((module.net.a.weight - before).abs().max()) > 0.05, "a step of training alone moves less"
    try:
        trainer(FOLDER, QATCallback(start), devices=2, strategy=parallel(True), max_steps=1).fit(Sharded(), data())
        raise AssertionError("GPTQ of sharded weights has to be refused")
    except qat.QATError as refused:
        done("init", said=str(refused))


def fold() -> None:
    """As `init`; behind the norm there is a ReLU, which positive factors pass."""
    words = {"method": "awq", "batches": 2, "network": {"reads": {"norm": ["b"]}}}
    start = recipe(fold=words)
    module, before = Halves(), Halves().net.norm.weight
    trainer(FOLDER, QATCallback(start), devices=2, strategy="ddp", max_steps=1).fit(module, data())
    same_on_all_ranks(module)
    for parameter in module.net.norm.parameters():
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(parameter, first)
    assert float((module.net.norm.weight - before).abs().max()) > 0.05, "a step of training alone moves less"
    try:
        trainer(FOLDER, QATCallback(start), devices=2, strategy=parallel(True), max_steps=1).fit(Sharded(), data())
        raise AssertionError("AWQ of sharded weights has to be refused")
    except qat.QATError as refused:
        done("fold", said=str(refused))


class Normed(Halves):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 8))


def norms() -> None:
    """Ranks see other batches and so other statistics; what they round is the same, in each phase."""
    phases = {"learn": {"steps": 3}, "settle": {"steps": -1, "freeze_batch_norm": True}}
    folded = recipe(phases=phases, batch_norm={"fold": True})
    for steps in (2, STEPS):
        module = Normed()
        t = trainer(FOLDER, QATCallback(folded), devices=2, strategy="ddp", max_steps=steps)
        t.fit(module, data())
        same_on_all_ranks(module)
        bundle = qat.convert(module, require_final=steps == STEPS)
        for tensor in (bundle["net.0.weight"].codes.float(), bundle.floats["net.0.bias"].contiguous()):
            first = tensor.clone()
            dist.broadcast(first, 0)
            assert torch.equal(tensor, first)
    t.save_checkpoint(FOLDER / "norms.ckpt")
    done("norms", losses=mean_losses(module), tensors=saved_equals_trained(module, FOLDER / "norms.ckpt", Normed()))


def alive_after_forward(module: torch.nn.Module, x: Tensor) -> int:
    """Bytes of the storages that autograd keeps and that are allocated when the forward is over, weights' included."""
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(x)
    codes = [t for m in module.modules() if hasattr(m, "_qat") for _, e, _ in m._qat.cache.entries.values() for t in e]
    storages = [t.untyped_storage() for t in [*kept, *codes] if t is not None]
    bytes_of = {s.data_ptr(): s.nbytes() for s in storages if s.nbytes()}
    y.sum().backward()
    return sum(bytes_of.values())


def sharded_run(quantizer: str | None, code_cache: bool) -> tuple[int, list[Tensor]]:
    """(bytes alive after a forward, the gathered weights after 20 optimizer steps of 8 micro-batches)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    module = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(4)))
    if quantizer is not None:
        weight = {"bits": 4, "granularity": "group", "group_size": 32, "quantizer": quantizer}
        everywhere = qat.recipes.from_dict({"name": "s", "rules": {"all": {"weight": weight}}})
        qat.prepare(module, everywhere, code_cache=code_cache)
    mesh = init_device_mesh("cpu", (2,))
    for layer in [m for m in module if isinstance(m, torch.nn.Linear)]:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3)
    g = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(20):
        for _ in range(8):
            module(torch.randn(4, 128, generator=g)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if quantizer is not None:
            qat.after_optimizer_step(module, optimizer)
    return alive_after_forward(module, torch.randn(4, 128)), [full(p).clone() for p in module.parameters()]


def fsdp2_codes() -> None:
    # a group that another case's trainer has left behind is used as it is
    plain, _ = sharded_run(None, False)
    found = {}
    for quantizer in ("absmax", "lsq"):
        alive, weights = sharded_run(quantizer, True)
        _, again = sharded_run(quantizer, False)
        found[quantizer] = alive - plain
        assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
    done("fsdp2_codes", extra=found)


for case in CASES:
    run = {"ddp": ddp, "fsdp2": fsdp2, "fsdp2_resume": fsdp2_resume, "fsdp2_inside": fsdp2_inside}
    (run | {"fsdp2_codes": fsdp2_codes, "init": init, "fold": fold, "lora": lora, "norms": norms})[case]()

# All is written. Leave without the interpreter's shutdown, in which gloo's threads may still be running: on a busy
# machine that ended a finished rank with "terminate called without an active exception".
dist.barrier()
dist.destroy_process_group()
os._exit(0)
