"""The trainer measured: its own cost per step, its checkpoints, and how soon it stops.

    python benchmarks/trainer.py overhead [--ranks 1 2] [--size 120x160] [--batch 24]
    python benchmarks/trainer.py checkpoint [--size 120x160] [--batch 8]
    python benchmarks/trainer.py signal [--ranks 1 2 4]

Each prints plain tables; `--rounds N --minutes M` is how often and how long to measure for each, see turns.py. What its
options choose among is measured by `python -m mde_dist.bench step`.
"""

import argparse
import contextlib
import itertools
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from signals import make_shards, stop, training
from torch import distributed, nn
from turns import Rounds, child, company, in_ranks, kept, show, timed

SAVE_STEPS = 12  # from one save to the next


# --- the trainer's loop, fed from memory ---


def random_batch(images: int, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """As `data.augmentation.prepare` gives it: normalised images, channels innermost; metres, a tenth of them holes."""
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(images, 3, *size, generator=draw).contiguous(memory_format=torch.channels_last)
    depth = 0.5 + 9 * torch.rand(images, *size, generator=draw)
    return image, depth * (torch.rand(depth.shape, generator=draw) > 0.1)


def train_fed(argv: list[str], pause: Callable[[int, Any, Any], bool]) -> list[list[float]]:
    """`mde_dist.train` as it is, but for its stream, one batch in memory -> (begin, end, CPU ms) of each step.

    `pause(step, config, accelerator)` is called before each step, outside of all; where it is false, training stops.
    """
    from mde_dist import train
    from mde_dist.data.loader import Batch
    from mde_dist.training import data_stream as stream
    from mde_dist.training import trainer

    steps = []

    def feed(config: Any, _shards: Any, _seen: int, accelerator: Any, stop: Any) -> Any:
        numbers = np.arange(config.train.batch_size // accelerator.num_processes)
        view = random_batch(len(numbers), config.data.size)
        stream.prepare = lambda *_: view

        def batches() -> Iterator[Batch]:
            for number in itertools.count():
                if not pause(number, config, accelerator):
                    stop.signal = signal.SIGTERM
                begin, cpu = time.perf_counter(), time.process_time()
                yield Batch(*view, numbers * 0, numbers, 0)
                steps.append([begin, time.perf_counter(), 1e3 * (time.process_time() - cpu)])

        return contextlib.nullcontext(batches())

    trainer.training_stream = feed
    with contextlib.suppress(SystemExit):
        train.main(argv)
    return steps


class Stub(nn.Module):
    """Next to no arithmetic: what a step takes with it is what surrounds the model."""

    def __init__(self, *_: object):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(1, 1)), nn.Parameter(torch.zeros(1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.scale * image[:, 0] + self.shift


def bare_loop(config: Any, world: int, build: Callable, **ddp: bool) -> Callable[[], object]:
    """A step of what one would write without a trainer: nothing logged, nothing checked."""
    from mde_dist.training.optim import make_optimizer

    bare = build(config.model, config.train.seed).to(memory_format=torch.channels_last)
    model = nn.parallel.DistributedDataParallel(bare, **ddp) if world > 1 else bare
    optimizer = make_optimizer(bare, config.optim)
    image, depth = random_batch(config.train.batch_size // world, config.data.size)

    def step() -> None:
        valid = depth > 0
        pixels = valid.sum()
        if world > 1:
            distributed.all_reduce(pixels)
        (torch.where(valid, model(image) - depth, 0.0).square().sum() / pixels * world).backward()
        nn.utils.clip_grad_norm_(bare.parameters(), config.optim.grad_clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def fed_overhead(folder: str, shards: str, rounds: list, block: int, stub: bool, **changes: Any) -> dict[str, Any]:
    """Steps of bare loops and of the trainer, in blocks in turn, in the same process group."""
    from mde_dist.models.depth_model import create_pretrained_model
    from mde_dist.training import step as train_module

    build = Stub if stub else create_pretrained_model
    train_module.build_started = lambda config, seed: (build(config, seed), None)
    counted, loops = Rounds(*rounds), {}
    ours = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    bare = {"bare loop, the trainer's DDP options": ours, "bare loop, DDP as it comes": {}}
    found: dict[str, list] = {name: [] for name in bare}

    def pause(number: int, config: Any, accelerator: Any) -> bool:
        world = accelerator.num_processes
        if not loops:
            for name, ddp in list(bare.items())[: 2 if world > 1 else 1]:  # a lone rank needs no DDP
                loops[name] = bare_loop(config, world, build, **ddp)
        if number % block:
            return True
        if number > block:  # the first round warms up
            counted.end()
        go = torch.tensor(float(counted.begin() if accelerator.is_main_process else 0))
        if world > 1:
            distributed.broadcast(go, src=0)
        for name in list(loops)[:: 1 if number // block % 2 else -1] if go else ():
            table = [timed(loops[name]) for _ in range(block)]
            found[name] += [table] if number else []
        return bool(go)

    steps = train_fed(training(folder, shards, **changes)[1], pause)
    spent = [(1e3 * (end - begin), cpu) for begin, end, cpu in steps[block:]]
    blocks = [spent[first : first + block] for first in range(0, len(spent), block)]
    return {"found": found | {"trainer": blocks}, "others": counted.others}


def overhead(given: argparse.Namespace, folder: str) -> None:
    shards, changes = make_shards(folder, 8), {"data_size": given.size, "train_batch_size": given.batch or 24}
    for stub, world in itertools.product((True, False), given.ranks or [1, 2]):
        # a block of the stub's has one log line in it, at the sample's batch size
        counts = {"rounds": [given.rounds * (5 if stub else 1), given.minutes], "block": 10 if stub else 3}
        result = in_ranks(world, fed_overhead, shards=shards, stub=stub, **counts, **changes)
        what = "a stub for the model" if stub else "the seed model"
        show(f"{what}, {world} rank(s), global batch {given.batch or 24} at {given.size}", **result)


# --- checkpoints ---


def fed_saves(folder: str, shards: str, rounds: list, **changes: Any) -> dict[str, Any]:
    """A save every few steps: (called, copied, on disk) of each, and (begin, end, …) of all steps."""
    from mde_dist.training.checkpoint_writer import AsyncCheckpointWriter

    saves, counted, submit = [], Rounds(*rounds), AsyncCheckpointWriter.submit

    def submit_noting(self: AsyncCheckpointWriter, label: object, copy: Callable, write: Callable) -> None:
        saves.append(times := [time.perf_counter()])
        submit(self, label, copy, lambda copied: (write(copied), times.append(time.perf_counter())))
        times.insert(1, time.perf_counter())

    def pause(number: int, *_: Any) -> bool:
        if number % SAVE_STEPS != SAVE_STEPS // 2:
            return True
        if number > SAVE_STEPS:
            counted.end()
        return counted.begin()

    AsyncCheckpointWriter.submit = submit_noting
    run, argv = training(folder, shards, train_checkpoint_every=SAVE_STEPS * changes["train_batch_size"], **changes)
    steps = train_fed(argv, pause)
    size = sum(path.stat().st_size for path in max((run / "checkpoints").iterdir()).iterdir()) / 1e6
    saves, steps = saves[: len(counted.others)], steps[SAVE_STEPS // 2 :]
    return {"MB": size, "saves": saves, "steps": steps, "others": counted.others}


def checkpoint(given: argparse.Namespace, folder: str) -> None:
    shards, changes = make_shards(folder, 8), {"data_size": given.size, "train_batch_size": given.batch or 8}
    print(f"\n1 rank, steps of {given.batch or 8} images at {given.size}, a save every {SAVE_STEPS}; median (longest)")
    head = "   ms the copy holds up   s until on disk   ms per step   beside the writing   ms lost in all"
    print(f"  {'MB':>16}{head}")
    for ema in (0, 2000):
        counts = {"rounds": [given.rounds, given.minutes], "optim_ema_samples": ema}
        found = in_ranks(1, fed_saves, shards=shards, **counts, **changes)
        chosen = [found["saves"][place] for place in kept(found["others"])]
        beside, calm = [], []
        for begin, end, _ in found["steps"]:
            save = next((save for save in found["saves"] if save[1] < end and begin < save[2]), None)
            if save is None:
                calm.append(1e3 * (end - begin))
            elif save in chosen and begin > save[0]:  # not the step that the copy belongs to
                beside.append(1e3 * (end - begin))
        called, copied, stood = np.array(chosen).T
        held, stood = 1e3 * (copied - called), stood - called
        cost = (held.sum() + sum(beside) - len(beside) * np.median(calm)) / len(chosen)
        print(
            f"  {'with EMA' if ema else 'without':9} {found['MB']:6.1f}   {np.median(held):12.0f} ({held.max():4.0f})"
            f"   {np.median(stood):9.2f} ({stood.max():.2f})   {np.median(calm):11.0f}   {np.median(beside):10.0f}"
            f" ({max(beside):4.0f})   {cost:10.0f}   {company(found['others'])}",
            flush=True,
        )


def main() -> None:
    if child(fed_overhead, fed_saves):
        return
    commands = {"overhead": overhead, "checkpoint": checkpoint, "signal": stop}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=commands)
    parser.add_argument("--size", default="120x160")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--ranks", type=int, nargs="+")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--minutes", type=float, default=8)
    given = parser.parse_args()
    given.rounds = given.rounds or (3 if given.what == "signal" else 12)
    print(f"{time.strftime('%F %T')}, load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        commands[given.what](given, folder)
    print(f"{time.strftime('%F %T')}, load {os.getloadavg()[0]:.1f}", flush=True)


if __name__ == "__main__":
    main()
