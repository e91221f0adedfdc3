"""The run directory: would training take it, go on in it, and have room in it? Nothing in it is changed."""

import contextlib
import secrets
import shutil
from pathlib import Path

from mde_dist.data.shards import ShardDataset
from mde_dist.tools.diagnostics.panel import RankSurvey, Row, format_bytes
from mde_dist.training.config import ORDER, Config, as_json, resume_key, to_toml
from mde_dist.training.run_dir import RunDirectory
from mde_dist.utils.errors import UserError
from mde_dist.utils.io import sync, sync_directory
from mde_dist.utils.locks import SILENCE, has_flock, holder_beside

_LIMIT = 60.0  # seconds for a file system to answer
_SPARE = 2  # checkpoints beside the newest: the best one, and the one that is being written


def check_run(panel: RankSurvey, config: Config, splits: tuple[ShardDataset, ShardDataset] | None) -> int | None:
    """Check the run directory -> the sample at which training would begin; None where training would refuse."""
    panel.begin("run directory")
    notes: list[str] = []

    def check() -> list:
        run = config.run
        if run.exists() and not run.is_dir():
            raise UserError(f"--run {run}: is not a directory; choose another")
        hashes = [split.manifest.sha256 for split in splits] if splits else ["", ""]
        # as one that writes it tells what is not whole; it is not entered, so it takes no lock
        this_run = resume_key(config, *hashes)
        directory = RunDirectory(run, this_run, to_toml(config), is_main=True, defaults=as_json(Config()) | {ORDER: 1})
        directory.refuse_foreign()
        holder = lock_holder(run / ".lock")
        if holder is not None:
            raise UserError(
                f"--run {run}: another training is at work in it ({holder}); wait for it, or choose another"
            )
        if splits is None:
            return [0, any(run.glob("checkpoints/step-*"))]
        found = directory.resume(notes.append)
        if found:
            directory.refuse_less(found, config.train.total_samples)
        return [found.state.samples_seen if found else 0, found is not None]

    answers = panel.query_ranks(check, "choose another --run", _LIMIT)
    if panel.failed("run directory", answers):
        return None
    starts = {rank: f"begins at sample {answer.value[0]:,}" for rank, answer in enumerate(answers)}
    if len(set(starts.values())) > 1:
        advice = f"{config.run} has to be one directory for all nodes: put it on a shared file system"
        panel.add(Row("run directory", "fail", panel.differing(starts), advice))
        return None
    (start, resumed), result = answers[0].value, "ok"
    if resumed and splits is None:
        found, result = f"{config.run} holds a run; whether of this config only the shards can tell", "warn"
    elif resumed:
        found = (
            f"{config.run} holds a run of this config; it goes on at sample {start:,} of {config.train.total_samples:,}"
        )
    else:
        found = f"{config.run} is new" if not config.run.exists() else f"{config.run} has no checkpoint yet"
    advice = "look again once the shards are there" if result == "warn" else ""
    if notes:  # of this rank's own check: the files are the same
        found, result, advice = f"{found}\n" + "\n".join(notes), "warn", "what is not whole is passed over"
    panel.add(Row("run directory", result, found, advice))  # type: ignore[arg-type]
    return start


def lock_holder(lock: Path) -> str | None:
    """Tell who holds the lock of a run directory, by the system's own list: to try to take it would be to take it.

    None where nobody does, or the list does not tell: it knows the processes of this machine.
    """
    if beside := holder_beside(lock):
        return beside
    try:
        inode, text = lock.stat().st_ino, lock.read_text("utf-8", errors="replace").strip()
        lines = [line.split() for line in Path("/proc/locks").read_text("utf-8").splitlines()]
    except OSError:
        return None
    # "1: FLOCK ADVISORY WRITE pid major:minor:inode start end"; the device is another one on stacked file systems
    pids = [line[4] for line in lines if line[1] == "FLOCK" and line[5].rpartition(":")[2] == str(inode)]
    return text if text.split()[1:2] and text.split()[1] in pids else None


