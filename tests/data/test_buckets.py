import pytest
from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha as pixart

from shortcut_jax.data.buckets import aspect_buckets, nearest, parse_buckets
from shortcut_jax.errors import DataError


@pytest.mark.parametrize("resolution", [256, 512, 1024])
def test_published_sizes_are_those_of_diffusers(resolution):
    bins = getattr(pixart, f"ASPECT_RATIO_{resolution}_BIN").values()
    assert parse_buckets("published", resolution) == tuple((int(h), int(w)) for h, w in bins)


@pytest.mark.parametrize("resolution", [64, 256, 512, 1024])
def test_aspect_sizes_keep_area_and_ratio(resolution):
    buckets = aspect_buckets(resolution)
    assert (resolution, resolution) in buckets and len(set(buckets)) == len(buckets) > 2
    for height, width in buckets:
        assert height % 16 == width % 16 == 0 and (width, height) in buckets
        assert 0.5 <= height / width <= 2
        # The nearest multiple of 16: the area is off by less than half a step of the long side.
        assert abs(height * width - resolution**2) <= 8 * min(height, width)


def test_written_and_square_sizes():
    assert parse_buckets("64x64,48x80", 999) == ((64, 64), (48, 80))
    assert parse_buckets("square", 128) == ((128, 128),)
    assert parse_buckets("aspect", 64) == ((48, 80), (64, 64), (80, 48))
    assert parse_buckets("6x10", 64, multiple=2) == ((6, 10),)


@pytest.mark.parametrize(
    "text, resolution, told",
    [
        ("64x70", 64, "64x70 is not in multiples of 16; the nearest is 64x64"),
        ("64x64,0x16", 64, "0x16 is not in multiples of 16; the nearest is 16x16"),
        ("64x64,64x64", 64, "64x64 is given twice"),
        ("big", 64, "'big' is neither"),
        ("square", 70, "--resolution=70 is not a multiple of 16; the nearest is 64"),
        ("published", 64, "256, 512 and 1024, not 64"),
        ("", 64, "is empty"),
    ],
)
def test_unfit_sizes_are_one_line(text, resolution, told):
    with pytest.raises(DataError, match=told) as error:
        parse_buckets(text, resolution)
    assert "\n" not in str(error.value)


def test_the_nearest_is_by_ratio_and_ties_do_not_depend_on_order():
    buckets = parse_buckets("aspect", 256)
    for i, (height, width) in enumerate(buckets):
        assert nearest(buckets, height, width) == nearest(buckets, 3 * height, 3 * width) == i
    assert nearest(buckets, 1, 1000) == 0 and nearest(buckets, 1000, 1) == len(buckets) - 1
    assert nearest([(32, 64), (64, 32)], 50, 50) == 0
    sizes = [(16, 16), (64, 64), (32, 32)]  # of one ratio: the largest that is covered, or else the smallest
    assert [nearest(sizes, s, s) for s in (10, 16, 40, 64, 99)] == [0, 0, 2, 1, 1]
