"""One output, several commands: one of them packs into it, or parts with the same options do, side by side."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from commands import wait_for
from trees import bts, contents, folder, packed, packed_yet, silent
from warm import warm_run, warm_start

from mde_dist.packing.index_tars import index_tars
from mde_dist.packing.pack import PackConfig, pack, pack_part
from mde_dist.packing.repair import LOCK, repair
from mde_dist.packing.sources import open_source
from mde_dist.packing.validate import verify
from mde_dist.training.setup import pack_sample
from mde_dist.utils.errors import UserError
from mde_dist.utils.locks import Taken, locked

OPTIONS = PackConfig(samples_per_shard=2)
HOLD = """
import sys, time
from pathlib import Path
from mde_dist.utils.locks import locked
with locked(Path(sys.argv[1]), "taken", shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("held", ["shared", "alone"])
def test_a_lock_is_shared_by_those_who_share_and_names_who_holds_it_alone(tmp_path, held):
    path = tmp_path / "folder/.lock"
    line = [sys.executable, "-c", HOLD, str(path), held]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "held\n"
        who = "" if held == "shared" else rf" \(process {holder.pid} on .+\)"
        with pytest.raises(Taken, match=rf"^taken{who}$"), locked(path, "taken"):
            pass
        if held == "shared":
            with locked(path, "taken", shared=True):
                pass
        else:
            with pytest.raises(Taken), locked(path, "taken", shared=True):
                pass
        holder.kill()
    with locked(path, "taken"):
        pass


def test_a_lock_file_that_goes_with_its_folder_leaves_the_name_to_the_next(tmp_path):
    path = tmp_path / "a/.lock"
    with locked(path, "taken"):
        (tmp_path / "a").rename(tmp_path / "b")
        with locked(path, "taken"):  # another folder by now
            pass
        with locked(path, "taken"):
            (tmp_path / "b/.lock").unlink()
    assert not path.exists()


def test_who_waits_for_a_lock_has_it_afterwards(tmp_path, capsys):
    path, order = tmp_path / ".lock", []

    def second() -> None:
        with locked(path, "taken", wait=True):
            order.append("second")

    waiting = threading.Thread(target=second)
    with locked(path, "taken"):
        waiting.start()
        waiting.join(0.3)
        order.append("first")
    waiting.join(30)
    assert order == ["first", "second"]
    assert f"taken (process {os.getpid()} on" in capsys.readouterr().out


def many(root: Path) -> Path:
    """48 pairs of 240x320, links to two files: enough for a packing to be met at work."""
    files = folder(root.parent / "files", count=2, size=(240, 320))
    for i in range(48):
        for kind, suffix in (("images", "jpg"), ("depth", "png")):
            link = root / f"train/{kind}/{i:04d}.{suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.hardlink_to(files / f"{kind}/{i % 2:04d}.{suffix}")
    return root


def test_a_second_packing_is_refused_and_one_that_was_killed_is_replaced(tmp_path):
    root, output = many(tmp_path / "tree"), tmp_path / "out"
    given = {"source": root, "output": output, "workers": 1, "samples-per-shard": 6}
    with warm_start("shard", **given) as first:
        wait_for(lambda: any((output / ".packing").glob("*.part")), first)
        first.send_signal(signal.SIGSTOP)
        for other in ({"depth-codec": "png"}, {"part": "0/2"}):
            second = warm_run("shard", **given, **other)
            assert (second.returncode, second.stderr.count("\n")) == (2, 1), second.stderr
            assert f"--output {output}" in second.stderr and f"process {first.ranks[0].pid} on" in second.stderr
        os.kill(first.ranks[0].pid, signal.SIGKILL)  # it alone: its workers have to notice
        assert not packed_yet(output)
        third = warm_run("shard", **given, **{"depth-codec": "png"})
    assert third.returncode == 0, third.stderr
    packed(root, tmp_path / "alone", PackConfig(samples_per_shard=6, codec="png"))
    assert contents(output) == contents(tmp_path / "alone")


def test_parts_are_packed_side_by_side_and_published_alone(tmp_path):
    root, output = many(tmp_path / "tree"), tmp_path / "out"
    given = {"source": root, "output": output, "workers": 1, "samples-per-shard": 6}
    with warm_start("shard", **given, part="0/2") as first:
        wait_for(lambda: any((output / ".packing").glob("*.part")), first)
        first.send_signal(signal.SIGSTOP)
        assert warm_run("shard", **given, part="1/2").returncode == 0
        for other in ({"part": "0/2"}, {"part": "1/2", "size": "120x160"}, {}):
            refused = warm_run("shard", **given, **other)
            assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr
            assert "0/2" in refused.stderr or f"process {first.ranks[0].pid}" in refused.stderr
        first.send_signal(signal.SIGCONT)
        assert first.wait() == 0
    pack(open_source(root), output, PackConfig(samples_per_shard=6), 1, silent)
    packed(root, tmp_path / "alone", PackConfig(samples_per_shard=6))
    assert contents(output) == contents(tmp_path / "alone")


@pytest.mark.parametrize(
    "changes", [{"codec": "png"}, {"size": (12, 16)}, {"samples_per_shard": 3}, {"limit": 2}, {"skip_bad": True}]
)
def test_parts_with_other_options_are_refused_by_name(tmp_path, changes):
    source, output, other = open_source(bts(tmp_path / "tree")), tmp_path / "out", replace(OPTIONS, **changes)
    pack_part(source, output, OPTIONS, 1, silent, (0, 2))
    with pytest.raises(UserError, match=f"part 0/2 was packed with {next(iter(changes))} = "):
        pack_part(source, output, other, 1, silent, (1, 2))
    with pytest.raises(UserError, match="part 0/2 was packed with"):
        pack(source, output, other, 1, silent)
    pack_part(source, output, OPTIONS, 1, silent, (1, 2))  # what was refused has left nothing behind
    pack(source, output, OPTIONS, 1, silent)
    packed(tmp_path / "tree", tmp_path / "alone", OPTIONS)
    assert contents(output) == contents(tmp_path / "alone")


def test_a_part_of_another_source_is_refused_by_name_until_it_is_packed_again(tmp_path):
    source, output = open_source(bts(tmp_path / "tree")), tmp_path / "out"
    other = open_source(bts(tmp_path / "other"))  # equal but for the times of its files
    pack_part(source, output, OPTIONS, 1, silent, (0, 2))
    pack_part(other, output, OPTIONS, 1, silent, (1, 2))
    with pytest.raises(UserError, match="of part 1/2 was packed from another source"):
        pack(source, output, OPTIONS, 1, silent)
    assert not packed_yet(output)
    pack_part(source, output, OPTIONS, 1, silent, (1, 2))
    pack(source, output, OPTIONS, 1, silent)


def test_an_output_that_is_there_meanwhile_is_refused_before_work_is_done(tmp_path):
    root = bts(tmp_path / "tree")
    packed(root, tmp_path / "out", OPTIONS)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="is there already"):
        pack(open_source(root), tmp_path / "out", OPTIONS, 1, silent)
    assert contents(tmp_path / "out") == before


