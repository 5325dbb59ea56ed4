"Each fault that a broken run of the past had is planted in a training that is otherwise sound, and has to be seen."
import pytest, torch
from spectral_diffusion.data import Batches, digits, to_field
from spectral_diffusion.denoisers import Denoiser
from spectral_diffusion.diagnostics import (check_gaussian, check_one_image, check_range, check_steps,
                                            check_time, check_weights)
from spectral_diffusion.embeddings import waves
from spectral_diffusion.samplers import Sample, sample_ddim, unrespaced
from spectral_diffusion.schedules import cosine, grid_edm
from spectral_diffusion.training import EMA, fit
from spectral_diffusion.unets import UNet

gen = lambda s=0: torch.Generator().manual_seed(s)
grid = grid_edm(cosine(), 20, smin=.01)

@pytest.fixture(scope='module')
def images(): d = digits(); return d.train, to_field(d.test[:128])

def trained(images, steps=60, ema=EMA):
    "A small model after a short training: the denoiser and its averaged copy"
    torch.manual_seed(0)
    D, avg = Denoiser(UNet(2, 1, 16, (1,2), 1), cosine(), 'v', .75), ema(.9)
    fit(D, Batches(images[0], 32, gen()), steps, 3e-3, generator=gen(), callbacks=[avg])
    return D, avg.model

@pytest.fixture(scope='module')
def sound(images): return trained(images)

def test_sound_model_passes(images, sound):
    D, avg = sound
    checks = [check_steps(sample_ddim, D.schedule, grid, images[1], gen()),
              check_gaussian(sample_ddim, D.schedule, grid, images[1], gen()),
              check_range(to_field(images[0]), images[1]), check_time(avg, images[1], gen()),
              check_weights(avg, D, images[1]), check_one_image(D, sample_ddim, grid, images[1][:1], steps=80)]
    assert all(c.ok for c in checks), checks

def test_unwired_average_is_seen(images, monkeypatch):
    "The callback is there, but its update does nothing"
    monkeypatch.setattr(EMA, 'after_step', lambda self, s: None)
    D, avg = trained(images)
    torch.nn.init.normal_(avg.net.head[2].weight, std=.02)          # also when the start is not silent
    assert not check_weights(avg, D, images[1]).ok

def test_inverted_frequencies_are_seen(images, monkeypatch):
    monkeypatch.setattr('spectral_diffusion.embeddings.waves',
                        lambda x, dim, low=.05, high=2.: waves(cosine().t_of(x.double()).float()*1000, dim, 1., 1e4))
    _, avg = trained(images)
    assert not check_time(avg, images[1], gen()).ok

def test_range_mix_up_is_seen(images): assert not check_range(to_field(images[0])/2 + .5, images[1]).ok

def test_unrespaced_sampler_is_seen(images):
    assert (not check_steps(unrespaced, cosine(), grid, images[1], gen()).ok
            and not check_gaussian(unrespaced, cosine(), grid, images[1], gen()).ok)

def test_wrong_target_is_seen(images, sound):
    "Trained as v, read as eps"
    from spectral_diffusion.training import denoising_loss
    as_v = lambda D, *a: denoising_loss(Denoiser(D.net, D.schedule, 'v', D.sd), *a)
    assert not check_one_image(Denoiser(sound[0].net, cosine(), 'eps', .75), sample_ddim, grid, images[1][:1],
                               as_v, steps=80).ok

def test_one_image_with_and_without_its_mean(images, sound):
    "Wrong colours, the picture itself gone, and both: the mean counts where it is asked for, the picture always"
    def made(change): return lambda *a, **kw: Sample(change(sample_ddim(*a, **kw).x), 0)
    shifted, flat = made(lambda x: x + .8), made(lambda x: x.mean((2,3), keepdim=True).expand_as(x))
    said = [[check_one_image(sound[0], f, grid, images[1][:1], steps=80, mean=m).ok for m in (True, False)]
            for f in (sample_ddim, shifted, flat)]
    assert said == [[True, True], [False, True], [False, False]]
    assert not check_steps(shifted, cosine(), grid, images[1], gen()).ok     # what is left aside there is seen here
