"""Options of the user about a source: everything that a layout has to know beside the files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mde_dist.data.depth import DepthScale
from mde_dist.packing.sources.pairs import DepthMap
from mde_dist.utils.errors import UserError


@dataclass(frozen=True)
class SourceOptions:
    layout: str | None = None
    """Layout of the source; None = recognise it."""
    scales: Mapping[str, DepthScale] = field(default_factory=dict)
    """Scales by split, "" for all: they overrule what a layout declares."""
    lists: Mapping[str, Path] = field(default_factory=dict)
    """Files of --list, by split."""
    depth_map: DepthMap | None = None
    """Depth map to read where there are two; None = the layout's own."""

    def override(self, split: str) -> DepthScale | None:
        return self.scales.get(split) or self.scales.get("")

    def scale(self, split: str, declared: DepthScale) -> DepthScale:
        return self.override(split) or declared

    def require_kind(self, kind: str, layout: str) -> None:
        """Refuse the other kind for a layout that has one. Raises UserError."""
        if self.depth_map and self.depth_map != kind:
            raise UserError(f"--depth-map {self.depth_map}: {layout} has {kind} depth only; leave the option out")

    def forbid_kind(self, layout: str) -> None:
        """Refuse the choice for a layout that does not say what its depth is. Raises UserError."""
        if self.depth_map:
            raise UserError(
                f"--depth-map {self.depth_map}: {layout} has one depth map for each image; leave the option out"
            )
