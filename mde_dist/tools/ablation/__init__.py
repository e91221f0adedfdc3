"""A table of trainings: what it says, how it runs, what came of it. The command is mde_dist/ablate.py."""
