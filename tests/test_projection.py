"""Projecting a loss: the law is found, the band holds what came, and nothing is made up."""

from __future__ import annotations

import numpy as np
import pytest

from hamner.plots.metrics import Floats, Series
from hamner.plots.projection import NoProjectionError, Projection, project

# Tokens in billions and validation loss of an earlier run of v4's base stage.
LOGGED = np.array([
    (0.0492, 5.157), (0.0737, 4.662), (0.1229, 4.170), (0.2458, 3.832), (0.4915, 3.586),
    (0.7373, 3.475), (0.9830, 3.421), (1.2288, 3.394), (1.4746, 3.360), (1.7203, 3.346),
    (1.9661, 3.337), (2.2118, 3.336), (2.4330, 3.289), (2.4699, 3.312),
])  # fmt: skip


def law(tokens: Floats | float, floor: float = 2.9, exponent: float = 0.33) -> Floats:
    return floor + 0.36 * (np.asarray(tokens) / 1e9) ** -exponent


def measured(share: float, seed: int) -> Series:
    """Losses of a run of ten billion tokens up to a share of it; neighbours share their noise."""
    random = np.random.default_rng(seed)
    tokens = np.arange(1, 801) * 12.5e6
    noise = np.zeros(800)
    for i in range(1, 800):
        noise[i] = 0.7 * noise[i - 1] + random.normal(0, 0.012)
    count = int(800 * share)
    return Series(tokens[5:count], (law(tokens) + noise)[5:count])


@pytest.mark.parametrize("exponent", [0.1, 0.33, 0.6, 1.0])
@pytest.mark.parametrize("floor", [0.0, 2.9])
def test_the_law_is_found_where_there_is_no_noise(floor: float, exponent: float) -> None:
    tokens = np.arange(1, 401) * 1e7
    found = project(Series(tokens, law(tokens, floor, exponent)), 2e10)
    assert found.tokens[-1] == pytest.approx(2e10)
    assert found.final[1] == pytest.approx(law(2e10, floor, exponent), abs=0.002)
    np.testing.assert_allclose(found.middle, law(found.tokens, floor, exponent), atol=0.002)
    assert found.form.startswith("E + A / D^")


def test_the_band_holds_the_truth_as_often_as_it_says_and_narrows() -> None:
    runs = 20
    widths = {}
    for share in (0.1, 0.5):
        found = [project(measured(share, seed), 1e10) for seed in range(runs)]
        hits = [low <= law(1e10) <= high for low, _, high in (each.final for each in found)]
        assert sum(hits) >= runs - 3
        widths[share] = np.mean([each.final[2] - each.final[0] for each in found])
    assert widths[0.5] < widths[0.1] / 2
    assert widths[0.1] < 0.4  # a band that holds everything says nothing


def test_a_tenth_of_the_data_says_where_an_earlier_run_really_went() -> None:
    tokens, losses = LOGGED.T
    found = project(Series(tokens[:-2] * 1e9, losses[:-2]), 2.4515e9)
    low, _, high = found.final
    assert low <= losses[-2:].mean() <= high
    assert high - low < 0.2
    assert found.form.startswith("A / D^")


def test_few_points_are_fitted_by_a_straight_line_in_logarithms() -> None:
    tokens = np.geomspace(3e8, 1e9, 9)
    losses = 3.0 * (tokens / 1e9) ** -0.2 * (1 + 0.01 * (-1.0) ** np.arange(9))
    found = project(Series(tokens, losses), 1e10)
    slope, level = np.polyfit(np.log(tokens), np.log(losses), 1)
    np.testing.assert_allclose(found.middle, np.exp(level + slope * np.log(found.tokens)))
    assert found.points == 9


def edges(found: Projection) -> tuple[Floats, ...]:
    return found.low, found.middle, found.high


def test_the_same_losses_give_the_same_projection_and_what_is_not_finite_is_left_out() -> None:
    tokens, losses = measured(0.3, seed=1)
    more_tokens = np.append(tokens, [2.9e9, 2.95e9, 0])
    more_losses = np.append(losses, [np.nan, -1.0, 5.0])
    one = project(Series(tokens, losses), 1e10)
    two = project(Series(more_tokens, more_losses), 1e10)
    for a, b in zip(edges(one), edges(two), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (one.low <= one.middle).all() and (one.middle <= one.high).all()


def test_a_loss_that_rises_is_projected_flat_and_never_below_zero() -> None:
    tokens = np.arange(1, 101) * 1e7
    rising = project(Series(tokens, 2 + 0.2 * tokens / 1e9), 1e10)
    assert np.ptp(rising.middle) < 1e-9
    falling = project(Series(tokens, 0.2 * (tokens / 1e9) ** -2.5), 1e12)
    assert (falling.low >= 0).all()


@pytest.mark.parametrize("count", [0, 1, 5])
def test_too_few_losses_are_not_projected(count: int) -> None:
    tokens, losses = measured(1.0, seed=1)
    with pytest.raises(NoProjectionError, match="too few losses"):
        project(Series(tokens[-count:][:count], losses[-count:][:count]), 1e10)


def test_a_loss_that_falls_faster_and_faster_is_not_projected() -> None:
    tokens = np.arange(1, 31) * 2e4
    losses = 7.4 - 5 * (tokens / 6e5) ** 0.9
    with pytest.raises(NoProjectionError, match="too early to project"):
        project(Series(tokens, losses), 6e5)
