"""The decoders of mde_dist in a loop over bytes in memory, into one buffer: the limit of any loader on these shards."""

import itertools
import json
from pathlib import Path

import harness
import numpy as np
import with_mde_dist

from mde_dist.data.shards import decode_pair, open_split
from mde_dist.tools.benchmarking.reading import read_pair

_IN_MEMORY = 64_000_000  # bytes that the loop goes round: more than a core's cache holds


def batches(out: Path, batch: int, workers: int) -> harness.Batches:
    note = json.loads((out / "pairs.json").read_text("utf-8"))
    with open_split(note["shards"], note["split"]) as shards:
        pairs, taken = list[tuple[memoryview, memoryview]](), 0
        for sample in np.random.default_rng(0).permutation(note["pairs"]):
            pairs.append(read_pair(shards, int(sample)))
            taken += sum(map(len, pairs[-1]))
            if taken > _IN_MEMORY:
                break
        image, depth = np.empty((*shards.size, 3), np.uint8), np.empty(shards.size, np.uint16)
        endless = itertools.cycle(pairs)
        while True:
            for encoded, jpeg in itertools.islice(endless, batch):
                decode_pair(jpeg, encoded, shards.manifest.codec, image, depth)
            yield image, depth


if __name__ == "__main__":
    harness.main(with_mde_dist.prepare, batches, ())
