"""What `mde_dist.predict` takes in and gives out: images and videos, maps, pictures and point clouds."""
