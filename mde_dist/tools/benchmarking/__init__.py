"""Measurements of `python -m mde_dist.bench`: a module per word, and `harness`, which all share.

Each module has `Options`, a dataclass (the config of training, harness.Timing, its own options; its docstring is the
head of `--help`), and `measure(options)`, which returns a harness.Result, or None on a rank with nothing to show.
"""
