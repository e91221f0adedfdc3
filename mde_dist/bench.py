"""Measure what limits training here in a minute: cores, disk, device or network; and say what to change.

    python -m mde_dist.bench loader  [options]    pairs/s that the loader gives, against the bare decoders, core by core
    python -m mde_dist.bench step    [options]    images/s of the training step alone, and what each choice in it gains
    python -m mde_dist.bench train   [options]    both together: does the device wait, and for what?
    python -m mde_dist.bench scaling [options]    1, 2, … ranks on this node: what each one more brings

Options: those of mde_dist.train (--config FILE.toml, --section.field value), so that what is measured is the very
config that will be trained; without any, the sample. And --seconds, --rounds, --json FILE; `bench WORD --help` explains
all. Begin with `train`: it names what limits, and `loader` or `step` then say what to do about it. Each ends with one
line, "limit: …; try …".
"""

from importlib import import_module

from mde_dist.training.config import validate
from mde_dist.utils.cli import parse, run_command
from mde_dist.utils.errors import UserError

WORDS = ("loader", "step", "train", "scaling")


def main(argv: list[str]) -> None:
    word, *rest = argv or ["--help"]
    if word in ("--help", "-h"):
        print(__doc__.strip())
        return
    if word not in WORDS:
        raise UserError(f"bench {word}: measures {', '.join(WORDS)} (python -m mde_dist.bench --help)")
    module = import_module(f"mde_dist.tools.benchmarking.{word}")
    options = validate(parse(module.Options, rest, f"python -m mde_dist.bench {word}"))
    options.check()
    result = module.measure(options)
    if result is None:  # a rank that has nothing to show
        return
    if options.json is not None:
        result.save(options.json)
    result.show()


if __name__ == "__main__":
    run_command(main)