def check_disk(panel: RankSurvey, config: Config, checkpoint: int, refused: bool) -> None:
    """Room for the checkpoints, and whether a file can be written, on the main process; is it seen by other nodes?

    `checkpoint`: bytes of one; 0 where that is not known. A directory that is `refused` may be anybody's: nothing is
    written there, not even for a moment.
    """
    panel.begin("disk")
    run, checkpoints = config.run, config.run / "checkpoints"
    folders = [run if run.is_dir() else nearest(run)]
    if checkpoints.is_dir() and checkpoints.stat().st_dev != run.stat().st_dev:
        folders.append(checkpoints)  # on another disk, behind a link
    answers = panel.query_ranks(lambda: secrets.token_hex(8) if panel.rank == 0 else None, "")
    (name,) = {answer.value for answer in answers} - {None}
    probes = [folder / f".{name}.tmp" for folder in folders]  # names that training sweeps away

    def write() -> list:
        if panel.rank:
            return []
        lacks = [] if refused else [lack for probe in probes for lack in lacking(probe, "--run")]
        on_it = [file for file in checkpoints.glob("*/*") if not file.parent.is_symlink()]
        size = sum(file.lstat().st_size for file in on_it)
        return [shutil.disk_usage(folders[-1]).free, size, list(dict.fromkeys(lacks))]

    try:
        answers = panel.query_ranks(write, "choose another --run", _LIMIT)
        written = not refused and not any(answer.error for answer in answers)
        seen = panel.query_ranks(lambda: not written or all(probe.exists() for probe in probes), "", _LIMIT)
    finally:
        for probe in probes if panel.rank == 0 else ():
            with contextlib.suppress(OSError):  # as where it could not be written
                probe.unlink()
    if panel.failed("disk", answers):
        return
    free, there, lacks = answers[0].value
    keep = config.train.keep_checkpoints
    need = max(checkpoint, checkpoint * (keep + _SPARE) - there)  # what is there makes room as it goes
    found = f"{format_bytes(free)} free at {folders[-1]}, {format_bytes(need)} needed: "
    found += f"{keep} + {_SPARE} checkpoints of {format_bytes(checkpoint)}"
    if there:
        found += f", {format_bytes(there)} of them there"
    found = "\n".join([found, *lacks])
    blind = [rank for rank, answer in enumerate(seen) if rank in panel.nodes and not answer.value]
    if free < need:
        panel.add(Row("disk", "fail", found, "free some, lower --train.keep-checkpoints, or choose another --run"))
    elif blind:
        found += f"\n{panel.named(blind)}: does not see what rank 0 writes there"
        panel.add(Row("disk", "warn", found, "put --run on a shared file system: it could not be resumed"))
    elif lacks:
        panel.add(Row("disk", "warn", found, "nothing, if you can live with that; else --run on another file system"))
    else:
        panel.add(Row("disk", "ok", found))


def check_cache(panel: RankSurvey, directory: Path) -> None:
    """The cache of each node, where shards come from a server: can it be written, and what does its disk lack?"""
    panel.begin("cache")
    probe = directory / f".{secrets.token_hex(8)}.tmp"

    def write() -> list[str]:
        if panel.rank != panel.beside[0]:
            return []
        try:
            return lacking(probe, "--data.cache")
        finally:
            probe.unlink(missing_ok=True)

    answers = panel.query_ranks(write, "choose another --data.cache", _LIMIT)
    if panel.failed("cache", answers):
        return
    lacks = {rank: "\n".join(answer.value) for rank, answer in enumerate(answers) if answer.value}
    if lacks:
        advice = "nothing, if you can live with that; else --data.cache on another file system"
        panel.add(Row("cache", "warn", f"{directory}\n{panel.differing(lacks)}", advice))


def lacking(probe: Path, option: str) -> list[str]:
    """Write a file and leave it there -> what its file system lacks and training does without, and what follows.

    Raises UserError where it cannot be written.
    """
    lacks, folder = [], probe.parent
    try:
        with probe.open("xb") as file:
            file.write(bytes(2**16))
            file.flush()
            if not has_flock(file):
                until = f"only after {SILENCE:.0f} s of silence"
                lacks.append(f"no file locks: a process killed on another machine is known for dead {until}")
            if not (sync(file.fileno(), folder) and sync_directory(folder)):
                lacks.append("nothing tells when the disk has it all: a power cut may undo what was written last")
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); give yourself the right to, or another {option}"
        ) from None
    return lacks


def nearest(path: Path) -> Path:
    """The nearest parent that exists."""
    return next(parent for parent in path.absolute().parents if parent.exists())
