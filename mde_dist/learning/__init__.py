"""Model, losses, optimizer, metrics. Knows nothing of files, devices or ranks."""
