"""The numbers of the group level against published examples, libraries and known truth."""

from __future__ import annotations

import math
import sys

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from tests.studies import Effects, Person, simulate
from tlseg_bids.errors import DataError
from tlseg_bids.group.bayes import shrink
from tlseg_bids.group.design import Covariate, design_of
from tlseg_bids.group.harmonise import SiteColumn, fit_combat, site_share
from tlseg_bids.group.headsize import fit_head_size
from tlseg_bids.group.outliers import MAD_TO_SD, MEAN_TO_SD, robust_scores
from tlseg_bids.group.study import Row, number, snake
from tlseg_bids.group.tables import text_cell
from tlseg_bids.group.visits import annual_change, intraclass, series_of, within_subject_cv

# Shrout & Fleiss 1979, table 2: six targets, four judges.
SHROUT_FLEISS = np.array(
    [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float
)


def test_intraclass_correlations_are_those_of_shrout_and_fleiss() -> None:
    """ICC(2,1) 0.29 and ICC(3,1) 0.71, with the intervals that R's psych gives for the table."""
    two, three = intraclass(SHROUT_FLEISS)
    assert (round(two.value, 2), round(three.value, 2)) == (0.29, 0.71)
    assert (round(two.low, 2), round(two.high, 2)) == (0.02, 0.76)
    assert (round(three.low, 2), round(three.high, 2)) == (0.34, 0.95)


def test_intraclass_correlations_without_noise_or_without_anything() -> None:
    same = np.repeat(np.arange(1.0, 6.0)[:, None], 2, axis=1)
    two, three = intraclass(same)
    assert (two.value, three.value) == (1.0, 1.0)
    assert all(math.isnan(icc.value) for icc in intraclass(np.ones((4, 2))))


def test_within_subject_coefficient_of_variation() -> None:
    """Two scans that differ by 2 % have a standard deviation of √2 %."""
    scores = np.array([[99.0, 101.0], [198.0, 202.0], [0.0, 0.0]])
    assert within_subject_cv(scores) == pytest.approx(math.sqrt(2))
    assert math.isnan(within_subject_cv(np.zeros((2, 2))))


def test_change_per_year_of_a_straight_line() -> None:
    values = np.array([[1000.0, 0.0], [980.0, 0.0], [940.0, 0.0]])
    rate, percent = annual_change(values, (0.0, 1.0, 3.0))
    assert rate == pytest.approx([-20.0, 0.0])
    assert percent[0] == pytest.approx(-20 / values[:, 0].mean() * 100)
    assert math.isnan(percent[1])


def row(participant: str, session: str, day: float = math.nan, age: float = math.nan, **entities):
    return Row(
        participant, session, {"sub": participant, **entities}, "T1w", "aseg", "x", {}, math.nan,
        math.nan, day, age, np.zeros((5, 1)), np.zeros(2),
    )  # fmt: skip


def test_visits_are_scans_near_in_time_and_else_sessions() -> None:
    rows = [
        row("1", "a", 400.0), row("1", "b", 0.0), row("1", "c", 20.0),
        row("2", "a"), row("2", "b"), row("2", "b", run="2"),
        row("3", "a", age=100.0), row("3", "b", age=465.25),
        row("4", "a", 0.0), row("4", "a", 5.0, acq="x"),
        row("5", "a", 3.0), row("5", "b", age=3.0),
    ]  # fmt: skip
    found = {series.participant: series for series in series_of(rows, range(len(rows)))}
    assert found["1"].visits == ((1, 2), (0,))
    assert found["1"].years == (0.0, pytest.approx(390 / 365.25))
    assert (found["2"].visits, found["2"].years) == (((3,), (4, 5)), ())
    assert (found["3"].years, found["3"].basis) == ((0.0, pytest.approx(1.0)), "age")
    assert "4" not in found  # another acquisition is no repetition
    assert found["5"].basis == ""  # one date and one age cannot be compared


def test_robust_constants_are_those_of_the_normal_distribution() -> None:
    assert pytest.approx(1 / norm.ppf(0.75)) == MAD_TO_SD
    assert pytest.approx(math.sqrt(math.pi / 2)) == MEAN_TO_SD


def test_scores_without_age_are_median_and_mad() -> None:
    values = np.array([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0], [7.0], [100.0]])
    scores = robust_scores(values, np.full(8, np.nan))
    spread = 1.482602218505602 * np.median(np.abs(values - 4.5))
    assert scores.z[:, 0] == pytest.approx((values[:, 0] - 4.5) / spread)
    assert not scores.by_age.any()
    assert np.isnan(robust_scores(values[:7], np.full(7, np.nan)).z).all()


