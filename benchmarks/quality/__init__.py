"""How close to the float model each tool's quantized model is, at equal bits and equal steps.

A case is a lab (data and a float model: `bytes_lm.py`), grids and methods (`weights.py`), and a line in `cases.py`.
What they share:

    lab.py       a float model of one seed with its data, and the one training loop that every method runs in
    methods.py   what a case is made of, as plain data; how a method makes its model
    peers.py     other libraries' schemes
    run.py       learning rates on the first seed, then every seed; two processes
    summary.py   rows: per seed, mean, spread, ratios to GPTQ and to the best other library
"""
