"On a real Slurm: a training that needs more than its job's time limit is requeued, goes on from its checkpoint, and ends with the bits of an uninterrupted one."
import os, subprocess, threading, time
import pytest, slurm_node
from safetensors.torch import load_file
from spectral_diffusion.experiments import *
from spectral_diffusion.runs import *
from test_runner import make_report

required = os.environ.get('SDIFF_SLURM')=='required'       # .ci/run says so: there a skip is a failure
why = slurm_node.missing(install=required)

train = """import time, torch
from safetensors.torch import save_file
from spectral_diffusion.data import Batches, digits
from spectral_diffusion.denoisers import Denoiser
from spectral_diffusion.runs import Run
from spectral_diffusion.schedules import cosine
from spectral_diffusion.training import EMA, Checkpoints, Log, fit
from spectral_diffusion.unets import UNet
class Slow:
    def after_step(self, s): time.sleep(pause)
run = Run(run_dir, report='00_train')
torch.manual_seed(0); g = torch.Generator().manual_seed(0)
D, ema = Denoiser(UNet(2, 1, 16, (1,2), 1, dropout=.2), cosine(), 'v', .5), EMA(.9)
fit(D, Batches(digits().train, 16, g, flip=True), n, generator=g,\
 callbacks=[ema, Log(run, 1), Checkpoints(run.folder/'checkpoints', 5), Slow()])
save_file({**{f'net.{k}': v.contiguous() for k,v in D.state_dict().items()},\
 **{f'ema.{k}': v.contiguous() for k,v in ema.model.state_dict().items()}}, run.folder/'end.safetensors')"""
params = "size:str = 'smoke' # one of: smoke, quick\nn:int = 3\nlr:float = 0.5\npause:float = 0.\nrun_dir:str = ''"

@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MPLBACKEND', 'agg')
    make_report(tmp_path, '00_train', train, params=params)
    make_report(tmp_path, '01_fail', "raise ValueError('n is wrong')")
    return tmp_path

@pytest.mark.slow
@pytest.mark.skipif(bool(why) and not required, reason=why)
def test_a_job_goes_on_after_its_limit(lab):
    "Limit 120 s, work 120 s and a start: signalled by Slurm, requeued, finished; beside it a failing job, and one that is cancelled"
    assert not why, why
    steps, pause = 60, 2.
    with slurm_node.node():
        alone = run_report('00_train', root='alone', progress=False, n=steps)
        cells = [*sweep_cells('00_train', dict(n=[steps]), pause=pause), *sweep_cells('01_fail'),
                 *sweep_cells('00_train', dict(n=[999]), pause=pause)]
        engine = make_engine('slurm', timeout_min=2, slurm_signal_delay_s=30)
        def cancel():
            slurm_node.wait_for(lambda: run_state(cells[2].folder)=='running', 'the third job', 90)
            subprocess.run(['scancel', engine.jobs[cells[2].folder].job_id], check=True)
        (thread := threading.Thread(target=cancel, daemon=True)).start()
        t0 = time.time()
        rows = run_cells(cells, engine)
        thread.join()
    print(f'{time.time()-t0:.0f} s')
    assert [r.state for r in rows]==['finished', 'failed', 'failed'], rows
    assert rows[1].note=='n is wrong' and 'job 3 ended' in rows[2].note, rows
    chained, (tries, last) = cells[0].folder, last_attempt(cells[0].folder)
    first = read_json(chained/'attempts/1.json')
    assert (tries >= 2 and last.restart==tries-1 and first.restart==0 and first.job==last.job
            and last.over-first.at > 120), (first, last)
    # from scratch it would end with the same bits, but it would not be the point
    resumed = [e.step for e in load_run(chained).log if e.event=='resumed']
    assert len(resumed)==tries-1 and min(resumed) > 0, resumed
    a, b = load_file(alone/'end.safetensors'), load_file(chained/'end.safetensors')
    assert a.keys()==b.keys() and all(a[k].equal(b[k]) for k in a)
