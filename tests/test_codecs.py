"Codecs: rotations in every dimension, statistics and files, whole pipelines through a latent space, and the refusals."
import math
from types import SimpleNamespace
import hypothesis.strategies as st, pytest, torch
from hypothesis import given, settings
from safetensors.torch import load_file, save_file
from spectral_diffusion.codecs import (DCT, Blocks, Codec, DCAE, Encoded, Haar, InField, Latent,
                                       PerBand, PrefixLoss, SpaceToDepth, admit, block_average, block_matrix,
                                       codebook_use, digest, field_error, latent_shape, load_codec, prefix,
                                       principal, save_codec, to_channels, train_codec)
from spectral_diffusion.data import Batches, digits, to_field
from spectral_diffusion.denoisers import Denoiser, Gaussian, Linear
from spectral_diffusion.fourier import Noise, power_law
from spectral_diffusion.guards import guards
from spectral_diffusion.samplers import sample_dpmpp2m
from spectral_diffusion.schedules import cosine, flow, grid_edm
from spectral_diffusion.training import Checkpoints, Log, fit
from spectral_diffusion.transformers import DiT
from spectral_diffusion.unets import UNet
torch.set_num_threads(1)
gen = lambda s=0: torch.Generator().manual_seed(s)

@pytest.fixture(scope='module')
def data(): return digits()

@settings(max_examples=40, deadline=None)
@given(st.sampled_from(['fold', 'haar', 'dct']), st.sampled_from([1, 2, 4]),
       st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(1, 3))
def test_rotations(basis, k, cells, channels):
    "Exact inverse, energy, shape, and white noise that stays white"
    c, S = Blocks(basis, k), [k*n for n in cells]
    x = torch.randn(2, channels, *S, generator=gen()); z = c.encode(x)
    assert (torch.allclose(c.decode(z), x, atol=1e-6*k**len(S)**.5*4)
            and math.isclose(z.square().sum(), x.square().sum(), rel_tol=1e-4))
    assert tuple(z.shape[1:]) == latent_shape(c, (channels, *S)) == (channels*k**len(S), *cells)
    M = c.encode(torch.eye(math.prod(S)).view(-1, 1, *S)).flatten(1)
    assert torch.allclose(M @ M.T, torch.eye(len(M)), atol=1e-5)

@pytest.mark.parametrize('S', [(16,), (8, 12), (4, 8, 4)])
def test_haar_is_pywavelets_haar(S):
    pywt = pytest.importorskip('pywt'); d = len(S)
    x = torch.randn(2, 1, *S, generator=gen()); z = Haar().encode(x)
    want = pywt.dwtn(x[:,0].numpy(), 'haar', axes=range(1, d+1))
    for i in range(2**d):
        name = ''.join('ad'[i >> (d-1-j) & 1] for j in range(d))
        assert torch.allclose(z[:,i], torch.from_numpy(want[name]), atol=1e-5), name
    two = pywt.wavedecn(x[:,0].numpy(), 'haar', level=2, axes=range(1, d+1))
    assert torch.allclose(Haar(2).encode(x)[:,0], torch.from_numpy(two[0]), atol=1e-5)

def test_gradients_pass_through():
    for c in (SpaceToDepth(), Haar(2), DCT(4)):
        x = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: c.decode(c.encode(x)**2), x)

@pytest.mark.parametrize('codec', [Codec(), Haar(), DCT(4), SpaceToDepth(2)])
def test_unit_variance(codec, data):
    x = (to_field(data.train[:400])[..., :8, :8] + torch.randn(1, 1, 8, 8, generator=gen())*.1
         + .3*torch.randn(400, 1, 8, 8, generator=gen(1)))
    z = codec.fit(x, batch=77).encode(x).transpose(0, 1).flatten(1)
    assert torch.allclose(z.var(1), torch.ones(len(z)), atol=5e-3) and z.mean(1).abs().max() < 1e-4
    far = codec.fit(x + 1000, batch=77).encode(x + 1000).transpose(0, 1).flatten(1)
    assert torch.allclose(far.var(1), torch.ones(len(z)), atol=.01)

