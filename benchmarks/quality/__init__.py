"""How close to the float model each tool's quantized model is, at equal bits and equal steps.

A suite of cases, one file each (B1, a byte-level language model: `bytes_lm.py`), and what they share:

    lab.py       a float model of one seed with its data, and the one training loop that every method runs in
    methods.py   the widths and the methods, as plain data; how a method makes its model
    peers.py     other libraries' schemes at these widths
    trials.py    variants that are tried on the tuning split, for docs/experiments.md
    run.py       learning rates on the first seed, then every seed; two processes
    summary.py   rows: per seed, mean, spread, ratios to GPTQ and to the best other library
"""
