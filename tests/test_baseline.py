"The parts of report 04 that need what is not here, CIFAR-10 and the weights that FID means, with stand-ins for both; and what it refuses."
import json
from pathlib import Path
import matplotlib, pytest, torch, torch.nn.functional as F
from spectral_diffusion import data, metrics
from spectral_diffusion.data import Images
from spectral_diffusion.metrics import Extractor

notebook = Path(__file__).parent.parent/'reports'/'04_baseline_e1.ipynb'
code = [''.join(c['source']) for c in json.loads(notebook.read_text())['cells'] if c['cell_type'] == 'code']

def execute(folder, until=None, **parameters):
    "Run the report's cells, the first `until` of them, in one namespace"
    assert 'run_dir:str' in code[0]                                        # the first cell holds the parameters
    names = {}
    for i, c in enumerate(code[:until]):
        exec(compile(c, f'cell {i}', 'exec'), names)
        if not i: names |= parameters | dict(run_dir=str(folder))
    return names

@pytest.fixture
def few(monkeypatch):
    "A few images in the place of all photographs and of CIFAR-10, noise with a colour"
    def images(name, side=8, n=64, m=32):
        g = torch.Generator().manual_seed(0)
        x = F.interpolate(torch.rand(n + m, 3, 4, 4, generator=g), (side, side), mode='bilinear').mul(255).byte()
        return Images(name, x[:n], x[n:])
    monkeypatch.setattr(data, 'photos', lambda *_, **kw: images('photos'))
    monkeypatch.setattr(data, 'cifar10', lambda root: images('cifar10'))
    matplotlib.use('agg')

@pytest.mark.parametrize('kw, error, said', [
    (dict(size='huge'), ValueError, "size 'huge' is unknown: use one of smoke, quick, desk, full"),
    (dict(data='mnist'), ValueError, "data 'mnist' is unknown: use one of photos, cifar10"),
    (dict(size='full', data='photos'), FileNotFoundError, 'download it from')])
def test_refused_before_anything_is_trained(few, tmp_path, monkeypatch, kw, error, said):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path/'empty'))                # nobody's weights
    with pytest.raises(error, match=said): execute(tmp_path, 4, **kw)

def test_fid_of_cifar10(few, tmp_path, monkeypatch):
    "With CIFAR-10 and FID's network the number is called FID, is taken against all training images, and stands beside the seed's"
    look = lambda *_: Extractor(lambda x: F.adaptive_avg_pool2d(x, 2).flatten(1)[:, :8], 'inception', 8, 'a stand-in')
    monkeypatch.setattr(metrics, 'efflite0', look)
    out = execute(tmp_path, data='cifar10')
    claims = {c.name: c for c in out['run'].metrics.claims}
    score = claims['FID, E1, sound, mean of seeds']
    assert out['fid'] and out['m'] == 64 == len(out['ref']) and score.ceiling > score.floor >= 0
    # the seed's number is of ten thousand samples, and fewer make a distance larger
    assert score.seed_value is None and score.samples == 24
    exec(next(c for c in code if 'for k, v in fds.items()' in c), out | dict(n=10_000))
    assert {c.name: c for c in out['run'].metrics.claims}['FID, E1, sound, mean of seeds'].seed_value == 193.18
    assert 'KID, ours, mean of seeds' in claims
    # photographs are no CIFAR-10, whoever looks at them; and features of another network are refused by name
    exec(next(c for c in code if 'fid = ' in c), on_photos := out | dict(data='photos'))
    assert on_photos['FD'] == 'FD-inception'
    out['extractor'].hash = 'other weights'
    with pytest.raises(ValueError, match='the features of .*none.* are not of inception, or too few: delete'):
        exec(next(c for c in code if 'drawn = sweep' in c), out)
