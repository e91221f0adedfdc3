"""The model card: README.md beside a model.safetensors, in the form that the Hugging Face hub shows.

Everything in it comes from the weights and from the run that made them; whatever cannot be read is left out. Text from
files is escaped by `markdown.py`, and by the hub's own library in the front matter, so that it cannot become markup.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from mde_dist import __version__
from mde_dist.data.manifest import Manifest
from mde_dist.inference.export_formats import Format
from mde_dist.inference.origin import Origin, Scores, find_origin, manifest_at
from mde_dist.models.depth_model import load_model
from mde_dist.models.weights import MODEL, read_model
from mde_dist.packing.sources.official import count_in_words
from mde_dist.utils.io import write_atomic, writing
from mde_dist.utils.markdown import block, code, plain, row
from mde_dist.utils.toml import dump_toml

NAME = "README.md"
NYU_LAYOUTS = ("densedepth", "bts", "h5", "labeled", "marigold")
"""Layouts of shards that come from NYU Depth v2."""
_TASK = "depth-estimation"


@dataclass(frozen=True)
class Program:
    """A program beside the weights, and how well it does what the model does."""

    kind: Format
    size: tuple[int, int]
    """Height and width that it takes, pixels."""
    difference: float
    """The largest that was found between its depth and the model's, metres."""


@dataclass(frozen=True)
class Card:
    """Content of a model card."""

    name: str
    metadata: Mapping[str, Any]
    """Metadata of the model.safetensors."""
    parameters: int
    bytes: int
    """Size of the model.safetensors."""
    origin: Origin
    train: Manifest | None
    """Manifest of the shards that it was trained on, where they can be read."""
    held_out: Manifest | None
    """Manifest of the shards that it was scored on."""
    programs: Sequence[Program]
    checked_on: str
    """Images on which the programs were compared with the model, in words."""

    @property
    def config(self) -> Mapping[str, Any]:
        return self.metadata["config"]


def write_card(
    folder: Path,
    run: Path | None = None,
    name: str | None = None,
    programs: Sequence[Program] = (),
    checked_on: str = "",
) -> Path:
    """Write README.md beside the model.safetensors in `folder` -> its path.

    `run`: run directory that the weights come from, by default the folder; `name`: of the model, by default the
    folder's. No network. Raises UserError where the weights cannot be read or the card cannot be written; all else that
    is missing or damaged is left out.
    """
    weights = folder / MODEL
    metadata, tensors = read_model(weights)
    parameters = sum(parameter.numel() for parameter in load_model(metadata, tensors).parameters())
    origin = find_origin(weights, run or folder)
    scores = next(iter(origin.scores), None)
    card = Card(
        name=plain(name or folder.resolve().name),
        metadata=metadata,
        parameters=parameters,
        bytes=weights.stat().st_size,
        origin=origin,
        train=manifest_at(metadata["config"].get("data.shards"), origin.manifest),
        held_out=manifest_at(scores.location, scores.manifest) if scores else None,
        programs=programs,
        checked_on=checked_on,
    )
    with writing(folder / NAME):
        write_atomic(folder / NAME, f"---\n{front_matter(card)}\n---\n\n{text(card)}".encode(errors="replace"))
    return folder / NAME


def front_matter(card: Card) -> str:
    """Front matter for the hub, as YAML."""
    tags = [_TASK, "monocular-depth-estimation", "safetensors", card.config["model.encoder"]]
    tags += ["onnx"] if any(program.kind.file.endswith(".onnx") for program in card.programs) else []
    found = [result for scores in card.origin.scores for result in eval_results(scores, card.held_out)]
    data = ModelCardData(
        pipeline_tag=_TASK,
        library_name="mde_dist",
        tags=tags,
        datasets=["nyu_depth_v2"] if _is_nyu(card.train) else None,
        model_name=card.name if found else None,
        eval_results=found or None,
    )
    return data.to_yaml(line_break="\n")


def eval_results(scores: Scores, shards: Manifest | None) -> Iterator[EvalResult]:
    """Scores of the model in the hub's terms. `shards`: those that it was measured on, where they can be read."""
    kind, name = "other", f"shards {plain(scores.manifest)[:12]}"
    if _is_nyu(shards):
        kind, name = "nyu_depth_v2", "NYU Depth v2"
    elif _is_rooms(shards):
        kind, name = "mde_dist_rooms", "rendered rooms of mde_dist"
    where = f"{scores.protocol} protocol, {scores.images} images, fingerprint {scores.fingerprint}"
    for metric, value in scores.columns["model"].items():
        yield EvalResult(
            task_type=_TASK,
            dataset_type=kind,
            dataset_name=name,
            dataset_split=plain(scores.split),
            dataset_args={"images": scores.images, "manifest": plain(scores.manifest)},
            metric_type=metric,
            metric_name=f"{metric} ({where})",
            metric_value=round(value, 6),
        )


