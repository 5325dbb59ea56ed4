"On a GPU: the same answers, the same training and the same samples as on the processor (skipped where there is none)."
import copy
from dataclasses import replace
from functools import partial
import pytest, torch
from spectral_diffusion.benchmarks import peak_mem
from spectral_diffusion.codecs import DCT, Haar, SpaceToDepth
from spectral_diffusion.conditioning import modes, network
from spectral_diffusion.data import Batches, digits, point_sets, to_field
from spectral_diffusion.denoisers import Denoiser, Guided
from spectral_diffusion.diagnostics import error_map, local_grid, triage
from spectral_diffusion.fourier import power_law, psd_of
from spectral_diffusion.guards import budget, guards
from spectral_diffusion.metrics import efflite0, features
from spectral_diffusion.mixing import (AFNO, BasisMixer, FNet, FourierConv, GlobalFilter, SelfAttention,
                                       SmoothAct, SpectralMixer, WindowAttention)
from spectral_diffusion.recipes import draw, recipe, train
from spectral_diffusion.rejection import RatioHead, fit_head, sample_diffrs
from spectral_diffusion.runs import Run
from spectral_diffusion.samplers import sample_dpmpp2m, samplers
from spectral_diffusion.schedules import coloured, cosine, edm, flow, grid_edm
from spectral_diffusion.training import EMA, Checkpoints, Early, Log, Muon, adamw, fit
from spectral_diffusion.transformers import DiT
from spectral_diffusion.unets import UNet
from spectral_diffusion.volumes import CaseBatches, Cases

dev = 'cuda'
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
gen = lambda s=0: torch.Generator().manual_seed(s)
def shake(m):
    for i, p in enumerate(m.requires_grad_(False).parameters()): p.add_(.05*torch.randn(p.shape, generator=gen(i)))
    return m.requires_grad_()
def near(a, b, tol):
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return (a - b).norm() <= tol*(1e-6 + b.norm())

@pytest.fixture(autouse=True)
def exact():
    "Full float32 in products and convolutions: this is about our code, not about rounding"
    was = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32,
           torch.backends.cudnn.deterministic)
    (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32,
     torch.backends.cudnn.deterministic) = False, False, True
    yield
    (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32,
     torch.backends.cudnn.deterministic) = was

nets = ({f'unet{d}': (partial(UNet, d, 3, 16, (1, 2), 1), d) for d in (1, 2, 3)}
        | {f'dit{d}': (partial(DiT, d, 3, 2, 24, 2, 2), d) for d in (1, 2, 3)}
        | dict(attention=(partial(UNet, 2, 3, 16, (1, 2), 1, attn=(0,)), 2),
               spectral=(partial(UNet, 2, 3, 16, (1, 2), 1, spectral=(0, 1)), 2),
               spectral3=(partial(UNet, 3, 3, 16, (1, 2), 1, spectral=(1,)), 3),
               adapters=(partial(UNet, 2, 3, 16, (1, 2), 1,
                                 adapters=('input', 'output', 'block', 'amplitude', 'phase', 'skip')), 2),
               patch=(partial(UNet, 3, 3, 16, (1, 2), 1, patch=2), 3),
               classes=(partial(UNet, 2, 3, 16, (1, 2), 1, classes=4), 2)))
@pytest.mark.parametrize('name', nets)
def test_networks(name):
    "Answers and gradients of every kind of network"
    make, d = nets[name]; m = shake(make())
    x, l = torch.randn(3, 3, *[8]*d, generator=gen()), torch.tensor([-3., 0., 4.])
    cond = torch.tensor([0, 1, 3]) if name == 'classes' else None
    g = copy.deepcopy(m).to(dev); y = m(x, l, cond); z = g(x.to(dev), l.to(dev), cond if cond is None else cond.to(dev))
    assert near(z, y, 1e-4)
    y.square().mean().backward(); z.square().mean().backward()
    for (k, p), q in zip(m.named_parameters(), g.parameters()):
        assert p.grad is None or near(q.grad, p.grad, 2e-3) or (q.grad.cpu() - p.grad).norm() < 1e-5, k

