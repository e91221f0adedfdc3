"""Where the time goes: by hand."""

import time

import pytest
import torch

from mde_dist.models.config import ModelConfig
from mde_dist.models.flops import training_flops
from mde_dist.training.throughput import ThroughputMeter, peak_flops, peak_memory

CPU = torch.device("cpu")


def test_rates_of_one_rank_by_hand():
    account = ThroughputMeter(CPU)
    account.step(30)
    account.step(50)
    rates = account.rates(torch.tensor([[4.0, 1.0, 2.0, 3e9]], dtype=torch.float64), left=600)
    # 80 images in 4 s; 600 more at 20 per second
    assert rates == {"images_per_second": 20.0, "data_wait": 0.25, "memory_gb": 3.0, "seconds_left": 30}


def test_rates_of_several_ranks_name_the_one_that_the_others_wait_for():
    account = ThroughputMeter(CPU, flops=5e9, peak=1e12)
    account.step(100)
    # seconds in all, waiting for data, own work, bytes
    rows = torch.tensor([[10.0, 1.0, 2.0, 1e9], [10.0, 0.5, 5.5, 2e9], [10.0, 3.0, 0.0, 1e9]], dtype=torch.float64)
    rates = account.rates(rows, left=0)
    assert rates["images_per_second"] == 10.0
    assert rates["data_wait"] == 0.3  # of the rank that waits most
    assert (rates["slowest_rank"], rates["slower"]) == (1, 0.5)  # 6 s of its own, the mean is 4
    assert rates["memory_gb"] == 2.0
    assert rates["mfu"] == round(10 * 5e9 / (3 * 1e12), 4)
    assert rates["seconds_left"] == 0


def test_time_is_booked_where_it_is_spent_and_restart_forgets_it():
    account = ThroughputMeter(CPU)
    with account.waiting():
        time.sleep(0.02)
    with account.working():
        time.sleep(0.04)
    seconds, wait, work, memory = account.row()
    assert 0.02 <= wait < work
    assert 0.04 <= work < seconds
    assert memory == peak_memory(CPU) > 1e7
    account.step(3)
    account.restart()
    assert account.row()[1:3] == [0.0, 0.0]
    assert account.rates(torch.tensor([account.row()]), 10)["seconds_left"] is None  # no step, no speed


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "bf16", 989),
        ("NVIDIA A100-SXM4-80GB", "no", 19.5),
        ("NVIDIA H200 NVL", "bf16", 835),
        ("NVIDIA GH200 480GB", "bf16", 989),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "bf16", 312),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L40", "bf16", 181),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        # whole words, and only words whose meaning is known
        ("NVIDIA RTX A1000", "bf16", None),
        ("NVIDIA RTX A1000 Laptop GPU", "bf16", None),
        ("NVIDIA RTX A4000", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", None),
        ("NVIDIA A100X", "bf16", None),
        ("GRID A100-10C", "bf16", None),
        ("NVIDIA GB200", "bf16", None),
        ("Tesla T4", "bf16", None),
        ("Some Other Card", "bf16", None),
    ],
)
def test_peaks_are_found_by_name(monkeypatch, name, precision, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), precision) == (tflops and tflops * 1e12)
    assert peak_flops(CPU, precision) is None


@pytest.mark.parametrize(("size", "gmac"), [((480, 640), 12.18), ((240, 320), 3.09)])
def test_arithmetic_of_the_seed_model(size, gmac):
    """Three times the forward pass, as published for the seed model, but for the images, which need no gradient."""
    first = 64 * 3 * 49 * (size[0] // 2) * (size[1] // 2) / 1e9  # multiply-adds of the first convolution
    assert training_flops(ModelConfig(), size) / 2e9 == pytest.approx(3 * gmac - first, rel=0.005)
