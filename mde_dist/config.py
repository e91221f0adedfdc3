"""Print the config that a command line comes to, as TOML or one field of it: for job scripts and for people.

python -m mde_dist.config [--config FILE.toml] [--section.field value …]
python -m mde_dist.config FIELD [--config FILE.toml] [--section.field value …]
"""

from mde_dist.training.config import Config, read_config, to_toml
from mde_dist.utils.cli import flatten, run_command


def main(argv: list[str]) -> None:
    if argv and argv[0] in dict(flatten(Config())):
        print(dict(flatten(read_config(argv[1:])))[argv[0]])
    else:
        print(to_toml(read_config(argv)))


if __name__ == "__main__":
    run_command(main)
