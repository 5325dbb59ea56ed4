"What crosses processes: the report runner as a command, kills and interrupts, exit codes, and what is left on disk."
import json, os, re, signal, subprocess, sys, time, warnings
from pathlib import Path
import nbformat, psutil, pytest
from nbformat.v4 import new_code_cell, new_notebook
from spectral_diffusion.experiments import *
from spectral_diffusion.runs import *

params = "size:str = 'smoke' # one of: smoke, quick\nn:int = 3\nlr:float = 0.5\nrun_dir:str = ''"
plot = "import matplotlib.pyplot as plt\nplt.figure(figsize=(1,1)); plt.plot(range(n));"
wait = ("import time, pathlib\npathlib.Path(run_dir, 'checkpoints').mkdir(exist_ok=True)\n"
        "pathlib.Path(run_dir, 'checkpoints', 'here').touch()\n"
        "if not pathlib.Path('go').exists(): time.sleep(60)")
cli = [sys.executable, '-c', 'from spectral_diffusion.experiments import sdiff_run; sdiff_run()']

def make_report(lab, name, *cells, params=params):
    nb = new_notebook(cells=[new_code_cell(params, metadata=dict(tags=['parameters'])), *map(new_code_cell, cells)],
                      metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')))
    (lab/'reports').mkdir(exist_ok=True)
    nbformat.write(nb, lab/'reports'/f'{name}.ipynb')

@pytest.fixture
def lab(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('MPLBACKEND', 'agg')
    make_report(tmp_path, '00_tiny', "print(n, lr, size)")
    return tmp_path

def run(lab, *args): return subprocess.run([*cli, *map(str, args)], cwd=lab, capture_output=True, text=True, timeout=60)
def names(folder): return {p.name for p in folder.iterdir()}
def no_temps(lab): assert not list(lab.rglob('.tmp-*')) and not list(lab.rglob('*.tmp'))

def start_and_wait(lab):
    "A runner whose report hangs in a cell, once it got there, and its kernel"
    make_report(lab, '01_wait', wait)
    # a background shell makes its children deaf to Ctrl-C
    hear = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    p = subprocess.Popen([*cli, '01_wait'], cwd=lab, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                         preexec_fn=hear)
    t0 = time.time()
    while not (lab/'runs/01_wait/smoke/checkpoints/here').exists():
        assert p.poll() is None and time.time()-t0 < 40, p.stdout.read()
        time.sleep(.1)
    return p, psutil.Process(p.pid).children(recursive=True)

def gone(procs, timeout=10): return not psutil.wait_procs(procs, timeout=timeout)[1]

def test_bad_input_writes_nothing(lab):
    "Unknown report, unknown name, wrong type, wrong choice, impossible folder: one line, exit 1, nothing on disk"
    (lab/'file').write_text('x')
    before = sorted(lab.rglob('*'))
    for args,msg in [(['00_tinny'], 'there are: 00_tiny'), (['00_tiny', '-p', 'm', '5'], "no parameter 'm'"),
                     (['00_tiny', '-p', 'n', '2.5'], "'n' must be int, not str '2.5'"),
                     (['00_tiny', '--size', 'huge'], 'one of smoke, quick'),
                     (['00_tiny', '--root', lab/'file'/'runs'], 'cannot write the run folder'),
                     (['00_tiny', '--name', 'a/b'], 'cannot be named')]:
        with pytest.raises(SystemExit) as e:
            sdiff_run(list(map(str, args)))
        assert msg in str(e.value.code) and '\n' not in str(e.value.code)
    r = run(lab, '00_tiny', '-p', 'nn', '5')
    assert (r.returncode == 1 and r.stderr.strip().count('\n') == 0 and "did you mean 'n'" in r.stderr
            and 'Traceback' not in r.stderr)
    assert sorted(lab.rglob('*')) == before

def test_finish_skip_force(lab):
    "A run leaves a page with its figure, is skipped when it is asked for again, and is made anew by force"
    wire = "from ipykernel.connect import get_connection_info; print(get_connection_info(unpack=True)['transport'])"
    make_report(lab, '00_tiny', plot, f"{wire}; print(n, lr, size)")
    r = run(lab, '00_tiny', '-p', 'lr', '2')
    assert r.returncode == 0, r.stderr
    html = Path(r.stdout.strip().splitlines()[-1]).absolute()
    folder = html.parent
    assert names(folder) == {'attempts', 'parameters.json', 'status.json', 'report.ipynb', 'report.html'}
    assert json.loads((folder/'parameters.json').read_text()) == dict(size='smoke', n=3, lr=2.)
    assert (len(re.findall(r'<img[^>]*src="data:image/png;base64,', html.read_text())) == 1
            and '3 2.0 smoke' in html.read_text())
    assert os.name=='nt' or 'ipc\n' in html.read_text(), 'a TCP port may be taken by another run that starts'
    assert 'cell 4/4' in r.stderr and 'WARNING' not in r.stderr and 'Traceback' not in r.stderr
    made = html.stat().st_mtime_ns
    assert run_report('00_tiny', lr=2) == folder and html.stat().st_mtime_ns == made
    (folder/'checkpoints').mkdir()
    run_report('00_tiny', lr=2, force=True, progress=False)
    assert html.stat().st_mtime_ns > made and not (folder/'checkpoints').exists()
    no_temps(lab)

def test_failing_cell(lab):
    "A failing cell leaves a marked run with its evidence, nothing under a final name, exit 1; the batch goes on"
    make_report(lab, '01_fail', "import time", "1/0", "print('never')")
    r = run(lab, '01_fail', '00_tiny')
    folder = lab/'runs/01_fail/smoke'
    assert (r.returncode == 1 and 'ZeroDivisionError: division by zero' in r.stdout
            and 'Traceback' not in r.stdout + r.stderr)
    assert names(folder) == {'attempts', 'parameters.json', 'status.json', 'report.failed.ipynb', 'traceback.txt'}
    assert run_state(folder) == 'failed' and '1/0' in (folder/'traceback.txt').read_text()
    assert run_state(lab/'runs/00_tiny/smoke') == 'finished'
    with pytest.raises(ValueError, match='only a finished run'): promote(folder)
    make_report(lab, '01_fail', "print('repaired')")
    assert (names(run_report('01_fail', progress=False))
            == {'attempts', 'parameters.json', 'status.json', 'report.ipynb', 'report.html'})
    no_temps(lab)

def test_kernel_dies(lab):
    "A kernel that is killed from outside (memory) is a failed run too"
    make_report(lab, '01_die', "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(RunFailed, match='out of memory'): run_report('01_die', progress=False)
    assert run_state(lab/'runs/01_die/smoke') == 'failed'
    no_temps(lab)

def test_kill_and_run_again(lab):
    "SIGKILL half-way: the kernel follows, nothing half-written has a final name; the next run keeps checkpoints and finishes"
    p, kernels = start_and_wait(lab)
    folder = lab/'runs/01_wait/smoke'
    assert run_state(folder) == 'running'
    with pytest.raises(ValueError, match=f'is being run by process {p.pid}'): run_report('01_wait')
    p.kill(); p.wait()
    assert run_state(folder) == 'killed' and gone(kernels)
    assert not names(folder) & {'report.ipynb', 'report.html', 'report.failed.ipynb'}
    for f in ('.tmp-1-report.html', 'checkpoints/.tmp-1-model'): (folder/f).touch() # as if killed while writing these
    (lab/'reports'/'go').touch()
    run_report('01_wait', progress=False)
    assert run_state(folder) == 'finished' and (folder/'checkpoints/here').exists()
    no_temps(lab)

def test_interrupt(lab):
    "Ctrl-C stops the kernel, marks the run, exits with 130"
    p, kernels = start_and_wait(lab)
    p.send_signal(signal.SIGINT)
    out, _ = p.communicate(timeout=20)
    assert p.returncode == 130 and out.strip().endswith('interrupted') and 'Traceback' not in out, out
    assert run_state(lab/'runs/01_wait/smoke') == 'interrupted' and gone(kernels)
    no_temps(lab)

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_full_disk_ends_only_the_log(tmp_path):
    r = Run(tmp_path/'run')
    r.log_file = Path('/dev/full')
    with pytest.warns(UserWarning, match='No space left'): r.log('step', i=0)
    with warnings.catch_warnings():
        warnings.simplefilter('error'); r.log('step', i=1)                       # said once

def test_json_is_whole_at_every_moment(tmp_path):
    "Whoever reads while another process writes again and again, or after it was killed, finds a whole file"
    code = ("from spectral_diffusion.runs import write_json\nwrite_json('a.json', x:=dict(x=list(range(20000))))\n"
            "print('go', flush=True)\nwhile True: write_json('a.json', x)")
    p = subprocess.Popen([sys.executable, '-c', code], cwd=tmp_path, stdout=subprocess.PIPE)
    p.stdout.readline()
    t0 = time.time()
    while time.time()-t0 < 1.5: assert len(read_json(tmp_path/'a.json')['x']) == 20000
    p.kill(); p.wait()
    assert len(read_json(tmp_path/'a.json')['x']) == 20000
