"""The machines: versions, devices, clocks, files that may be open, and where those that do not stay are put."""

import importlib.metadata
import os
import platform
import re
import resource
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement

from mde_dist import __version__
from mde_dist.distributed.environment import Ignored, missing_interface
from mde_dist.distributed.process_group import clock_offsets
from mde_dist.tools.diagnostics.panel import RankSurvey, Row, format_bytes
from mde_dist.utils.errors import UserError
from mde_dist.utils.user import temporary_folder

_PACKAGES = ("torchvision", "accelerate", "numpy", "safetensors", "simplejpeg", "numcodecs")
_MAY_DIFFER = ("driver",)
_EXTRAS = ("", "s3", "tensorboard", "wandb")
"""The extras that a training may use; the empty one stands for what is always needed."""
_READ_BELOW = (
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "TORCHDYNAMO_DISABLE",
    "TORCH_COMPILE_DISABLE",
)
"""Read by cuBLAS, cuDNN, oneDNN and torch.compile: numbers of fewer bits for float32, and no compiling."""
_CLOCK_WARN, _CLOCK_FAIL = 2.0, 60.0  # seconds
_MARGIN = 128  # descriptors for libraries, devices, logs, checkpoints and pipes
_DRIVER = Path("/proc/driver/nvidia/version")
_SHARED = Path("/dev/shm")
_FOR_GPUS = 10**9  # bytes of it: NCCL takes ten million for each of some channels of each pair, NVIDIA advises 1 GB


