"""Steps in which a normalisation would have one value of a channel: refused before training, with what to change."""

import re
from types import SimpleNamespace

import pytest
import torch

from mde_dist.models.config import ModelConfig
from mde_dist.models.depth_model import create_model
from mde_dist.models.flops import has_spread
from mde_dist.training.config import read_config
from mde_dist.training.step import check_statistics
from mde_dist.utils.errors import UserError


@pytest.mark.parametrize("norm", ["batch", "group", "frozen"])
@pytest.mark.parametrize("refine", [False, True])
def test_it_is_foretold_where_torch_refuses(norm, refine):
    config = ModelConfig(encoder="tiny", norm=norm, head="full" if refine else "quarter", skip_conv=refine)
    model, refused = create_model(config), set()
    for size in ((8, 8), (16, 32), (32, 32), (32, 33)):
        try:
            model(torch.rand(1, 3, *size))
        except ValueError:
            refused.add(size)
        assert has_spread(config, size) == (size not in refused), size
    if norm == "batch":
        assert refused == {(8, 8), (16, 32), (32, 32)}
        model(torch.rand(2, 3, 32, 32))


@pytest.mark.parametrize("backbone", ["resnet18", "resnet34", "resnet50"])
def test_the_other_backbones_are_alike(backbone):
    assert [has_spread(ModelConfig(encoder=backbone), size) for size in ((32, 32), (33, 32))] == [False, True]


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (1, "--data.size 32x32 --train.batch-size 1"),
        (2, "--data.size 32x32 --train.batch-size 2"),
        (2, "--data.size 32x32 --train.batch-size 6 --train.grad-accum-steps 3"),
        (2, "--data.size 240x320 --augment.crop 32x32 --train.batch-size 2"),
        (1, "--data.size 40x40 --augment.crop 32x32 --train.batch-size 1"),
        (1, "--data.size 64x64 --augment.border 0.25 --train.batch-size 1"),
        (1, "--data.size 72x72 --augment.border 0.25 --augment.crop 32x32 --train.batch-size 1"),
        (1, "--data.size 8x8 --model.norm group --train.batch-size 1"),
    ],
)
def test_each_piece_of_advice_helps_by_itself(world, options):
    accelerator = SimpleNamespace(num_processes=world, device=torch.device("cpu"))

    def check(*more: str) -> None:
        config = read_config(["--model.encoder", "tiny", *options.split(), *more])
        assert config.train.batch_size % (world * config.train.grad_accum_steps) == 0
        check_statistics(config, accelerator, config.data.size)

    with pytest.raises(UserError, match=r"^1 image of .* one value per channel") as told:
        check()
    advice = str(told.value).rpartition("; try ")[2].split(", or ")
    assert advice
    for words in advice:
        check(*re.sub(r"\(.*\)", "", words).split())


def test_ranks_that_share_their_statistics_have_enough_with_one_image_each():
    config = read_config(["--data.size", "32x32", "--train.batch-size", "2"])
    gpu = torch.device("cuda")
    check_statistics(config, SimpleNamespace(num_processes=2, device=gpu), (32, 32))
    with pytest.raises(UserError, match="one value per channel"):
        config = read_config(["--data.size", "32x32", "--train.batch-size", "1"])
        check_statistics(config, SimpleNamespace(num_processes=1, device=gpu), (32, 32))
