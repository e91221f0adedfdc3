"""One rank of a training stream that writes down what it gets: log_positions.py SHARDS OUT JOBS.json

Each job is a dict: name, samples_seen, batches, batch_size, accumulate, threads. A line of OUT/NAME.RANK.jsonl is one
sample as it reached the loop: stream position, key, crc32 of the stored image and depth, and of the augmented view.
"""

import dataclasses
import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

from mde_dist.data.augmentation import prepare
from mde_dist.data.shards import open_split
from mde_dist.distributed.process_group import init_distributed
from mde_dist.distributed.signals import PreemptionHandler
from mde_dist.training.config import Config
from mde_dist.training.data_stream import training_stream


def crc(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.contiguous().numpy().tobytes())


def log(shards, accelerator, job, out):
    default = Config()
    data = dataclasses.replace(default.data, threads=job["threads"], shuffle_shards=2, size=(32, 40))
    train = dataclasses.replace(default.train, batch_size=job["batch_size"], grad_accum_steps=job["accumulate"], seed=5)
    config = dataclasses.replace(default, data=data, train=train)
    world, rank, accumulate = accelerator.num_processes, accelerator.process_index, job["accumulate"]
    size = job["batch_size"] // (world * accumulate)
    lines = []
    with training_stream(config, shards, job["samples_seen"], accelerator, PreemptionHandler()) as loader:
        for number in range(job["batches"] * accumulate):
            batch = next(loader)
            image, depth = prepare(batch, config.data.size, config.augment, config.train.seed)
            first = job["samples_seen"] + number // accumulate * job["batch_size"]
            first += (number % accumulate * world + rank) * size
            for row, sample in enumerate(batch.sample):
                stored = [crc(batch.image[row]), crc(batch.depth[row].view(torch.int16))]
                view = [crc(image[row]), crc(depth[row])]
                lines.append([first + row, int(batch.epoch[row]), shards.key(int(sample)), *stored, *view])
            np.testing.assert_equal(len(batch.sample), size)
    Path(out, f"{job['name']}.{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def main(place, out, jobs):
    with init_distributed(cpu_threads=1) as accelerator, open_split(place, "train") as shards:
        for job in json.loads(Path(jobs).read_text()):
            log(shards, accelerator, job, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
