"""What keeps a run alive: processes, checkpoints, signals, records."""
