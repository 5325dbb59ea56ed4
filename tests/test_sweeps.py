"Sweeps with real processes: eight runners on the same cells, kills, Ctrl-C, submitit without Slurm."
import json, os, re, signal, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path
import psutil, pytest
from spectral_diffusion import experiments
from spectral_diffusion.experiments import *
from spectral_diffusion.runs import *
from test_runner import gone, make_report, no_temps

script = lambda name: [sys.executable, '-c', f'from spectral_diffusion.experiments import {name}; {name}()']
touch = "from pathlib import Path\nwith open(Path.cwd()/f'{n}.ran', 'a') as f: f.write('x')"
wait = ("import time\nfrom pathlib import Path\nPath(run_dir, 'here').touch()\n"
        "while not (Path.cwd()/'go').exists(): time.sleep(.05)")

@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MPLBACKEND', 'agg')
    return tmp_path

def start(lab, *args, name='sdiff_sweep', **kw):
    hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([*script(name), *map(str, args)], cwd=lab, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, preexec_fn=hear, **kw)

def until(test, seconds=120):
    t0 = time.time()
    while not test():
        assert time.time()-t0 < seconds
        time.sleep(.05)

def family(p): return psutil.Process(p.pid).children(recursive=True)
def states(lab): return [r.state for r in status_rows(lab/'runs')]

# eight runners at the same moment, without the seconds that a kernel takes:
# the real decisions and attempts, a fake execute, forked processes
fake = """
import os, signal, sys, time
from pathlib import Path
from spectral_diffusion import experiments as e
go = Path('go')
pids = []
for me in range(8):
    if not (pid := os.fork()): break
    pids.append(pid)
else:
    while len([*Path().glob('ready*')]) < 8: time.sleep(.001)
    go.touch()
    codes = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in pids]
    print(codes); sys.exit()
def execute(report, folder, params, bar):
    with open(folder/'ran', 'a') as f: f.write(f'{me}\\n')
    if params['n']==9 and not (folder/'killed').exists():\
 (folder/'killed').touch(); os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(.01)
    if params['n']%2: raise ValueError('odd')
e.execute = execute
class Inline:
    every = .03
    def room(self): return True
    def busy(self, cell): return False
    def error(self, cell): return ''
    def stop(self): pass
    def start(self, cell, **kw):
        try: e.run_report(cell.report, progress=False, **kw, **cell.params)
        except (e.Taken, e.RunFailed): pass
class Gate(e.Board):
    "All have looked at every cell before anyone runs one: who looks later may try again what failed before"
    def show(self, rows):
        Path(f'ready{me}').touch()
        while not go.exists(): time.sleep(.001)
        super().show(rows)
cells = e.sweep_cells('00_cells', dict(n=list(range(20))))
rows = e.run_cells(cells, Inline(), False, Gate(open(os.devnull, 'w')))
assert all(r.state==('failed' if i%2 else 'finished') for i,r in enumerate(rows)), rows
"""

def test_eight_runners_twenty_cells(lab):
    "They start at the same moment: every cell is run once, those that fail (the odd ones) too; who gets cell 9 is killed in it, and it is taken over"
    make_report(lab, '00_cells', 'pass')
    r = subprocess.run([sys.executable, '-c', fake], cwd=lab, capture_output=True, text=True, timeout=120)
    codes = json.loads(r.stdout.splitlines()[-1])
    assert sorted(codes)==[-9] + [0]*7, r.stderr
    ran = {read_json(f.parent/'parameters.json').n: f.read_text().split() for f in lab.glob('runs/00_cells/*/ran')}
    assert sorted(ran)==list(range(20)) and all(len(w)==1+(i==9) for i,w in ran.items()), ran
    tries = {read_json(f/'parameters.json').n: last_attempt(f) for f in (lab/'runs/00_cells').iterdir()}
    assert all(n==len(ran[i]) and who.over for i,(n,who) in tries.items())
    assert len({w[-1] for w in ran.values()}) > 2      # the work was shared
    no_temps(lab)

