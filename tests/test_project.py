"The book's order, notebooks and modules in step, and nothing in them that belongs to one machine."
import ast, io, json, re, subprocess, tokenize
from pathlib import Path
import pytest, yaml

root = Path(__file__).parent.parent
cells = lambda nb, kind='code': [''.join(c['source']) for c in json.loads(nb.read_text())['cells']
                                 if c['cell_type'] == kind]
chapters = {m[1]: nb for nb in sorted((root/'nbs').glob('[0-9]*.ipynb'))
            if (m := re.search(r'^#\| default_exp (\w+)', '\n'.join(cells(nb)), re.M))}  # tutorials export nothing
number = {m: int(nb.name[:2]) for m, nb in chapters.items()}

def imported(source):
    "Chapters that a piece of source imports, in whatever way it says so"
    code = '\n'.join(l for l in source.splitlines() if not re.match(r'\s*[%!]', l))
    names = set()
    for n in ast.walk(ast.parse(code)):
        if isinstance(n, ast.Import):
            names |= {a.name.removeprefix('spectral_diffusion.') for a in n.names
                      if a.name.startswith('spectral_diffusion.')}
        if isinstance(n, ast.ImportFrom) and (n.level or (n.module or '').startswith('spectral_diffusion')):
            m = (n.module or '').removeprefix('spectral_diffusion').lstrip('.')
            names |= {m} if m else {a.name for a in n.names}
    return names & set(number)

def later(module, sources): return {m for s in sources for m in imported(s) if number[m] > number[module]}

@pytest.mark.parametrize('module', chapters)
def test_imports_downwards(module):
    "In exported code and in examples"
    assert not later(module, cells(chapters[module])), f'{chapters[module].name} imports later chapters'
    own = imported((root/'spectral_diffusion'/f'{module}.py').read_text())
    assert all(number[m] < number[module] for m in own)

@pytest.mark.parametrize('line', ['from spectral_diffusion.samplers import *', 'from .samplers import x',
                                  'import spectral_diffusion.samplers', 'from spectral_diffusion import samplers',
                                  'def f():\n    from .samplers import x'])
def test_import_guard_fires(line): assert later('fourier', [line]) == {'samplers'} and not later('rejection', [line])

@pytest.mark.parametrize('module', chapters)
def test_file_name(module): assert chapters[module].stem[3:] == module

@pytest.mark.parametrize('module', chapters)
def test_in_step(module):
    "Every exported cell stands in the module as it is (the CI also runs nbdev_export and looks for a difference)"
    squeeze = lambda s: re.sub(r'\s+', '', '\n'.join(l for l in s.splitlines()
                                                     if not l.lstrip().startswith(('#|', 'from ', 'import '))))
    text = squeeze((root/'spectral_diffusion'/f'{module}.py').read_text())
    for c in cells(chapters[module]):
        if not re.match(r'#\|\s*export', c): continue
        body = squeeze(c)
        assert body in text, f'run nbdev_export: {c[:80]!r}'

def wide(source, most=120):
    "Lines that do not fit on a wide screen; a docstring, or a comment behind a parameter, stays one line"
    code = '\n'.join('' if re.match(r'\s*(#\||%|!)', l) else l for l in source.split('\n'))
    texts = {n for q in ast.walk(ast.parse(code)) if isinstance(q, ast.Expr) and isinstance(q.value, ast.Constant)
             for n in range(q.lineno, q.end_lineno + 1)}
    notes = {t.start[0]: t.start[1] for t in tokenize.generate_tokens(io.StringIO(code).readline)
             if t.type == tokenize.COMMENT}
    return [l for n, l in enumerate(code.split('\n'), 1)
            if n not in texts and (len(l[:notes.get(n)].rstrip()) > most or len(l) > most + 50)]

written = [f for d in ('nbs/*.ipynb', 'reports/*.ipynb', 'tests/*.py') for f in sorted(root.glob(d))]

@pytest.mark.parametrize('file', written, ids=lambda f: f'{f.parent.name}-{f.stem}')
def test_code_fits_the_page(file):
    assert not [l for c in (cells(file) if file.suffix == '.ipynb' else [file.read_text()]) for l in wide(c)]

def test_width_guard_fires():
    long = 'x = ' + ' + '.join(['1']*40)
    assert wide(long) == [long] and wide(f'def f():\n    {long}') and wide('y = 1 # ' + 'a'*170)
    assert not wide(f'def f(a # {"a"*100}\n      ): return a') and not wide(f'def f():\n    "{"a"*130}"')

def test_exported_cells_are_short():
    "Nine of ten have at most twenty lines"
    n = [sum(map(bool, map(str.strip, c.splitlines()[1:]))) for nb in chapters.values() for c in cells(nb)
         if re.match(r'#\|\s*export', c)]
    assert len(n) > 500 and sum(k > 20 for k in n) <= len(n)/10, sum(k > 20 for k in n)

