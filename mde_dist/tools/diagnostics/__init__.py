"""What `python -m mde_dist.doctor` looks at before a training: each file one kind of thing, each function one row."""
