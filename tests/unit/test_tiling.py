import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_core.data.tiling import Tiling, choose_grid
from internvl_core.errors import ArgumentError

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "tiling.json").read_text())


def build_tiling(min_tiles: int = 1, max_tiles: int = 12, *, is_dynamic: bool = True) -> Tiling:
    return Tiling(448, min_tiles, max_tiles, use_thumbnail=True, is_dynamic=is_dynamic)


def test_every_grid_is_the_one_the_original_chose() -> None:
    differing = [
        row
        for row in GOLDEN["rows"]
        if choose_grid(row[0], row[1], min_tiles=row[2], max_tiles=row[3], tile_size=row[4]) != tuple(row[5:])
    ]
    assert len(GOLDEN["rows"]) > 100
    assert differing == []


@pytest.mark.parametrize(
    ("width", "height", "expected"), [(640, 480, 13), (1920, 1080, 9), (1000, 1000, 10), (224, 224, 1)]
)
def test_a_thumbnail_comes_on_top_of_more_than_one_tile(width: int, height: int, expected: int) -> None:
    assert build_tiling().count_tiles(width, height) == expected


def test_a_static_tiling_gives_one_tile() -> None:
    assert build_tiling(is_dynamic=False).count_tiles(4000, 100) == 1


def test_the_images_of_a_sample_share_the_bound() -> None:
    assert [build_tiling().for_images(n).max_tiles for n in (0, 1, 2, 5, 12, 40)] == [12, 12, 6, 2, 1, 1]


def test_a_bound_below_the_minimum_means_one_tile() -> None:
    assert build_tiling(min_tiles=4).for_images(4).count_tiles(4000, 100) == 1
    assert build_tiling(min_tiles=4).with_max_tiles(1).count_tiles(4000, 100) == 1


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 4), st.integers(4, 40))
def test_a_grid_keeps_its_bounds(width: int, height: int, min_tiles: int, max_tiles: int) -> None:
    columns, rows = build_tiling(min_tiles, max_tiles).choose_grid(width, height)
    assert min_tiles <= columns * rows <= max_tiles


@pytest.mark.parametrize(("min_tiles", "max_tiles"), [(0, 12), (5, 4)])
def test_impossible_bounds_are_refused(min_tiles: int, max_tiles: int) -> None:
    with pytest.raises(ArgumentError, match="min_dynamic_patch"):
        build_tiling(min_tiles, max_tiles)
