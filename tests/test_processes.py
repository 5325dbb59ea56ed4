"Two processes make the run that one makes: the network copied to both, going on from its own checkpoint, then cut up between them."
import os, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
import psutil, torch

def train(folder, accelerator=None, stop=None, steps=8):
    "A short run that may be stopped by an error; its losses, and the averaged weights"
    from spectral_diffusion.data import Batches, digits
    from spectral_diffusion.denoisers import Denoiser
    from spectral_diffusion.schedules import cosine
    from spectral_diffusion.training import EMA, Checkpoints, Log, fit
    from spectral_diffusion.unets import UNet
    class Stopped:
        def after_step(self, s): assert s.step != stop
    first = []; begun = SimpleNamespace(after_step=lambda s: first.append(s.step))
    torch.manual_seed(0); g = torch.Generator().manual_seed(0)
    D, ema, log = Denoiser(UNet(2, 1, 16, (1,2), 1), cosine(), 'v', .5), EMA(.9), Log()
    try:
        s = fit(D, Batches(digits().train, 16, g, flip=True), steps, generator=g,
                callbacks=[ema, log, begun, Stopped(), Checkpoints(folder, 3)], accelerator=accelerator)
    except AssertionError: s = None
    if accelerator: assert first[0] == (4 if stop == 7 else 7 if stop is None else 1), first   # from its own checkpoint
    if s is None: return
    return log.curve(), torch.cat([p.flatten() for p in ema.model.parameters()]), s

def by_the_clock(acc):
    "A second of training, of which the second process believes that half is over: steps and time of this one"
    from spectral_diffusion.data import Batches, digits
    from spectral_diffusion.denoisers import Denoiser
    from spectral_diffusion.schedules import cosine
    from spectral_diffusion.training import Clock, fit
    from spectral_diffusion.unets import UNet
    torch.manual_seed(0); D, clock = Denoiser(UNet(2, 1, 8, (1,), 1), cosine(), 'v', .5), Clock(1/60)
    ahead = SimpleNamespace(ready=lambda s: setattr(clock, 'spent', .5*acc.process_index))
    s = fit(D, Batches(digits().train, 16, torch.Generator().manual_seed(0)), 1000,
            generator=torch.Generator().manual_seed(0), callbacks=[clock, ahead], accelerator=acc)
    return s.step, clock.spent

def main(folder, how):
    from accelerate import Accelerator
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    torch.set_num_threads(1); acc = Accelerator(cpu=True)
    if how == 'sharded':       # accelerate offers sharding on accelerators only: on CPUs its type is set by hand
        acc.state.distributed_type, acc.state.fsdp_plugin = (
            DistributedType.FSDP, FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True))
    result = train(folder/'run', acc, dict(copied=5, again=7).get(how))
    if how == 'again':
        steps, spent = by_the_clock(acc); both = acc.gather(torch.tensor([steps])).tolist()
        assert both == [steps]*2 and spent >= 1, (both, spent)                                  # they end together
    if how == 'sharded':
        local = next(result[2].denoiser.parameters())
        assert local.to_local().numel()*2 == local.numel() and acc.num_processes == 2        # really cut up
        if acc.is_main_process: torch.save(result[:2], folder/'result.bin')
    torch.distributed.destroy_process_group()            # or threads of gloo may outlive the interpreter, and abort

def launch(folder, how):
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
                        __file__, str(folder), how],
                       capture_output=True, text=True, timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert r.returncode == 0, r.stderr[-3000:]

def test_two_processes_make_the_run_of_one(tmp_path):
    losses, weights, _ = train(tmp_path/'alone')
    launch(tmp_path, 'copied'); launch(tmp_path, 'again'); launch(tmp_path, 'sharded')
    losses2, weights2 = torch.load(tmp_path/'result.bin', weights_only=True)
    torch.testing.assert_close(losses2, losses, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights2, weights, rtol=1e-3, atol=1e-4)

naps = """
import os, sys, time
from collections import namedtuple
from spectral_diffusion.checkpoints import kept
Nap = namedtuple('Nap', 'i')
def nap(j): print(os.getpid(), flush=True); time.sleep(600)
kept([Nap(0), Nap(1)], nap, sys.argv[1], workers=2)
"""

def test_workers_follow_a_killed_run(tmp_path):
    "kill -9 of a process whose jobs run in others: they are gone within seconds, so that they cannot meet those of the next try"
    p = subprocess.Popen([sys.executable, '-c', naps, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    workers = [psutil.Process(int(p.stdout.readline())) for _ in range(2)]
    assert all(w.ppid() == p.pid for w in workers)
    p.kill(); p.wait()
    def left(w):
        try: return w.status() != psutil.STATUS_ZOMBIE                     # nobody may be there to bury it
        except psutil.NoSuchProcess: return False
    end = time.time() + 10
    while any(map(left, workers)) and time.time() < end: time.sleep(.1)
    alive = [w for w in workers if left(w)]
    for w in alive: w.kill()
    assert not alive

if __name__ == '__main__': main(Path(sys.argv[1]), sys.argv[2])
