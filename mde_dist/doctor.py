"""Will this training work here? Half a minute, before hours are spent; takes what mde_dist.train takes, and runs as it.

    python -m mde_dist.doctor [--config FILE.toml] [--run DIR] [--section.field value …]
    accelerate launch … -m mde_dist.doctor …

Prints a table and a verdict. Exit code 0 where training can start, 1 where not. Changes nothing.
"""

import sys
from dataclasses import replace
from pathlib import Path

from mde_dist.distributed.signals import PreemptionHandler
from mde_dist.training.config import Config, for_all_ranks, read_config
from mde_dist.utils.cli import read_alone, run_command
from mde_dist.utils.user import temporary_folder


def main(argv: list[str]) -> None:
    config, error = read_alone(lambda: read_config(argv), Config())
    # imported here: torch takes seconds and hundreds of megabytes, which --help and a wrong option do without
    from mde_dist.distributed.environment import ignored_variables
    from mde_dist.distributed.heartbeat import monitor_ranks
    from mde_dist.distributed.process_group import init_distributed
    from mde_dist.tools.diagnostics.examine import examine, show

    if config.debug:  # which trains in a new directory there
        config = replace(config, run=Path(temporary_folder(), "mde_dist-debug-new"))
    ignored = ignored_variables()  # before they are taken out
    with (
        init_distributed(**config.train.process_group_args, error=error, settings=for_all_ranks(config)) as accelerator,
        monitor_ranks(accelerator, PreemptionHandler(), config.train.heartbeat_timeout),
    ):
        rows, estimate = examine(config, accelerator, ignored)
        if accelerator.is_main_process:
            show(rows, estimate)
    if any(row.result == "fail" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
