"""Outputs that are mounted volumes, and sets of files whose publication is cut off at any of its steps."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from trees import bts, contents, packed, packed_yet, silent

from mde_dist import shard
from mde_dist.data.shards import open_split
from mde_dist.packing.index_tars import index_tars
from mde_dist.packing.pack import PackConfig, pack, pack_part
from mde_dist.packing.sources import open_source
from mde_dist.training.run_dir import RunDirectory
from mde_dist.utils import publish
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import write_atomic
from mde_dist.utils.publish import is_free, whole_folder

EXPORT = ".exporting"

OPTIONS = PackConfig(samples_per_shard=2)
OTHERS = PackConfig(samples_per_shard=3, codec="png")


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Path]:
    """A mounted disk as a new one is, in a folder of another disk, which is read-only."""
    parent = tmp_path / "parent"
    parent.mkdir()
    mounted = []

    def mount(folder: Path, *options: str) -> None:
        line = ["mount", "-t", "tmpfs", "-o", ",".join(["size=8m", *options]), "tmpfs", str(folder)]
        if subprocess.run(line, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted here")
        mounted.append(folder)

    try:
        mount(parent)
        (parent / "out").mkdir()
        mount(parent / "out")
        mount(parent, "remount", "ro")
        (parent / "out/lost+found").mkdir()
        yield parent / "out"
    finally:
        for folder in sorted(set(mounted), reverse=True):
            subprocess.run(["umount", "-l", folder], check=True)


def apart(work: Callable[[], object]) -> int:
    """Do something in a process of its own -> its exit code, as os.waitstatus_to_exitcode gives it."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException as error:  # the process of the tests must not go on twice
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(step: int) -> None:
    """This process is killed before call number `step` (from 0) of those that publish something."""
    calls = 0

    def counted(real: Callable[..., Any], half: bool = False) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step + 1:
                if half:  # of what is to be removed
                    next(Path(arguments[0]).iterdir()).unlink()
                os._exit(9)
            return real(*arguments, **options)

        return call

    for name in ("write_atomic", "sync_directory"):
        setattr(publish, name, counted(getattr(publish, name)))
    Path.rename = counted(Path.rename)  # type: ignore[method-assign]
    shutil.rmtree = counted(shutil.rmtree, half=True)  # type: ignore[assignment]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bts(tmp_path_factory.mktemp("tree") / "tree", 4, 2)


@pytest.fixture(scope="module")
def whole(tree: Path) -> dict[str, str]:
    """What is to come out."""
    packed(tree, tree.parent / "whole", OPTIONS)
    return contents(tree.parent / "whole")


@pytest.mark.parametrize(
    ("step", "options"),
    [(1, OTHERS), (5, OPTIONS), (9, OPTIONS), (12, OPTIONS)],
    ids=["tar", "index", "manifest", "removal"],
)
def test_a_packing_killed_while_it_publishes_leaves_a_whole_set_or_goes_on(tree, whole, tmp_path, step, options):
    source, output = open_source(tree), tmp_path / "out"

    def cut_off() -> None:
        die_at(step)
        packed(tree, output, OPTIONS)

    assert apart(cut_off) == 9
    if step == 12:
        assert {name: it for name, it in contents(output).items() if "/" not in name} == whole
        with pytest.raises(UserError, match="is there already"):
            packed(tree, output, OPTIONS)
        return
    inodes = {path.name: path.stat().st_ino for path in output.rglob("*.tar")}
    assert len(inodes) == 3
    with pytest.raises(UserError, match="their packing is at work, or was cut off"):
        open_split(output, "train")
    with pytest.raises(UserError, match="its packing is not finished"):
        index_tars(output, 1, silent, True, lambda split, median: None)
    if step == 5:
        pack_part(source, output, options, 1, silent, (0, 2))
        assert not packed_yet(output)
    packed(tree, output, options)
    if options == OPTIONS:
        assert contents(output) == whole
        assert {path.name: path.stat().st_ino for path in output.glob("*.tar")} == inodes  # moved, not packed anew
    else:
        packed(tree, tmp_path / "other", options)
        assert contents(output) == contents(tmp_path / "other")


def test_what_is_removed_from_a_half_published_set_is_packed_again_and_what_is_added_is_refused(tree, whole, tmp_path):
    def cut_off() -> None:
        die_at(4)
        packed(tree, tmp_path / "out", OPTIONS)

    assert apart(cut_off) == 9
    assert packed_yet(tmp_path / "out")
    for name in packed_yet(tmp_path / "out"):
        (tmp_path / "out" / name).unlink()
    foreign = tmp_path / "out/train-000000.tar"  # which had not been moved yet
    foreign.write_bytes(b"of another")
    with pytest.raises(UserError, match="is there already and not empty"):
        packed(tree, tmp_path / "out", OPTIONS)
    assert foreign.read_bytes() == b"of another"
    foreign.unlink()
    packed(tree, tmp_path / "out", OPTIONS)
    assert contents(tmp_path / "out") == whole


