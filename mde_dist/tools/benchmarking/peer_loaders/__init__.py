"""The usual loaders, each in a script that runs under an interpreter that has the loader, and need not have mde_dist.

All deliver the same: uint8 RGB images and float32 depth in metres, in batches, shuffled. `harness` runs them.
"""
