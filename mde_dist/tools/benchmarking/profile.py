"""What the device does in a few steps: a trace to look at, and the kinds of kernels that take the time."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from mde_dist.utils.io import writing

_STEPS = 3
_KINDS = (
    # the first one that a name contains counts
    ("nccl", "all-reduce"),
    ("adam", "optimizer"),
    ("lpnorm", "optimizer"),
    ("multi_tensor", "optimizer"),
    ("foreach", "optimizer"),
    ("batch_norm", "batch norm"),
    ("bn_", "batch norm"),
    ("group_norm", "group norm"),
    ("conv", "convolution"),
    ("gemm", "convolution"),
    ("cudnn", "convolution"),
    ("xmma", "convolution"),
    ("cutlass", "convolution"),
    ("mkldnn", "convolution"),
    ("upsample", "resize"),
    ("pool", "pooling"),
    ("memcpy", "copy"),
    ("copy", "copy"),
    ("memset", "fill"),
    ("fill", "fill"),
    ("zero", "fill"),
    ("reduce", "sums"),
    ("sum", "sums"),
    ("elementwise", "elementwise"),
    ("triton", "fused by compile"),
)


def write_profile(step: Callable[[], object], folder: Path, device: torch.device) -> list[str]:
    """Trace a few steps into `folder`/step.json; -> what to say about them. Raises UserError."""
    cuda = device.type == "cuda"
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # or it complains of GPUs that are not there
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as seen:
        for _ in range(_STEPS):
            step()
        if cuda:
            torch.cuda.synchronize()
    path = folder / "step.json"
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".step.{os.getpid()}.json"
        seen.export_chrome_trace(str(temporary))
        temporary.replace(path)
    times = Counter[str]()
    for event in seen.key_averages():
        time = event.self_device_time_total if cuda else event.self_cpu_time_total
        if not cuda or event.device_type == torch.autograd.DeviceType.CUDA:
            times[kind_of(event.key)] += time
    whole = sum(times.values()) or 1
    shares = ", ".join(f"{kind} {time / whole:.0%}" for kind, time in times.most_common() if time >= 0.005 * whole)
    return [
        f"profile of {_STEPS} steps: {path} (ui.perfetto.dev); time of {'kernels' if cuda else 'operators'}: {shares}"
    ]


def kind_of(name: str) -> str:
    """The kind of a kernel or operator."""
    low = name.lower()
    return next((kind for part, kind in _KINDS if part in low), "else")
