"""The trainer and its parts: step, losses, optimizer, checkpoints, logs."""
