"""Metrics under named protocols, exact over any number of ranks."""