def text(card: Card) -> str:
    """The card below its front matter, as Markdown."""
    height, width = card.metadata["size"]
    about = f"""\
# {code(card.name)}

Depth in metres from one RGB image: a {code(card.config["model.encoder"])} encoder with a residual decoder, \
{card.parameters / 1e6:.1f} million parameters, {card.bytes / 1e6:.0f} MB as float32, trained at {height}x{width}.

## Use it

In this folder, where mde_dist is installed:

```python
from mde_dist.inference.predictor import open_predictor
predict = open_predictor(".")  # or the path of this folder
depth = predict(image)  # RGB uint8 (height, width, 3) -> depth float32 (height, width), metres
```

The image may have any size: the model sees it with about {height * width:,} pixels, and the depth has the image's size.
"""
    return "\n".join([about, *_programs(card), *_training(card), *_scores(card), *_limits(card), *_config(card)])


def _programs(card: Card) -> Iterator[str]:
    if not card.programs:
        return
    height, width = card.programs[0].size
    other = "" if [height, width] == list(card.metadata["size"]) else "This is not the size that it was trained at.\n"
    yield f"""\
## Use it without mde_dist

Input `image`: float32 (batch, 3, {height}, {width}), RGB, 0 to 1, an image resized to {height}x{width}; any batch.
Output `depth`: float32 (batch, {height}, {width}), metres. The normalisation is inside.
{other}"""
    for program in card.programs:
        yield f"`{program.kind.file}` {program.kind.about}\n\n{block(program.kind.usage, 'python')}"
    found = ", ".join(f"`{program.kind.file}` {1000 * program.difference:.4f} mm" for program in card.programs)
    yield f"Largest difference from the model on {code(card.checked_on)}: {found}.\n"


def _training(card: Card) -> Iterator[str]:
    config, origin, shards = card.config, card.origin, card.train
    split = config.get("data.train_split") or "train"
    lines = [f"data: {code(config.get('data.shards'))}, split {code(split)}"]
    if shards and split in shards.splits:
        info, (height, width) = shards.splits[split], shards.size
        known = _is_nyu(shards) or _is_rooms(shards)
        count = count_in_words(shards.layout, split, info.samples) if known else f"{info.samples:,} pairs"
        what = f"NYU Depth v2 in the layout {shards.layout}, " if _is_nyu(shards) else ""
        lines.append(f"pairs: {what}{count}; {height}x{width} pixels, median depth {info.depth['median']:.2f} m")
    if origin.samples is not None:
        lines += [f"sha256 of the manifest: {code(origin.manifest)}", f"samples seen: {origin.samples:,}"]
    lines.append(f"started from: {code(config.get('model.weights', 'none'))}")
    made = f"mde_dist {card.metadata.get('version')}" + (f", torch {origin.torch}" if origin.torch else "")
    lines.append(f"made by {code(made)}")
    yield _listed("Training", lines)


def _scores(card: Card) -> Iterator[str]:
    yield "## Scores\n"
    if not card.origin.scores:
        yield "No evaluation of these weights is at hand.\n"
    for scores in card.origin.scores:
        metrics = scores.columns["model"]
        yield (
            f"Protocol `{scores.protocol}`, {scores.images:,} images of {code(scores.location)}, split "
            f"{code(scores.split)}; fingerprint `{scores.fingerprint}`: results can be compared where it is the same.\n"
        )
        yield row("", *map(code, scores.columns))
        yield row("---", *["---:"] * len(scores.columns))
        for metric in metrics:
            yield row(metric, *(f"{column[metric]:.4f}" for column in scores.columns.values()))
        yield ""


def _limits(card: Card) -> Iterator[str]:
    """Limits of the numbers."""
    lines = [
        "Metres are those of the camera and the rooms that it learned from: with another field of view, or outdoors, "
        "the scale is wrong even where the shapes look right.",
        "Depths beyond those of its training data are not known to it. Depth cameras measure little or nothing on "
        "glass, mirrors and black surfaces, so it has learned little about them.",
        "It is not made for decisions on which somebody's safety depends.",
        "No licence is set: that of the training data counts, too. Set `license` above before it is published.",
    ]
    if _is_rooms(card.train):
        lines.insert(0, "It has seen rendered rooms only: photographs are foreign to it.")
    yield _listed("Limits", lines)


def _config(card: Card) -> Iterator[str]:
    values = [(name, value) for name, value in card.config.items() if re.fullmatch(r"[\w.]+", name)]
    yield f"<details>\n<summary>Config of the training</summary>\n\n{block(dump_toml(values), 'toml')}\n</details>\n"
    yield f"Written by mde_dist {__version__}.\n"


def _listed(title: str, lines: Sequence[str]) -> str:
    return f"## {title}\n\n" + "".join(f"- {line}\n" for line in lines)


def _is_nyu(shards: Manifest | None) -> bool:
    """Say whether they were packed from NYU Depth v2; false where they cannot be read."""
    return shards is not None and shards.layout in NYU_LAYOUTS


def _is_rooms(shards: Manifest | None) -> bool:
    return shards is not None and shards.layout == "rooms"