def test_image_and_mask_apart_and_kept(tmp_path):
    x, m = torch.randn(50, 1, 8, 8, generator=gen()), (torch.rand(50, 1, 8, 8, generator=gen()) < .1).float()
    torch.manual_seed(0); c = DCAE(2, 1, 4, 4, base=8, most=8, options=(2, 4)).fit(x).fit(m, 'mask')
    f = tmp_path/'c.safetensors'
    save_codec(c, f); d = load_codec(f)
    assert (digest(d) == digest(c) and d.config == c.config
            and torch.equal(d.encode(m, 'mask'), c.encode(m, 'mask'))
            and torch.equal(d.decode(c.encode(x)), c.decode(c.encode(x))))
    assert not torch.equal(c.encode(m), c.encode(m, 'mask'))
    with torch.no_grad(): c.inner.bias += 1
    for f_ in (c.check, lambda: save_codec(c, f), lambda: Latent(Gaussian(flow(), 1.), c, (1, 8, 8)),
               lambda: Encoded(iter(()), c)):
        with pytest.raises(ValueError, match='fit them again'): f_()

def test_a_file_of_other_weights(tmp_path):
    torch.manual_seed(0); a, b = (DCAE(2, 1, 4, 4, base=8, most=8).fit(torch.randn(9, 1, 8, 8)) for _ in range(2))
    save_codec(a, tmp_path/'a.safetensors'); save_codec(b, tmp_path/'b.safetensors')
    from safetensors import safe_open
    with safe_open(tmp_path/'a.safetensors', 'pt') as f: about = f.metadata()
    save_file(load_file(tmp_path/'b.safetensors'), tmp_path/'c.safetensors', metadata=about)
    with pytest.raises(ValueError, match='the file was changed'): load_codec(tmp_path/'c.safetensors')
    torch.save({}, tmp_path/'x.pt')
    with pytest.raises(ValueError, match='pickle'): load_codec(tmp_path/'x.pt')

@pytest.mark.parametrize('net,what', [
    (lambda: UNet(2, 8, 8, (1,), 1), 'expected input'), (lambda: UNet(3, 4, 8, (1,), 1), 'error'),
    (lambda: DiT(2, 4, 8, 48, 1, 3), 'cannot be cut'),
    (lambda: DiT(2, 4, 2, 48, 1, 3, out=3), 'error|answers with')])
def test_a_pair_that_does_not_fit(net, what):
    "Refused when it is built, in one line that names both shapes"
    with pytest.raises(ValueError, match=rf'latents of \(4, 4, 4\).*({what})') as e:
        Latent(Denoiser(net(), flow(), 'u'), Haar(), (1, 8, 8))
    assert '\n' not in str(e.value)

def test_rotated_training_is_training():
    "The same linear denoiser, error and samples in voxels and in wavelets"
    S = power_law((8, 8), 2.); S = .3*S/S.mean()
    x = Noise(S)((3000, 1, 8, 8), gen())*.3**.5; test = Noise(S)((500, 1, 8, 8), gen(1))*.3**.5
    lams = (-2., 2.); err = {}
    for k, c in dict(voxels=Codec(), wavelets=Haar(), folded=SpaceToDepth()).items():
        L = Latent(Linear(cosine(), c.encode(x)), c, (1, 8, 8)); err[k] = field_error(L, test, lams, gen(2))
    assert (torch.allclose(err['voxels'], err['wavelets'], rtol=.05)
            and torch.allclose(err['voxels'], err['folded'], rtol=.05))

