"""mde_dist with depth left in millimetres, as its training takes it to the device."""

from functools import partial

import harness
import with_mde_dist

if __name__ == "__main__":
    harness.main(with_mde_dist.prepare, partial(with_mde_dist.batches, metres=False), ())
