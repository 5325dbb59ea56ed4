"Patches under random shapes, and a DiT wherever a U-Net can stand."
import pytest, torch
from hypothesis import given, settings, strategies as st
from spectral_diffusion.denoisers import Denoiser, bottleneck
from spectral_diffusion.samplers import samplers
from spectral_diffusion.schedules import cosine, grid_uniform
from spectral_diffusion.training import EMA, fit
from spectral_diffusion.transformers import DiT, dit, dits, patchify, positions, unpatchify
torch.set_num_threads(1)
sides = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=3)

@settings(max_examples=40, deadline=None)
@given(sides, st.integers(1, 3), st.integers(0, 99))
def test_patches_only_move_values(sides, c, seed):
    p = tuple(k for _,k in sides)
    x = torch.randn(2, c, *[n*k for n,k in sides], generator=torch.Generator().manual_seed(seed))
    y = patchify(x, p)
    assert y.shape[2:] == tuple(n for n,_ in sides) and torch.equal(unpatchify(y, p), x)
    assert torch.equal(y.flatten(1).sort(1)[0], x.flatten(1).sort(1)[0])

@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(6, 40))
def test_positions_differ(grid, width):
    p = positions(tuple(grid), 2*width).flatten(1).T
    assert len(p) == 1 or torch.pdist(p).min() > .1

@pytest.mark.parametrize('name', [*samplers])
def test_every_sampler(name):
    D = Denoiser(DiT(1, 2, 4, 24, 2, 2), cosine(), 'v'); g = torch.Generator().manual_seed(0)
    r = samplers[name](D, torch.randn(2, 2, 16, generator=g), grid_uniform(12)[1:], generator=g)
    assert r.x.shape == (2, 2, 16) and r.x.isfinite().all()

def test_trains_in_bf16_with_recompute_and_ema():
    torch.manual_seed(0); x = torch.randn(8, 1, 8, 8); ema = EMA(.9)
    D = Denoiser(DiT(2, 1, 2, 32, 2, 2, recompute=True), cosine(), 'v')
    s = fit(D, iter(lambda: x, None), 8, bf16=True, generator=torch.Generator().manual_seed(0), callbacks=[ema])
    assert s.loss.isfinite() and bottleneck(ema.model, x, torch.tensor(.5))[1].shape == (8, 32, 4, 4)

@pytest.mark.parametrize('size', [*dits])
def test_every_size_is_built(size, dim=3):
    with torch.device('meta'):
        x = torch.empty(1, 2, *[16]*dim)
        assert dit(size, dim=dim, channels=2, patch=8, recompute=True)(x, torch.empty(1)).shape == x.shape