def undocumented(source, public):
    "Public functions, patched methods and classes that have no docstring, or an argument without a comment behind it"
    lines, bad = source.split('\n'), []
    for d in ast.parse(source).body:
        patched = isinstance(d, ast.FunctionDef) and any(ast.unparse(p).startswith('patch') for p in d.decorator_list)
        if not isinstance(d, (ast.FunctionDef, ast.ClassDef)) or d.name.startswith('_') or not (
                patched or d.name in public): continue
        f = d if isinstance(d, ast.FunctionDef) else next(
            (m for m in d.body if isinstance(m, ast.FunctionDef) and m.name == '__init__'), None)
        a = f.args if f else ast.arguments([], [], None, [], [], None, [])
        args = [x for x in [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg] if x and x.arg != 'self']
        last = {x.lineno: x for x in args}                      # a comment is about the last one of its line
        missing = [x.arg for x in args if last[x.lineno] is not x or '#' not in lines[x.lineno-1]]
        if missing or not ast.get_docstring(d): bad.append((d.name, missing))
    return bad

@pytest.mark.parametrize('module', chapters)
def test_public_arguments_are_documented(module):
    text = (root/'spectral_diffusion'/f'{module}.py').read_text()
    public = ast.literal_eval(re.search(r'__all__ = (\[.*?\])', text, re.S)[1])
    assert undocumented(text, public) == []

def test_docs_guard_fires():
    ok = 'def f(x, # a field\n      y # another\n     ):\n    "What it does"'
    assert undocumented(ok, ['f']) == [] == undocumented(ok.replace(' # another', ''), [])
    assert undocumented(ok.replace(' # another', ''), ['f']) == [('f', ['y'])]
    assert undocumented(ok.replace(' # a field\n     ', ''), ['f']) == [('f', ['x'])]
    assert undocumented(ok.replace('"What it does"', 'pass'), ['f']) == [('f', [])]
    assert undocumented('class C:\n    "It"\n    def __init__(self, x): pass', ['C']) == [('C', ['x'])]

def test_notebooks_are_clean():
    "No tracebacks, no execution counts, no path of somebody's machine"
    for nb in [*(root/'nbs').glob('*.ipynb'), *(root/'reports').rglob('*.ipynb')]:
        raw = nb.read_text(); d = json.loads(raw)
        assert '"output_type": "error"' not in raw, nb
        assert all(c.get('execution_count') is None for c in d['cells']), nb
        assert not re.search(r'(?<![\w.])/(home|root|tmp|Users|work)/', raw), nb

def test_templates_have_no_outputs():
    for nb in (root/'reports').glob('*.ipynb'):
        assert not any(c.get('outputs') for c in json.loads(nb.read_text())['cells']), (
            f'{nb.name}: results belong in reports/results')

def stale_imports(code):
    "Names that code imports from the library and the library does not have"
    import importlib
    return [f'{n.module}.{a.name}' for n in ast.walk(ast.parse(code))
            if isinstance(n, ast.ImportFrom) and (n.module or '').startswith('spectral_diffusion') for a in n.names
            if a.name != '*' and not hasattr(importlib.import_module(n.module), a.name)]

@pytest.mark.parametrize('copy', sorted((root/'reports'/'results').glob('*/report.ipynb')), ids=lambda p: p.parent.name)
def test_published_reports_still_import(copy):
    "A reader who runs a published copy must not stumble over a name that has gone (then: run its desk again)"
    bad = [s for c in cells(copy) for s in stale_imports('\n'.join(l for l in c.splitlines() if l[:1] not in '%!'))]
    assert not bad, bad

def test_stale_imports_are_seen():
    gone = 'from spectral_diffusion.training import fit, Checkpoint\nfrom torch import nothing'
    assert stale_imports(gone) == ['spectral_diffusion.training.Checkpoint']

