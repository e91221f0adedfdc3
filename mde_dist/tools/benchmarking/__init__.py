"""What `python -m mde_dist.bench` measures: a module per word behind it.

Each module has `Options`, a dataclass (config.Config for the options of training, result.Timing for those of a
measurement, and its own), and `bench(options)`, which measures and returns a result.Result, or None on a rank that has
nothing to show. Options' docstring is the head of its `--help`.
"""