def test_decides_again_once_it_holds_the_run(lab, monkeypatch):
    "Somebody is faster, and done, between our look at the folder and our claim: nothing is executed twice"
    make_report(lab, '00_cells', 'pass')
    executed, claim = [], experiments.attempt
    @contextmanager
    def late(folder, n=None):
        monkeypatch.setattr(experiments, 'attempt', claim)
        run_report('00_cells', progress=False)
        with claim(folder, n): yield
    monkeypatch.setattr(experiments, 'execute', lambda *args: executed.append(1))
    monkeypatch.setattr(experiments, 'attempt', late)
    assert run_state(run_report('00_cells', progress=False))=='finished' and executed==[1]

def test_two_sweeps_with_real_reports(lab):
    "Two commands on the same three cells: each report is executed once, both end well; again, all is skipped"
    make_report(lab, '00_cells', touch)
    ps = [start(lab, '00_cells', '-p', 'n', '1,2,3', '-p', 'lr', '.1') for _ in range(2)]
    outs = [p.communicate(timeout=120)[0] for p in ps]
    assert [p.returncode for p in ps]==[0,0], outs
    assert {f.name: f.read_text() for f in (lab/'reports').glob('*.ran')}=={f'{i}.ran': 'x' for i in (1,2,3)}
    assert all('3 cells: 3 finished in runs' in o and '00_cells n=3 lr=0.1: finished' in o for o in outs), outs
    t0 = time.time()
    assert all(r.state=='finished' for r in sweep('00_cells', dict(n=[1,2,3], lr=[.1]))) and time.time()-t0 < 5
    no_temps(lab)

def test_killed_runner(lab):
    "kill -9 of a runner: its worker and kernel follow by themselves, and another runner takes the cell over"
    make_report(lab, '00_cells', wait, touch)
    p = start(lab, '00_cells', '-p', 'n', '0,1', '--workers', '1')
    until(lambda: [*lab.glob('runs/00_cells/*/here')])
    children = family(p)
    assert len(children)==2 and sorted(states(lab))==['running']
    q = start(lab, '00_cells', '-p', 'n', '1,0')      # starts with the other one, waits for this
    until(lambda: len([*lab.glob('runs/00_cells/*/here')])==2)
    p.kill(); p.wait()
    assert gone(children)
    (lab/'reports/go').touch()
    out, _ = q.communicate(timeout=120)
    assert q.returncode==0 and '2 cells: 2 finished' in out, out
    assert {f.read_text() for f in (lab/'reports').glob('*.ran')}=={'x'}
    assert sorted(last_attempt(f)[0] for f in (lab/'runs/00_cells').iterdir())==[1,2]

@pytest.mark.parametrize('to', ['parent', 'group'])
def test_ctrl_c(lab, to):
    "SIGINT to the runner alone, or to its process group as a terminal does: cells are interrupted, 130, one line, nobody is left"
    make_report(lab, '00_cells', wait)
    p = start(lab, '00_cells', '-p', 'n', '0,1,2', '--workers', '2', start_new_session=True)
    until(lambda: len([*lab.glob('runs/00_cells/*/here')])==2)
    children = family(p)
    assert len(children)==4
    os.kill(p.pid, signal.SIGINT) if to=='parent' else os.killpg(p.pid, signal.SIGINT)
    out, _ = p.communicate(timeout=120)
    assert p.returncode==130 and 'Traceback' not in out and out.strip().splitlines()[-1]=='interrupted', out
    assert states(lab)==['interrupted']*2 and gone(children)
    assert all(last_attempt(r)[1].over for r in (lab/'runs/00_cells').iterdir())
    no_temps(lab)

def test_worker_dies(lab):
    "A worker that is killed (memory) fails its cell and not the sweep"
    make_report(lab, '00_cells', "import os, signal, psutil\nif n==1: os.kill(os.getppid(), signal.SIGKILL)\n"
                                 "import time; time.sleep(.2)")
    p = start(lab, '00_cells', '-p', 'n', '1,2')
    out, _ = p.communicate(timeout=120)
    assert (p.returncode==1 and 'ended by SIGKILL: out of memory?' in out
            and '1 finished, 1 killed' in out.splitlines()[-1].replace('1 failed', '1 killed')), out
    assert sorted(states(lab))==['finished', 'killed']

