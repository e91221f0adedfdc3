"""Options of the process group. Imports no torch, so that `--help` is quick."""

from typing import Literal

Precision = Literal["auto", "bf16", "fp32"]
Gradients = Literal["fp32", "bf16"]
