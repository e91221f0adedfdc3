"""Shards -> a trained model in a run directory.

    accelerate launch -m mde_dist.train [--config FILE.toml] [--run DIR] [--section.field value …]

The same command for a CPU, one GPU, several GPUs and several nodes. Run again, it resumes.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save as safetensors
from torch import nn

from . import report
from .announce import describe, describe_batch
from .command import run_command
from .config import SAMPLE_SHARDS, Config, as_json, as_toml, identity, read_config
from .data.shards import ShardSet, open_split
from .errors import UserError
from .evaluate import Interrupted, score_baselines, score_split
from .learning.losses import mse
from .learning.metrics import PROTOCOLS, summarise
from .learning.model import build
from .learning.optim import learning_rate, load_optimizer_tensors, make_optimizer, optimizer_tensors
from .run.checkpoint import MODEL, OPTIMIZER, model_bytes, versions
from .run.directory import RunDirectory
from .run.distributed import agree, all_sum, processes, same_everywhere, share_buffers, together
from .run.monitor import Account, Monitor
from .run.preemption import StopFlag, stop_flag
from .stream import poisoned, step_news, take_share, training_stream


def main(argv: list[str]) -> None:
    config = read_config(argv)
    if config.debug:
        config = replace(config, run=Path(tempfile.mkdtemp(prefix="mde_dist-debug-")))
    with processes(config.train.precision, config.train.cpu_threads, config.train.timeout) as accelerator:
        if config.debug:
            start_debugging(accelerator)
        check_batch(config, accelerator.num_processes)
        make_sample(config, accelerator)
        with stop_flag() as stop, contextlib.ExitStack() as opened:
            shards, held_out = together(accelerator, lambda: open_splits(config, opened))
            same_everywhere(accelerator, "the shards", shards.manifest.sha256 + held_out.manifest.sha256)
            stopped = train(config, accelerator, shards, held_out, stop)
    if stopped:
        sys.exit(128 + stopped)


def start_debugging(accelerator: Accelerator) -> None:
    """Slow, single and reproducible, with errors that point at their cause."""
    if accelerator.num_processes > 1:
        raise UserError("--debug is for a single process: python -m mde_dist.train --debug")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it deterministic matmuls on CUDA raise
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.autograd.set_detect_anomaly(True)


def check_batch(config: Config, world: int) -> None:
    """The global batch has to divide by ranks and accumulation steps. Raises UserError."""
    batch, accumulate = config.train.batch_size, config.train.accumulate
    parts = world * accumulate
    if batch % parts:
        near = max(parts, round(batch / parts) * parts)
        raise UserError(
            f"train.batch_size = {batch} (global) does not divide by {world} ranks x {accumulate} accumulated; "
            f"try --train.batch-size {near}, or another number of processes"
        )


def make_sample(config: Config, accelerator: Accelerator) -> None:
    """Render and pack the embedded sample if it is what to train on and is not there: one process, the others wait."""
    if config.data.shards != SAMPLE_SHARDS:
        return
    manifest = Path(SAMPLE_SHARDS, "manifest.json")
    # once more per node for nodes that share no disk; the bytes are the same
    for turn in (accelerator.is_main_process, accelerator.is_local_main_process):
        if turn and not manifest.is_file():
            # small shards, so that all cores have some to render
            options = f"--layout rooms --samples-per-shard 32 --output {SAMPLE_SHARDS}"
            command = ["-m", "mde_dist.shard", *options.split()]
            print(f"no shards at {SAMPLE_SHARDS} yet; rendering the sample: python {' '.join(command)}", flush=True)
            alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
            if subprocess.run([sys.executable, *command], env=alone, check=False).returncode:
                raise UserError(f"the sample could not be packed into {SAMPLE_SHARDS}; the line above says why")
        accelerator.wait_for_everyone()


def open_splits(config: Config, opened: contextlib.ExitStack) -> tuple[ShardSet, ShardSet]:
    """The splits to train on and to evaluate on. Raises UserError."""
    data = config.data
    shards = opened.enter_context(open_split(data.shards, data.train_split, data.cache_options))
    held_out = open_split(data.eval_shards or data.shards, data.eval_split, data.cache_options)
    return shards, opened.enter_context(held_out)


@dataclass
class State:
    """All that changes as the loop goes, besides model and optimizer; saved as JSON."""

    samples_seen: int = 0
    step: int = 0
    evaluated: int = 0
    """samples_seen at the last evaluation."""
    replaced: int = 0
    """Samples so far that were damaged, so that another one took their place."""
    best: dict[str, Any] = field(default_factory=dict)
    """`abs_rel`, `samples` and `step` of the best evaluation."""


def train(config: Config, accelerator: Accelerator, shards: ShardSet, held_out: ShardSet, stop: StopFlag) -> int:
    """Train to the end, or until a signal; returns the signal's number, 0 at the end."""
    device, world, main_process = accelerator.device, accelerator.num_processes, accelerator.is_main_process
    size = config.data.size or shards.size
    total, batch_size, accumulate = config.train.samples, config.train.batch_size, config.train.accumulate
    bare = build(config.model, config.train.seed).to(device)
    if device.type == "cuda" and world > 1 and config.train.sync_bn:
        bare = nn.SyncBatchNorm.convert_sync_batchnorm(bare)
    optimizer = make_optimizer(bare, config.optim)
    about = {"config": as_json(config), "size": size}

    this_run = identity(config, shards.manifest.sha256, held_out.manifest.sha256)
    with RunDirectory(config.run, this_run, as_toml(config), writes=main_process) as directory:
        state = resume(directory, config, bare, optimizer)
        model = accelerator.prepare_model(bare)
        metrics = config.run / "metrics.jsonl" if main_process else None
        account = Account()

        def save() -> None:
            if main_process:
                tensors = {MODEL: model_bytes(bare, about), OPTIMIZER: safetensors(optimizer_tensors(bare, optimizer))}
                best = state.best.get("step")
                record = {**vars(state), "config": as_json(config), **versions()}
                directory.save(state.step, tensors, record, config.train.keep, best)
            account.restart()

        with (
            Monitor(metrics, state.samples_seen, state.evaluated, total) as monitor,
            training_stream(config, shards, state.samples_seen, accelerator, stop) as loader,
        ):
            describe(monitor, config, accelerator, shards, state.samples_seen)
            if state.samples_seen == 0:
                record_baselines(config, accelerator, shards, held_out, monitor)
            account.restart()
            while True:
                if evaluation_due(config, state):
                    try:
                        evaluate(config, accelerator, bare, held_out, size, state, monitor, stop)
                    except Interrupted:
                        break
                    except UserError:
                        save()  # what was learned is whole, what it was to be scored on is not
                        raise
                    save()
                if state.samples_seen >= total:
                    break
                # one optimizer step: this rank's share of the global batch at samples_seen
                share = take_share(loader, config, size, account)
                if config.debug and state.step == 0 and share.views:
                    describe_batch(monitor, share.samples, *share.views[0])
                news = all_sum(accelerator, step_news(share, stop, device))
                pixels, (_, stops, failures, batch_hash, replaced) = news[0], news.tolist()
                if stops > 0:
                    break
                bad = state.replaced + int(replaced)
                error = share.error or poisoned(config, bad, state.samples_seen + batch_size, shards)
                if failures > 0 or error is not None:
                    save()  # what was learned so far is whole
                    agree(accelerator, error)
                rate = learning_rate(config.optim, state.samples_seen, total)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                losses = torch.zeros((), dtype=torch.float64, device=device)
                for number, (image, depth) in enumerate(share.views, 1):
                    with contextlib.nullcontext() if number == accumulate else accelerator.no_sync(model):
                        with accelerator.autocast():
                            prediction = model(image)
                        # the mean over the valid pixels of the GLOBAL batch; DDP averages over ranks, hence `world`
                        loss = mse(prediction, depth) / pixels.clamp(min=1).float()
                        accelerator.backward(loss * world)
                        losses += loss.detach().double()
                norm = nn.utils.clip_grad_norm_(bare.parameters(), config.optim.clip or float("inf"))
                if not torch.isfinite(norm):  # of the reduced gradient, so the same on every rank
                    raise UserError(
                        f"the gradient is {norm.item()} at sample {state.samples_seen}; this batch was not learned "
                        f"from, the checkpoints in {config.run} are whole; try a lower --optim.lr or --optim.clip 1"
                    )
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                before = state.samples_seen
                state.samples_seen += batch_size
                state.replaced = bad
                state.step += 1
                account.step(batch_size)
                if state.samples_seen >= total or due(config.train.log_every, before, state.samples_seen):
                    values = {"loss": all_sum(accelerator, losses).item(), "lr": rate, "grad_norm": norm.item()}
                    values |= {"replaced": state.replaced} if state.replaced else {}
                    monitor.step(state.samples_seen, **values, batch=f"{int(batch_hash):x}", **account.rates())
                if due(config.train.checkpoint_every, before, state.samples_seen) and not evaluation_due(config, state):
                    save()

            if state.samples_seen < total or evaluation_due(config, state):
                save()
                directory.mark_preempted(f"stopped at sample {state.samples_seen}")
                monitor.say(
                    f"stopped at sample {state.samples_seen} by a signal; the same command continues from there"
                )
                return int(stop.signal or signal.SIGTERM)
        if main_process:
            finish(directory, model_bytes(bare, about))
    return 0


