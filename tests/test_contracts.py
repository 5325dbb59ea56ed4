"The three contracts under random shapes, times and values: Field, Schedule, Denoiser."
import gc, math
from dataclasses import replace
import pytest, torch
from PIL import Image
from nbformat.v4 import new_markdown_cell, new_notebook
from hypothesis import example, given, settings, strategies as st
from spectral_diffusion.book import head
from spectral_diffusion.codecs import DCAE, Codec, load_codec, save_codec, train_codec
from spectral_diffusion.data import check_field, image_folder, to_field, to_uint8
from spectral_diffusion.denoisers import Denoiser, Gaussian, Mixture
from spectral_diffusion.fourier import Noise, bands, hartley, irfftn, power_law, rapsd, rfftn
from spectral_diffusion.metrics import scorecard
from spectral_diffusion.recipes import train_volumes, volume_recipes
from spectral_diffusion.samplers import samplers
from spectral_diffusion.schedules import *
from spectral_diffusion.unets import UNet

settings.register_profile('book', max_examples=25, deadline=None); settings.load_profile('book')
sizes = st.lists(st.integers(2, 9), min_size=1, max_size=3).map(tuple)
clocks = dict(linear=linear, cosine=cosine, sigmoid=sigmoid, edm=edm, flow=flow,
              ddpm_linear=ddpm_linear, ddpm_cosine=ddpm_cosine)
times = st.floats(.01, .99)
def field(size, seed, n=2, c=2): return torch.randn(n, c, *size, generator=torch.Generator().manual_seed(seed))
def spectral(sch, kind, size):
    return dict(white=lambda: sch, coloured=lambda: coloured(sch, power_law(size, 1.)),
                blurred=lambda: blurred(sch, size, .5))[kind]()

@given(sizes, st.integers(0, 99))
def test_transforms(size, seed):
    x = field(size, seed)
    assert torch.allclose(hartley(hartley(x)), x, atol=1e-5) and torch.allclose(irfftn(rfftn(x), size), x, atol=1e-5)
    _, p = rapsd(x); n = bands(size).flatten().bincount()
    assert torch.allclose((p*n).sum()/n.sum(), x.square().mean(), rtol=1e-4)

