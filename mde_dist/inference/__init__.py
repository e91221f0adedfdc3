"""A trained model -> depth maps, exported programs, a model card."""
