"""What grows with samples, nodes and ranks: modelled for 8, 64 and 512 GPUs, and measured where a small machine can.

    python benchmarks/scale.py model [--rate 1000] [--share 16] [--window 4] [--samples-per-shard 256]
    python benchmarks/scale.py measure [order index manifest reduce checkpoint wait readahead peers] [--shards DIR]

`model` computes, from assumptions in scale_formulas.py; nothing of it ran on GPUs. `measure` runs the package's own
code on this machine. scale.md has both side by side, and what breaks first.
"""

import argparse
from collections.abc import Iterable, Sequence

import numpy as np
from scale_data import DATA
from scale_formulas import (
    COLUMNS,
    DISK,
    LINKS,
    NORMS,
    PAIR,
    PARAMETERS,
    PART_FILE,
    PER_NODE,
    ROW,
    Costs,
    all_reduce,
    distinct,
    exposed,
    groups_in_batches,
    host_sum,
    meet,
    read_by_node,
    shards_fetched,
    small_gather,
    small_sum,
    waiting,
)
from scale_ranks import RANKS
from turns import child

GPUS = (8, 64, 512)
SAMPLES = (48_000, 1_000_000, 47_000_000, 1_000_000_000)
GRADIENT = 4 * PARAMETERS  # bytes


def table(title: str, head: str, rows: Iterable[Sequence[object]]) -> None:
    """`head`: the columns' names, separated by |."""
    print(f"\n**{title}**\n\n| {head} |\n|" + "---|" * (1 + head.count("|")))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def in_units(value: float, units: Sequence[tuple[float, str]]) -> str:
    return next((f"{value / one:.3g} {name}" for one, name in units if value >= one), f"{value:.3g}")


def count(n: float) -> str:
    return in_units(n, ((1e9, "billion"), (1e6, "million"))) if n >= 1e6 else f"{n:,.0f}"


