"""Command lines, files, terminal, pictures: what every other folder may use, and nothing of depth."""
