"""What scale.py computes with: assumptions with their reason, and formulas, the exact ones tested."""

import heapq
import math
from dataclasses import dataclass

import numpy as np

PER_NODE = 8  # GPUs
GPUS = (8, 64, 512)
SAMPLES = (48_000, 1_000_000, 47_000_000, 1_000_000_000)
PAIR = 225_000
"""Bytes of a raw pair of 480x640 in a tar: JPEG 38 KB, depth 184 KB, headers and padding."""
ROW = 52
"""Bytes of a sample in the index."""
PARAMETERS, NORMS, COLUMNS = 12_725_825, 20, 429
"""Of the seed model: trained numbers, and batch-norm layers; numbers that an evaluation keeps of an image. `model`
compares them with the package."""
LAST_BUCKET = 0.46
"""Of the gradient's bytes, in DDP's last bucket (1 MiB, 25 MiB, the rest), which is full only when backward is done."""
OVERLAP = 4 / 9
"""Of a step, in which the other buckets are summed beside backward; assumed: two thirds of backward's two thirds."""
PART_FILE = 65536 * 8 + 2 * 480 * 640 * 8
"""Bytes of the statistics that packing keeps beside each shard until it is done."""
DISK = {"local disk": 2e9, "NFS": 5e8}
"""Bytes/s of a sequential write, assumed."""


@dataclass(frozen=True)
class Link:
    """Between nodes."""

    name: str
    bandwidth: float
    """Bytes/s of a node, as much as is reached: 0.8 of the line."""
    ring_hop: float
    """Seconds of a small message."""
    tree_hop: float


# hops: what NCCL's own tuner assumes for its low-latency protocol over InfiniBand; over TCP a guess
LINKS = (Link("400 Gb/s", 0.8 * 50e9, 2.7e-6, 5e-6), Link("25 Gb/s TCP", 0.8 * 3.125e9, 30e-6, 30e-6))
NVLINK, NVLINK_HOP, BASE = (
    2.0e11,
    1.1e-6,
    6.7e-6,
)  # bytes/s of a GPU's sum, s of a hop (beside other nodes), s of a call

HOST_HOP = 30e-6  # seconds, over TCP from process to process; a guess


@dataclass(frozen=True)
class Costs:
    """Of one core of the machine that scale.md names, by `measure`; the rest is extrapolated from them."""

    hash_rate: float = 1.55e9
    """Bytes/s of sha256 over the index, from the page cache."""
    row_check: float = 35e-9
    """Seconds to see whether a row of the index fits in its shard."""
    shard_parse: float = 6e-6
    """Seconds for a shard of the manifest."""
    shard_bytes: float = 172.0
    """Of the manifest's text."""
    shard_memory: float = 600.0
    """Bytes of a process, for as long as it runs."""
    stat: float = 5.4e-6
    """Seconds to look whether a shard is there, on a local disk."""
    stat_nfs: float = 0.5e-3
    """The same on NFS; assumed."""
    window: float = 0.24e-3
    """Seconds to lay out a window of the order, whatever its size, and"""
    layout: float = 0.12e-6
    """seconds for each of its samples."""

    def order(self, batch: int, window: int) -> tuple[float, float]:
        """(seconds of a rank's thread for a step's share of the order, and of the steps that lay out a window), both
        in samples of all ranks: a rank's part of a batch lies in one window, now and then in two."""
        whole = self.window + self.layout * window
        return min(1.0, batch / window) * whole, whole


def ring(ranks: int, size: float, bandwidth: float, hop: float = 0.0) -> float:
    """Seconds to sum `size` bytes over a ring: each rank sends 2 (n-1)/n of them, in 2 (n-1) hops."""
    return 2 * (ranks - 1) / ranks * size / bandwidth + 2 * (ranks - 1) * hop


