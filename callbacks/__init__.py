"""Callbacks for PyTorch Lightning: thin, they say when; what happens is in the core.

    from qat.callbacks import QATCallback
    trainer = Trainer(callbacks=[QATCallback("w4a16_g128")])

Works with `import lightning` and with `import pytorch_lightning`.
"""

from __future__ import annotations

from qat.callbacks.distillation_callback import DistillationCallback
from qat.callbacks.export_callback import ExportCallback
from qat.callbacks.monitor import QuantizationMonitor
from qat.callbacks.qat_callback import QATCallback

__all__ = ["DistillationCallback", "ExportCallback", "QATCallback", "QuantizationMonitor"]