mixers = dict(
    ours=lambda S: SpectralMixer(4, len(S)), allpass=lambda S: SpectralMixer(4, len(S), allpass=True),
    group=lambda S: SpectralMixer(4, len(S), group=2), span=lambda S: SpectralMixer(4, len(S), span=7),
    filter=lambda S: GlobalFilter(4, S), fnet=lambda S: FNet(), afno=lambda S: AFNO(4, 2),
    fno=lambda S: FourierConv(4, [3]*len(S)), separable=lambda S: FourierConv(4, [3]*len(S), True),
    dct=lambda S: BasisMixer(4, S), haar=lambda S: BasisMixer(4, S, 'haar'),
    attention=lambda S: SelfAttention(4, 2), window=lambda S: WindowAttention(4, 3, 2), act=lambda S: SmoothAct())
@pytest.mark.parametrize('name', mixers)
@pytest.mark.parametrize('S', [(8,), (6, 5), (4, 6, 5)])
def test_mixers(name, S):
    m, x = shake(mixers[name](S)), torch.randn(2, 4, *S, generator=gen())
    y, z = m(x), copy.deepcopy(m).to(dev)(x.to(dev))
    assert z.device.type == dev and near(z, y, 1e-4)

@pytest.mark.parametrize('target', ['eps', 'x0', 'v', 'u', 'F'])
@pytest.mark.parametrize('sch', [cosine(), edm(), flow(), coloured(cosine(), power_law((8, 8), 1.))],
                         ids=['cosine', 'edm', 'flow', 'coloured'])
def test_denoisers(sch, target):
    "Every target on every path, in units of frequencies too"
    for sd in (.5, power_law((8, 8), 1.).sqrt()) if 'coloured' in sch.name else (.5,):
        D = Denoiser(shake(UNet(2, 3, 16, (1,), 1)), sch, target, sd)
        x, t = torch.randn(2, 3, 8, 8, generator=gen()), torch.tensor([.3, .8]).double()
        G = copy.deepcopy(D).to(dev); assert near(G(x.to(dev), t.to(dev)), D(x, t), 1e-4)
        assert near(Guided(G, scale=2., against=copy.deepcopy(G), keep=.5)(x.to(dev), t.to(dev)), D(x, t), 1e-4)

@pytest.mark.parametrize('name', samplers)
def test_samplers(name):
    "The same start and, where there is noise on the way, the same generator lead to the same sample"
    D = Denoiser(shake(UNet(2, 1, 16, (1,), 1)), cosine(), 'v', .5); grid = grid_edm(D.schedule, 8, smin=.05)
    x = D.schedule.prior((2, 1, 8, 8), gen(1), grid[0])
    with torch.no_grad():
        y, z = (samplers[name](m, x.to(d), grid, generator=gen(2)).x
                for m, d in ((D, 'cpu'), (copy.deepcopy(D).to(dev), dev)))
    assert z.device.type == dev and near(z, y, 1e-3)

def run(d, folder=None, steps=12, bf16=False, stop=0, colour=False, opt=adamw, begun=0):
    "A short training with everything on; its losses and last weights"
    torch.manual_seed(0); data = digits(); log, ema = Log(Run(), 4), EMA(.9); early = Early(ema, .3)
    psd = psd_of(to_field(data.train)).clamp(min=1e-6)
    D = Denoiser(UNet(2, 1, 16, (1, 2), 1), coloured(cosine(), torch.ones_like(psd)) if colour else cosine(),
                 'v', psd.sqrt() if colour else .5).to(d)
    class Halt:
        def after_step(self, s):
            if s.step == stop: raise KeyboardInterrupt
    cbs = [ema, log, early, *([Checkpoints(folder, 3)] if folder else []), Halt(),
           *guards(to_field(data.test[:16]).to(d))]
    try:
        s = fit(D, Batches(data.train, 16, gen(1), flip=True), steps, generator=gen(2), bf16=bf16, callbacks=cbs,
                opt=opt, lr=.02 if opt is Muon else 1e-3)
    except KeyboardInterrupt: return
    assert [e['step'] for e in s.events if e['what'] == 'resumed'] == [begun]*bool(begun)
    return log.curve(), torch.cat([p.detach().float().cpu().flatten()
                                   for p in (*D.parameters(), *ema.model.parameters(), *early.model.parameters())])

