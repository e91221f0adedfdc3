"""Distributed training of monocular depth estimation on NYU Depth v2."""

from mde_dist.utils.user import complete_user

__version__ = "0.1.0"

complete_user()