def test_scores_follow_growth_to_both_ends_and_find_the_small_adult() -> None:
    """Volumes double in childhood: an infant is no outlier, an adult with its volume is."""
    rng = np.random.default_rng(0)
    age = np.sort(rng.uniform(0, 20, 400))
    values = (1000 + 1000 * (1 - np.exp(-age / 2)) + rng.normal(0, 20, 400))[:, None]
    values[390] = 1200.0
    scores = robust_scores(values, age)
    assert scores.z[390, 0] < -20
    others = np.delete(scores.z[:, 0], 390)
    assert (np.abs(others) > 3.5).mean() < 0.02
    assert np.abs(others[:10]).max() < 6
    assert np.abs(others.std() - 1) < 0.3
    blind = robust_scores(values, np.full(400, np.nan)).z[:, 0]
    assert blind[:5].max() < -6  # without the age, every infant stands out


def test_a_structure_that_hardly_ever_varies_has_finite_scores() -> None:
    values = np.zeros((30, 2))
    values[3, 0] = 5.0
    values[4, 1] = np.nan
    z = robust_scores(values, np.full(30, np.nan)).z
    assert z[3, 0] > 3.5
    assert (np.delete(z[:, 0], 3) == 0).all()
    assert np.isnan(z[4, 1])


@pytest.mark.parametrize("age", [np.full(60, np.nan), np.arange(60.0)])
def test_rounding_is_no_deviation(age: np.ndarray) -> None:
    values = np.full((60, 2), 1.5e6)
    values[::3, 0] = np.nextafter(1.5e6, 2e6)
    values[7, 0] = np.nextafter(1.5e6, 0)
    values[::3, 1] += 1.0
    z = robust_scores(values, age).z
    assert (z[:, 0] == 0).all()
    assert (z[::3, 1] > 0).all()


@pytest.mark.parametrize(("method", "exponent"), [("power-proportion", 0.7), ("residual", None)])
def test_head_size_corrections_find_the_truth(method: str, exponent: float | None) -> None:
    rng = np.random.default_rng(2)
    size = 1.5e6 * np.exp(rng.normal(0, 0.1, 200))
    truth = 3000 * (size / 1.5e6) ** 0.7 if exponent else 1000 + 0.002 * size
    fitted = fit_head_size(method, "icv", truth[:, None], size, np.ones(200, bool))
    assert fitted.slopes[0] == pytest.approx(exponent or 0.002)
    corrected = fitted.apply(truth[:, None], size)
    assert np.ptp(corrected) < 1e-6
    assert corrected[0, 0] == pytest.approx(truth.mean(), rel=0.01)


def data():
    effects = Effects({"A": 0.0, "B": 0.2, "C": -0.1}, {"A": 1, "B": 2, "C": 0.7})
    people, rows = simulate(90, effects)
    cells = [line.split("|") for line in rows[1:]]
    columns = {"age": [c[1] for c in cells], "sex": [c[2] for c in cells]}
    return np.array([p.volumes for p in people]), [c[3] for c in cells], columns