@pytest.mark.parametrize('opt', [adamw, Muon])
@pytest.mark.parametrize('colour', [False, True])
def test_training(colour, opt):
    "The loss of a dozen steps, with averages and guards, in pixels and in units of frequencies"
    (a, wa), (b, wb) = run('cpu', colour=colour, opt=opt), run(dev, colour=colour, opt=opt)
    assert near(b, a, 5e-3) and near(wb, wa, 5e-3)

def test_bf16():
    "In bfloat16 the loss is the same to a few percent"
    (a, _), (b, _) = run(dev), run(dev, bf16=True)
    assert b.isfinite().all() and near(b, a, .05) and not torch.equal(a, b)

@pytest.mark.parametrize('opt', [adamw, Muon])
def test_resume(opt, tmp_path):
    "A run that was stopped goes on to the same bits, with a log that writes lines"
    want = run(dev, tmp_path/'a', opt=opt); assert run(dev, tmp_path/'b', stop=7, opt=opt) is None
    got = run(dev, tmp_path/'b', opt=opt, begun=6)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])

def test_budget():
    "What a step needs is foreseen: weights, moments and activations, within a third of the truth"
    D = Denoiser(UNet(2, 3, 64, (1, 2), 2), cosine(), 'v', .5).to(dev)
    x = torch.randn(32, 3, 32, 32, device=dev); b = budget(D, x, ema=0, back=False)
    class One:
        def __iter__(self): return self
        def __next__(self): return x
    fit(D, One(), 2, generator=gen())
    peak = peak_mem(lambda: fit(D, One(), 3, generator=gen()))[1]
    need = sum(b.values()) - b['weights'] - b['copy']
    assert .66 < need/peak < 1.33, (b, peak)

@pytest.mark.parametrize('codec', [Haar(), Haar(2), DCT(4), SpaceToDepth(2)], ids=str)
@pytest.mark.parametrize('d', [1, 2, 3])
def test_codecs(codec, d):
    x = torch.randn(2, 3, *[8]*d, generator=gen()); z = codec.encode(x.to(dev))
    assert near(z, codec.encode(x), 1e-5) and near(codec.decode(z), x, 1e-5)

def test_features():
    pytest.importorskip('efficientnet_lite_pytorch')
    x = torch.rand(8, 3, 32, 32, generator=gen())*2 - 1
    assert near(features(efflite0(dev), x), features(efflite0(), x), 2e-3)

def some(n=4, S=(8, 8, 8)):
    g = gen(1)
    return Cases(torch.randint(0, 256, (n, 1, *S), generator=g, dtype=torch.uint8),
                 (torch.rand(n, 1, *S, generator=g) < .05).byte(), torch.randint(0, 3, (n, 7), generator=g))
@pytest.mark.parametrize('mode', modes)
def test_modes(mode):
    "Every kind of conditioning trains"
    losses = []
    for d in ('cpu', dev):
        torch.manual_seed(0); log = Log()
        D = Denoiser(network(mode, partial(UNet, 3, base=8, mults=(1, 2), blocks=1)), flow(), 'u', .5).to(d)
        fit(D, CaseBatches(some(), 2, gen(2), modes[mode].batch), 4, 1e-3, generator=gen(3), callbacks=[log])
        losses.append(torch.as_tensor(log.curve()))
    assert near(losses[1], losses[0], 1e-2)

