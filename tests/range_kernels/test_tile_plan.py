"""How sequences are cut into tiles of queries."""

import pytest
from range_kernels.cuda.tile_plan import cut, plan_tiles


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("begin", [0, 5])
def test_tiles_contain_each_query_once_and_only_the_first_is_short(begin, rows):
    for length in range(4 * rows + 2):
        tiles = cut(begin, begin + length, rows)
        assert [query for start, count in tiles for query in range(start, start + count)] == list(
            range(begin, begin + length)
        )
        assert all(count == rows for _, count in tiles[1:])
        assert all(0 < count <= rows for _, count in tiles)


def test_tiles_contain_the_key_range_of_their_sequence():
    tiles = plan_tiles([0, 5, 5, 8], [0, 9, 9, 12], 4)
    assert tiles.tolist() == [[0, 1, 0, 9], [1, 4, 0, 9], [5, 3, 9, 3]]
    assert plan_tiles([0], [0], 4).shape == (0, 4)
