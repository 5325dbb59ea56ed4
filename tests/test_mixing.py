"Mixers under random sizes, types and values: what the chapter proves on examples holds everywhere."
import copy
import pytest, torch
from hypothesis import given, settings, strategies as st
from spectral_diffusion.benchmarks import flops
from spectral_diffusion.fourier import dct, haar, idct, unhaar
from spectral_diffusion.mixing import *

settings.register_profile('mixing', max_examples=15, deadline=None); settings.load_profile('mixing')
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
seeds = st.integers(0, 99)
def rand(*s, seed=0): return torch.randn(*s, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def shake(m, seed=0):
    for i, p in enumerate(m.double().requires_grad_(False).parameters()): p.add_(.3*rand(*p.shape, seed=seed+i))
    return m
def dims(S): return tuple(range(2, 2+len(S)))
ours = dict(plain={}, allpass=dict(allpass=True), group=dict(group=2), domain=dict(span=7))
zoo = dict(ours=lambda S: SpectralMixer(4, len(S)), global_=lambda S: GlobalFilter(4, S), fnet=lambda S: FNet(),
           afno=lambda S: AFNO(4, 2), fno=lambda S: FourierConv(4, [3]*len(S)),
           separable=lambda S: FourierConv(4, [3]*len(S), True),
           dct=lambda S: BasisMixer(4, S), haar=lambda S: BasisMixer(4, S, 'haar'),
           attention=lambda S: SelfAttention(4, 2), window=lambda S: WindowAttention(4, 3, 2),
           act=lambda S: SmoothAct())

@given(sizes, seeds)
def test_bases(S, seed):
    "Haar and DCT are orthonormal: inner products survive, and the transpose is the inverse"
    x, y = rand(2, 2, *S, seed=seed), rand(2, 2, *S, seed=seed+1)
    for f, g in [(dct, idct), (haar, unhaar)]:
        assert torch.allclose(g(f(x)), x) and torch.allclose((f(x)*y).sum(), (x*g(y)).sum())

@pytest.mark.parametrize('kind', ours)
@given(sizes, seeds)
def test_ours_is_a_real_convolution(kind, S, seed):
    "Commutes with every shift and with its own kind; the response to a delta says all"
    m, x = shake(SpectralMixer(4, len(S), **ours[kind]), seed), rand(2, 4, *S, seed=seed)
    shift = tuple(seed % n for n in S)
    assert torch.allclose(m(x.roll(shift, dims(S))), m(x).roll(shift, dims(S)), atol=1e-9)
    assert torch.allclose(m(2*x + 1), 2*m(x) + m(torch.ones_like(x)), atol=1e-9)
    if kind == 'allpass':
        assert torch.allclose(m(x).square().sum(), x.square().sum()) and torch.allclose(m.inverse(m(x)), x)

@given(st.integers(2, 40), st.data(), seeds)
def test_causal(n, data, seed):
    t = data.draw(st.integers(1, n-1)); x = rand(2, 4, n, seed=seed); z = x.clone(); z[...,t:] = 9.
    for m in (SpectralMixer(4, causal=True), SpectralMixer(4, causal=True, group=2), LongConv(4, 40),
              SelfAttention(4, 2, causal=True), WindowAttention(4, 5, 2, causal=True)):
        m = shake(m, seed)
        assert (m(x) - m(z))[...,:t].abs().max() < 1e-12*(1 + m(z).abs().max())

@pytest.mark.parametrize('name', zoo)
@given(sizes, seeds)
def test_masked_places_do_not_count(name, S, seed):
    "Neither their values nor NaN reach the others; a mask of ones is no mask; float32 agrees; the answer repeats to the bit"
    m, x = shake(zoo[name](S), seed), rand(2, 4, *S, seed=seed)
    mask = rand(2, *S, seed=seed+2) > -.5
    z = torch.where(mask[:,None], x, rand(2, 4, *S, seed=seed+3)*50)
    assert (torch.allclose(m(x, mask=mask), m(z, mask=mask), atol=1e-9)
            and not m(x, mask=mask).movedim(1, -1)[~mask].any())
    assert torch.allclose(m(x, mask=torch.ones_like(mask)), m(x), atol=1e-9) and torch.equal(m(x), m(x))
    y = copy.deepcopy(m).float()(x.float())
    assert y.dtype == torch.float32 and y.shape == x.shape and (y - m(x)).norm() < 1e-4*(1 + m(x).norm())

@given(st.integers(1, 3), st.integers(7, 12), st.sampled_from([(2, 1), (3, 2), (1, 1)]), seeds)
def test_resolution(d, n, by, seed):
    "Cycles/domain: band-limited fields on a finer grid give the same answer; in between lies Fourier interpolation"
    n = n//by[1]*by[1]; fine = (n*by[0]//by[1],)*d
    x = resample(rand(2, 2, *[5]*d, seed=seed), (n,)*d)
    for m in (SpectralMixer(2, d, span=6), FourierConv(2, [2]*d)):
        m = shake(m, seed); assert torch.allclose(m(resample(x, fine)), resample(m(x), fine), atol=1e-9)

@given(sizes, seeds)
def test_texture(S, seed):
    "Cycles/sample: twice as much of a texture gives twice as much of the answer"
    m, x, twice = shake(SpectralMixer(2, len(S)), seed), rand(1, 2, *S, seed=seed), (1, 1, *[2]*len(S))
    x = resample(x, S)                          # nothing at Nyquist, which the longer field tells apart
    assert torch.allclose(m(x.repeat(twice)), m(x).repeat(twice), atol=1e-9)

@pytest.mark.parametrize('kw', [dict(), dict(allpass=True), dict(group=2), dict(causal=True), dict(cond=2)], ids=str)
@given(st.integers(2, 9), seeds)
def test_gradients(kw, n, seed):
    m = shake(SpectralMixer(2, order=2, **kw), seed).requires_grad_(True); x = rand(2, 2, n, seed=seed).requires_grad_()
    more = dict(logsnr=rand(2, seed=seed)) if 'cond' in kw else {}
    assert torch.autograd.gradcheck(lambda x, *p: m(x, **more), (x, *m.parameters()), fast_mode=True)

def test_costs_grow_as_they_should():
    "Counted operations: the mixer n log n, attention n^2, windowed attention n"
    work = lambda make, n: flops(lambda: make(torch.zeros(1, 32, n)))
    with torch.no_grad():
        for m, low, high in [(SpectralMixer(32), 2., 2.4), (FNet(), 2., 2.4), (SelfAttention(32), 3.5, 4.),
                             (WindowAttention(32, 16), 1.99, 2.01)]:
            assert low < work(m, 4096)/work(m, 2048) < high, m

def test_faults_are_seen():
    "Each check above must fail for a layer that breaks its promise"
    x, z = rand(1, 4, 16), rand(1, 4, 16, seed=1); z[...,:8] = x[...,:8]
    # circular is not causal
    assert (shake(SpectralMixer(4))(x) - shake(SpectralMixer(4))(z))[...,:8].abs().max() > 1e-3
    m = shake(SpectralMixer(4, allpass=True)); m.filter.even = torch.nn.Parameter(.3*rand(1, 4, 17))
    assert abs(m(x).square().sum()/x.square().sum() - 1) > .01
    m = shake(SpectralMixer(1)); x = resample(rand(1, 1, 5), (12,))
    assert (m(resample(x, (24,)))[...,::2] - m(x)).norm() > .01*m(x).norm()
    assert (FNet()(x.roll(1, -1)) - FNet()(x).roll(1, -1)).norm() > .1

def test_refusals():
    for f, word in [(lambda: SpectralMixer(4, 2, causal=True), 'no past'),
                    (lambda: SpectralMixer(4, allpass=True, causal=True), 'allpass needs'),
                    (lambda: SpectralMixer(6, group=4), 'groups of 4'),
                    (lambda: SpectralMixer(4)(rand(1,4,8,8)), '1 spatial dims'),
                    (lambda: GlobalFilter(4, (8,))(rand(1,4,9)), 'fields of'),
                    (lambda: LongConv(4, 8)(rand(1,4,9)), 'longer'),
                    (lambda: SpectralMixer(4).inverse(rand(1,4,9)), 'allpass=True'),
                    (lambda: SpectralMixer(4, cond=1)(rand(1,4,9)), 'logsnr')]:
        with pytest.raises(ValueError, match=word): f()
