"Every long call has a clock: a real bar by hand, progress.json under a runner, nothing in tests; and one clock at a time."
import io, itertools, os, random, tempfile, time
from pathlib import Path
from types import SimpleNamespace
import pytest, torch, tqdm, tqdm.auto
from PIL import Image
from spectral_diffusion import runs
from spectral_diffusion.benchmarks import fresh, interleave
from spectral_diffusion.checkpoints import Store
from spectral_diffusion.codecs import DCAE, Haar, Latent, admit, field_error, train_codec
from spectral_diffusion.data import Batches, Fields, digits, image_folder, to_field
from spectral_diffusion.denoisers import Denoiser, Gaussian
from spectral_diffusion.designs import design, measure
from spectral_diffusion.diagnostics import error_map, learning, triage
from spectral_diffusion.experiments import find_optimal_steps
from spectral_diffusion.guards import study
from spectral_diffusion.metrics import (bootstrap, features, frechet_ci, kid, kid_subsets, nearest, precision_recall,
                                        rapsd_distance)
from spectral_diffusion.recipes import draw, recipe
from spectral_diffusion.rejection import RatioHead, fit_head, sample_diffrs, thresholds
from spectral_diffusion.samplers import optimize_grid, sample_ddim, samplers, unrespaced
from spectral_diffusion.schedules import cosine, flow, grid_logsnr, grid_uniform
from spectral_diffusion.training import fit
from spectral_diffusion.unets import UNet
from spectral_diffusion.volumes import cohort, volume_kid

gen = lambda seed=0: torch.Generator().manual_seed(seed)
D, x, g = Gaussian(flow(), .25), torch.randn(4, 1, 8, generator=gen()), grid_uniform(9, .9, .01)

def judge():
    torch.manual_seed(0); net = Denoiser(UNet(1, 1, 8, (1,), 1), cosine()).eval()
    real = torch.randn(8, 1, 16, generator=gen())
    return fit_head(RatioHead(1, 8, 16), net, real, -real, 6, 4, held=.5, every=3, patience=None, generator=gen())

def look():
    data = digits(); train, test = to_field(data.train), to_field(data.test[:32])
    torch.manual_seed(0)
    return triage(Denoiser(UNet(2, 1, 8, (1,), 1), cosine(), 'v', .5), test, train, sample_ddim,
                  grid_logsnr(cosine(), 5, -6., 6.), steps=4)

def small(): torch.manual_seed(0); return Denoiser(UNet(2, 1, 8, (1,), 1), cosine(), 'v', .5)
def held(): data = digits(); return learning(small().eval(), to_field(data.test[:32]), to_field(data.train[:64]))

def shards(load):
    with tempfile.TemporaryDirectory() as tmp:
        store = Store(tmp, shard=4); store.save(1, dict(x=torch.arange(9)))
        return store.load() if load else None

def pictures():
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp, 'pictures'); folder.mkdir()
        for i in range(9): Image.new('RGB', (9, 9), (28*i, 0, 0)).save(folder/f'{i}.png')
        return image_folder(folder, 8)

def coded(): torch.manual_seed(0); return train_codec(DCAE(1, 1, 2, 2, 4, 8), Fields(x, 2, gen()), 3)

none = lambda x, t: torch.zeros(len(x))
calls = {k: (lambda k=k: samplers[k](D, x, g, generator=gen()), 'restart' if k == 'restart' else 'sample')
         for k in samplers} | {
    'optimize_grid': (lambda: optimize_grid(D, [g], x, m=2, rounds=3, fine=20), 'fit grid'),
    'fit_head': (judge, 'judge'), 'thresholds': (lambda: thresholds(D, none, x, g), 'thresholds'),
    'sample_diffrs': (lambda: sample_diffrs(D, none, x, g, generator=gen()), 'sample'),
    'study': (lambda: study(dict(clip=list), ('nan',), range(2), steps=3), 'study'), 'triage': (look, 'triage'),
    'measure': (lambda: measure(design(dict(a=(0,1), b=(0,1))), lambda a, b, seed: a + b + .1*seed, range(2)),
                'measure'),
    'interleave': (lambda: interleave(dict(a=int, b=int), reps=3), 'rounds'),
    'fit': (lambda: fit(small(), Batches(digits().train, 4, gen()), 3), 'train'), 'learning': (held, 'held-out error'),
    'features': (lambda: features(lambda x: x.flatten(1), torch.randn(300, 1, 4, 4, generator=gen())), 'features'),
    'frechet_ci': (lambda: frechet_ci(*torch.randn(2, 60, 3, generator=gen()), min_n=0), 'jackknife'),
    'error_map': (lambda: error_map(D, x, (0., 1.), 2, gen()), 'error map'),
    'Codec.fit': (lambda: Haar().fit(x, batch=2), 'fit codec'), 'admit': (lambda: admit(Haar(), x, batch=2), 'admit'),
    'field_error': (lambda: field_error(Latent(D, Haar(), (1, 8)), x, (0., 1.), gen()), 'field error'),
    'kid_subsets': (lambda: kid_subsets(*torch.randn(2, 9, 3, generator=gen()), 5, 2, gen()), 'subsets'),
    'kid': (lambda: kid(*torch.randn(2, 3000, 2, generator=gen())), 'kernel'),
    'precision_recall': (lambda: precision_recall(*torch.randn(2, 20, 3, generator=gen())), 'halves'),
    'bootstrap': (lambda: bootstrap(torch.mean, torch.randn(9, generator=gen()), n=9), 'resamples'),
    'rapsd_distance': (lambda: rapsd_distance(*torch.randn(2, 20, 1, 8, 8, generator=gen())), 'jackknife'),
    'volume_kid': (lambda: volume_kid(*torch.randn(2, 16, 3, generator=gen()), 8), 'jackknife'),
    'Store.save': (lambda: shards(False), 'save'), 'Store.load': (lambda: shards(True), 'load'),
    'nearest': (lambda: nearest(*torch.randn(2, 60, 3, generator=gen()), chunk=9), 'neighbours'),
    'unrespaced': (lambda: unrespaced(D, x, g, generator=gen()), 'sample'), 'train_codec': (coded, 'codec'),
    'draw': (lambda: draw(recipe('small'), small().eval(), 4, (1, 8, 8), nfe=3, batch=2), 'sample'),
    'cohort': (lambda: cohort(16, 2, 1), 'volumes'), 'image_folder': (pictures, 'pictures'),
    'find_optimal_steps': (lambda: find_optimal_steps(lambda n: SimpleNamespace(value=1/n, low=0.), (2, 4)),
                           'step counts'),
    'fresh': (lambda: fresh(dict(a=('builtins:eval', 'int')), reps=3), 'rounds')}

