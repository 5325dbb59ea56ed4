"Conditions: bundles, nulls, guidance, ControlNet and moves, under random shapes and on oracles."
from functools import partial
import pytest, torch
from hypothesis import given, settings, strategies as st
from spectral_diffusion.conditioning import *
from spectral_diffusion.denoisers import Denoiser, Gaussian, Guided
from spectral_diffusion.guards import budget, saved_bytes
from spectral_diffusion.samplers import samplers
from spectral_diffusion.schedules import cosine, flow, grid_edm, lognormal
from spectral_diffusion.training import EMA, Checkpoints, denoising_loss, fit
from spectral_diffusion.transformers import DiT
from spectral_diffusion.unets import UNet
from spectral_diffusion.volumes import CaseBatches, Cases

torch.set_num_threads(1)
settings.register_profile('conditioning', max_examples=20, deadline=None); settings.load_profile('conditioning')
gen = lambda s=0: torch.Generator().manual_seed(s)
seeds, sides = st.integers(0, 999), st.lists(st.integers(2, 9), min_size=1, max_size=3).map(tuple)
makers = {'unet': partial(UNet, 3, base=8, mults=(1, 2), blocks=1),
          'dit': partial(DiT, 3, patch=4, width=24, depth=1, heads=2)}
def some(n=4, S=(8, 8, 8)):
    g = gen(1)
    return Cases(torch.randint(0, 256, (n, 1, *S), generator=g, dtype=torch.uint8),
                 (torch.rand(n, 1, *S, generator=g) < .05).byte(), torch.randint(0, 3, (n, 7), generator=g))

class Told:
    def __init__(self, none, given): self.none, self.given, self.schedule = none, given, none.schedule
    def __call__(self, x, t, cond=None): return (self.none if cond is None else self.given)(x, t)

@given(st.floats(0, 5), st.floats(-2, 2), st.floats(.05, 2), seeds)
def test_guided_gaussian(w, m, v, seed):
    "Guiding a shifted Gaussian by w is shifting it w times as far, at every noise level"
    sch, x, t = (flow(), torch.randn(3, 1, 4, generator=gen(seed)).double(),
                 torch.rand(3, generator=gen(seed + 1)).clamp(.02, .98))
    D = Guided(Told(Gaussian(sch, v), Gaussian(sch, v, m)), 'c', w)
    assert torch.allclose(D(x, t), Gaussian(sch, v, w*m)(x, t), atol=1e-5*(1 + abs(w*m)))

@pytest.mark.parametrize('name', [*samplers])
def test_guidance_through_every_sampler(name):
    "Samples of the guided Gaussian have the mean that was asked for w times as loudly"
    sch, g = cosine(), gen()
    D = Guided(Told(Gaussian(sch, .25), Gaussian(sch, .25, .4)), 'c', 2.); grid = grid_edm(sch, 25, smin=.02)
    x = samplers[name](D, sch.prior((2000, 1), g, grid[0]), grid, generator=g).x
    assert abs(x.mean() - .8) < .07 and abs(x.std() - .5) < .1

def test_interval_is_per_item():
    "Only the items whose noise is inside the interval are guided"
    sch = cosine(); D = Told(Gaussian(sch, .25), Gaussian(sch, .25, .4))
    t = sch.t_of(torch.tensor([-5., 0., 5.]).double()); x = torch.randn(3, 1, 4, generator=gen())
    y, plain, loud = (Guided(D, 'c', w, i)(x, t) for w, i in ((3., (-1., 1.)), (1., (-9., 9.)), (3., (-99., 99.))))
    assert (torch.equal(y[[0, 2]], plain[[0, 2]]) and torch.allclose(y[1], loud[1])
            and not torch.allclose(y[1], plain[1]))