def size(n: float) -> str:
    return in_units(n, ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB"), (1.0, "B")))


def time(s: float) -> str:
    return in_units(s, ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs")))


def model(given: argparse.Namespace) -> None:
    check_constants()
    step = given.share / given.rate
    print(f"{given.rate:g} images/s and {given.share} images a step for each GPU: a step of {time(step)}")
    on_disk(given.samples_per_shard)
    opening(given.samples_per_shard)
    reading(given.rate)
    nodes(given.samples_per_shard, given.share)
    shuffling(given.samples_per_shard, given.window)
    sums(step, given.share)
    beside(step, given.share, given.samples_per_shard)
    waits()


def check_constants() -> None:
    """That the figures are those of the package as it is."""
    from torch import nn

    from mde_dist.data.manifest import INDEX
    from mde_dist.evaluation import breakdown
    from mde_dist.evaluation.results import N_HASH_COLUMNS
    from mde_dist.models.config import ModelConfig
    from mde_dist.models.depth_model import create_pretrained_model

    seed = create_pretrained_model(ModelConfig(weights="none"), 0)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in seed.modules())
    found = sum(p.numel() for p in seed.parameters()), norms, INDEX.itemsize, breakdown.COLUMNS + N_HASH_COLUMNS + 1
    assert found == (PARAMETERS, NORMS, ROW, COLUMNS), f"now {found}"


def on_disk(block: int) -> None:
    costs = Costs()
    table(
        "On disk",
        f"samples | bytes | shards of {block} | index | manifest | part files while packing",
        [
            [count(n), size(n * PAIR), count(s), size(n * ROW), size(s * costs.shard_bytes), size(s * PART_FILE)]
            for n, s in ((n, -(-n // block)) for n in SAMPLES)
        ],
    )


def opening(block: int) -> None:
    costs, rows = Costs(), []
    for n in SAMPLES:
        shards = -(-n // block)
        seconds = n * ROW / costs.hash_rate, n * costs.row_check, shards * costs.shard_parse, shards * costs.stat
        memory, in_all = shards * costs.shard_memory, sum(seconds)
        rows.append([count(n), *map(time, (*seconds, in_all)), time(shards * costs.stat_nfs), size(memory)])
        rows[-1].append(size(memory * PER_NODE))
    table(
        "To open a split: every rank does all of it",
        "samples | hash the index | check its rows | parse the manifest | look for shards | in all | look on NFS | "
        "memory of a rank | of a node",
        rows,
    )


def reading(rate: float) -> None:
    rows = []
    for g in GPUS:
        own, all_of_it = min(g, PER_NODE) * rate * PAIR, g * rate * PAIR
        shares = [f"{all_of_it / link.bandwidth:.0%}, {own / link.bandwidth:.0%}" for link in LINKS]
        rows.append(
            [g, f"{g * rate:,.0f}", size(own), size(all_of_it), *shares, *(time(n / (g * rate)) for n in SAMPLES)]
        )
    table(
        "Bytes that a node reads in a second, and the share of its link",
        "GPUs | images/s | its own samples | from a server, as it is | of 400 Gb/s: as it is, own | of 25 Gb/s | "
        + " | ".join(f"epoch of {count(n)}" for n in SAMPLES),
        rows,
    )


def nodes(block: int, share: int) -> None:
    samples, rows = 200_000, []
    for number in (8, 64):
        batch = number * PER_NODE * share
        for window in (4, 32, 256):
            read = [read_by_node(samples, block, window, batch, number, dealt) for dealt in (False, True)]
            room, uneven = 3 * window * block * PAIR, shards_fetched(samples, block, window, short=1)
            rows.append([number, batch, window, "100%", *(f"{part:.0%}" for part in read), size(room), f"{uneven:.2f}"])
    table(
        f"Shards of an epoch by node, of {samples:,} samples (simulated, the real order)",
        "nodes | global batch | window | fetched from a server | read from | were a batch dealt out by shard | "
        "cache room of 3 windows | fetched per window, of its shards, where the first shard lacks a sample",
        rows,
    )


def shuffling(block: int, window: int) -> None:
    shards, scenes, rows = 188, 249, []
    n = shards * block
    # packing sorts training pairs by a hash of their key: a shard is a random part of all scenes
    shard, scene = np.arange(n) // block, np.random.default_rng(0).permutation(n) % scenes
    for batch in (32, 128, 1024, 8192):
        for w in (window, 4 * window, 16 * window):
            held = w * block
            formula = distinct(w, block, min(batch, held)) * max(1.0, batch / held)
            found = [groups_in_batches(group, block, w, batch) for group in (shard, scene)]
            full = distinct(shards, block, batch), distinct(scenes, n // scenes, batch)
            rows.append([batch, w, f"{held / n:.1%}", f"{formula:.1f}, {found[0]:.1f}, {full[0]:.1f}"])
            rows[-1] += [f"{found[1]:.1f}, {full[1]:.1f}", f"{meet(held, batch):.1%}, {meet(n, batch):.2%}"]
    table(
        f"Shuffling {n:,} samples in {shards} shards",
        "global batch | window | of an epoch | shards in a batch: formula, real order, full shuffle | "
        "of 249 scenes: real order, full shuffle | two samples of a shard meet in a batch: so, full shuffle",
        rows,
    )


def sums(step: float, share: int) -> None:
    rows = []
    for link in LINKS:
        for g in GPUS if link is LINKS[0] else GPUS[1:]:
            fp32, bf16 = all_reduce(g, GRADIENT, link), all_reduce(g, GRADIENT / 2, link)
            norms = NORMS * (small_gather(g, link) + small_sum(g, link))
            lost = [(exposed(t, step) + more) / step for t, more in ((fp32, norms), (fp32, 0), (bf16, 0))]
            name = link.name if g > PER_NODE else "NVLink"
            rows.append(
                [
                    g,
                    name,
                    *map(time, (fp32, bf16, norms, small_sum(g, link), host_sum(g))),
                    *(f"{part:.0%}" for part in lost),
                ]
            )
    table(
        f"Sums over the ranks: {size(GRADIENT)} of gradients against a step of {time(step)}, {share} images a GPU",
        "GPUs | link | fp32 | bf16 | batch norm of all | news, device | host (gloo) | added to a step, as it is | "
        "without sync_bn | and bf16",
        rows,
    )


def beside(step: float, share: int, block: int) -> None:
    rows, whole = [], 4 * GRADIENT  # weights, two moments, average
    written = " / ".join(time(whole / rate) for rate in DISK.values())
    for g in GPUS:
        rows.append([g, f"{size(whole)}: {written}", time(-(-g // PER_NODE) * whole / DISK["NFS"])])
        for window in (4, 256):
            mean, burst = Costs().order(g * share, window * block)
            rows[-1].append(f"{time(mean)}, {mean / step:.1%}; {time(burst)}")
        rows[-1] += [min(g, -(-images // 8)) for images in (654, 48_000)]
    table(
        f"Beside the steps ({', '.join(DISK)})",
        "GPUs | checkpoint, written by one rank | read by all from one NFS | order a step, window 4: mean, of a "
        "step; when a window begins | window 256 | ranks that evaluate 654 images | 48,000",
        rows,
    )
    sizes = ((n, n * COLUMNS * 8) for n in (654, 48_000, 1_000_000))
    table("Numbers of an evaluation, on each rank", "images | table", [[count(n), size(b)] for n, b in sizes])


def waits() -> None:
    draw = np.random.default_rng(0)
    usual = draw.gamma(25, 1.5e-3 / 25, 20_000)
    slow = np.where(draw.random(len(usual)) < 0.005, usual + 0.2, usual)
    table(
        "Share of its time that a GPU waits (simulated): 32 images of 1.5 ms each, a step of 32 ms",
        "threads | ahead | all reads alike | one in 200 takes 0.2 s more",
        [
            [threads, ahead, *(f"{waiting(times, threads, 32, ahead, 32e-3, 3000):.1%}" for times in (usual, slow))]
            for threads in (1, 2, 4, 8)
            for ahead in (1, 3, 8)
        ],
    )


def main() -> None:
    measures = DATA | RANKS
    if child(*(measure for measure, _ in measures.values())):
        return
    shown = {name: show for name, (_, show) in measures.items() if show}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("model", "measure"))
    parser.add_argument("which", nargs="*", help=f"of {', '.join(shown)}; none given = all")
    parser.add_argument("--rate", type=float, default=1000, help="images/s of a GPU")
    parser.add_argument("--share", type=int, default=16, help="images of a GPU in a step")
    parser.add_argument("--window", type=int, default=4, help="shards")
    parser.add_argument("--samples-per-shard", type=int, default=256)
    parser.add_argument("--shards", help="of real pairs, for `wait` and `readahead`")
    given = parser.parse_args()
    if given.what == "model":
        return model(given)
    for name in given.which or shown:
        shown[name](given)


if __name__ == "__main__":
    main()
