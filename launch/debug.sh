#!/usr/bin/env bash
# One process under a debugger: set a `breakpoint()` anywhere in mde_dist, then
#     launch/debug.sh [mde_dist.train options …]
set -euo pipefail
exec python -m mde_dist.train --debug "$@"
