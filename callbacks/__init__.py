"""Callbacks for PyTorch Lightning: thin, they say when; what happens is in the core.

    from qat.callbacks import QATCallback
    trainer = Trainer(callbacks=[QATCallback("w4a16_g128")])
"""

from __future__ import annotations

from qat.callbacks.qat_callback import QATCallback

__all__ = ["QATCallback"]
