"""Checks of `python -m mde_dist.doctor` before a training: a file for each kind of thing, a function for each row."""
