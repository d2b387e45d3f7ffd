"""Where a loss is heading: a curve fitted to what was measured, and how far it can be trusted.

The loss after D tokens is taken to be E + A / D^alpha (arXiv 2203.15556, equation 2, for a model
of fixed size), or A / D^alpha, a straight line in logarithms, where there are few points. For
every exponent of a grid E and A are least squares; the best exponent wins.

The band holds nine in ten of many such fits. They differ in where they begin (the first tokens
don't follow the law, and nobody knows up to where), in noise (the residuals are drawn again in
blocks, as neighbours resemble each other) and, where there are few points, in having a floor E or
none. The band is about the curve, not about
single measurements, and presumes that training goes on as it did. A decay of the learning rate that
is still to come will end lower.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hamner.plots.metrics import Curve, Floats, Series, binned

ALPHA = "\N{GREEK SMALL LETTER ALPHA}"
EXPONENTS = np.geomspace(0.05, 2.0, 300)
BEGINNINGS = (0.05, 0.1, 0.2, 0.35)  # of the tokens so far; the fits begin there
MIDDLE_BEGINNING = 0.1
FEWEST, ENOUGH = 6, 16  # points in the shortest fit: for two parameters, for three
MOST = 400  # points that are fitted; more are thinned to so many medians
STEEPENING = 3  # so much smaller the squared errors of a bend
DRAWS = 100  # of residuals, for each beginning
BAND = (5, 95)  # percentiles


@dataclass(frozen=True)
class Projection:
    """A fitted curve at `tokens`, from the first token of the fit to the one projected to."""

    tokens: Floats
    middle: Floats
    low: Floats
    high: Floats
    form: str
    points: int  # that the fit rests on

    @property
    def final(self) -> tuple[float, float, float]:
        """The loss where it ends: low, middle, high."""
        return float(self.low[-1]), float(self.middle[-1]), float(self.high[-1])


class NoProjectionError(Exception):
    """The losses don't allow one; the message says why."""


def project(losses: Series, until: float) -> Projection:
    """Fit the losses by tokens, and go on `until` so many; the warm-up's are to be left out.

    Raises:
        NoProjectionError: too few losses, or they fall faster and faster, as no such curve does.
    """
    losses = losses.finite()
    losses = losses.where((losses.x > 0) & (losses.y > 0))
    seen = float(losses.x.max(initial=0))
    thinned = binned(losses, MOST, log=True)
    tails = [after_beginning(thinned, begin * seen) for begin in BEGINNINGS]
    fewest = min(len(tail.x) for tail in tails)
    if fewest < FEWEST:
        raise NoProjectionError("too few losses after the warm-up\nto project from")
    x, y = tails[BEGINNINGS.index(MIDDLE_BEGINNING)]
    if steepens(x, y):
        raise NoProjectionError("still falling faster and faster:\ntoo early to project")
    with_floor = fewest >= ENOUGH
    tokens = np.geomspace(x[0], max(until, seen), 200)
    random = np.random.default_rng(0)
    forms = {True, with_floor}
    curves = [redrawn_fits(tail, tokens, random, form) for tail in tails for form in forms]
    low, high = np.percentile(np.concatenate(curves), BAND, axis=0)
    middle = fits(x, y[None], tokens, with_floor)[0]
    low, high = np.minimum(low, middle), np.maximum(high, middle)
    name = f"E + A / D^{ALPHA}" if with_floor else f"A / D^{ALPHA}"
    return Projection(tokens, middle, low, high, name, len(x))


def after_beginning(losses: Curve, begin: float) -> Series:
    return Series(losses.x, losses.middle).where(losses.x >= begin)


def steepens(x: Floats, losses: Floats) -> bool:
    """Whether in logarithms a curve that bends down fits far better than a straight line."""
    along, logarithms = np.log(x), np.log(losses)
    curves = [np.polyfit(along, logarithms, degree) for degree in (1, 2)]
    straight, bent = (((np.polyval(c, along) - logarithms) ** 2).sum() for c in curves)
    return bool(curves[1][0] < 0 and bent < straight / STEEPENING)


def redrawn_fits(
    losses: Series, tokens: Floats, random: np.random.Generator, with_floor: bool
) -> Floats:
    """Fits to the losses with residuals drawn again, in blocks: (DRAWS, len(tokens))."""
    x, y = losses
    fitted = fits(x, y[None], x, with_floor)[0]
    residuals = y - fitted
    count, block = len(x), max(1, round(len(x) ** 0.5))
    begins = random.integers(0, count, (DRAWS, -(-count // block)))
    drawn = (begins[:, :, None] + np.arange(block)).reshape(DRAWS, -1)[:, :count] % count
    return fits(x, fitted + residuals[drawn], tokens, with_floor)


def fits(x: Floats, losses: Floats, tokens: Floats, with_floor: bool) -> Floats:
    """Least-squares curves through every row of losses (B, len(x)), at the tokens: (B, N)."""
    scale = x[-1]  # keeps the powers near 1
    if not with_floor:
        return lines(np.log(x / scale), np.log(losses), np.log(tokens / scale))
    powers = (x[:, None] / scale) ** -EXPONENTS  # (len(x), exponents)
    centre, squares = powers.mean(axis=0), (powers**2).sum(axis=0)
    spread = squares - len(x) * centre**2
    mean = losses.mean(axis=1, keepdims=True)
    together = (losses - mean) @ (powers - centre)  # (B, exponents), as all that follows
    slope = np.maximum(together / spread, 0)
    floor = mean - slope * centre
    through_zero = losses @ powers / squares
    slope, floor = np.where(floor < 0, through_zero, slope), np.maximum(floor, 0)
    off = mean - floor - slope * centre
    errors = slope**2 * spread - 2 * slope * together + len(x) * off**2  # and what all have
    rows, best = np.arange(len(losses)), errors.argmin(axis=1)
    curves = (tokens / scale) ** -EXPONENTS[best, None]
    return floor[rows, best, None] + slope[rows, best, None] * curves


def lines(x: Floats, logarithms: Floats, at: Floats) -> Floats:
    level, slope = regression(x, logarithms)
    return np.exp(level[:, None] + slope[:, None] * at)


def regression(x: Floats, rows: Floats) -> tuple[Floats, Floats]:
    """Level (B,) and slope (B,) of the least-squares line through each of the rows (B, len(x))."""
    centred = x - x.mean()
    slope = rows @ centred / (centred @ centred)
    return rows.mean(axis=1) - slope * x.mean(), slope
