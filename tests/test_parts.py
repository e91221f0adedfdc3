"""A data set that is packed in parts, as the tasks of a job array do it, and then published."""

import pytest
from trees import bts, contents, packed, packed_yet, silent

from mde_dist import shard
from mde_dist.packing.pack import PackConfig, pack, pack_part
from mde_dist.packing.sources import open_source
from mde_dist.utils.errors import UserError

OPTIONS = PackConfig(samples_per_shard=2)


@pytest.mark.parametrize("parts", [1, 2, 3, 9])
def test_parts_in_any_order_are_byte_for_byte_the_whole(tmp_path, parts):
    source = open_source(bts(tmp_path / "tree", train=7, test=5))
    packed(tmp_path / "tree", tmp_path / "whole", OPTIONS)
    output = tmp_path / "parts"
    counts = [pack_part(source, output, OPTIONS, 1, silent, (part, parts)) for part in reversed(range(parts))]
    assert sum(counts) == 7  # four shards of training, three of test
    assert not packed_yet(output)
    before = {path.name: path.stat().st_ino for path in (output / ".packing").glob("*.tar")}
    assert len(before) == 7
    pack(source, output, OPTIONS, 1, silent)
    assert {path.name: path.stat().st_ino for path in output.glob("*.tar")} == before  # published, not packed again
    assert contents(output) == contents(tmp_path / "whole")


def test_a_part_that_is_missing_is_packed_when_they_are_published(tmp_path):
    source = open_source(bts(tmp_path / "tree", train=7, test=5))
    packed(tmp_path / "tree", tmp_path / "whole", OPTIONS)
    pack_part(source, tmp_path / "parts", OPTIONS, 1, silent, (0, 2))
    pack(source, tmp_path / "parts", OPTIONS, 1, silent)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_the_command_packs_parts(tmp_path, capsys):
    bts(tmp_path / "tree")
    base = ["--source", str(tmp_path / "tree"), "--output", str(tmp_path / "out"), "--samples-per-shard", "2"]
    for part in ("0/2", "1/2"):
        shard.main([*base, "--workers", "1", "--part", part])
        assert not packed_yet(tmp_path / "out")
    assert "part 1/2 of" in capsys.readouterr().out
    shard.main([*base, "--workers", "1"])
    packed(tmp_path / "tree", tmp_path / "whole", OPTIONS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("part", ["2/2", "-1/2", "1", "a/b", "1/0", "0/"])
def test_parts_that_are_none_are_one_line(tmp_path, part):
    with pytest.raises(UserError) as error:
        shard.main(["--source", str(tmp_path), "--output", str(tmp_path / "x"), f"--part={part}"])
    assert "\n" not in str(error.value)
    assert "--part" in str(error.value)


def test_parts_go_with_packing_only(tmp_path):
    for others in (["--dry-run"], ["--verify", str(tmp_path)]):
        with pytest.raises(UserError, match=r"--part is for packing|name one thing"):
            shard.main(["--source", str(tmp_path), "--part", "0/2", *others])
