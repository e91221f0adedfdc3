"""Distributed training of monocular depth estimation on NYU Depth v2."""

__version__ = "0.1.0"