@pytest.mark.parametrize('make', makers)
@pytest.mark.parametrize('mode', modes)
def test_modes_train(mode, make, tmp_path):
    "Every mode trains through the loop with both networks, resumes to the bit, and then has an answer to no condition"
    def run(folder, steps):
        torch.manual_seed(0); D = Denoiser(network(mode, makers[make]), flow(), 'u', .5)
        m, cs, ema = modes[mode], some(8), EMA(.9)
        loss = SizeWeighted(m.weights) if m.weights else denoising_loss
        class Halt:
            def after_step(self, s):
                if s.step == steps: raise KeyboardInterrupt
        try:
            s = fit(D, CaseBatches(cs, 4, gen(2), m.batch), 6, 1e-2, loss=loss, generator=gen(3),
                    callbacks=[ema, Halt(), Checkpoints(folder, 2)])
        except KeyboardInterrupt: return
        return D, ema, [e['step'] for e in s.events if e['what'] == 'resumed']
    a, ema, _ = run(tmp_path/'a', 99); run(tmp_path/'b', 4); b, _, begun = run(tmp_path/'b', 99); assert begun == [2]
    assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))
    x, t, g = (torch.randn(4, 1, 8, 8, 8, generator=gen()), torch.tensor(.5),
               modes[mode].batch(*(v[:4].float() for v in some()[:2]), some().bins))
    with torch.no_grad():
        assert ema.model(x, t).isfinite().all()
        if isinstance(g, tuple):
            assert (not torch.equal(ema.model(x, t, g[1]), ema.model(x, t))
                    and Guided(ema.model, g[1], 2.)(x, t).shape == x.shape)

@given(sides, seeds)
def test_moves_are_linear_and_coded(S, seed):
    "Moves keep the shape and are linear; turns keep all values; only the identity has the code 0"
    torch.manual_seed(seed); T = draw_move(S); x, y = torch.randn(2, 2, *S)
    assert T(x).shape == x.shape and torch.allclose(T(2*x - y), 2*T(x) - T(y), atol=1e-5)
    assert (T.code(S) == 0).all() == (T == identity(len(S))) and len(T.code(S)) == len(S)**2 + 3*len(S)
    if not T.box and not any(T.shift): assert torch.equal(T(x).flatten().sort()[0], x.flatten().sort()[0])
    assert torch.equal(moved([T, identity(len(S))], torch.stack([x, y]))[0], torch.stack([T(x), y]))

@given(st.integers(1, 3), seeds, st.sampled_from(['eps', 'x0', 'v', 'u', 'F']))
def test_score_aug_loss_is_the_moved_one(d, seed, target):
    "A network that answers the moved truth has no loss, for every target: noise and answer are moved alike"
    torch.manual_seed(seed); S = (6,)*d
    x0, eps, t = torch.randn(3, 1, *S), torch.randn(3, 1, *S), torch.tensor([.2, .5, .8])
    from spectral_diffusion.schedules import to_target
    a, s = flow().coeffs(t, x0); truth = to_target(target, x0, eps, a, s, .5)
    class Net(torch.nn.Module):
        def forward(self, x, l, c): self.c = c; return self.answer
    net = Net(); D = Denoiser(net, flow(), target, .5)
    state = torch.get_rng_state(); aug = ScoreAug(p=1.); moves = []
    probe = lambda D, x0, t, eps, c, w: moves.append((x0, c)) or torch.zeros(3)
    ScoreAug(p=1., loss=probe)(D, truth, t, truth); torch.set_rng_state(state)
    net.answer = moves[0][0]
    assert aug(D, x0, t, eps).max() < 1e-8 and torch.equal(net.c['omega'], moves[0][1]['omega'])

