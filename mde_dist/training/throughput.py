"""Measurement of time: images/s, waiting for data, the slowest rank, memory, use of the device, time left."""

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PEAK_TFLOPS = {
    # dense, as the makers publish them: (bf16, fp32 without TF32)
    "B200": (2250.0, 75.0),
    "GH200": (989.0, 67.0),
    "H200": (989.0, 67.0),
    "H200 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "H100 NVL": (835.0, 60.0),
    "H100 PCIe": (756.0, 51.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "A10G": (70.0, 31.5),
    "A10": (125.0, 31.2),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
}
_SAYS_NOTHING = re.compile(r"NVIDIA|GeForce|Tesla|SXM\d?|PCIe|HBM3e?|\d+GB?", re.IGNORECASE)
"""Words of a device's name that change nothing about its peak. What another one may mean is not known: a laptop's RTX
4090, an RTX 3090 Ti and a MIG slice of an A100 have other peaks."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that a device can do at `precision` (bf16, else fp32); None where it is not known."""
    words = re.split(r"[\s-]+", torch.cuda.get_device_name(device)) if device.type == "cuda" else []
    for name, (bf16, fp32) in sorted(PEAK_TFLOPS.items(), key=lambda item: -len(item[0].split())):
        named = name.split()
        if set(named) <= set(words) and all(_SAYS_NOTHING.fullmatch(word) for word in words if word not in named):
            return (bf16 if precision == "bf16" else fp32) * 1e12
    return None


class ThroughputMeter:
    """Meter of this rank's time since the last `restart`."""

    def __init__(self, device: torch.device, flops: float = 0.0, peak: float | None = None):
        """`flops`: of forward and backward over one image; `peak`: FLOP/s of the device, where that is known."""
        self._device, self._flops, self._peak = device, flops, peak
        self.restart()

    def restart(self) -> None:
        self._since, self._wait, self._work, self._images = time.perf_counter(), 0.0, 0.0, 0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent in the block is time without data."""
        start = time.perf_counter()
        yield
        self._wait += time.perf_counter() - start

    @contextmanager
    def working(self) -> Iterator[None]:
        """Time spent in the block, on a GPU that of the device, depends on this rank alone: no collective in it."""
        if self._device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self._work += time.perf_counter() - began

    def step(self, images: int) -> None:
        """A step over so many images of all ranks is done."""
        self._images += images

    def row(self) -> list[float]:
        """This rank's figures, for `rates`: seconds in all, waiting, working; bytes of memory at most."""
        for start, end in self._events:
            end.synchronize()
            self._work += start.elapsed_time(end) / 1e3
        self._events.clear()
        return [max(time.perf_counter() - self._since, 1e-9), self._wait, self._work, float(peak_memory(self._device))]

    def rates(self, rows: torch.Tensor, left: int) -> dict[str, Any]:
        """The rows of all ranks (world, 4) -> what a log line says.

        images_per_second, over all ranks; data_wait, the share of the time that the rank which waits most spends
        without data; memory_gb, of the rank that needs most (10^9 bytes; on a GPU what torch reserved there, else the
        process's resident memory); seconds_left for `left` samples. On several ranks: slowest_rank, which takes longest
        for data and its own forward passes, and slower, by what share of the mean over the ranks. Where the device's
        peak is known: mfu, the share of it that the model's arithmetic makes.
        """
        seconds, wait, work, memory = rows.unbind(1)
        speed = self._images / seconds.max().item()
        said: dict[str, Any] = {"images_per_second": round(speed, 2)}
        said["data_wait"] = round((wait / seconds).max().item(), 4)
        if len(rows) > 1:
            own = wait + work
            said["slowest_rank"] = int(own.argmax())
            said["slower"] = round((own.max() / own.mean().clamp(min=1e-9)).item() - 1, 4)
        if self._peak is not None:
            said["mfu"] = round(speed * self._flops / (self._peak * len(rows)), 4)
        said["memory_gb"] = round(memory.max().item() / 1e9, 3)
        said["seconds_left"] = round(left / speed) if speed else None
        return said


def peak_memory(device: torch.device) -> int:
    """Bytes that this rank needed at most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
