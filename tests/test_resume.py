"A run that is killed with SIGKILL, at any moment and in the middle of a save too, ends with the same bits; so does one that several processes share."
import os, random, signal, subprocess, sys, time
from pathlib import Path
import pytest

def train(folder, steps=10, every=2):
    "A run in which every kind of randomness matters; its last weights, averages and losses as one tensor"
    import torch
    from spectral_diffusion.data import Batches, digits
    from spectral_diffusion.denoisers import Denoiser
    from spectral_diffusion.schedules import cosine
    from spectral_diffusion.training import EMA, Checkpoints, Log, fit
    from spectral_diffusion.unets import UNet
    torch.manual_seed(0); g = torch.Generator().manual_seed(0)
    D, ema, log = Denoiser(UNet(2, 1, 16, (1,2), 1, dropout=.2), cosine(), 'v', .5), EMA(.9), Log()
    s = fit(D, Batches(digits().train, 16, g, flip=True), steps, generator=g,
            callbacks=[ema, log, Checkpoints(folder, every, shard=2**18)])
    begun = ([0] + [e['step'] for e in s.events if e['what'] == 'resumed'])[-1]
    return begun, torch.cat([x.double().flatten()
                             for x in (*D.state_dict().values(), *ema.model.state_dict().values(), log.curve())])

def child(folder, out=None):
    "Train in a forked process; its pid"
    if pid := os.fork(): return pid
    try:
        begun, x = train(folder)
        if out: out.with_suffix('.from').write_text(str(begun)); out.write_bytes(x.numpy().tobytes())
        os._exit(0)
    finally: os._exit(1)

def kill(pid, folder, rng, seconds):
    "SIGKILL at a random time, or as soon as the n-th temporary file of a save shows up; how it was"
    t0, n, saving, seen = time.time(), rng.randint(1, 25), rng.random() < .5, set()
    after = rng.uniform(0, seconds)
    while not os.waitpid(pid, os.WNOHANG)[0]:
        if saving: seen |= {p for p in folder.rglob('*tmp*')} if folder.exists() else set()
        if (len(seen) >= n) if saving else time.time()-t0 > after:
            os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
            return 'in a save' if saving else 'at a random time'
        if not saving: time.sleep(.002)
    return 'not at all'

def main(root, kills):
    # once, before the forks
    import torch._dynamo, torch.distributed.checkpoint.state_dict, sklearn.datasets, \
           spectral_diffusion.training, spectral_diffusion.unets, spectral_diffusion.data
    from spectral_diffusion.checkpoints import Store
    torch.set_num_threads(1); rng, how, begun = random.Random(0), [], []
    t0 = time.time(); os.waitpid(child(root/'whole', root/'whole.bin'), 0); seconds = time.time()-t0
    for i in range(kills):
        folder, out = root/f'run{i}', root/f'run{i}.bin'
        for _ in range(rng.randint(1, 2)): how.append(kill(child(folder), folder, rng, seconds))
        kept = Store(folder).steps(); os.waitpid(child(folder, out), 0)
        assert out.read_bytes() == (root/'whole.bin').read_bytes(), f'run {i} differs after a kill {how[-1]}'
        begun.append(int(out.with_suffix('.from').read_text())); assert begun[-1] == max(kept, default=0), (begun, kept)
    assert any(begun)                                                                # and not all from the beginning
    print(kills, 'runs,', ', '.join(f'{how.count(k)} killed {k}' for k in sorted({*how})))
    assert how.count('in a save') and how.count('at a random time')

def kills(tmp_path, n):
    r = subprocess.run([sys.executable, __file__, str(tmp_path), str(n)], capture_output=True, text=True,
                       env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert r.returncode == 0, r.stderr[-3000:]
    print(r.stdout)

def test_killed_runs_end_with_the_same_bits(tmp_path): kills(tmp_path, 5)

@pytest.mark.slow
def test_fifty_killed_runs_end_with_the_same_bits(tmp_path): kills(tmp_path, 50)

if __name__ == '__main__': main(Path(sys.argv[1]), int(sys.argv[2]))
