"""Depth models: encoders, decoders, weights. Knows nothing of files of data, devices or ranks."""