def versions() -> dict[str, str]:
    """Versions of the software on this rank."""
    found = {"mde_dist": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
    if _DRIVER.is_file() and (driver := re.search(r"\d+\.\d+(\.\d+)?", _DRIVER.read_text("utf-8", errors="replace"))):
        found["driver"] = driver[0]
    return found


def check_versions(panel: RankSurvey) -> None:
    """Ranks of several versions may hang, or train something else than one another."""
    panel.begin("versions")
    answers = panel.query_ranks(versions, "install the packages of mde_dist anew")
    if panel.failed("versions", answers):
        return
    tables: list[dict[str, str]] = [answer.value for answer in answers]
    names = list(dict.fromkeys(name for table in tables for name in table))
    differ = [name for name in names if len({table.get(name) for table in tables}) > 1]
    if not differ:
        panel.add(Row("versions", "ok", ", ".join(f"{name} {version}" for name, version in tables[0].items())))
        return
    found = [
        panel.differing({rank: f"{name} {table.get(name, 'not there')}" for rank, table in enumerate(tables)})
        for name in differ
    ]
    harmless = set(differ) <= set(_MAY_DIFFER)
    advice = "install the same environment on every node, or activate the same one before the launcher"
    panel.add(Row("versions", "warn" if harmless else "fail", "\n".join(found), advice))


def check_minimums(panel: RankSurvey) -> None:
    """Add a row where packages are older than those that mde_dist is tested with: they may lack what it calls."""
    answers = panel.query_ranks(too_old, "install the packages of mde_dist anew")
    if panel.failed("minimum versions", answers) or not any(answer.value for answer in answers):
        return
    found = {rank: ", ".join(answer.value.values()) for rank, answer in enumerate(answers) if answer.value}
    wanted = " ".join(dict.fromkeys(f"'{need}'" for answer in answers for need in answer.value))
    panel.add(Row("minimum versions", "warn", f"{panel.differing(found)}: never tested", f"pip install {wanted}"))


def too_old() -> dict[str, str]:
    """Packages that are older on this rank than mde_dist needs: `NAME>=VERSION` -> name and version as installed."""
    found = {}
    try:
        needs = list(map(Requirement, importlib.metadata.requires("mde_dist") or ()))
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return {}
    for need in needs:
        if need.marker and not any(need.marker.evaluate({"extra": extra}) for extra in _EXTRAS):
            continue
        with suppress(importlib.metadata.PackageNotFoundError):
            installed = importlib.metadata.version(need.name)
            if not need.specifier.contains(installed, prereleases=True):
                found[f"{need.name}{need.specifier}"] = f"{need.name} {installed}"
    return found


def check_environment(panel: RankSurvey, ignored: Sequence[Ignored]) -> None:
    """Left behind by another job, they would change what accelerate does; what computes reads some by itself.

    `ignored`: as this rank's environment had them when it started.
    """
    panel.begin("environment")

    def check() -> list[str]:
        found = [f"{v} is not obeyed" for v in ignored if v.value != panel.accelerator.mixed_precision]
        read = [f"{name}={os.environ[name]} changes digits or speed" for name in _READ_BELOW if name in os.environ]
        missing = missing_interface(panel.accelerator.device.type == "cuda")  # with which several ranks would not start
        return found + read + ([missing] if missing else [])

    answers = panel.query_ranks(check, "")
    texts = {rank: "\n".join(answer.value) for rank, answer in enumerate(answers) if answer.value}
    if texts:
        advice = "unset them where the launcher starts; they also come from the yaml of `accelerate config`"
        panel.add(Row("environment", "warn", panel.differing(texts), advice))
    else:
        panel.add(Row("environment", "ok", "no variable asks for another training than the config"))


def _device(device: torch.device) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        name, memory, there = about.name, about.total_memory, torch.cuda.device_count()
    else:
        threads = torch.get_num_threads()
        name, memory, there = f"{device.type} ({threads} thread{'s' if threads > 1 else ''})", host_memory(), 0
    return {"name": name, "memory": memory, "there": there, "cores": cores, "unused": not there and _DRIVER.is_file()}


def host_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_devices(panel: RankSurvey) -> None:
    """One slower device sets the pace of all; one that nobody uses helps nobody."""
    panel.begin("devices")
    answers = panel.query_ranks(lambda: _device(panel.accelerator.device), "see what nvidia-smi says")
    if panel.failed("devices", answers):
        return
    devices: list[dict[str, Any]] = [answer.value for answer in answers]
    # what counts as one kind: memory differs in its last megabytes between cards of one type
    texts = {rank: f"{d['name']}, {d['memory'] / 1e9:.0f} GB" for rank, d in enumerate(devices)}
    nodes = Counter(panel.nodes)
    per_node = ", ".join(dict.fromkeys(str(count) for count in nodes.values()))
    several = f"{len(nodes)} nodes x {per_node} ranks, " if len(nodes) > 1 else ""
    advice = []
    if len(set(texts.values())) > 1:
        advice.append("the slowest device sets the pace, and the smallest the batch: use nodes of one kind")
    for node, count in nodes.items():
        if devices[node]["there"] > count:
            where = f"on {panel.hosts[node]} " if len(nodes) > 1 else ""
            use = f"--multi_gpu --num_processes {devices[node]['there']}"
            advice.append(f"{where}{devices[node]['there']} GPUs are there, {count} in use: accelerate launch {use}")
        if devices[node]["unused"]:
            advice.append(f"{panel.hosts[node]} has a GPU that this torch cannot use: install a build of it with CUDA")
    cores = panel.differing({rank: f"{d['cores']} cores" for rank, d in enumerate(devices)})
    shown = f"{several}{panel.world} x {texts[0]}" if len(set(texts.values())) == 1 else panel.differing(texts)
    panel.add(Row("devices", "warn" if advice else "ok", f"{shown}; {cores}", "\n".join(advice)))


def check_clocks(panel: RankSurvey) -> None:
    """Logs of clocks that differ are misordered, and credentials of one that is far off are refused."""
    if panel.world == 1:
        return
    panel.begin("clocks")
    offsets = clock_offsets(panel.accelerator)
    spread = max(offsets) - min(offsets)
    if spread <= _CLOCK_WARN:
        panel.add(Row("clocks", "ok", f"within {max(spread, 1e-3):.3f} s of one another"))
        return
    far = [rank for rank, offset in enumerate(offsets) if abs(offset) > _CLOCK_WARN] or [
        max(range(panel.world), key=lambda rank: abs(offsets[rank]))
    ]
    found = "\n".join(f"{panel.named([rank])}: {offsets[rank]:+.1f} s from rank 0" for rank in far)
    what = "logs will be misordered" if spread <= _CLOCK_FAIL else "credentials and requeues go by the time"
    panel.add(
        Row("clocks", "warn" if spread <= _CLOCK_FAIL else "fail", found, f"{what}: set the clocks with chrony or NTP")
    )


def check_open_files(panel: RankSurvey, shards_open: int) -> None:
    """`shards_open`: files of shards that a rank keeps open."""
    need = shards_open + _MARGIN + 2 * panel.world  # rank 0 has a line to every other one

    def check() -> int:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    answers = panel.query_ranks(check, "ulimit -n")
    if panel.failed("open files", answers):
        return
    limits = [answer.value if answer.value != resource.RLIM_INFINITY else 2**31 for answer in answers]
    low = {rank: f"{limit} allowed, {need} needed" for rank, limit in enumerate(limits) if limit < need}
    if low:
        advice = f"before the launcher: ulimit -n {-(-need // 1024) * 1024} (in a job script, or in limits.conf)"
        panel.add(Row("open files", "fail", panel.differing(low), advice))
    else:
        panel.add(Row("open files", "ok", f"{min(limits)} allowed, {need} needed ({shards_open} shards)"))


def check_scratch(panel: RankSurvey) -> None:
    """Room for files that do not stay: launchers of several ranks, compilers and pictures want it, and NCCL does."""
    panel.begin("scratch")
    answers = panel.query_ranks(lambda: look_at_scratch(torch.cuda.device_count()), "see what is mounted there")
    if panel.failed("scratch", answers):
        return
    found = {node: answers[node].value for node in dict.fromkeys(panel.nodes)}
    lacking = {node: text for node, (text, *advice) in found.items() if advice}
    advice = dict.fromkeys(line for _, *lines in found.values() for line in lines)
    if lacking:
        panel.add(Row("scratch", "warn", panel.differing(lacking), "\n".join(advice)))
    else:
        panel.add(Row("scratch", "ok", found[0][0]))


def look_at_scratch(gpus: int) -> list[str]:
    """Description of this machine's scratch space, and a line of advice for each thing that a training on so many GPUs
    may miss."""
    advice, room = [], 0
    try:
        found = f"temporary files in {temporary_folder()}"
    except UserError as error:
        found, _, todo = str(error).partition("; ")
        advice.append(todo)
    try:
        with tempfile.TemporaryFile(dir=_SHARED) as file:
            file.write(bytes(1))
        about = os.statvfs(_SHARED)
        room = about.f_bavail * about.f_frsize
        shared = f"{format_bytes(room)} free in {_SHARED}"
    except OSError as error:
        shared = f"{_SHARED} cannot be written ({error.strerror})"
    if gpus > 1 and room < _FOR_GPUS:
        advice.append(
            f"GPUs of a node talk through {_SHARED}: docker run --shm-size=1g (Kubernetes: an emptyDir of medium "
            "Memory mounted there), or NCCL_SHM_DISABLE=1"
        )
    return [f"{found}; {shared}", *advice]