@pytest.mark.parametrize('codec', [SpaceToDepth(), Haar()])
def test_train_sample_decode_resume(codec, data, tmp_path):
    "Data, codec, network, guards, checkpoints and sampler fit together; a resumed run is the same run"
    def go(steps, folder, stop=0):
        def halt(s):
            if s.step == stop: raise KeyboardInterrupt
        torch.manual_seed(0); D = Denoiser(UNet(2, 4, 16, (1,), 1), cosine(), 'v'); log = Log()
        c = type(codec)(**codec.config).fit(to_field(data.train))
        b = Encoded(Batches(data.train, 16, gen()), c); probe = c.encode(to_field(data.train[:32]))
        s = fit(D, b, steps, 3e-3, generator=gen(1), warmup=5,
                callbacks=[log, SimpleNamespace(after_step=halt), Checkpoints(folder, every=10),
                           *guards(probe, look=20)])
        return D, c, log.curve(), [e['step'] for e in s.events if e['what'] == 'resumed']
    D, c, curve, _ = go(40, tmp_path/'a'); assert curve[-10:].mean() < .95*curve[:3].mean()
    L = Latent(D, c, (1, 8, 8), clamp=True)
    x = c.decode(sample_dpmpp2m(L, torch.randn(4, *L.shape, generator=gen(3)), grid_edm(cosine(), 8)).x)
    assert x.shape == (4, 1, 8, 8) and x.isfinite().all() and x.abs().max() <= 1 + 1e-4
    with pytest.raises(KeyboardInterrupt): go(40, tmp_path/'b', 17)
    E, *_, begun = go(40, tmp_path/'b'); assert begun == [10]
    assert all(torch.equal(a, b) for a, b in zip(D.parameters(), E.parameters()))

def test_clamp_limits_answers_in_the_field():
    x = 3*torch.randn(4, 1, 8, 8, generator=gen())
    for clamp in (False, True):
        L = Latent(Gaussian(flow(), 9.), Haar(), (1, 8, 8), clamp=clamp)
        top = L.codec.decode(L(L.codec.encode(x), .01)).abs().max()
        assert (top <= 1 + 1e-5) == clamp

@pytest.mark.parametrize('S', [(32,), (16, 16), (8, 8, 8)])
def test_learned_codecs_learn(S):
    "In every dimension a few steps help, and an untrained one does not pass the gate"
    base = Noise(power_law(S, 3.)); x = .5*base((64, 1, *S), gen()); torch.manual_seed(0); d = len(S)
    c = DCAE(d, 1, 4, 4, base=8, most=16)
    with pytest.raises(ValueError, match='needed are 3'): admit(c, x)
    class Same:
        def __next__(self): return x[:16]
    err = train_codec(c, Same(), 40, 1e-2); assert err[-5:].mean() < .6*err[:3].mean() and not c.training
    assert admit(Codec(), x).value == math.inf

@pytest.mark.parametrize('f', [2, 8, 32, 128])
def test_stages(f):
    with torch.device('meta'): assert latent_shape(DCAE(2, 3, 8, f, base=8, most=16), (3, 2*f, 3*f)) == (8, 2, 3)