@pytest.mark.parametrize('d', [1, 2, 3])
@given(seed=seeds, data=st.data())
@settings(max_examples=5)
def test_control_net_is_the_base_at_first(d, seed, data):
    "To the bit, whatever the options and the mask; training leaves the base alone"
    torch.manual_seed(seed)
    kw = dict(patch=data.draw(st.sampled_from([1, 2])), attn=data.draw(st.sampled_from([(), (1,)])),
              blocks=data.draw(st.integers(1, 2)))
    base = UNet(d, 1, 8, (1, 2), **kw); [p.data.add_(.1*torch.randn(p.shape)) for p in base.parameters()]
    x, l, c = torch.randn(2, 1, *[8]*d), torch.randn(2), Parts(maps=torch.randn(2, 1, *[8]*d))
    net = ControlNet(base); before = [p.clone() for p in base.parameters()]
    ask = torch.no_grad()(lambda f, *a: f(*a)); y = ask(base, x, l)
    assert torch.equal(ask(net, x, l, c), y)
    opt = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], .1)
    for _ in range(2): opt.zero_grad(); (net(x, l, c) - x).square().mean().backward(); opt.step()
    assert (not torch.equal(ask(net, x, l, c), y) and torch.equal(ask(net, x, l), y)
            and all(map(torch.equal, before, base.parameters())))

def test_no_leak():
    "Trained on turned signals half of the time, a network that was told draws none; one that was not told draws many"
    def ramps(n, g):
        return (torch.linspace(-1, 1, 8)*(.5 + .5*torch.rand(n, 1, 1, generator=g))
                + .05*torch.randn(n, 1, 8, generator=g))
    share = {}
    for told in (True, False):
        torch.manual_seed(0)
        D, g = Denoiser(network('unconditional', partial(UNet, 1, base=16, mults=(1,), blocks=1), omega=1),
                        flow(), 'u', .5), gen()
        fit(D, iter(lambda: ramps(64, g), None), 200, 5e-3, density=lognormal(0., 1.4), warmup=20,
            generator=gen(1), loss=ScoreAug(('spatial',), told=told))
        grid = grid_edm(flow(), 12, smin=.02); z = flow().prior((400, 1, 8), gen(2), grid[0])
        draw = lambda c: (samplers['dpmpp2m'](Guided(D, c), z, grid).x[:, 0]
                          @ torch.linspace(-1, 1, 8) > 0).float().mean()
        share[told] = draw(None)
        if told: assert draw(Parts(omega=identity(1)._replace(flips=(True,)).code((8,)).expand(400, -1))) < .05
    assert share[True] > .97 and .6 < share[False] < .9

def test_sizes_and_refusals():
    m = torch.zeros(3, 1, 16, 16, 16); m[0, 0, 2:5, 3, 3] = m[0, 0, 10:14, 12, 12] = m[1, 0, 4, 4, 4] = 1
    from spectral_diffusion.volumes import size_bins
    bins = size_bins(m, 4.)
    assert size_agreement(bins, m, 4.).value == 1 and size_agreement(bins, m.roll(1, 0), 4.).value < 1
    with pytest.raises(ValueError, match='neither 0 nor 1'): size_agreement(bins, .6*m, 4.)
    with pytest.raises(ValueError, match='no mode'): network('brave', makers['unet'])
    with pytest.raises(ValueError, match='unknown option'): ScoreAug(('turn',))
    with pytest.raises(ValueError, match='either a class or'): UNet(classes=2, tell=lambda n: None)
    with pytest.raises(ValueError, match='holds no log-SNR'): Guided(None, None, 1., (2., 1.))

def test_budget_of_a_bundle():
    "What is told counts, as a tensor and in a bundle alike"
    x = torch.randn(4, 1, 8, 8, 8); maps, D = x.sigmoid(), Denoiser(network('bravo', makers['unet']), cosine(), 'v')
    told = budget(D, x, Parts(maps=maps))['activations']
    assert told == pytest.approx(saved_bytes(D, x, Parts(maps=maps)), rel=.01) and told > budget(D, x)['activations']
    C = Denoiser(UNet(3, 1, 8, (1, 2), 1, classes=10), cosine(), 'v'); y = torch.arange(4)
    assert budget(C, x, y)['activations'] == pytest.approx(saved_bytes(C, x, y), rel=.01)
