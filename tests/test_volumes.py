"Volumes: every order of axes, and whole pipelines in 3-D."
import itertools
import numpy as np, pytest, torch
nib = pytest.importorskip('nibabel'); pytest.importorskip('nilearn')
from spectral_diffusion.data import to_field, to_uint8
from spectral_diffusion.denoisers import Denoiser
from spectral_diffusion.metrics import dice, ms_ssim, psnr
from spectral_diffusion.samplers import sample_ddim
from spectral_diffusion.schedules import cosine, flow, grid_uniform
from spectral_diffusion.training import Log, fit
from spectral_diffusion.transformers import DiT
from spectral_diffusion.unets import UNet
from spectral_diffusion.volumes import CaseBatches, cohort, diameters, nifti_folder, read_nifti, size_bins, triplanar
torch.set_num_threads(1)
gen = lambda s=0: torch.Generator().manual_seed(s)

@pytest.fixture(scope='module')
def ds(): return cohort(16, 24, 8, seed=3)

def test_every_order_of_axes(tmp_path):
    "6 permutations x 8 mirrorings"
    x = torch.rand(10, 12, 14, generator=gen()).numpy(); im = nib.Nifti1Image(x, np.diag([5., 4, 3, 1])); want = None
    for axes in itertools.permutations(('LR', 'PA', 'IS')):
        for codes in itertools.product(*axes):
            o = nib.orientations.ornt_transform(nib.io_orientation(im.affine), nib.orientations.axcodes2ornt(codes))
            f = tmp_path/f"{''.join(codes)}.nii"; nib.save(im.as_reoriented(o), f)
            got = read_nifti(f, (8,)*3, 6.)
            want = got if want is None else want
            assert torch.allclose(got, want, atol=1e-5), codes

def test_scanner_that_stands_at_an_angle(tmp_path):
    "A rotation in the affine is not a reason to resample: the array stays on its own axes"
    a = .2; R = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    x = torch.rand(8, 8, 8, generator=gen()).numpy()
    for name, M in [('straight', np.eye(3)), ('oblique', R)]:
        A = np.eye(4); A[:3,:3] = M*4; nib.save(nib.Nifti1Image(x, A), tmp_path/f'{name}.nii')
    got = [read_nifti(tmp_path/f'{n}.nii', (8,)*3, 4.) for n in ('straight', 'oblique')]
    assert torch.allclose(*got, atol=1e-4) and torch.allclose(got[0][0], torch.from_numpy(x), atol=1e-4)

@pytest.mark.parametrize('make', [lambda: UNet(3, 1, 8, (1, 2), 1), lambda: DiT(3, 1, 4, 48, 2, 3, span=(16,)*3)])
def test_train_and_sample(ds, make):
    "Data, network, training, sampling and bytes fit together in 3-D, for two schedules"
    for sch, target in [(cosine(), 'v'), (flow(), 'u')]:
        torch.manual_seed(0); log = Log(); D = Denoiser(make(), sch, target, .5)
        fit(D, CaseBatches(ds.train, 4, gen(), lambda image, mask, bins: image), 24, lr=3e-3, warmup=5,
            generator=gen(1), callbacks=[log])
        c = log.curve(); assert c[-8:].mean() < .85*c[:4].mean()
        x = sample_ddim(D, sch.prior((2, 1, 16, 16, 16), gen(2)), grid_uniform(4)).x
        assert to_uint8(x).shape == (2, 1, 16, 16, 16) and x.isfinite().all()
        assert [len(s) for s in triplanar(x)] == [6]*3

def test_masks_as_fields(ds):
    x, bins = next(CaseBatches(ds.train, 8, gen(), lambda image, mask, bins: (mask, bins)))
    assert (size_bins(x, ds.mm) == bins).all() and set(x.unique().tolist()) == {0., 1.}
    assert ((dice(x, x) == 1) | (x.flatten(1).sum(1) == 0)).all()

def test_metrics_of_volumes(ds):
    x = to_field(ds.test.image); near = (x + .05*torch.randn(x.shape, generator=gen())).clamp(-1, 1); far = x.roll(1, 0)
    assert (psnr(near, x) > psnr(far, x)).all() and (ms_ssim(near, x) > ms_ssim(far, x)).all()

@pytest.mark.parametrize('r', [1.5, 4., 9.])
@pytest.mark.parametrize('mm', [1., 2.])
def test_balls_measure_their_diameter(r, mm):
    p = (torch.stack(torch.meshgrid(*[torch.arange(24.)]*3, indexing='ij'), -1) - 11.3)*mm
    d = diameters((p.norm(dim=-1) < r*mm).float(), mm)
    assert len(d) == 1 and abs(d.item() - 2*r*mm) < .6*mm

def test_one_volume_is_refused(tmp_path):
    nib.save(nib.Nifti1Image(np.random.rand(4, 4, 4).astype(np.float32), np.eye(4)), tmp_path/'a.nii')
    with pytest.raises(ValueError, match='holds 1 volumes'): nifti_folder(tmp_path)
