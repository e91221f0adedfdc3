"""Embedded sample: furnished rooms rendered by ray casting, each image with its exact depth.

Everything is drawn from the seed, so no data set, asset or network is needed. The story runs through the files, each
of which imports only from those before it:

    geometry    shapes, rotations and the pinhole camera
    materials   colours mixed by procedural patterns
    builder     solids, and who draws, paints and places them without collision
    furniture   pieces put together from solids
    scene       all solids as arrays, and what rays meet in them
    shell       the empty room's faces, fixtures and lights
    build       seed -> furnished room with the camera's pose
    render      room -> image and depth as a camera and a structured-light sensor take them
"""

from mde_dist.packing.rooms.build import build_scene
from mde_dist.packing.rooms.geometry import Camera, intrinsics
from mde_dist.packing.rooms.render import render_room
from mde_dist.packing.rooms.scene import cast

__all__ = ["Camera", "build_scene", "cast", "intrinsics", "render_room"]