def test_files_that_come_meanwhile_are_not_mixed_with(tree, whole, tmp_path):
    output = tmp_path / "out"
    foreign = output / "train-000000.tar"
    with pytest.raises(UserError, match="is there already and not empty"):
        pack(open_source(tree), output, OPTIONS, 1, lambda done, total: foreign.write_bytes(b"of another"))  # type: ignore[arg-type, return-value]
    assert foreign.read_bytes() == b"of another"
    with pytest.raises(UserError, match="is there already and not empty"):
        packed(tree, output, OPTIONS)
    foreign.unlink()
    packed(tree, output, OPTIONS)
    assert contents(output) == whole


def test_a_mounted_volume_takes_shards_packed_in_parts_though_its_parent_is_read_only(tree, whole, volume):
    given = ["--source", str(tree), "--output", str(volume), "--samples-per-shard", "2", "--workers", "1"]
    for part in ("0/2", "1/2"):
        shard.main([*given, "--part", part])
        assert packed_yet(volume) == ["lost+found"]
    shard.main(given)
    assert contents(volume) == whole
    assert os.listdir(volume.parent) == ["out"]  # noqa: PTH208


def test_a_mounted_volume_takes_an_export_and_a_run(volume):
    names = ["model.safetensors", "model.pt2", "README.md"]
    with RunDirectory(volume, {}, "", is_main=True):
        pass
    with pytest.raises(UserError, match="No space left"), whole_folder(volume, names, EXPORT) as folder:
        write_atomic(folder / names[0], bytes(2**23 + 1))
    assert packed_yet(volume) == ["lost+found"] and not (volume / ".exporting").exists()
    with whole_folder(volume, names, EXPORT) as folder:
        assert folder.stat().st_dev == volume.stat().st_dev
        for name in names:
            write_atomic(folder / name, name)
        with pytest.raises(UserError, match="another export"), whole_folder(volume, names, EXPORT):
            pass
    assert packed_yet(volume) == sorted(["lost+found", *names])


@pytest.mark.parametrize("step", range(8))  # list, two files, folder, card, folder, the one above, removal
def test_an_export_killed_at_any_step_of_publishing_is_whole_or_replaced(tmp_path, step):
    output = tmp_path / "new/out"

    def fill(*names: str) -> None:
        assert is_free(output, output / ".exporting")
        with whole_folder(output, names, EXPORT) as folder:
            for name in names:
                write_atomic(folder / name, name)

    def cut_off() -> None:
        die_at(step)
        fill("a", "b", "README.md")

    assert apart(cut_off) == 9
    assert (output / "README.md").exists() == (step > 4)
    if step <= 4:
        fill("b", "README.md")  # another choice of formats
        assert contents(output).keys() == {"README.md", "b"}
    else:
        assert packed_yet(output) == ["README.md", "a", "b"]


def test_an_export_that_the_disk_refuses_half_way_leaves_nothing(tmp_path, monkeypatch):
    names, real, calls = ["a", "b", "README.md"], Path.rename, 0

    def rename(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with (
        pytest.raises(UserError, match=r"out: cannot be written \(Input/output error\)"),
        whole_folder(tmp_path / "out", names, EXPORT) as folder,
    ):
        for name in names:
            write_atomic(folder / name, name)
    assert calls > 2 and not (tmp_path / "out").exists()


def test_an_output_of_ones_own_in_a_folder_of_others_is_filled():
    """As another user, whom the folder around it lets pass, and neither write nor list."""

    def nobody() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        with whole_folder(Path("closed/out"), ["a", "README.md"], EXPORT) as folder:
            for name in ("a", "README.md"):
                write_atomic(folder / name, name)

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("closed/out").mkdir(parents=True)
        if os.geteuid() == 0:
            os.chown("closed/out", 65534, 65534)
        Path(folder).chmod(0o755)
        Path("closed").chmod(0o111)
        try:
            assert apart(nobody) == 0
        finally:
            Path("closed").chmod(0o755)
        assert contents(Path("closed")).keys() == {"out/README.md", "out/a"}


def test_what_an_earlier_version_left_beside_the_output_is_named_and_in_nobodys_way(tree, whole, tmp_path, capsys):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial/train-000000.part").write_bytes(b"of another format")
    shard.main(["--source", str(tree), "--output", str(tmp_path / "out"), "--samples-per-shard", "2", "--workers", "1"])
    assert f"{tmp_path / '.out.partial'} is what an earlier version left" in capsys.readouterr().out
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(("name", "free"), [("lost+found/x", True), (".Trash-0/x", True), ("x.tar", False)])
def test_an_output_is_free_where_nobody_has_put_anything(tmp_path, name, free):
    (tmp_path / "out" / name).parent.mkdir(parents=True)
    (tmp_path / "out" / name).touch()
    assert is_free(tmp_path / "out", tmp_path / "out/.packing") == free
    assert not is_free(tmp_path / "out" / name, tmp_path / "out" / name / ".packing")
    assert is_free(tmp_path / "new", tmp_path / "new/.packing")