def test_readme_is_rendered():
    r = subprocess.run(['sdiff_readme', '--check'], cwd=root, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr

def test_code_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    "As it stands there, with a tiny folder and two seconds"
    from PIL import Image
    import matplotlib, numpy as np
    matplotlib.use('agg'); monkeypatch.chdir(tmp_path); (tmp_path/'my_pictures').mkdir()
    rng = np.random.default_rng(0)
    for i in range(330): Image.fromarray(rng.integers(0, 256, (9, 8, 3), np.uint8)).save(f'my_pictures/{i}.png')
    block, = re.findall('```python\n(.*?)```', (root/'README.md').read_text(), re.S)
    for old, new in (("'small-balanced'", "'small-balanced', batch=4, nfe=4"), ('size=32', 'size=16'),
                     ('minutes=10', 'minutes=.03')):
        assert block.count(old) == 1; block = block.replace(old, new)
    exec(block, {})
    assert capsys.readouterr().out.startswith('verdict: ')

def found(node, key):
    "Everything under a key, however deep"
    if isinstance(node, dict):
        return [v for k, v in node.items() if k == key] + [x for v in node.values() for x in found(v, key)]
    return [x for v in node for x in found(v, key)] if isinstance(node, list) else []

def workflow_faults(texts):
    "What must not be in the workflows: others' actions, versions that move, slow tests that nothing starts, a site that is published untested or for a stranger"
    flows, pinned = [yaml.safe_load(t) for t in texts], r'\bQUARTO: \d+\.\d+\.\d+\s*[}\n]'
    bad = [f'action {u}' for u in found(flows, 'uses')
           if not re.fullmatch(r'actions/[\w-]+@(v\d+(\.\d+)*|[0-9a-f]{40})', str(u))]
    bad += ['Quarto is not pinned' for t in texts if 'quarto' in t.lower()
            and not (re.search(pinned, t) and {*re.findall(r'releases/download/(\S+)', t)} == {'v$QUARTO'})]
    slow = [(f, j) for f in flows for j in f['jobs'].values() if any('-m slow' in str(r) for r in found(j, 'run'))]
    def timed(f, j):
        # YAML reads the key `on` as true
        return (any(re.fullmatch(r'(\S+ ){4}\S+', c) for c in found(f.get(True), 'cron'))
                and "event_name == 'schedule'" in j.get('if', "event_name == 'schedule'"))
    for f in flows:
        if not any('deploy-pages' in u for u in found(f, 'uses')): continue
        on, when = f.get(True), ' '.join(str(j.get('if', '')) for j in f['jobs'].values())
        if ({*on} != {'workflow_run', 'workflow_dispatch'} or "conclusion == 'success'" not in when
                or "event != 'pull_request'" not in when):
            bad.append('publishing without tests')
    return bad + ([] if any(timed(*x) for x in slow) else ['slow tests without a schedule'])

workflows = [f.read_text() for f in sorted((root/'.github'/'workflows').glob('*.yml'))]
def test_workflows(): assert len(workflows) == 2 and workflow_faults(workflows) == []

@pytest.mark.parametrize('old, new, fault', [
    ('actions/checkout@v4', 'actions/checkout', 'action'),
    ('actions/checkout@v4', 'actions/checkout@main', 'action'),
    ('actions/deploy-pages@v4', 'peaceiris/actions-gh-pages@v4', 'action'),
    ('- run: bash .ci/run', '- uses: fastai/workflows/nbdev-ci@master', 'action'),
    ('QUARTO: 1.7.32', 'QUARTO: 1.7', 'Quarto'), ('download/v$QUARTO', 'download/latest', 'Quarto'),
    ('QUARTO: 1.7.32', 'QUARTO: latest', 'Quarto'),
    ('  schedule: [{cron: "0 3 * * 1"}]\n', '', 'slow'),
    (" || github.event_name == 'schedule'", '', 'slow'), ('pytest -m slow', 'pytest', 'slow'),
    ("conclusion == 'success'", "conclusion != 'cancelled'", 'publishing'),
    (" && github.event.workflow_run.event != 'pull_request'", '', 'publishing'),
    ('  workflow_dispatch:\npermissions: {contents: read}\nconcurrency',
     '  workflow_dispatch:\n  push: {branches: [main]}\npermissions: {contents: read}\nconcurrency', 'publishing')])
def test_workflow_faults_are_seen(old, new, fault):
    assert any(old in w for w in workflows)
    assert [b.split()[0] for b in workflow_faults([w.replace(old, new) for w in workflows])][:1] == [fault]

def test_full_size_is_built():
    "The quickstart's network for a GPU, on the meta device: no memory, but every shape"
    import torch
    from functools import partial
    from spectral_diffusion.recipes import recipe
    from spectral_diffusion.unets import UNet, n_params
    space = dict(size='full', seed=0, steps=0, digits=None, photos=None, partial=partial, recipe=recipe, UNet=UNet)
    exec(next(c for c in cells(root/'reports'/'00_quickstart.ipynb') if 'sizes = dict(' in c), space)
    schedule = (r := space['r']).schedule()
    with torch.device('meta'): net = r.net(3, schedule)
    assert n_params(net) == r.params and r.bf16
    assert net(torch.empty(2, 3, 32, 32, device='meta'), torch.empty(2, device='meta')).shape == (2, 3, 32, 32)

def test_tables_of_the_front_page_are_fresh(monkeypatch):
    "What its cells say now is what they said when they ran last (then: sdiff_readme), and they name every report"
    monkeypatch.chdir(root/'nbs'); names, told = {}, ''
    for c in json.loads(Path('index.ipynb').read_text())['cells']:
        if '#| echo: false' not in (source := ''.join(c['source'])): continue
        *before, last = ast.parse(source).body
        exec(compile(ast.Module(before, []), 'index', 'exec'), names)
        now = eval(compile(ast.Expression(last.value), 'index', 'eval'), names).data; told += now
        assert now == ''.join(c['outputs'][0]['data']['text/markdown']), c['id']
    assert not [f.name for f in (root/'reports'/'results').iterdir()
                if f'(../reports/results/{f.name}/report.ipynb) |' not in told]
