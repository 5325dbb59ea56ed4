"Points: the dino's table, ensembles that train like single networks, and the floor that the sampler sets."
import math, numpy as np, os, pytest, torch
from importlib.util import find_spec
from pathlib import Path
from spectral_diffusion.data import MemberBatches, point_sets, points
from spectral_diffusion.denoisers import Denoiser
from spectral_diffusion.embeddings import *
from spectral_diffusion.metrics import kl_knn
from spectral_diffusion.samplers import sample_ddpm
from spectral_diffusion.schedules import ddpm_linear, grid_trailing
from spectral_diffusion.training import denoising_loss, fit
from spectral_diffusion.unets import ClipMembers, MemberLoss, ResidualMLP, member
torch.set_num_threads(1)
K, schedule = 100, ddpm_linear(100)

def test_dino_is_the_published_one():
    "The chapter's integers against the copy that another package ships, to its four decimals"
    from spectral_diffusion import data
    if not (package := find_spec('data_morph')):
        assert os.environ.get('SDIFF_PEERS') != 'required'
        pytest.skip('needs data-morph-ai, of the peers extra')
    want = np.loadtxt(Path(package.origin).parent/'data/starter_shapes/dino.csv', delimiter=',', skiprows=1)
    assert want.shape == data._dino.shape and np.abs(data._dino - want).max() < 6e-5

def adamw(params, lr): return torch.optim.AdamW(params, lr)

def trained(net, seeds, steps=25, loss=MemberLoss):
    "The seed's protocol in small"
    D = Denoiser(net, schedule, 'eps')
    fit(D, MemberBatches(points('dino', 2000), 64, seeds), steps, 3e-3, warmup=0, clip=math.inf, opt=adamw,
        callbacks=[ClipMembers(.1)], loss=loss(denoising_loss, K, [100+s for s in seeds]),
        generator=torch.Generator().manual_seed(0))
    return D.net

@pytest.mark.parametrize('gate', (None, AttentionGate, HybridGate))
def test_member_trains_as_alone(gate):
    "A member of an ensemble ends where the same network ends that was trained alone, for every member"
    torch.manual_seed(0); net = ResidualMLP(3, axis_waves(8, .3, 10.), gate, StepEmbedding(schedule, K), width=24)
    alone = [trained(member(net, i), [i]) for i in range(3)]
    start, together = [p.detach().clone() for p in net.parameters()], trained(net, [0, 1, 2])
    for i,one in enumerate(alone):
        for p,q,s in zip(together.parameters(), one.parameters(), start):
            moved = (p[i] - s[i]).abs().max()
            assert moved > 1e-3 and (p[i] - q[0]).abs().max() < 2e-3*moved + 1e-5

def test_shared_clipping_would_show():
    "The planted fault: clipping by the common norm, as `fit` does by itself, is not training alone"
    torch.manual_seed(0); net = ResidualMLP(2, axis_waves(8, .3, 10.), None, StepEmbedding(schedule, K), width=24)
    alone, D = trained(member(net, 0), [0]), Denoiser(net, schedule, 'eps')
    fit(D, MemberBatches(points('dino', 2000), 64, [0, 1]), 25, 3e-3, warmup=0, clip=.1, opt=adamw,
        loss=MemberLoss(denoising_loss, K, [100, 101]), generator=torch.Generator().manual_seed(0))
    assert max((p[0] - q[0]).abs().max() for p,q in zip(D.net.parameters(), alone.parameters())) > 1e-3

def test_ancestral_step_is_the_textbooks():
    "`sample_ddpm` on the table is Ho et al. 2020, eq. 6 and 7, with the posterior variance and no noise at the end"
    beta = torch.linspace(1e-4, .02, K, dtype=torch.float64); abar = (1-beta).cumprod(0)
    prev = torch.cat([torch.ones(1).double(), abar[:-1]])
    D = point_sets['moons'].oracle(schedule)
    x = z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()
    ours, g = (sample_ddpm(D, z, grid_trailing(K), generator=torch.Generator().manual_seed(1)).x,
               torch.Generator().manual_seed(1))
    for k in reversed(range(K)):
        x = beta[k]*prev[k].sqrt()/(1-abar[k])*D(x, (k+1)/K) + (1-prev[k])*(1-beta[k]).sqrt()/(1-abar[k])*x
        if k: x = x + (beta[k]*(1-prev[k])/(1-abar[k])).sqrt()*torch.randn(x.shape, generator=g, dtype=x.dtype)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)

def test_line_is_lost_to_the_sampler():
    "From N(0, I) the exact denoiser keeps about .16 bit on line, from matched noise next to none: no embedding can win there"
    x, g = points('line', 30_000), torch.Generator().manual_seed(3)
    D, z = point_sets['line'].oracle(schedule), torch.randn(6000, 2, generator=g)
    abar = schedule.alpha(1.).item()**2; L = torch.linalg.cholesky(abar*x.T.cov() + (1-abar)*torch.eye(2))
    kl = [kl_knn(x, sample_ddpm(D, s, grid_trailing(K), generator=g).x) for s in (z, abar**.5*x.mean(0) + z@L.T)]
    assert .12 < kl[0] < .21 and -.03 < kl[1] < .06, kl
