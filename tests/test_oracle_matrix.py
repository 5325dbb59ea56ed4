"""Every sampler x schedule x NFE x data std x {white, coloured}, against Gaussian data whose exact denoiser is known.

A sampler on a Gaussian oracle is linear in its start and in every draw of noise, so its final variance needs no
statistics: give the first item of a batch the start, each further item one unit draw, and add up the squares."""
import pytest, torch, warnings
from functools import partial
from spectral_diffusion import samplers as S
from spectral_diffusion.samplers import samplers, stochastic, adaptive, grid_size, Sample
from spectral_diffusion.fourier import power_law
from spectral_diffusion.schedules import *
from spectral_diffusion.denoisers import Gaussian

warnings.filterwarnings('ignore', category=FutureWarning)
torch.set_num_threads(1)
schedules = {s.name: s for s in (linear(), cosine(), sigmoid(), edm(), flow(), ddpm_linear(), ddpm_cosine())}
stds, ns, psd = (.25, 1.), (10, 20, 50, 200), power_law((8,), 1.)
bases = dict(white=lambda s: s, coloured=lambda s: coloured(s, psd))
first_order = ('ddim', 'euler', 'exp_v', 'exp_F') + stochastic

def setup(name, sch, nfe, std):
    "The sampler and the grid that a budget of questions buys"
    if name == 'restart':      # Heun's descents: 2 (N-1) + 1 questions, and 2 per step of a restart
        K, n = 2, max(nfe//10, 1)
        t_min, t_max = (sch.t_of(torch.tensor(l).double() - 2*torch.tensor(std).log().double()).item()
                        for l in (2., -3.))
        return partial(samplers[name], K=K, n=n, t_min=t_min, t_max=t_max), (nfe - 1 - 2*K*n)//2 + 1
    if name == 'edm': return partial(samplers[name], churn=5.), grid_size(name, nfe)
    return samplers[name], grid_size(name, nfe)

def exact_error(f, sch, n, std, monkeypatch, jump=True, draws=400):
    "Worst relative error of the final std over all frequencies, and the share of it that the last jump leaves"
    g, x = grid_edm(sch, n, smin=.005*std, smax=80*std), torch.zeros(1, 1, 8, dtype=torch.float64)
    (a, b), (a_, b_) = sch.coeffs(g[0], x), sch.coeffs(g[-1], x)
    start, draw = torch.zeros(1+draws, 1, 8, dtype=torch.float64), iter(range(1, 1+draws))
    start[0] = (a**2*std**2 + b**2).sqrt()
    def unit(X, generator):
        z = torch.zeros_like(X); z[next(draw)] = 1
        return z
    monkeypatch.setattr(S, 'noise_like', unit)
    out = sch.to(f(Gaussian(sch, std**2), sch.back(start), g, jump=jump).x).square().sum(0).sqrt()
    want = std if jump else (a_**2*std**2 + b_**2).sqrt()
    return (out/want - 1).abs().max().item(), (b_/a_/std).square().max().item()/2

def judge(name, sch, std, monkeypatch, ns=ns, **kw):
    "Right within the sampler's own discretisation error, which falls with NFE"
    e, floor = zip(*(exact_error(f, sch, n, std, monkeypatch, **kw)
                     for f,n in (setup(name, sch, nfe, std) for nfe in ns)))
    floor = floor[-1] + 2e-4
    assert e[-1] < (.03 if name in first_order else .004) + floor, (sch.name, std, name, e)
    assert e[-1] < e[0]/4 + floor, (sch.name, std, name, e)
    assert all(b < 1.1*a + floor for a,b in zip(e[1:], e[2:])), (sch.name, std, name, e)

fixed = [k for k in samplers if k not in adaptive + ('heun', 'euler_a')]     # the last two are aliases

@pytest.mark.parametrize('basis', bases)
@pytest.mark.parametrize('clock', schedules)
def test_matrix(clock, basis, monkeypatch):
    for std in stds:
        for name in fixed: judge(name, bases[basis](schedules[clock]), std, monkeypatch, ns[name == 'restart':])

def test_laplace(monkeypatch):
    "Its clock ends at a log-SNR of about 5: judged where it ends, before the jump"
    for name in fixed:
        if name != 'restart': judge(name, laplace(), 1., monkeypatch, jump=False)

@pytest.mark.parametrize('name', adaptive)
def test_adaptive(name, monkeypatch):
    for sch in (cosine(), edm(), flow(), coloured(flow(), psd)):
        for std in stds:
            for tol, most in ((1e-4, .05), (1e-6, 3e-3)):
                e, floor = exact_error(partial(samplers[name], tol=tol), sch, 20, std, monkeypatch, draws=0)
                assert e < most + floor, (sch.name, std, tol, e)

@pytest.mark.slow
@pytest.mark.parametrize('K', (50, 1000))
def test_tables_of_any_length(K, monkeypatch):
    for sch in (ddpm_linear(K, .1/K, 20/K), ddpm_cosine(K), coloured(ddpm_cosine(K), power_law((8,), 2.))):
        for std in (.1, .25, .5, 1., 2.):
            for name in fixed: judge(name, sch, std, monkeypatch, (20, 50, 200, 390))


# Planted faults. The check is the plain one, on samples: it passes for the honest sampler and fires for each fault.

def std_is_right(f, std=.25, nfe=50, sch=ddpm_linear(), g=None, n=4000):
    g = grid_edm(sch, nfe, smin=.005*std) if g is None else g
    G = lambda i: torch.Generator().manual_seed(i)
    x = sch.prior((n,1), G(0), g.max().item(), var=std**2)
    return abs(f(Gaussian(sch, std**2), x, g, generator=G(1)).x.std().item()/std - 1) < .15

def strided(step):
    "Ancestral sampling that visits the grid, with the coefficients of going from t to `step(t, s)`"
    def f(D, x, grid, generator=None):
        for t, s in zip(grid, grid[1:]):
            x0 = D(x, t)
            (a, b), (a_, b_) = (D.schedule.coeffs(u, x) for u in (t, step(t, s)))
            keep, up = S._renew(torch.cat([a, a_]), torch.cat([b, b_]), 1.)
            x = (a_ - keep*a)*x0 + keep*x + up*S.noise_like(x, generator)
        return Sample(D(x, grid[-1]), len(grid))
    return f

def one_step_beta(D, x, grid, generator=None, K=1000):
    "The posterior in betas, with the beta of a single step of the table"
    for t, s in zip(grid, grid[1:]):
        abar, abar_ = D.schedule.alpha(t)**2, D.schedule.alpha(s)**2
        beta, x0 = 1 - abar/D.schedule.alpha(max(t - 1/K, 0.))**2, D(x, t)
        mean = (abar_.sqrt()*beta*x0 + (1-beta).sqrt()*(1-abar_)*x)/(1-abar)
        x = (mean + (beta*(1-abar_)/(1-abar)).sqrt()*S.noise_like(x, generator)).float()
    return Sample(D(x, grid[-1]), len(grid))

@pytest.mark.parametrize('std', stds)
def test_honest_samplers_pass(std):
    assert std_is_right(strided(lambda t, s: s), std)
    for name in ('ddpm', 'midpoint', 'heun3', 'dpmpp2m', 'dpmpp3m', 'unipc'):
        assert std_is_right(samplers[name], std), name

def test_unrespaced_sampler_is_caught():
    assert not std_is_right(strided(lambda t, s: max(t - 1/1000, 1e-6)))

def test_one_step_beta_is_caught():
    assert not std_is_right(one_step_beta)
    assert std_is_right(one_step_beta, g=grid_trailing(1000), n=1000)         # where a step is a step, it is right

def test_clamped_x_t_is_caught(monkeypatch):
    honest = S._lin
    monkeypatch.setattr(S, '_lin', lambda *terms: honest(*terms).clamp(-1, 1))
    for name in ('ddim', 'ddpm', 'dpmpp2m', 'unipc'): assert not std_is_right(samplers[name], 1.), name

def test_ascending_grid_is_caught(monkeypatch):
    up = grid_edm(ddpm_linear(), 20).flip(0)
    for name, f in samplers.items():
        with pytest.raises(ValueError, match='must fall'): f(Gaussian(ddpm_linear(), .06), torch.randn(2,1), up)
    monkeypatch.setattr(S, 'check_grid', lambda g: g)                         # and without the guard, the std tells
    for name in ('ddim', 'heun2', 'dpmpp2m'): assert not std_is_right(samplers[name], g=up), name