def test_two_repairs_or_indexings_do_not_mix(tmp_path):
    packed(bts(tmp_path / "tree"), tmp_path / "out", OPTIONS)
    tar = tmp_path / "out/train-000000.tar"
    tar.write_bytes(tar.read_bytes()[:2000] + b"x" + tar.read_bytes()[2001:])
    one, other = (verify(tmp_path / "out", 1, silent) for _ in range(2))
    with locked(tmp_path / "out" / LOCK, "taken"), pytest.raises(Taken):
        repair(tmp_path / "out", one)
    repair(tmp_path / "out", one)
    after = contents(tmp_path / "out")
    with pytest.raises(UserError, match="has changed its manifest meanwhile"):
        repair(tmp_path / "out", other)
    assert contents(tmp_path / "out") == after
    (tmp_path / "out/manifest.json").unlink()
    with locked(tmp_path / "out" / LOCK, "taken"), pytest.raises(Taken):
        index_tars(tmp_path / "out", 1, silent, True, lambda split, median: None)
    index_tars(tmp_path / "out", 1, silent, True, lambda split, median: None)
    assert not (tmp_path / "out" / LOCK).exists()


def test_of_two_trainings_that_want_the_sample_the_second_takes_that_of_the_first(tmp_path, room_shards, monkeypatch):
    monkeypatch.chdir(tmp_path)
    second = threading.Thread(target=pack_sample)
    with locked(Path("shards/rooms/.rendering.lock"), "rendering"):
        second.start()
        second.join(0.5)
        assert second.is_alive() and not packed_yet(Path("shards/rooms"))
        shutil.copytree(room_shards, "shards/rooms", dirs_exist_ok=True)
    second.join(30)
    assert not second.is_alive() and [path.name for path in Path("shards").iterdir()] == ["rooms"]