def resume(directory: RunDirectory, config: Config, model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Put back the newest whole checkpoint, if there is one."""
    checkpoint = directory.resume()
    if checkpoint is not None:
        directory.note_change(checkpoint, {"train.batch_size": config.train.batch_size})
    directory.start()
    if checkpoint is None:
        return State()
    model.load_state_dict(checkpoint.model)
    load_optimizer_tensors(model, optimizer, checkpoint.optimizer)
    return State(**{item.name: checkpoint.state[item.name] for item in fields(State)})


def due(every: int, before: int, now: int) -> bool:
    """Whether a multiple of `every` lies in (before, now]."""
    return now // every > before // every


def evaluation_due(config: Config, state: State) -> bool:
    """Whether the model of this very sample has to be evaluated and was not yet."""
    seen = state.samples_seen
    wanted = seen >= config.train.samples or due(config.train.evaluate_every, state.evaluated, seen)
    return wanted and state.evaluated < seen


def evaluate(
    config: Config,
    accelerator: Accelerator,
    model: nn.Module,
    held_out: ShardSet,
    size: tuple[int, int],
    state: State,
    monitor: Monitor,
    stop: StopFlag,
) -> None:
    """Score the held-out split, note it, and remember it if it is the best so far."""
    protocol = PROTOCOLS[config.evaluate.protocol]
    options = (config.evaluate.batch_size, config.data.threads, config.evaluate.limit)
    share_buffers(accelerator, model)
    model.eval()
    (rows,) = score_split(accelerator, model, held_out, [protocol], size, *options, stop=lambda: bool(stop))
    model.train()
    summary = summarise(rows, protocol)
    score = summary.metrics["abs_rel"]
    best = score < state.best.get("abs_rel", float("inf"))
    if best:
        state.best = {"abs_rel": score, "samples": state.samples_seen, "step": state.step}
    state.evaluated = state.samples_seen
    monitor.record(samples=state.samples_seen, evaluation=protocol.name, images=summary.images, **summary.metrics)
    monitor.say(
        f"evaluated at sample {state.samples_seen}: {protocol.name} abs_rel {score:.4f}, "
        f"delta1 {summary.metrics['delta1']:.4f}{' (best so far)' if best else ''}"
    )


def record_baselines(
    config: Config, accelerator: Accelerator, shards: ShardSet, held_out: ShardSet, monitor: Monitor
) -> None:
    """What predicting without looking scores: the line that the model has to beat."""
    protocol = PROTOCOLS[config.evaluate.protocol]
    limit = config.evaluate.limit
    tables = score_baselines(accelerator, held_out, shards, [protocol], limit)
    for name, (rows,) in tables.items():
        summary = summarise(rows, protocol)
        monitor.record(samples=0, baseline=name, evaluation=protocol.name, images=summary.images, **summary.metrics)


def finish(directory: RunDirectory, model: bytes) -> None:
    """Publish the weights, draw what there is to see, and say where everything is."""
    weights = directory.publish_model(model)
    made = report.draw(directory.path)
    report.show_scores(directory.path)
    for path in (weights, *made):
        print(f"made: {path}")
    print(f"next: python -m mde_dist.evaluate --run {directory.path} --protocols eigen full blog")
    print(f"      python -m mde_dist.predict --checkpoint {weights} --output depth IMAGE …", flush=True)


if __name__ == "__main__":
    run_command(main)
