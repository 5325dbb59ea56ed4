"Every chapter and every report runs from top to bottom, each in a process of its own, through nbdev's own command."
import subprocess
from pathlib import Path
import pytest

root = Path(__file__).parent.parent
notebooks = sorted([*(root/'nbs').glob('*.ipynb'), *(root/'reports').glob('*.ipynb')], key=lambda p: -p.stat().st_size)

def run(nb, *flags):
    r = subprocess.run(['nbdev_test', '--path', str(nb), '--n_workers', '0', *flags], cwd=root, capture_output=True, text=True)
    assert r.returncode == 0 and 'Success' in r.stdout, r.stdout[-2000:] + r.stderr[-6000:]

@pytest.mark.parametrize('nb', notebooks, ids=lambda p: p.stem)
def test_notebook(nb): run(nb)

@pytest.mark.slow
@pytest.mark.parametrize('nb', [nb for nb in notebooks if '#| slow' in nb.read_text()], ids=lambda p: p.stem)
def test_slow_cells(nb):
    "What takes minutes, and the benchmarks against other libraries (needs the `peers` extra)"
    run(nb, '--flags', 'slow')