def test_block_average_takes_the_better():
    x = torch.ones(1, 1, 8, 8); x[..., 4:] = -1
    assert torch.equal(block_average(x, (4, 4)), x)                  # repeating is exact
    ramp = torch.linspace(-1, 1, 32).expand(1, 1, 32, 32)
    near = torch.nn.functional.avg_pool2d(ramp, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert (block_average(ramp, (4, 4)) - ramp).square().mean() < .5*(near - ramp).square().mean()

@pytest.mark.parametrize('S', [(8, 8), (4, 4, 4)])
def test_prefix_through_adam(S):
    "Channels that sit out do not move, even with an optimiser that remembers"
    torch.manual_seed(0); D = Denoiser(UNet(len(S), 4, 8, (1,), 1), flow(), 'u')
    w = D.net.head[-1].weight.detach().clone()
    x = torch.randn(16, 4, *S, generator=gen())
    class Same:
        def __iter__(self): return self
        def __next__(self): return x
    fit(D, Same(), 5, 1e-2, warmup=0, loss=PrefixLoss((2,), gen()), generator=gen(1))
    assert not torch.equal(D.net.head[-1].weight[:2], w[:2]) and torch.equal(D.net.head[-1].weight[2:], w[2:])
    assert torch.equal(prefix(x, 2)[:, 2:], torch.zeros(16, 2, *S)) and torch.equal(prefix(x, 4), x)

def test_quantiser():
    pytest.importorskip('vector_quantize_pytorch')
    from spectral_diffusion.codecs import VQVAE
    torch.manual_seed(0); x = torch.randn(8, 1, 16, 16)
    class Same:
        def __next__(self): return x
    V = VQVAE(2, 1, 4, 4, base=8, most=16, codes=32); train_codec(V, Same(), 30); V.fit(x)
    z = V.encode(x); assert z.shape == (8, 4, 4, 4) and abs(z.var().item() - 1) < .05
    i = V.quantise(V.analyse(x))[1].unique(return_counts=True)[1]; p = i/i.sum()
    used, perplexity = codebook_use(V, x)
    assert used == len(p)/32 and perplexity == pytest.approx(math.exp(-(p*p.log()).sum()), rel=1e-5)
    q = V.quantise(V.analyse(x))[0]; assert torch.allclose(V.quantise(q)[0], q, atol=1e-5)

def test_match():
    x = torch.arange(8.).view(1, 8, 1)
    assert (to_channels(x, 4).flatten().tolist() == [.5, 2.5, 4.5, 6.5]
            and to_channels(to_channels(x, 16), 8).equal(x))

@pytest.mark.parametrize('S', [(16,), (8, 8), (4, 4, 4)])
def test_preconditioning_turns_with_the_field(S):
    "Folded blocks with Haar's axes are wavelets, for the same network"
    d = len(S); C = 2**d
    torch.manual_seed(0); net = UNet(d, C, 8, (1,), 1); torch.nn.init.normal_(net.head[-1].weight, std=.1)
    s = torch.linspace(2, .1, C); x = torch.randn(3, 1, *S); t = torch.tensor([.1, .5, .9])
    wave = InField(Latent(Denoiser(PerBand(net, s, .7), flow(), 'x0', .7), Haar(), (1, *S)))
    fold = InField(Latent(Denoiser(PerBand(net, s, .7, block_matrix('haar', 2, d)), flow(), 'x0', .7),
                          SpaceToDepth(), (1, *S)))
    assert torch.allclose(wave(x, t), fold(x, t), atol=1e-4)

def test_principal_axes():
    Q = torch.linalg.qr(torch.randn(4, 4, generator=gen()))[0]; s = torch.tensor([3., 1., .3, .1])
    z = torch.einsum('ij,bjxy->bixy', Q, s.view(-1, 1, 1)*torch.randn(500, 4, 8, 8, generator=gen(1)))
    dev, axes = principal(z)
    assert torch.allclose(dev, s, rtol=.02) and torch.allclose((axes @ Q).abs(), torch.eye(4), atol=.03)
    assert principal(z[:, :1])[1].shape == (1, 1)

def test_a_scaled_codec_has_no_denoiser_of_fields():
    with pytest.raises(ValueError, match='does not keep white noise white'):
        InField(Latent(Gaussian(flow(), 1.), Haar().fit(torch.randn(9, 1, 8, 8)), (1, 8, 8)))

def test_further_terms_are_heard():
    x = .5*torch.randn(16, 1, 8, 8, generator=gen()) + .5
    class Same:
        def __next__(self): return x
    def mean(terms):
        torch.manual_seed(0); c = DCAE(2, 1, 2, 4, base=8, most=8); train_codec(c, Same(), 30, terms=terms)
        return c.decode(c.encode(x)).mean().item()
    assert mean((lambda y, x: 30*(y.mean() + 1)**2,)) < mean(()) - .5