def all_reduce(gpus: int, size: float, link: Link) -> float:
    """Seconds to sum within the nodes, whose GPUs then each sum an eighth between the nodes; whichever is slower sets
    the pace, since the parts of a bucket follow one another, and the latency is that of a tree."""
    nodes = -(-gpus // PER_NODE)
    inside = ring(min(gpus, PER_NODE), size, NVLINK)
    return max(inside, ring(nodes, size, link.bandwidth)) + small_sum(gpus, link)


def small_sum(gpus: int, link: Link) -> float:
    """Seconds of a sum of a few numbers: up and down a tree over the nodes, and a chain in each."""
    nodes = -(-gpus // PER_NODE)
    return BASE + 2 * ((min(gpus, PER_NODE) - 1) * NVLINK_HOP + math.floor(math.log2(nodes)) * link.tree_hop)


def host_sum(gpus: int) -> float:
    """Seconds of a sum of a few numbers from host to host: gloo's is a ring through all ranks, over TCP."""
    return ring(gpus, 0.0, 1.0, HOST_HOP)


def small_gather(gpus: int, link: Link) -> float:
    """Seconds of an all-gather of a few numbers, which goes round a ring: every rank is a hop."""
    nodes = -(-gpus // PER_NODE)
    return BASE + (gpus - nodes) * NVLINK_HOP + (nodes - 1) * link.ring_hop


def exposed(seconds: float, step: float) -> float:
    """What an all-reduce adds to a step that does not wait for anything else."""
    return max(LAST_BUCKET * seconds, seconds - OVERLAP * step)


def distinct(groups: int, size: int, draws: int) -> float:
    """Groups of `size` members that are expected among `draws` members drawn without putting back."""
    members = groups * size
    if draws > members - size:
        return float(groups)

    def log_choose(n: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(draws + 1) - math.lgamma(n - draws + 1)

    return groups * -math.expm1(log_choose(members - size) - log_choose(members))


def meet(members: int, batch: int) -> float:
    """The chance of two samples that are shuffled among so many to come in the same batch."""
    return min(1.0, (batch - 1) / max(1, members - 1))


def waiting(
    seconds: np.ndarray, threads: int, batch: int, ahead: int, step: float, batches: int, seed: int = 0
) -> float:
    """Share of its time that a loop of `step` seconds a batch waits for a loader, by simulation of its queue.

    `seconds`: what samples take to read and decode, drawn from at random. Batch k is asked for when batch k - `ahead`
    - 1 is given back, its samples are taken in order by whichever thread is free. The first `ahead` + 1 do not count.
    """
    draw = np.random.default_rng(seed)
    free = [0.0] * threads
    ready: list[float] = []
    now = waited = start = 0.0
    for k in range(batches):
        for _ in range(ahead + 1 if k == 0 else 1):
            ends = []
            for took in draw.choice(seconds, batch):
                ends.append(max(now, heapq.heappop(free)) + took)
                heapq.heappush(free, ends[-1])
            ready.append(max(ends))
        if k == ahead + 1:
            start, waited = now, 0.0
        waited += max(0.0, ready[k] - now)
        now = max(now, ready[k]) + step
    return waited / (now - start)


def read_by_node(samples: int, block: int, window: int, batch: int, nodes: int, by_shard: bool) -> float:
    """Share of the shards of an epoch that a node reads from, mean over the nodes, by the real order.

    `by_shard`: were each global batch dealt out sorted by sample, which leaves it the same set.
    """
    from mde_dist.data.sampler import GlobalSampler

    order, shards = GlobalSampler(samples, block, window, seed=0), -(-samples // block)
    read = np.zeros((nodes, shards), bool)
    owner = np.arange(batch) * nodes // batch
    for first in range(0, samples - batch + 1, batch):
        drawn = order.at(np.arange(first, first + batch))[1]
        read[owner, (np.sort(drawn) if by_shard else drawn) // block] = True
    return float(read.any(0).sum() and read.sum(1).mean() / read.any(0).sum())


def groups_in_batches(group: np.ndarray, block: int, window: int, batch: int) -> float:
    """Groups in a global batch, mean over an epoch of the real order; `group`: of each sample."""
    from mde_dist.data.sampler import GlobalSampler

    order = GlobalSampler(len(group), block, window, seed=0)
    firsts = range(0, len(group) - batch + 1, batch)
    return float(np.mean([len(np.unique(group[order.at(np.arange(k, k + batch))[1]])) for k in firsts]))


def shards_fetched(samples: int, block: int, window: int, short: int) -> float:
    """Shards that a window of the order touches, of as many as it has blocks, where the first shard lacks `short`."""
    from mde_dist.data.sampler import GlobalSampler

    ends = np.minimum(np.arange(1, -(-(samples + short) // block) + 1) * block - short, samples)
    order, found = GlobalSampler(samples, block, window, seed=0), []
    for end, ranges in order.windows(0):
        if end > samples:
            return float(np.mean(found))
        first, last = (
            np.searchsorted(ends, ranges[:, 0], side="right"),
            np.searchsorted(ends, ranges[:, 1] - 1, side="right"),
        )
        found.append(len(set(first) | set(last)) / len(ranges))
    return 0.0
