"U-Nets under random sizes and options: what the chapter proves on examples holds everywhere."
import copy
import pytest, torch
from hypothesis import given, settings, strategies as st
from spectral_diffusion.embeddings import StepEmbedding
from spectral_diffusion.fourier import irfftn, rfftn
from spectral_diffusion.schedules import linear
from spectral_diffusion.unets import *

settings.register_profile('unets', max_examples=15, deadline=None); settings.load_profile('unets')
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
seeds = st.integers(0, 99)
kinds = dict(branch=lambda d: SpectralBranch(d, 4, 5, 2), block=lambda d: SpectralBlock(d, 4, 4, 5),
             gain=lambda d: Adapter(d, 4, 5), amplitude=lambda d: Adapter(d, 4, 5, ('amplitude',)),
             phase=lambda d: Adapter(d, 4, 5, ('phase',)),
             all=lambda d: Adapter(d, 4, 5, ('gain', 'amplitude', 'phase')))
def rand(*s, seed=0): return torch.randn(*s, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
def shake(m, seed=0):
    for i, p in enumerate(m.double().requires_grad_(False).parameters()): p.add_(.2*rand(*p.shape, seed=seed+i))
    return m
def call(m, x, e): return m(x, e) if isinstance(m, SpectralBlock) else m(x, e=e)
def dims(S): return tuple(range(2, 2+len(S)))

@pytest.mark.parametrize('kind', kinds)
@given(sizes, seeds)
def test_identity_then_not(kind, S, seed):
    "Nothing happens at first (the branch alone is 0); shaken, something does, in one to three dims, and single precision agrees"
    m, x, e = kinds[kind](len(S)).double(), rand(2, 4, *S, seed=seed), rand(2, 5, seed=seed+1)
    assert torch.allclose(call(m, x, e), x*(kind != 'branch'), atol=1e-12)
    y = call(shake(m, seed), x, e)
    if max(S) > 2: assert (y - x).norm() > 1e-3*x.norm()
    z = call(copy.deepcopy(m).float(), x.float(), e.float())
    assert z.dtype == torch.float32 and (z - y).norm() < 1e-3*(1 + y.norm())

@pytest.mark.parametrize('kind', [k for k in kinds if k != 'block'])
@given(sizes, seeds)
def test_real_shifts_and_tiles(kind, S, seed):
    "The spectrum belongs to a real field; a shift in is a shift out; more of the same is answered by more of the same (once no floor hides anything)"
    m, x, e = shake(kinds[kind](len(S)), seed), rand(2, 4, *S, seed=seed), rand(2, 5, seed=seed+1)
    Y = m.spectrum(x, e)
    if kind == 'branch':
        Y = torch.view_as_complex(Y.permute(3, 1, 4, 0, 2).contiguous()).flatten(1, 2).unflatten(2, (*S[:-1], -1))
    assert torch.allclose(rfftn(irfftn(Y, S)), Y, atol=1e-10*(1 + Y.abs().max().item()))
    shift, y = tuple(seed % n for n in S), m(x, e=e)
    near = dict(atol=1e-8*(1 + y.abs().max().item()))
    assert torch.allclose(m(x.roll(shift, dims(S)), e=e), y.roll(shift, dims(S)), **near)
    if kind == 'branch': zero(m.floor.net[2]).bias.data.fill_(-40.); y = m(x, e=e)
    assert torch.allclose(m(x.repeat(1, 1, *[2]*len(S)), e=e), y.repeat(1, 1, *[2]*len(S)), **near)

@pytest.mark.parametrize('kind', kinds)
def test_items_do_not_meet(kind):
    "One item of a batch is answered as if it were alone; autocast changes nothing but rounding"
    torch.manual_seed(0)       # rounding is amplified by some weights more than by others: the same ones each time
    m, x, e = shake(kinds[kind](2)).float(), rand(3, 4, 6, 5).float(), rand(3, 5, seed=1).float()
    y = call(m, x, e)
    for i in range(3): assert (call(m, x[i:i+1], e[i:i+1]) - y[i:i+1]).norm() < 1e-5*y[i].norm()
    with torch.autocast('cpu', torch.bfloat16): assert (call(m, x, e.bfloat16()) - y).norm() < .05*y.norm()

@settings(max_examples=6)
@given(st.integers(1, 3), st.data(), seeds)
def test_any_unet_runs(d, data, seed):
    "Every combination of options trains: the answer has the field's shape, is zero at first and moves after two steps"
    levels = st.lists(st.integers(0, 1), unique=True).map(tuple)
    places = data.draw(st.lists(st.sampled_from(['input', 'output', 'block', 'amplitude', 'phase']),
                                unique=True).map(tuple))
    kw = dict(attn=data.draw(levels), spectral=data.draw(levels), adapters=places,
              patch=data.draw(st.sampled_from([1, 2])))
    torch.manual_seed(seed); net = UNet(d, 1, 8, (1, 2), 1, **kw)
    S = tuple(kw['patch']*data.draw(st.integers(2, 5)) for _ in range(d))
    x, l = torch.randn(2, 1, *S), torch.tensor([-1., 2.]); opt = torch.optim.SGD(net.parameters(), .1)
    assert not net(x, l).any()
    for _ in range(2): opt.zero_grad(); (net(x, l) - x).square().mean().backward(); opt.step()
    y = net(x, l); assert y.shape == x.shape and y.isfinite().all() and y.any()

@pytest.mark.parametrize('make,count', [(UNetCifar32, 1_982_115), (TinyUNet, 492_867), (SeedSpectralUNet, 83_334),
                                        (lambda **kw: SeedSpectralUNet(depth=3, **kw), 2_042_054)])
def test_networks_of_the_seeds(make, count):
    "Their counts; they learn; they hear the noise level as the step of a table"
    torch.manual_seed(0); x, l = torch.randn(2, 3, 16, 16), torch.tensor([-3., 3.])
    net = make(time=StepEmbedding(linear(), 1000, 512 if make is UNetCifar32 else 128)); assert n_params(net) == count
    opt = torch.optim.Adam(net.parameters(), 1e-3); losses = []
    for _ in range(6):
        loss = (net(x, l) - x).square().mean()
        opt.zero_grad(); loss.backward(); opt.step(); losses.append(loss.item())
    net.eval(); assert losses[-1] < losses[0] and (net(x, l) - net(x, l + 2)).abs().max() > 1e-5