@given(st.integers(0, 999))
def test_range_round_trip(seed):
    u = torch.randint(0, 256, (2,3,5,4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    x = to_field(u)
    assert (to_uint8(x) == u).all() and -1 <= x.min() and x.max() <= 1

@given(st.sampled_from([*clocks]), times)
def test_clock(name, t):
    s = clocks[name]()
    assert abs(s.t_of(s.logsnr(torch.tensor(t, dtype=torch.float64))) - t) < 1e-6

@pytest.mark.parametrize('kind', ['white', 'coloured', 'blurred'])
@given(st.sampled_from([*clocks]), times, sizes, st.sampled_from(['eps','x0','v','u','F']), st.integers(0, 99))
def test_denoiser_inverts_corruption(kind, name, t, size, target, seed):
    "A network that answers its target exactly returns x0"
    sch = spectral(clocks[name](), kind, size)
    x0, eps = field(size, seed), field(size, seed+1)
    a, s = sch.coeffs(t, x0)
    if a.min() < 2e-2: return                      # the error is rounding / alpha
    truth = sch.back(to_target(target, sch.to(x0), sch.to(eps), a, s, .7))
    got = Denoiser(lambda x, l, c: truth, sch, target, .7)(sch.corrupt(x0, eps, t), t)
    assert (got - x0).abs().max() < 2e-5*(1 + (a+s)/a).max()

@given(st.sampled_from([*clocks]), st.sampled_from([*samplers]), st.integers(2, 12), sizes, st.integers(0, 99))
@example('linear', 'restart', 3, (2,), 0)
def test_samplers_ask_inside_and_return_a_point(name, sampler, n, size, seed):
    "One-point data are returned exactly, no question leaves (0, 1], NFE is what was asked (a grid too coarse for restart: none)"
    sch, point, asked = clocks[name](), field(size, seed, 1), []
    grid, restart = grid_edm(sch, n), torch.tensor(.1, dtype=torch.float64)          # its t_min; t_max is .3
    class Spy:
        schedule = sch
        def __call__(self, x, t, cond=None):
            asked.append(float(torch.as_tensor(t).max()))
            return Mixture(sch, point)(x, t)
    run = lambda: samplers[sampler](Spy(), sch.prior((3, 2, *size), torch.Generator().manual_seed(seed)), grid,
                                    generator=torch.Generator().manual_seed(seed))
    if sampler == 'restart' and grid[(sch.logsnr(grid) - sch.logsnr(restart)).abs().argmin()] >= .3:
        with pytest.raises(ValueError, match='refine the grid'): run()
        assert not asked; return
    r = run()
    assert torch.allclose(r.x, point.expand_as(r.x), atol=1e-3)
    assert r.nfe == len(asked) and 0 < min(asked) and max(asked) <= 1

def test_range_mix_up_is_refused():
    from spectral_diffusion.data import check_field
    with pytest.raises(ValueError, match=r'\[0, 1\]'): check_field(torch.rand(8,3,8,8))

def test_wiener_beats_every_other_gain():
    "No other radial gain has a smaller error than the oracle's"
    S = power_law((8,8), 2.); x = Noise(S)((2000,1,8,8), torch.Generator().manual_seed(0)); sch = cosine()
    xt = sch.corrupt(x, torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), .5)
    best = Gaussian(sch, S/S.mean())(xt, .5)
    err = lambda y: (y - x).square().mean()
    for k in (.9, 1.1): assert err(best*k) > err(best)
    assert err(Gaussian(sch, 1.)(xt, .5)) > err(best)

small = replace(volume_recipes['small-volumes'], net=lambda: None)
refusals = {
    'integers are no field': (lambda: check_field(torch.zeros(1, 1, 4, 4).int()), TypeError, 'use to_field'),
    'an empty frequency': (lambda: Noise(torch.tensor([1., 0.])), ValueError, 'cannot be inverted'),
    'an infinite one': (lambda: coloured(flow(), torch.tensor([1., math.inf])), ValueError, 'cannot be inverted'),
    'no std at a frequency': (lambda: Denoiser(None, coloured(flow(), torch.ones(4)), 'F', torch.zeros(4)),
                              ValueError, 'sd must be positive'),
    'no blocks': (lambda: UNet(2, 1, 8, (1,), 0), ValueError, 'must be at least 1'),
    'features as samples': (lambda: scorecard(None, *torch.zeros(3, 9, 4)), ValueError, 'takes samples as images'),
    'a codec for voxels': (lambda: train_volumes(small, None, Codec()), ValueError, 'pass no codec'),
    'fields that are not finite': (lambda: train_codec(DCAE(1, 1, 2, 2, 4, 8), iter([torch.full((1, 1, 8), math.nan)]),
                                                       1), FloatingPointError, 'check the data'),
    'a chapter without a title': (lambda: head(new_notebook(cells=[new_markdown_cell('Well')])), ValueError,
                                  "must begin with '# title'")}

@pytest.mark.parametrize('what', refusals)
def test_refusals(what):
    "One line that says what is wrong, for what no chapter tries"
    f, kind, text = refusals[what]
    with pytest.raises(kind, match=text) as e: f()
    assert '\n' not in str(e.value)

def test_a_codec_that_nobody_knows(tmp_path):
    class Mine(Codec): pass
    save_codec(Mine(), tmp_path/'c.safetensors'); del Mine; gc.collect()
    with pytest.raises(ValueError, match='holds a Mine, which is not known here'): load_codec(tmp_path/'c.safetensors')

def test_one_picture_is_no_folder(tmp_path):
    Image.new('RGB', (9, 9)).save(tmp_path/'a.png')
    with pytest.raises(ValueError, match='at least two are needed'): image_folder(tmp_path, 8)