def published(
    values: np.ndarray, sites: np.ndarray, design: np.ndarray, reference: str | None
) -> np.ndarray:
    """ComBat step by step from the formulas of Johnson et al. 2007 and Fortin et al. 2018."""
    names = np.unique(sites)
    dummies = (sites[:, None] == names).astype(float)
    own = np.full(len(values), True) if reference is None else sites == reference
    both = np.hstack([dummies, design])
    fitted = np.linalg.lstsq(both, values, rcond=None)[0]
    sigma = np.sqrt(np.mean((values - both @ fitted)[own] ** 2, axis=0))
    alpha = dummies[own].mean(axis=0) @ fitted[: len(names)]
    mean = alpha + design @ fitted[len(names) :]
    z = (values - mean) / sigma
    result = values.copy()
    for site in names[names != reference]:
        here = z[sites == site]
        n, gamma, delta = len(here), here.mean(axis=0), here.var(axis=0, ddof=1)
        gamma_bar, tau2, m, s2 = gamma.mean(), gamma.var(ddof=1), delta.mean(), delta.var(ddof=1)
        a, b = (m**2 + 2 * s2) / s2, (m**3 + m * s2) / s2
        g, d = gamma, delta
        for _ in range(2000):
            g = (n * tau2 * gamma + d * gamma_bar) / (n * tau2 + d)
            d = (b + 0.5 * ((here - g) ** 2).sum(axis=0)) / (n / 2 + a - 1)
        result[sites == site] = (sigma / np.sqrt(d) * (here - g)) + mean[sites == site]
    return result


@pytest.mark.parametrize("reference", [None, "B"])
def test_combat_is_that_of_the_published_formulas(reference: str | None) -> None:
    values, sites, columns = data()
    effects, notes = fit_combat(
        values, SiteColumn("site", sites, reference), columns, np.ones(90, bool)
    )
    assert notes == []
    design = design_of(effects.covariates, columns, 90)
    ours = effects.apply(values, sites, design)
    theirs = published(values, np.array(sites), design, reference)
    assert np.allclose((ours - theirs) / values.std(axis=0), 0, atol=1e-6)
    assert site_share(values, sites, design).min() > 0.3


def test_combat_removes_what_a_scanner_does_to_all_structures() -> None:
    """The structures together tell of the scanner what ten scans cannot tell of any of them."""
    rng = np.random.default_rng(3)
    sites = np.repeat(["A", "B"], 10)
    scale, shift = np.where(sites == "A", 0.8, 1.2), np.where(sites == "A", -0.3, 0.3)
    values = 1000 + 50 * (rng.normal(0, scale, (200, 20)).T + shift[:, None])
    effects, _ = fit_combat(values, SiteColumn("site", sites), {}, np.ones(20, bool))
    after = effects.apply(values, sites, np.empty((20, 0)))

    def apart(these: np.ndarray) -> tuple[float, float]:
        a, b = these[:10], these[10:]
        return (b.mean() - a.mean()) / 50, b.std(axis=0).mean() / a.std(axis=0).mean()

    assert apart(values) == (pytest.approx(0.6, abs=0.1), pytest.approx(1.5, abs=0.1))
    assert apart(after) == (pytest.approx(0, abs=0.03), pytest.approx(1, abs=0.05))


def test_the_empirical_bayes_step_at_its_limits() -> None:
    scans, every = np.array([5, 8]), np.ones(4, bool)
    few = np.array([[0.5, 0.1], [-0.5, 0.2]]), np.array([[0.8, 1.1], [1.2, 0.9]])
    unpooled = shrink(*few, scans, np.array([True, False]))
    assert [part.tolist() for part in unpooled] == [part.tolist() for part in few]
    same = np.full((2, 4), 0.5), np.full((2, 4), 1.5)
    assert np.allclose(shrink(*same, scans, every), same)


def test_the_head_size_and_the_structures_do_not_tell_of_each_other() -> None:
    """A scanner that shifts every structure, but not the head size, leaves the head size alone."""
    rng = np.random.default_rng(5)
    sites = np.repeat(["A", "B"], 50)
    values = 1000 + 50 * (rng.normal(size=(100, 21)) + (sites == "B")[:, None])
    values[:, -1] -= 50 * (sites == "B")
    names = [*(f"structure_{n}" for n in range(20)), "icv"]
    wild = values.copy()
    wild[sites == "B", -1] *= 3
    done = []
    for these in (values, wild):
        effects, _ = fit_combat(these, SiteColumn("site", sites), {}, np.ones(100, bool), names)
        done.append(effects.apply(these, sites, np.empty((100, 0))))
    assert np.allclose(done[0][:, :-1], done[1][:, :-1], rtol=1e-9)
    for after in done:
        assert after[50:, -1].mean() == pytest.approx(after[:50, -1].mean(), rel=1e-6)
    moved = np.abs(done[0] - values).mean(axis=0) / 50
    assert moved[-1] < 0.25 < 0.4 < moved[:-1].min()


