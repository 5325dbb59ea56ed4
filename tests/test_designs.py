"""Designed experiments: every array, every way that factors fit, and the arithmetic against plain least squares."""
import itertools
import numpy as np, pytest
from scipy import stats
from spectral_diffusion.designs import *

rng = np.random.default_rng
named = lambda lv: {f'f{i}': tuple(range(l)) for i, l in enumerate(lv)}
strict = lambda x: all(np.ptp(np.eye(a.max()+1)[a].T@np.eye(b.max()+1)[b]) == 0
                       for a, b in itertools.combinations(x.T, 2))

@pytest.mark.parametrize('x', [*arrays.values(), paley_array(7), paley_array(19),
                               linear_array(5, 2), linear_array(2, 5)])
def test_pairs_of_levels_occur_equally_often(x):
    assert strict(x) and all(np.ptp(np.bincount(c)) == 0 for c in x.T)
    check_orthogonal(x)

@pytest.mark.parametrize('name', arrays)
def test_any_wrong_digit_is_caught(name):
    x = arrays[name]
    for i, j in itertools.product(range(0, len(x), 3), range(x.shape[1])):
        bad = x.copy(); bad[i,j] = (bad[i,j] + 1) % (x[:,j].max() + 1)
        with pytest.raises(ValueError, match='not orthogonal'): check_orthogonal(bad)

def or_none(f):
    try: return f()
    except ValueError: return None

@pytest.mark.parametrize('n3', range(0, 14, 2))
def test_smallest_array_that_fits(n3):
    for n2 in range(not n3, 17, 3):
        lv = rng(n2).permutation([2]*n2 + [3]*n3).tolist(); d = or_none(lambda: design(named(lv)))
        room = [a for a, x in arrays.items() if (x.max(0) == 2).sum() >= n3 and x.shape[1] >= n2 + n3]
        sizes = [len(e) for a in [*room, *['full']*int(np.prod(lv) <= 27)]
                 if (e := or_none(lambda: design(named(lv), a)))]
        assert (d is None) == (not sizes) and (d is not None or not room or n2 > n3 + 4)
        if d is None: continue
        assert len(d) == min(sizes) and (d.x.max(0) + 1 == lv).all() and len({tuple(c) for c in d.x.T}) == len(lv)
        assert all(r == dict(zip(d.factors, x)) for r, x in zip(d, d.x)) and len(set(map(str, d))) == len(d)

def test_a_two_level_factor_doubles_its_first_choice_in_a_wide_column():
    d = design(dict(ema=('on', 'off'), lr=(1, 2, 3), target=(1, 2, 3)))
    assert d.array == 'L9' and [r['ema'] for r in d].count('on') == 6
    assert all(sum(r['ema'] == e and r[k] == l for r in d) == (2 if e == 'on' else 1)
               for e in ('on', 'off') for k in ('lr', 'target') for l in (1, 2, 3))

def test_no_combination_is_run_twice():
    "The same recipe with the same seed is the same number, not a second measurement"
    # the projection of L12 on four columns repeats a row
    with pytest.raises(ValueError, match='twice'): design(named([2]*4), 'L12')
    with pytest.raises(ValueError, match='twice'): design(named([2, 3]), 'L9')
    with pytest.raises(ValueError, match='twice'):
        Design('mine', named([2, 2]), np.array([[0, 0], [0, 1], [1, 0], [1, 1]]*2))
    assert design(named([2, 3])).array == 'full' and len(design(named([2, 3]))) == 6

def test_chosen_columns_keep_main_effects_clear():
    for lv, a in [([2]*4, 'L8'), ([2]*8, 'L16'), ([3]*4, 'L27'), ([2, 3, 2], 'full')]:
        assert aliases(design(named(lv), a)) == []
    assert len(aliases(design(named([2]*3)))) == 3 and len(aliases(design(named([3]*4)))) == 12

def test_share_that_an_interaction_mimics_is_r_squared():
    for d in (design(named([2]*6), 'L12'), design(named([2, 2, 3, 3]), 'L18'), design(named([2, 3, 3]), 'L9')):
        for a, b, c in itertools.permutations(d.x.T, 3):
            z = contrasts(a); X = np.einsum('ni,nj->nij', contrasts(b), contrasts(c)).reshape(len(d), -1)
            fit = X@np.linalg.lstsq(X, z, rcond=None)[0]
            assert np.isclose(mimicry(a, b, c), (fit**2).sum()/(z**2).sum())

def regression(X, y):
    "Residual sum of squares and its degrees of freedom"
    e = y - X@np.linalg.lstsq(X, y, rcond=None)[0]
    return (e**2).sum(), len(y) - np.linalg.matrix_rank(X)

@pytest.mark.parametrize('paired', [False, True])
@pytest.mark.parametrize('lv,array', [([2, 2, 2], 'L8'), ([3, 2, 3], 'L9'), ([2]*6, 'L12'),
                                      ([2, 3, 2, 3, 3], 'L18'), ([3, 2, 3, 3, 3], 'L27')])
