"Other libraries by value: what both sides compute has to agree. Needs the `peers` extra, or says that it was skipped; SDIFF_PEERS=required makes that a failure."
import os
from importlib.util import find_spec
import pytest, torch
from spectral_diffusion.denoisers import Gaussian
from spectral_diffusion.interop import *
from spectral_diffusion.samplers import sample_ddim
from spectral_diffusion.schedules import cosine, coloured, ddpm_linear, edm, flow, linear, table, zero_terminal
from spectral_diffusion.fourier import power_law

pytestmark = pytest.mark.skipif(not find_spec('diffusers') and os.environ.get('SDIFF_PEERS') != 'required',
                                reason='no diffusers: install the extra `peers`')
torch.set_num_threads(1)
gen = lambda s=0: torch.Generator().manual_seed(s)

@pytest.fixture(scope='module')
def net():
    from diffusers import UNet2DModel
    torch.manual_seed(0)
    return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,16),
                       layers_per_block=1, norm_num_groups=4,
                       down_block_types=('DownBlock2D',)*2, up_block_types=('UpBlock2D',)*2).eval()

def scheduler(name, **kw): import diffusers; return getattr(diffusers, name)(**kw)

@torch.no_grad()
def theirs(net, s, x, **kw):
    for i in s.timesteps: x = s.step(net(x, i).sample, i, x, **kw).prev_sample
    return x

# on 'linspace' their DDIM steps by K//n, which is not the distance of its times
@pytest.mark.parametrize('spacing', ['leading', 'trailing'])
@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction', 'sample'])
@pytest.mark.parametrize('betas', ['linear', 'scaled_linear', 'squaredcos_cap_v2'])
def test_ddim(net, kind, spacing, betas):
    "Their DDIM and ours end in the same pictures, for every target, spacing and table"
    s = scheduler('DDIMScheduler', clip_sample=False, prediction_type=kind, timestep_spacing=spacing,
                  beta_schedule=betas)
    s.set_timesteps(10)
    # where alpha is almost 0, eps in float32 says nothing about x0
    if kind == 'epsilon': s.timesteps = s.timesteps[1:]
    x = torch.randn(2, 1, 8, 8, generator=gen())
    a, b = theirs(net, s, x), sample_ddim(from_diffusers(net, s), x, to_time(s.timesteps)).x
    assert (a - b).abs().max() < 2e-3*b.std()

@pytest.mark.parametrize('name', ['DDPMScheduler', 'DDIMScheduler', 'DPMSolverMultistepScheduler',
                                  'UniPCMultistepScheduler', 'EulerDiscreteScheduler', 'PNDMScheduler',
                                  'HeunDiscreteScheduler'])
def test_tables(name):
    "Exactly the table in, and ours out to float32's product"
    s = scheduler(name)
    t = to_time(torch.arange(1000))
    assert torch.allclose(schedule_of(s).alpha(t)**2, s.alphas_cumprod.double(), rtol=1e-12, atol=0)
    for ours in (ddpm_linear(), linear()):
        assert torch.allclose(to_scheduler(ours, type(s)).alphas_cumprod.double(), table_of(ours), rtol=1e-4)

def test_flow(net):
    "Rectified flow: their Euler steps are ours in the flow's own space"
    s = scheduler('FlowMatchEulerDiscreteScheduler'); s.set_timesteps(10)
    D = from_diffusers(net, s)
    x = torch.randn(2, 1, 8, 8, generator=gen())
    assert D.target == 'u' and D.schedule.name == 'flow'
    b = sample_ddim(D, x, s.timesteps.double()/1000).x                    # DDIM on a flow is Euler's method
    assert (theirs(net, s, x) - b).abs().max() < 1e-3*b.std()

@pytest.mark.parametrize('kind', ['epsilon', 'v_prediction'])
def test_edm(net, kind):
    "EDM's preconditioning: their Euler steps over sigma are ours"
    s = scheduler('EDMEulerScheduler', prediction_type=kind); s.set_timesteps(15)
    D, x, sigmas = from_diffusers(net, s), 80*torch.randn(2, 1, 8, 8, generator=gen()), s.sigmas[:-1].double()
    b, y = sample_ddim(D, x, D.schedule.t_of(-2*sigmas.log())).x, x
    with torch.no_grad():
        for i in s.timesteps: y = s.step(net(s.scale_model_input(y, i), i).sample, i, y).prev_sample
    assert (y - b).abs().max() < 1e-3*b.std() and D.target == 'F'

@pytest.mark.parametrize(
    'sch', [ddpm_linear(), cosine(),
            table(zero_terminal((1 - torch.linspace(1e-4, .02, 1000, dtype=torch.float64)).cumprod(0)))],
    ids=['table', 'continuous', 'zero SNR'])
