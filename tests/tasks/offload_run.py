"""How much memory a run without training needs: that of a small model, which imports whatever runs import, then that of
a large one.

    python offload_run.py SMALL LARGE TEXT OUT OFFLOAD

Prints by how many bytes the process's own memory (RssAnon: what the system cannot drop and read again from a file) grew
at most during the second run.
"""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from qat.recipes import from_dict
from qat.tasks.train import run


def recipe(model: str, text: str, out: str, offload: bool) -> Any:
    slot = {"bits": 4, "granularity": "channel", "quantizer": "lsq", "percentile": 100.0}
    rules = {"linears": {"types": ["Linear"], "weight": slot}, "head": {"match": ["*lm_head"], "keep_float": True}}
    train = {"model": model, "data": [text], "out": out, "seq_len": 32, "batch_size": 2, "accelerator": "cpu"}
    return from_dict(
        {
            "name": "large",
            "rules": rules,
            "phases": {"qat": {"steps": 0}},
            "init": {"method": "gptq", "batches": 1},
            "export": {"targets": ["compressed-tensors"]},
            "train": {**train, "offload": offload},
        }
    )


def own() -> int:
    """Bytes of memory that no file backs."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def main(small: str, large: str, text: str, out: str, offload: str) -> None:
    torch.set_num_threads(1)
    run(recipe(small, text, f"{out}/small", True))
    gc.collect()
    before, seen, done = own(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen[0] = max(seen[0], own())

    thread = threading.Thread(target=watch)
    thread.start()
    run(recipe(large, text, f"{out}/large", offload == "true"))
    done.set()
    thread.join()
    print(seen[0] - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
