"""`import lightning` and `import pytorch_lightning`, in any order; and what importing the callbacks does not import."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent

RUN = """
import copy, pickle
import torch
from torch.utils.data import DataLoader, TensorDataset
import qat.recipes
recipe = qat.recipes.from_dict({"name": "x", "rules": {"l": {"weight": {"bits": 4, "quantizer": "lsq"}}}})
def use(pl):
    class Lit(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).square().mean()
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)
    callbacks = [QATCallback(recipe), QuantizationMonitor()]
    callbacks.append(DistillationCallback("mse"))
    for callback in callbacks:
        assert type(pickle.loads(pickle.dumps(callback))) is type(callback) is type(copy.deepcopy(callback))
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    t = pl.Trainer(accelerator="cpu", max_steps=2, callbacks=callbacks, **quiet)
    lit = Lit()
    t.fit(lit, DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4))
    assert qat.state.state_of(lit).record.step == 2
    one = pl.Trainer(accelerator="cpu", max_steps=1, callbacks=QATCallback(recipe), **quiet)  # not in a list
    one.fit(Lit(), DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4))
    assert isinstance(callbacks[0], QATCallback) and isinstance(callbacks[0], pl.Callback)
"""
OURS = "from qat.callbacks import DistillationCallback, QATCallback, QuantizationMonitor"
UNIFIED, SMALL = "import lightning", "import pytorch_lightning"
ORDERS = {
    "lightning": [UNIFIED, OURS, "use(lightning)", "assert 'pytorch_lightning' not in sys.modules"],
    "ours, pytorch_lightning": [OURS, SMALL, "use(pytorch_lightning)", "assert 'lightning' not in sys.modules"],
    "both": [UNIFIED, SMALL, OURS, "use(lightning)", "use(pytorch_lightning)"],
    "one after the other": [UNIFIED, OURS, "use(lightning)", SMALL, "use(pytorch_lightning)", "use(lightning)"],
}
HEAVY = ("lightning", "pytorch_lightning", "triton", "deepspeed", "transformers", "wandb", "matplotlib", "gguf")
SCRIPTS = {name: "\n".join(["import sys, qat, qat.state", RUN, *lines]) for name, lines in ORDERS.items()}
SCRIPTS["imports"] = (
    f"import sys, qat.callbacks\nloaded = [m for m in {HEAVY} if m in sys.modules]\nassert not loaded, loaded"
)


@pytest.fixture(scope="module")
def results() -> dict[str, subprocess.CompletedProcess[str]]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def run(script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=env, capture_output=True, text=True)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SCRIPTS, pool.map(run, SCRIPTS.values()), strict=True))


@pytest.mark.parametrize("name", SCRIPTS)
def test_order_of_imports(results: dict[str, subprocess.CompletedProcess[str]], name: str) -> None:
    # mutation: `bases = bases[:1]` in qat.callbacks.lightning.joined -> "both" is red
    assert results[name].returncode == 0, results[name].stderr[-3000:]
