"""NYU Depth v2 as people have it on disk -> pairs of image and depth, with the scale of each split.

From a file's bytes to a recognised data set, each of these imports only from those before it:

    pairs       what a source is: pairs, splits, and who reads them
    tree        files by name, in a folder or in a ZIP
    pictures    pairs of two picture files
    keys        paths of images -> names of pairs in the shards
    rows        the text of a list -> rows of columns
    lists       lists of files -> pairs
    official    the official split, and how many pairs each layout has
    choice      what the user chose: layout, scales, lists, depth map
    hdf5        arrays of HDF5 files
    densedepth, listed (bts, marigold), h5, labeled, folder, rendered (rooms)   the layouts
    recognise   which of them a folder, ZIP or file is
"""

from mde_dist.packing.sources.pairs import BadPair, DepthMap, Pair, RawPair, Source, Split
from mde_dist.packing.sources.recognise import EXPECTED, LAYOUTS, open_source
from mde_dist.packing.sources.rendered import ROOMS_SPLITS, rooms

__all__ = [
    "EXPECTED",
    "LAYOUTS",
    "ROOMS_SPLITS",
    "BadPair",
    "DepthMap",
    "Pair",
    "RawPair",
    "Source",
    "Split",
    "open_source",
    "rooms",
]
