"""Ranges: histograms that grow, and the thresholds taken from them."""

from math import erf, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from adavit.calibration.histogram import Histogram
from adavit.calibration.options import METHODS

VALUES = hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-1e6, 1e6, width=32))


def of(*parts: np.ndarray) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(part)
    return histogram


@given(VALUES, VALUES)
def test_every_value_but_zero_is_counted_once(first: np.ndarray, second: np.ndarray) -> None:
    found = of(first, second)
    assert found.counts.sum() == np.count_nonzero(first) + np.count_nonzero(second)
    assert found.peak == max(np.abs(first).max(), np.abs(second).max())
    assert found.peak <= found.width * len(found.counts) * (1 + 1e-9)
    assert found.width * len(found.counts) <= 2 * found.peak * (1 + 1e-9)  # no wider than it takes


@given(VALUES, VALUES)
def test_no_threshold_exceeds_the_largest_value(first: np.ndarray, second: np.ndarray) -> None:
    found = of(first, second)
    assert found.threshold("max") == max(np.abs(first).max(), np.abs(second).max())
    assert all(0 <= found.threshold(method) <= found.peak for method in METHODS)


def test_growing_merges_bins() -> None:
    values = np.random.default_rng(0).exponential(size=10_000).astype(np.float32)
    grown, whole = of(np.full(1, 0.01, np.float32), values), of(np.append(values, np.float32(0.01)))
    assert grown.threshold("percentile") == pytest.approx(whole.threshold("percentile"), rel=0.01)


def test_an_outlier_does_not_set_the_range() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    found = of(np.append(values, np.float32(100)))
    assert found.threshold("max") == 100
    assert 3 < found.threshold("percentile") < 5
    assert 3 < found.threshold("entropy") < 30


@given(hnp.arrays(np.float32, 20_000, elements=st.floats(0.25, 1, width=32), fill=st.floats(0.25, 1, width=32)))
@settings(max_examples=25, deadline=None)
def test_of_ten_thousand_values_a_percentile_clips_one(values: np.ndarray) -> None:
    assert (values > of(values).threshold("percentile")).sum() <= 2


def test_of_rare_large_values_entropy_clips_what_a_percentile_keeps() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    found = of(np.append(values, np.full(30, 100, np.float32)))
    assert found.threshold("percentile") == 100
    assert 3 < found.threshold("entropy") < 30


def test_the_entropy_threshold_keeps_what_is_evenly_spread() -> None:
    values = np.linspace(-1, 1, 100_000, dtype=np.float32)
    assert of(values).threshold("entropy") == pytest.approx(1, rel=0.02)


def test_values_next_to_zero_do_not_have_the_others_clipped() -> None:
    before = np.random.default_rng(0).normal(-3, 2, 200_000)
    hidden = (before * 0.5 * (1 + np.vectorize(erf)(before / sqrt(2)))).astype(np.float32)
    assert (np.abs(hidden) < 0.17).mean() > 0.9  # behind a GELU
    scale = of(hidden).threshold("entropy") / 127
    error = hidden - np.clip(np.round(hidden / scale), -127, 127) * scale
    assert (hidden**2).sum() > 10**1.5 * (error**2).sum()  # 15 dB


def test_nothing_seen_has_no_range() -> None:
    assert [of(np.zeros(5, np.float32)).threshold(method) for method in METHODS] == [0, 0, 0]