def test_status_command(lab):
    "What `sdiff_status` prints of a sweep under way, with the progress of the loop inside"
    loop = ("from spectral_diffusion import runs\nfrom types import SimpleNamespace\nfrom pathlib import Path\n"
            "import time\nruns.Run.current = SimpleNamespace(folder=Path(run_dir))\n"
            "for i in runs.progress(range(3000), desc='train'): time.sleep(.02)")
    make_report(lab, '00_cells', loop)
    p = start(lab, '00_cells')
    until(lambda: [*lab.glob('runs/00_cells/*/progress.json')])
    time.sleep(1)
    out = start(lab, name='sdiff_status').communicate()[0]
    assert re.search(r'1 cell: 1 running\n00_cells/smoke +running +0:\d\d  train \d+/3000, \d:\d\d left', out), out
    p.send_signal(signal.SIGINT); p.communicate(timeout=120)
    assert 'interrupted' in start(lab, name='sdiff_status').communicate()[0]

def test_commands_say_one_line(lab, monkeypatch):
    "Bad input, and a report that fails, under a runner's environment too"
    make_report(lab, '00_cells', "1/0")
    monkeypatch.setenv('SDIFF_QUIET', '1')
    for args, text in ((['00_cells', '-p', 'm', '1'], "no parameter 'm'"), (['nothing'], 'there are: 00_cells'),
                       (['00_cells', '--engine', 'slurm', '--timeout-min', '1'], 'choose timeout_min >= 3')):
        p = start(lab, *args); out, _ = p.communicate(timeout=120)
        assert p.returncode==1 and out.count('\n')==1 and 'Traceback' not in out and not (lab/'runs').exists(), out
        assert text in out
    p = start(lab, '00_cells', name='sdiff_run'); out, _ = p.communicate(timeout=120)
    assert p.returncode==1 and 'Traceback' not in out and 'ZeroDivisionError' in out.splitlines()[-1], out

# a "training" that survives: it counts in a file that is always whole, and is slow enough to be interrupted
count = """import time
from pathlib import Path
from spectral_diffusion.runs import read_json, write_json
f = Path(run_dir)/'checkpoints'/'n.json'; f.parent.mkdir(exist_ok=True)
i, begun = (read_json(f)['i'], read_json(f)['begun']+1) if f.exists() else (0, 1)
while i < 40:
    time.sleep(.05); i += 1
    write_json(f, dict(i=i, begun=begun))"""

def test_submitit_without_slurm(lab):
    "submitit's local executor: signalled as before a limit, the job goes on from what it kept, though it was started with force"
    make_report(lab, '00_cells', count)
    p = start(lab, '00_cells', '--engine', 'submitit', '--force')
    kept = lab/'runs/00_cells/smoke/checkpoints/n.json'
    until(lambda: kept.exists() and read_json(kept).i > 3)
    job, = [c for c in family(p) if 'submitit.core._submit' in c.cmdline()]
    kernels = job.children(recursive=True)
    job.send_signal(signal.SIGUSR2)
    out, _ = p.communicate(timeout=120)
    assert p.returncode==0 and '1 cell: 1 finished' in out, out
    cell = lab/'runs/00_cells/smoke'
    assert (read_json(kept).i, read_json(kept).begun, last_attempt(cell)[0])==(40, 2, 2) and gone(kernels)
    first = read_json(cell/'attempts/1.json')
    assert first.over                                  # it left in good order

def test_submitit_failure(lab):
    "A failing report and a vanished one are failed cells with a reason"
    make_report(lab, '00_cells', "if n==1: raise ValueError('n must not be 1')")
    rows = sweep('00_cells', dict(n=[1,2]), 'submitit', timeout_min=1)
    assert [r.state for r in rows]==['failed', 'finished'] and rows[0].note=='n must not be 1'
