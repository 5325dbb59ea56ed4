("Every chapter and every report runs from top to bottom, each in a process of its own, through nbdev's own test. "
 "The processes are forked from one that has loaded what nearly all of them need, which saves seconds each.")
import multiprocessing, os, sys
from pathlib import Path
import pytest

root = Path(__file__).parent.parent
notebooks = sorted([*(root/'nbs').glob('*.ipynb'), *(root/'reports').glob('*.ipynb')], key=lambda p: -p.stat().st_size)

def one(nb, flags, said):
    "In the process of its own: all that is said goes to a file, with a last word if all went well"
    with open(said, 'w') as f: os.dup2(f.fileno(), 1); os.dup2(f.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(k), 'w', buffering=1) for k in (1, 2))
    from nbdev.config import get_config
    from nbdev.test import test_nb as nbdev_test_nb
    os.chdir(root); cfg = get_config()
    ok, _ = nbdev_test_nb(nb, skip_flags=cfg.tst_flags.split(), force_flags=flags, basepath=cfg.config_path)
    if ok: print('Success.')
    sys.stdout.flush(); sys.stderr.flush(); os._exit(0)

def run(nb, said, *flags):
    ctx = multiprocessing.get_context('forkserver')
    ctx.set_forkserver_preload(['torch._dynamo', 'torch.distributed.checkpoint.state_dict', 'nbdev.test',
                                'matplotlib.pyplot', 'sklearn.datasets', 'skimage.data'])
    p = ctx.Process(target=one, args=(nb, flags, said)); p.start(); p.join()
    said = said.read_text()
    assert p.exitcode == 0 and said.endswith('Success.\n'), f'exit code {p.exitcode}\n' + said[-6000:]

@pytest.mark.parametrize('nb', notebooks, ids=lambda p: p.stem)
def test_notebook(nb, tmp_path): run(nb, tmp_path/'said')

@pytest.mark.parametrize('code', ['assert 1 == 2', 'import os; os._exit(0)', 'def f(: pass'])
def test_a_broken_notebook_is_caught(code, tmp_path):
    import nbformat
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('x = 1'),
                                                   nbformat.v4.new_code_cell(code)]), tmp_path/'broken.ipynb')
    with pytest.raises(AssertionError, match='exit code'): run(tmp_path/'broken.ipynb', tmp_path/'said')

@pytest.mark.slow
@pytest.mark.parametrize('nb', [nb for nb in notebooks if '#| slow' in nb.read_text()], ids=lambda p: p.stem)
def test_slow_cells(nb, tmp_path):
    "What takes minutes, and the benchmarks against other libraries (needs the `peers` extra)"
    run(nb, tmp_path/'said', 'slow')