def test_oracle_in_their_scheduler(sch):
    "A closed form behind their DDIM: the same as behind ours, and the variance is the data's"
    oracle, x = Gaussian(sch, .25), torch.randn(4000, 1, 2, 2, generator=gen())
    s = to_scheduler(sch, scheduler('DDIMScheduler').__class__, clip_sample=False,
                     prediction_type='v_prediction', timestep_spacing='trailing')
    s.set_timesteps(100)
    out = theirs(ForDiffusers(oracle, target='v'), s, x)
    assert (out - sample_ddim(oracle, x, to_time(s.timesteps)).x).abs().max() < 5e-3 and abs(out.std() - .5) < .03

def test_oracle_in_their_flow():
    "A closed form behind their flow: their Euler steps are ours, and Heun's have the variance of the data"
    oracle, x, out = Gaussian(flow(), .25), torch.randn(4000, 1, 2, 2, generator=gen()), {}
    for name in ('Euler', 'Heun'):
        s = to_scheduler(flow(), scheduler(f'FlowMatch{name}DiscreteScheduler').__class__); s.set_timesteps(20)
        out[name], ts = theirs(ForDiffusers(oracle), s, x), s.timesteps.double()/1000
        if name == 'Euler': assert (out[name] - sample_ddim(oracle, x, ts).x).abs().max() < 1e-4
    assert abs(out['Heun'].std() - .5) < .02 < abs(out['Euler'].std() - .5)

def test_oracle_in_their_edm():
    "A closed form behind EDM's schedulers: their Euler steps are ours, and their multistep has the data's variance"
    oracle, out = Gaussian(edm(), .25), {}
    for name in ('EDMEulerScheduler', 'EDMDPMSolverMultistepScheduler'):
        s = to_scheduler(edm(), scheduler(name).__class__, sigma_data=.3); s.set_timesteps(20)
        net, x = ForDiffusers(oracle, sd=.3), 80*torch.randn(4000, 1, 2, 2, generator=gen()); y = x
        with torch.no_grad():
            for i in s.timesteps: y = s.step(net(s.scale_model_input(y, i), i).sample, i, y).prev_sample
        out[name[3:8]] = y
        if 'Euler' in name:
            b = sample_ddim(oracle, x, edm().t_of(-2*s.sigmas[:-1].double().log())).x
            assert (y - b).abs().max() < 1e-3
    back = schedule_of(s); t = torch.linspace(.1, 1, 9).double()
    assert torch.allclose(back.logsnr(t), edm().logsnr(t))
    assert abs(out['DPMSo'].std() - .5) < .02 < abs(out['Euler'].std() - .5)

def test_transformer():
    "A class-conditional DiT that also predicts a variance"
    from diffusers import DiTTransformer2DModel
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
                                num_layers=1, sample_size=8, num_embeds_ada_norm=10, norm_num_groups=4).eval()
    s, x, y = scheduler('DDIMScheduler'), torch.randn(3, 4, 8, 8, generator=gen()), torch.tensor([1, 2, 3])
    D = from_diffusers(dit, s)
    with torch.no_grad(): want = dit(x, torch.tensor([499]*3), class_labels=y).sample[:,:4]
    assert (torch.allclose(D.predict(x, .5, y), want, atol=1e-6)
            and torch.equal(D.predict(x, .5, y), D.predict(x, .5, dict(class_labels=y))))
    assert D(x, .5, y).shape == x.shape

def test_there_and_back(net):
    "Out through `ForDiffusers` and in again is the identity"
    s = scheduler('DDIMScheduler'); D = from_diffusers(net, s); x = torch.randn(2, 1, 8, 8, generator=gen())
    for t in (.1, .5, .9): assert torch.allclose(from_diffusers(ForDiffusers(D), s)(x, t), D(x, t), atol=1e-4)

def test_refusals():
    with pytest.raises(ValueError, match='no table'): schedule_of(scheduler('ScoreSdeVeScheduler'))
    for bad in (coloured(edm(), power_law((8,), 1.)), coloured(cosine(), power_law((8,), 1.))):
        with pytest.raises(ValueError, match='variance preserving'): ForDiffusers(Gaussian(bad, 1.))
    with pytest.raises(ValueError, match='cannot follow edm'): to_scheduler(edm(), scheduler('DDIMScheduler').__class__)
    cls, warped, half = scheduler('EDMEulerScheduler').__class__, edm(.01, 50., 5.), torch.tensor(.5).double()
    with pytest.raises(ValueError, match='pass rho='): to_scheduler(warped, cls)
    back = schedule_of(to_scheduler(warped, cls, rho=5.))
    assert torch.allclose(back.logsnr(half), warped.logsnr(half))
    with pytest.raises(ValueError, match='outside'): wrap(lambda x, i: x, cosine())(torch.randn(1, 2), 0.)

def test_no_step_before_the_first():
    "A grid may end below the table's first time; the network is told its first step there, and not one before"
    asked = []
    wrap(lambda x, i: asked.append(i.item()) or x, cosine())(torch.randn(1, 2), 1e-4)
    assert asked == [0.]
