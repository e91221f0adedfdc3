"""Parts of the commands doctor, bench and ablate."""
