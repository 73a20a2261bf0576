"""Pixels and bins: inverse, rounding, collapse, refusal."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordexp.codec import CONVENTIONS, CoordCodec
from coordexp.errors import ConfigError

sides = st.floats(min_value=1, max_value=20_000)
shares = st.floats(min_value=0, max_value=1)
codecs = st.sampled_from([CoordCodec(num_bins=c.bins, convention=name) for name, c in CONVENTIONS.items()])


@given(codecs, sides, shares)
def test_to_pixel_inverts_to_bin_for_real_positions(codec, side, share):
    x = share * side
    assert codec.to_pixel(codec.to_bin(x, side), side) == pytest.approx(x, rel=1e-12, abs=1e-12 * side)


@given(codecs, sides, shares)
def test_round_trip_of_a_quantised_value_is_within_half_a_bin_or_one_when_flooring(codec, side, share):
    x = share * side
    error = abs(codec.to_pixel(codec.quantize(x, side), side) - x) * codec.scale / side
    allowed = 1.0 if CONVENTIONS[codec.convention].floor else 0.5
    assert error <= allowed + 1e-9


def test_norm999_meets_hand_computed_values():
    codec = CoordCodec()
    assert codec.to_bin(320, 640) == 499.5
    assert codec.quantize(320, 640) == 500
    assert codec.quantize(640, 640) == 999
    assert codec.quantize(0, 640) == 0
    assert CoordCodec(1000, "floor1000").quantize(640, 640) == 999
    assert CoordCodec(1000, "floor1000").quantize(639.9, 640) == 999
    assert CoordCodec(1001, "norm1000").quantize(640, 640) == 1000


def test_outside_is_an_error_and_is_clamped_only_on_request():
    codec = CoordCodec()
    for x in (-0.01, 640.5):
        with pytest.raises(ValueError, match="outside the image side"):
            codec.quantize(x, 640)
    assert np.array_equal(codec.quantize(np.array([-5.0, 700.0]), 640, clip=True), [0, 999])
    with pytest.raises(ValueError, match="finite"):
        codec.to_bin(float("nan"), 640)
    with pytest.raises(ValueError, match="positive"):
        codec.to_bin(1.0, 0)


@given(sides, st.lists(shares, min_size=4, max_size=4, unique=True))
def test_a_quantised_box_never_collapses_and_moves_an_edge_by_at_most_one_bin(side, parts):
    x1, x2 = sorted(parts[:2])
    y1, y2 = sorted(parts[2:])
    codec = CoordCodec()
    box = [x1 * side, y1 * side, x2 * side, y2 * side]
    if not (box[2] > box[0] and box[3] > box[1]):
        return
    bins, moved = codec.quantize_box(box, side, side)
    assert bins[2] > bins[0]
    assert bins[3] > bins[1]
    assert min(bins) >= 0
    assert max(bins) <= 999
    distance = np.abs(np.array(bins) - np.array([codec.to_bin(v, side) for v in box]))
    assert distance.max() <= (1.5 if moved else 0.5) + 1e-6


def test_the_nearer_edge_moves_when_a_box_collapses():
    codec = CoordCodec()
    assert codec.quantize_box([10.4, 0, 10.45, 999], 999, 999) == ((10, 0, 11, 999), True)
    assert codec.quantize_box([9.6, 0, 9.7, 999], 999, 999) == ((9, 0, 10, 999), True)


def test_unknown_convention_and_wrong_bin_count_are_refused_with_the_way_out():
    with pytest.raises(ConfigError, match="norm999"):
        CoordCodec(1000, "norm99")
    with pytest.raises(ConfigError, match="1001 bins"):
        CoordCodec(1000, "norm1000")
