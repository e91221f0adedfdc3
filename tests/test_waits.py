"""Nothing in a step waits for a GPU: the real step on tensors that claim to lie on one, and have no values to read."""

import contextlib
import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from mde_dist.data import augmentation as augment
from mde_dist.data.augmentation import prepare
from mde_dist.data.config import AugmentConfig
from mde_dist.data.loader import Batch
from mde_dist.training import step as train_module
from mde_dist.training.config import Config, read_config
from mde_dist.training.losses import valid_counts

GPU = torch.device("cuda", 0)
NEW_TORCH = pytest.mark.skipif(
    TorchVersion(torch.__version__) < "2.14", reason="2.5 and 2.9 ask the driver for random tensors without values, too"
)
VIEWS = [AugmentConfig(), AugmentConfig(crop=(32, 48)), AugmentConfig(border=0.05, zoom=2, cut_depth=0.5)]
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class Waits(TorchDispatchMode):
    """Notes what waits for the device: copies from or to it that are not told otherwise. Reading a value raises."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        result = function(*arguments, **options)
        if function in COPIES:
            source = arguments[1] if function == torch.ops.aten.copy_.default else arguments[0]
            ends = {source.device.type, result.device.type}
            if len(ends) > 1 and not (options.get("non_blocking") or any(a is True for a in arguments)):
                self.found.append(str(function))
        return result


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a GPU would have to be there for is left out: pinning, events, and moving the model there."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: None))
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_, **__: module)
    build = train_module.build_started

    def built_there(*arguments: Any) -> Any:
        with GPU:
            return build(*arguments)

    monkeypatch.setattr(train_module, "build_started", built_there)
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda tensor, pin_memory=False, **rest: empty_like(tensor, **rest))
    # a copied tensor would bring a copy of its mode, whose weak references to storages are counted once and given back
    # twice: the heap breaks, often not before the process ends (torch 2.14)
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
    yield
    for cached in (augment._imagenet, augment._footprints_on):
        cached.cache_clear()  # of tensors without values


def config() -> Config:
    return read_config(["--optim.ema-samples", "1000", "--train.batch-size", "4", "--train.grad-accum-steps", "2"])


def step_on(device: torch.device) -> None:
    """Optimizer steps of three parts each, from stored batches to the verdict.

    All but the backward pass itself, which torch cannot do on such tensors.
    """

    def backward(loss: torch.Tensor) -> None:
        assert loss.requires_grad
        for parameter in learning.bare.parameters():
            parameter.grad = torch.zeros_like(parameter)

    accelerator = SimpleNamespace(
        device=device,
        num_processes=1,
        autocast=contextlib.nullcontext,
        no_sync=lambda model: contextlib.nullcontext(),
        backward=backward,
        prepare_model=lambda model: model,
    )
    learning = train_module.TrainModule(config(), accelerator, (32, 64))
    learning.wrap()
    for number in range(3):  # what the first ones set up may wait
        with Waits() as waits:
            views = []
            for view in VIEWS:
                image = torch.zeros((2, 48, 64, 3), dtype=torch.uint8, device=device)
                depth = torch.ones((2, 48, 64), dtype=torch.uint16, device=device)
                batch = Batch(image, depth, np.zeros(2, np.int64), np.arange(2))
                views.append(prepare(batch, (32, 64), view, 0))
            counted = sum(valid_counts(depth) for _, depth in views)
            learning.set_lr(8 * number)
            learning.step(learning.backward(views, counted), 4, number + 1)
        assert number == 0 or waits.found == []


@NEW_TORCH
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_nothing_in_a_step_waits_for_the_device(gpu: None) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        step_on(GPU)


@NEW_TORCH
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_a_copied_model_is_of_the_same_mode(gpu: None) -> None:
    with FakeTensorMode() as mode:
        model = copy.deepcopy(torch.nn.Linear(2, 2, device=GPU))
    assert all(parameter.fake_mode is mode for parameter in model.parameters())


@pytest.mark.parametrize(
    "wait",
    [
        lambda norm: bool(norm.isfinite()),  # as the trainer once asked after each step
        lambda norm: norm.item(),
        lambda norm: torch.tensor([1.0, 2.0], device=norm.device),
        lambda norm: torch.zeros(3).to(norm.device),
        lambda norm: norm.cpu(),
    ],
)
def test_what_would_wait_is_seen(gpu: None, wait: Any) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), Waits() as waits:
        norm = torch.zeros((), device=GPU)
        try:
            wait(norm)
        except DataDependentOutputException:
            return
        assert waits.found
