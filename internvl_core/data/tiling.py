"""How an image is divided into tiles: the one rule, used by the index and by the cutter alike.

The grid depends on width and height only, so the number of tiles, and with it the length of a
sample, is known from a file's header. Equal to the original's `dynamic_preprocess`, ties included.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

from internvl_core.errors import ArgumentError


@dataclass(frozen=True)
class Tiling:
    """Bounds and switches of the division."""

    tile_size: int
    """Side of a tile in px."""
    min_tiles: int
    max_tiles: int
    """Most cells of the grid; the thumbnail comes on top."""
    use_thumbnail: bool
    is_dynamic: bool
    """False: the whole image becomes one tile."""

    def __post_init__(self) -> None:
        if self.tile_size < 1:
            raise ArgumentError(f"force_image_size: {self.tile_size} px, must be at least 1.")
        if not 1 <= self.min_tiles <= self.max_tiles:
            raise ArgumentError(
                f"min_dynamic_patch {self.min_tiles}, max_dynamic_patch {self.max_tiles}: must be 1 <= min <= max."
            )

    def for_images(self, num_images: int) -> Self:
        """Divide the bound among the images of one sample; the remainder is not used."""
        return self if num_images <= 1 else self.with_max_tiles(max(1, self.max_tiles // num_images))

    def with_max_tiles(self, max_tiles: int) -> Self:
        """Lower or raise the upper bound; below `min_tiles` no grid is allowed, which means one tile."""
        if max_tiles < self.min_tiles:
            return replace(self, min_tiles=1, max_tiles=1)
        return replace(self, max_tiles=max_tiles)

    def choose_grid(self, width: int, height: int) -> tuple[int, int]:
        """Columns and rows for an image of this size in px."""
        if not self.is_dynamic:
            return 1, 1
        return choose_grid(width, height, min_tiles=self.min_tiles, max_tiles=self.max_tiles, tile_size=self.tile_size)

    def count_tiles(self, width: int, height: int) -> int:
        """Tiles of an image of this size in px, the thumbnail included."""
        columns, rows = self.choose_grid(width, height)
        return columns * rows + (1 if self.has_thumbnail(columns, rows) else 0)

    def has_thumbnail(self, columns: int, rows: int) -> bool:
        """A lone tile already is its own thumbnail."""
        return self.is_dynamic and self.use_thumbnail and columns * rows > 1


def choose_grid(width: int, height: int, *, min_tiles: int, max_tiles: int, tile_size: int) -> tuple[int, int]:
    """Choose the grid whose aspect ratio is nearest to the image's.

    On an exact tie the larger grid wins if the image could fill half of it.

    Returns:
        Columns and rows; (1, 1) where the bounds allow no grid.
    """
    return _choose_grid(width, height, min_tiles, max_tiles, tile_size)


# Cameras and scanners have few formats: nearly every size of a data set has been seen before.
@lru_cache(maxsize=1 << 14)
def _choose_grid(width: int, height: int, min_tiles: int, max_tiles: int, tile_size: int) -> tuple[int, int]:
    aspect_ratio = width / height
    best, best_distance = (1, 1), float("inf")
    for columns, rows in _list_grids(min_tiles, max_tiles):
        distance = abs(aspect_ratio - columns / rows)
        fills_half = width * height > 0.5 * tile_size**2 * columns * rows
        if distance < best_distance or (distance == best_distance and fills_half):
            best, best_distance = (columns, rows), distance
    return best


@lru_cache(maxsize=64)
def _list_grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    sides = range(1, max_tiles + 1)
    grids = [(columns, rows) for columns in sides for rows in sides if min_tiles <= columns * rows <= max_tiles]
    return tuple(sorted(grids, key=lambda grid: grid[0] * grid[1]))