def test_sums_of_squares_are_those_of_regression(lv, array, paired):
    d, R = design(named(lv), array), 3; y = rng(0).normal(size=(len(d), R)) + d.x.sum(1)[:,None]
    s = analyse(d, y, paired); one = np.ones((len(d)*R, 1)); seeds = np.tile(np.eye(R), (len(d), 1)) if paired else one
    cols = {f: np.repeat(contrasts(c), R, 0) for f, c in zip(d.factors, d.x.T)}
    rss, dfe = regression(np.hstack([seeds, *cols.values()]), y.ravel())
    assert np.isclose(rss, s.s2*s.dfe) and dfe == s.dfe
    for f in cols:
        assert np.isclose(regression(np.hstack([seeds, *(c for g, c in cols.items() if g != f)]),
                                     y.ravel())[0] - rss, s.ss[f])
    full, dff = regression(np.hstack([seeds, np.repeat(np.eye(len(d)), R, 0)]), y.ravel())
    assert (np.isclose(full, s.ss['replicates']) and dff == s.df['replicates']
            and np.isclose(sum(s.ss.values()), s.total))
    rows = {r.source: r for r in anova(s)}
    assert (np.isclose(sum(r.ss for k, r in rows.items() if k not in ('error', 'total')), s.total)
            and sum(r.df for k, r in rows.items() if k not in ('error', 'total')) == s.N - 1)
    assert (np.isclose(rows['error'].contribution, 100*s.s2*(s.N-1)/s.total)
            and np.isclose(sum(r.contribution for r in rows.values() if r.contribution is not None), 200))

@pytest.mark.parametrize('paired,same,lo,hi', [(False, False, .945, .955), (True, True, .945, .955),
                                               (True, False, 0, .7)])
def test_prediction_of_a_setting_fixed_in_advance(paired, same, lo, hi):
    "With paired data the interval is for the same seeds; on other seeds it is far too narrow, as the argument's comment says"
    d, n = design(named([2, 2, 3, 3]), 'L18'), 40_000; seed = 2*rng(1).normal(size=(n, 1, 3))*paired
    y = d.x@[1., -1, .5, 0] + rng(2).normal(size=(n, 3, 18)); y = y.swapaxes(1, 2) + seed
    new = 1.5 + rng(3).normal(size=(n, 3)) + (seed[:,0] if same else 2*rng(4).normal(size=(n, 3))*paired)
    p = predict(analyse(d, y, paired), dict(f0=1, f1=0, f2=1, f3=2), r=3)
    assert lo <= np.mean((p.low < new.mean(-1)) & (new.mean(-1) < p.high)) <= hi

def test_lost_run_and_unread_things_are_one_line_errors():
    d = design(dict(lr=(1, 2, 3), ema=(0, 1), data=(1, 2, 3))); y = rng(0).normal(size=(9, 2))
    f = lambda lr, data, seed: 0.
    bad = [(lambda: measure(d, f, [0]), TypeError, "no argument 'ema'"),
           (lambda: measure(d, lambda lr, ema, data: 0., [0]), TypeError, "no argument 'seed'"),
           (lambda: analyse(d, y[1:]), ValueError, '8 rows'),
           (lambda: analyse(d, y, error='none'), ValueError, "use 'pooled', 'runs', 'replicate'"),
           (lambda: analyse(d, np.ones((9, 3))), ValueError, 'no factor reaches it'),
           (lambda: analyse(d, np.arange(9.)[:,None] + np.zeros(2)), ValueError, 'the seed does not reach'),
           (lambda: Design('L9', d.factors, d.x[:-1]), ValueError, 'not orthogonal'),
           (lambda: design({}), ValueError, 'at least one factor'),
           (lambda: predict(analyse(d, y), dict(lr=1, ema=0, data=1, beta=2)), ValueError, "'beta'"),
           (lambda: best(analyse(d, y), 'least'), ValueError, "'min' or 'max'")]
    for call, err, match in bad:
        with pytest.raises(err, match=match) as e: call()
        assert '\n' not in str(e.value)

def test_rates_of_false_and_missed_alarms():
    "A no-op is called so in 95% of experiments, whatever the others do; a factor as large as the interval is seen every other time"
    d = design(named([2]*5), 'L8'); y = 3*d.x[:,:1] + rng(5).normal(size=(4000, 8, 4)); s = analyse(d, y)
    assert all(abs(seen(s)[f].mean() - .05) < .012 for f in ('f1', 'f2', 'f3', 'f4')) and seen(s)['f0'].all()
    y += differences(s, 'f1')[1].mean()*d.x[:,1:2]
    assert abs(seen(analyse(d, y))['f1'].mean() - .5) < .04

def test_interaction_raises_the_alarm_where_there_is_room_for_it():
    d = design(named([2]*3), 'L8'); y = (d.x[:,0] ^ d.x[:,1])[:,None] + .3*rng(6).normal(size=(8, 3))
    p = {r.source: r.p for r in anova(analyse(d, y))}
    assert p['interactions'] < 1e-3 and min(p[f] for f in d.factors) > .05
    null = analyse(d, rng(7).normal(size=(4000, 8, 3))); F = null.ss['interactions']/4/(null.ss['replicates']/16)
    assert stats.kstest(stats.f.sf(F, 4, 16), 'uniform').pvalue > .005

def test_intervals_of_a_three_level_factor_hold_together():
    d = design(named([3]*4), 'L27'); s = analyse(d, rng(8).normal(size=(4000, 27, 2)) + d.x[:,:1])
    dif, h = differences(s, 'f0')
    assert .945 < (abs(dif - [1, 2]) < h).all(-1).mean() < .97
