"""Two CPU processes over gloo: one launch for all cases, because starting two interpreters is what takes time."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lit_small import Lit, data, delayed, recipe, trainer
from torch import Tensor

from qat.callbacks import QATCallback

TRAINED = ("ddp", "fsdp2", "fsdp2_resume", "fsdp2_inside")
PEFT = importlib.util.find_spec("peft") is not None
CASES = (*TRAINED, "init", "fold", "norms", "fsdp2_codes", *(["lora"] if PEFT else []))
ROOT = Path(__file__).parents[2]
EMA_INPUT = {"bits": 8, "granularity": "tensor", "quantizer": "ema", "zero_point": "int"}
pytestmark = pytest.mark.slow


class Stepped(Lit):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(list(data())[self.global_step % 8], batch_idx)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("dist")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = str(Path(__file__).with_name("dist_run.py"))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, *launch, script, str(folder), *CASES], env=env, capture_output=True, text=True, timeout=400
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return {case: json.loads((folder / f"{case}.json").read_text()) for case in CASES}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    module = Stepped()
    callback = QATCallback(recipe(input=EMA_INPUT, phases=delayed(2)))
    trainer(tmp_path_factory.mktemp("one"), callback, max_steps=6, limit_val_batches=1).fit(module, data(), data())
    return module.losses


# Inside the processes: weights and scales are equal on all ranks, DDP has its default flags, the gathered integers are
# those of one process that reads the checkpoint, a resumed run equals the uninterrupted one.
# mutation: no all_reduce in qat.steps.after_optimizer_step -> "ddp" and "fsdp2" are red (ranges differ);
# mutation: return y in qat.node.kept_in_graph -> "ddp" is red (unused parameters);
# mutation: no padding in QATState.get_extra_state -> "fsdp2_resume" is red (size of the record)


@pytest.mark.parametrize("case", TRAINED)
def test_two_processes_train_as_one(found: dict[str, Any], alone: list[float], case: str) -> None:
    # reduction order differs; a code may flip at a tie, so the tolerance is not the last bit
    torch.testing.assert_close(torch.tensor(found[case]["losses"]), torch.tensor(alone), rtol=2e-3, atol=2e-3)
    assert found[case]["losses"][:3] == pytest.approx(alone[:3], abs=1e-6)


@pytest.mark.parametrize("case", ["ddp", "fsdp2"])
def test_gathered_integers(found: dict[str, Any], case: str) -> None:
    assert found[case]["tensors"] == 2


@pytest.mark.skipif(not PEFT, reason="peft is not installed")
def test_adapters_train_alike_replicated_and_sharded(found: dict[str, Any]) -> None:
    """What a checkpoint of either gives equals what the ranks gathered: the run itself asserts it."""
    replicated, sharded = found["lora"]["losses"]
    torch.testing.assert_close(torch.tensor(replicated), torch.tensor(sharded), rtol=2e-3, atol=2e-3)


def test_sharded_before_prepared_is_refused_in_words(found: dict[str, Any]) -> None:
    said = found["fsdp2_inside"]["said"]
    assert said == "net.a is already sharded; call qat.prepare(model, recipe) in configure_model before fully_shard"


def test_gptq_starts_all_ranks_alike_and_refuses_shards(found: dict[str, Any]) -> None:
    # mutation: no `_agree` in qat.callbacks.calibration -> the run is red
    assert found["init"]["said"].startswith("init.method=gptq_latent needs whole weights, and net.a.weight is sharded")


def test_awq_starts_all_ranks_alike_and_refuses_shards(found: dict[str, Any]) -> None:
    """Mutation: `_agree` not called after the fold -> red."""
    assert found["fold"]["said"].startswith("fold.method=awq needs whole weights, and net.a.weight is sharded")


def test_sharded_weights_leave_nothing_of_their_size_behind(found: dict[str, Any]) -> None:
    """Bytes alive after a forward beyond the float model's, of 4 layers of 128 x 128 in groups of 32: nothing for a
    dynamic scale, the learned fp32 scales (before and after rounding) otherwise. Mutation: `owns` always true."""
    scales = 4 * 128 * (128 // 32) * 4
    assert found["fsdp2_codes"]["extra"]["absmax"] == 0
    assert 0 <= found["fsdp2_codes"]["extra"]["lsq"] <= 3 * scales