def test_diagnostics():
    "Maps of the error, grids and the whole triage of a model that lives on the GPU"
    data = digits(); x = to_field(data.test[:64])
    D = Denoiser(shake(UNet(2, 1, 16, (1,), 1)), cosine(), 'v', .5); G = copy.deepcopy(D).to(dev)
    with torch.no_grad():
        assert near(error_map(G, x.to(dev), (-2., 2.), 3, gen()), error_map(D, x, (-2., 2.), 3, gen()), 1e-3)
        local_grid(G, x[:2].to(dev), generator=gen())
    grid = grid_edm(D.schedule, 5, smin=.05)
    a, b = (triage(m, x.to(d), to_field(data.train[:128]).to(d), sample_dpmpp2m, grid, steps=4)
            for m, d in ((D, 'cpu'), (G, dev)))
    assert a.verdict == b.verdict and [c.ok for c in a.checks] == [c.ok for c in b.checks]

def test_rejection():
    "A judge learns on the GPU and samples are rejected there, with draws from the processor's generator"
    D = Denoiser(shake(UNet(2, 1, 16, (1,), 1)), cosine(), 'v', .5); grid = grid_edm(D.schedule, 5, smin=.05)
    x = to_field(digits().train[:40]); fake = torch.randn(40, 1, 8, 8, generator=gen()); heads, out = [], []
    for d in ('cpu', dev):
        torch.manual_seed(0); m = copy.deepcopy(D).to(d); h = RatioHead(2, 16, 16).to(d)
        fit_head(h, m, x.to(d), fake.to(d), 4, 8, every=2, generator=gen(1))
        heads.append(torch.cat([p.detach().cpu().flatten() for p in h.parameters()]))
        out.append(sample_diffrs(m, lambda x, t: x.flatten(1).mean(1),
                                 D.schedule.prior((6, 1, 8, 8), gen(2), grid[0]).to(d), grid, generator=gen(3)).x)
    assert (near(heads[1], heads[0], 5e-3) and out[1].device.type == dev and out[1].isfinite().all()
            and near(out[1], out[0], 1e-3))

def test_recipes():
    "A guided recipe in units of frequencies is trained and drawn from"
    r = replace(recipe('small-balanced'), net=lambda channels, schedule: UNet(2, channels, 16, (1, 2), 1),
                steps=10, batch=16)
    x, y = (draw(r, train(r, digits(), device=d).guided, 4, (1, 8, 8), nfe=6) for d in ('cpu', dev))
    assert near(y, x, 2e-2)

def test_accelerate():
    "An accelerator moves the units and the average along with the network"
    from accelerate import Accelerator
    x = to_field(digits().train); ema, sch = EMA(.9), coloured(cosine(), torch.ones(8, 8))
    torch.manual_seed(0); D = Denoiser(UNet(2, 1, 16, (1, 2), 1), sch, 'F', psd_of(x).clamp(min=1e-6).sqrt())
    fit(D, Batches(digits().train, 16, gen(1)), 4, generator=gen(2), callbacks=[ema], accelerator=Accelerator())
    assert {p.device.type for m in (D, ema.model) for p in (*m.parameters(), *m.buffers())} == {dev}

def test_members():
    "Members draw the same noise wherever they are"
    from spectral_diffusion.unets import MemberLoss
    drawn = [MemberLoss(None, 100, [1, 2]).draw(torch.zeros(4, 2, device=d)) for d in ('cpu', dev)]
    assert drawn[1][0].device.type == dev and all(torch.equal(a, b.cpu()) for a, b in zip(*drawn))

@pytest.mark.parametrize('name', point_sets)
def test_oracles_of_points(name):
    "An exact denoiser answers where its points are"
    x = torch.randn(200, 2, generator=gen())
    for sch in (flow(), cosine()):
        D = point_sets[name].oracle(sch)
        for t in (.01, .5, 1.): assert near(D(x.to(dev), t), D(x, t), 1e-5)