# bars that come before or after, one at a time
before = dict(optimize_grid={'sample'}, sample_diffrs={'thresholds'}, fresh={'prepare'}, fit_head={'resamples'},
              **{'Store.load': {'save', 'check'}})

@pytest.fixture
def hand(monkeypatch):
    "As by hand in a terminal, with a clock that goes on by a second at every look; what is drawn"
    for k in ('IN_TEST', 'SDIFF_QUIET'): monkeypatch.delenv(k, raising=False)
    monkeypatch.setattr(runs, 'time', SimpleNamespace(**vars(time) | dict(time=itertools.count().__next__)))
    drawn = io.StringIO(); monkeypatch.setattr(tqdm.auto, 'tqdm', lambda **kw: tqdm.tqdm(**kw, file=drawn))
    return drawn

@pytest.mark.parametrize('name', calls)
def test_bar_by_hand(name, hand):
    "It is drawn under its name, and comes to its end; loops inside have no bar of their own"
    f, desc = calls[name]; f()
    lines = [l for l in hand.getvalue().replace('\n', '\r').split('\r') if l.strip()]
    assert any(l.startswith(desc) and '100%' in l for l in lines), lines
    begun = {l.split(':')[0] for l in lines if '  0%' in l}
    assert begun <= {desc, 'sample (%)'} | before.get(name, set()), begun
    assert not runs._loops                                                    # nothing is left under way

@pytest.mark.parametrize('name', calls)
def test_silent_in_tests(name, capsys):
    calls[name][0]()
    assert not capsys.readouterr().err

@pytest.mark.parametrize('name', ['ddim', 'fit_head', 'sample_diffrs', 'study', 'triage', 'interleave'])
def test_file_under_a_runner(name, tmp_path, monkeypatch):
    "The runner reads what is done, of how much, and how long it will take; the file goes, and inner loops do not take it away"
    seen, write, (f, desc) = [], runs.write_json, calls[name]
    run = runs.Run(tmp_path/'run')
    monkeypatch.setenv('SDIFF_QUIET', '1')
    monkeypatch.setattr(runs, 'time', SimpleNamespace(**vars(time) | dict(time=itertools.count().__next__)))
    monkeypatch.setattr(runs, 'write_json', lambda path, o: (seen.append(o), write(path, o)))
    f()
    mine = [o for o in seen if o['desc'].split(' (')[0] == desc]
    assert (mine[0]['done'] < mine[-1]['done'] == mine[-1]['total']
            and any(o['eta_s'] and o['eta_s'] > 0 for o in mine[:-1]))
    assert not (run.folder/'progress.json').exists()
    if name in ('study', 'triage'): assert any('(train' in o['desc'] for o in mine)

def test_same_numbers_with_and_without(hand):
    "A clock draws no random number and changes no result"
    before = torch.get_rng_state(), random.getstate()
    with_clock = {k: samplers[k](D, x, g, generator=gen()).x for k in samplers}; os.environ['IN_TEST'] = '1'
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    try:
        for k, v in with_clock.items(): assert torch.equal(v, samplers[k](D, x, g, generator=gen()).x), k
    finally: del os.environ['IN_TEST']

def test_one_bar_for_a_loop_of_samplers(hand):
    for _ in runs.progress(range(3), desc='batches'): sample_ddim(D, x, g)
    text = hand.getvalue()
    assert 'sample:' not in text and 'sample 9/9]' in text and 'batches: 100%' in text

def test_an_error_leaves_no_bar_behind(hand):
    def broken(x, t): raise RuntimeError('broken')
    broken.schedule = flow()
    for _ in range(2):
        with pytest.raises(RuntimeError, match='broken'): sample_ddim(broken, x, g)
        assert not runs._loops

def test_worker_forked_inside_a_loop_is_silent(hand):
    r, w = os.pipe()
    for _ in runs.progress(range(1), desc='parent'):
        if not (pid := os.fork()):
            drawn = hand.getvalue(); [*runs.progress(range(5), desc='child')]
            os.write(w, b'quiet' if hand.getvalue() == drawn else b'loud'); os._exit(0)
        os.waitpid(pid, 0)
    assert os.read(r, 9) == b'quiet'
