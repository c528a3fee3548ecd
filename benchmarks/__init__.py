"""Measurements, none of them shipped: `make bench-cpu`, `make bench-gpu`, `python benchmarks/demo_seeds.py`."""