@pytest.mark.parametrize(("gap", "told"), [(2.0, False), (8.0, True)])
def test_a_covariate_that_hardly_varies_within_the_sites_is_told(gap: float, told: bool) -> None:
    """Ages have a variance of 1 within two sites, and of gap² / 4 between them."""
    values, _, _ = data()
    sites = np.repeat(["A", "B"], 45)
    ages = 40 + np.tile(np.linspace(-1.7, 1.7, 45), 2) + gap * (sites == "B")
    columns = {"age_years": [f"{age:.3f}" for age in ages], "sex": ["F", "M"] * 45}
    _, notes = fit_combat(values, SiteColumn("site", sites), columns, np.ones(90, bool))
    assert [text.split(":")[0] for text in notes] == told * [
        "94 % of the variance of 'age_years' lies between the sites of the fit"
    ]


def test_a_structure_that_is_absent_at_a_site_is_not_harmonised() -> None:
    values, sites, columns = data()
    values[np.array(sites) == "A", 3] = 0.0
    values[5, 4] = np.nan
    values[2:, 5] = np.nan
    effects, _ = fit_combat(values, SiteColumn("site", sites), columns, np.ones(90, bool))
    result = effects.apply(values, sites, design_of(effects.covariates, columns, 90))
    assert np.isnan(result[:, [3, 5]]).all()
    assert np.flatnonzero(np.isnan(result[:, 4])).tolist() == [5]
    assert np.isfinite(np.delete(result, [3, 4, 5], axis=1)).all()


def test_without_the_library_there_is_a_sentence(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "combatlearn", None)
    values, sites, columns = data()
    with pytest.raises(DataError) as error:
        fit_combat(values, SiteColumn("site", sites), columns, np.ones(90, bool))
    assert str(error.value) == (
        "the library combatlearn is not installed – --combat – install it: "
        'pip install "tlseg-bids[harmonise]"'
    )


def test_a_library_that_estimates_otherwise_is_refused(monkeypatch) -> None:
    class Later:
        def __init__(self, **_options) -> None: ...

        def fit(self, *_, **__) -> None: ...

        def transform(self, table: pd.DataFrame, **_) -> pd.DataFrame:
            return table

    monkeypatch.setattr("combatlearn.core.ComBatModel", Later)
    values, sites, columns = data()
    with pytest.raises(DataError) as error:
        fit_combat(values, SiteColumn("site", sites), columns, np.ones(90, bool))
    assert str(error.value) == (
        "this version of the library combatlearn estimates ComBat in a way that is not known here "
        '– --combat – install another: pip install "tlseg-bids[harmonise]"'
    )


def test_categories_become_columns_and_new_levels_are_unknown() -> None:
    sex = Covariate("sex", ("F", "M", "X"))
    assert sex.names == ["sex=M", "sex=X"]
    coded = sex.encode(["F", "M", "X", "U"])
    assert coded[:3].tolist() == [[0, 0], [1, 0], [0, 1]]
    assert np.isnan(coded[3]).all()


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("=1+1", "'=1+1"), ("+44", "+44"), ("-0.5", "-0.5"), ("-", "-"), ("@SUM(A1)", "'@SUM(A1)"),
        ("-2+cmd", "'-2+cmd"), ("a\tb\nc", "a b c"), ("", "n/a"), ("=", "="), ("\t=1", "'=1"),
    ],
)  # fmt: skip
def test_cells_that_a_spreadsheet_would_run(text: str, written: str) -> None:
    assert text_cell(text) == written


def test_small_helpers() -> None:
    assert snake("Left lateral ventricle") == "left_lateral_ventricle"
    assert snake("ManufacturersModelName") == "manufacturers_model_name"
    assert [number(x) for x in ("1e3", " 5 ")] == [1000.0, 5.0]
    assert all(math.isnan(number(x)) for x in ("n/a", "inf", "1_000", None, "89+"))
    assert (
        Person("1", np.ones(2), session="a", run="2").stem == "sub-1_ses-a_run-2_space-T1w_seg-aseg"
    )
