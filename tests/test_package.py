"What gets installed: a wheel without pins, whose modules import fast and need only what the wheel asks for."
import ast, configparser, re, subprocess, sys, zipfile
from email.parser import Parser
from pathlib import Path
import pytest

root = Path(__file__).parent.parent
# the runner, designed experiments and the site: extras `reports` and `docs`
extras = {'experiments', 'designs', 'book'}
modules = sorted(f.stem for f in (root/'spectral_diffusion').glob('[a-z]*.py'))
base = [m for m in modules if m not in extras]

def top_level(module):
    "Packages that a module imports when it is imported"
    tree = ast.parse((root/'spectral_diffusion'/f'{module}.py').read_text()).body
    names = ({a.name for n in tree if isinstance(n, ast.Import) for a in n.names}
             | {n.module for n in tree if isinstance(n, ast.ImportFrom) and not n.level})
    return {n.split('.')[0] for n in names} - set(sys.stdlib_module_names)

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "Built from the files that git tracks or would track, so the checkout stays as it is"
    src, out = tmp_path_factory.mktemp('src'), tmp_path_factory.mktemp('wheel')
    files = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '--', 'spectral_diffusion',
                            'pyproject.toml', 'README.md', 'LICENSE', 'settings.ini'],
                           cwd=root, capture_output=True, text=True, check=True).stdout.split()
    for f in files: (src/f).parent.mkdir(parents=True, exist_ok=True); (src/f).write_bytes((root/f).read_bytes())
    r = subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', str(out), str(src)],
                       capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    return next(out.glob('*.whl'))

def test_wheel(wheel):
    "All modules, commands that exist, the licence, and no pin or upper bound on what everybody needs"
    z = zipfile.ZipFile(wheel)
    assert ({f'spectral_diffusion/{m}.py' for m in modules} <= set(z.namelist())
            and not [n for n in z.namelist() if n.startswith(('tests', 'nbs'))])
    meta = Parser().parsestr(z.read(next(n for n in z.namelist() if n.endswith('/METADATA'))).decode())
    needs = [r for r in meta.get_all('Requires-Dist') if 'extra ==' not in r]
    assert needs and not [r for r in needs if re.search(r'==|<|~=', r)]
    scripts = configparser.ConfigParser()
    scripts.read_string(z.read(next(n for n in z.namelist() if n.endswith('entry_points.txt'))).decode())
    for target in scripts['console_scripts'].values():
        module, f = target.split(':')
        assert f'\ndef {f}(' in z.read(module.replace('.', '/') + '.py').decode(), target

def test_base_modules_need_base_packages():
    "No module of the library itself imports, at its top, what only an extra installs"
    text = (root/'pyproject.toml').read_text()
    deps = ({re.match(r'[\w-]+', d)[0].lower()
             for d in ast.literal_eval(re.search(r'^dependencies = (\[.*?\])', text, re.M | re.S)[1])}
            | {'pil'})    # Pillow comes with matplotlib
    for m in base: assert {n.lower() for n in top_level(m)} <= deps, (m, top_level(m) - deps)

@pytest.mark.parametrize('what,most', [(base, .55), (['experiments'], 1.4)], ids=['library', 'runner'])
def test_imports_are_fast(what, most):
    "The whole library, and what the commands import, against torch's own import in the same process: no host's pace"
    code = ("import time, importlib; t = time.process_time(); import torch; u = time.process_time(); "
            f"[importlib.import_module('spectral_diffusion.' + m) for m in {what}]; "
            "print((time.process_time() - u)/(u - t))")
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd='/')
    assert r.returncode == 0, r.stderr
    assert float(r.stdout) < most, r.stdout

def test_version():
    "One number in three places"
    ini = configparser.ConfigParser(); ini.read(root/'settings.ini')
    v = re.search(r'__version__ = "(.*)"', (root/'spectral_diffusion'/'__init__.py').read_text())[1]
    assert (v == ini['DEFAULT']['version']
            == re.search(r'^## (\S+)', (root/'CHANGELOG.md').read_text(), re.M)[1].rstrip(','))

@pytest.mark.slow
def test_empty_environment(wheel, tmp_path):
    "Into an empty environment, with the newest of everything: all modules import there, without the dev pins"
    subprocess.run([sys.executable, '-m', 'venv', tmp_path/'venv'], check=True)
    py = tmp_path/'venv'/'bin'/'python'
    subprocess.run([py, '-m', 'pip', 'install', '-q', str(wheel)], check=True)
    subprocess.run([py, '-c', "import importlib; "
                    f"[importlib.import_module('spectral_diffusion.' + m) for m in {base}]"],
                   check=True, cwd=tmp_path)
    subprocess.run([py, '-m', 'pip', 'install', '-q', f'{wheel}[reports]'], check=True)
    subprocess.run([py, '-c', 'import spectral_diffusion.experiments, spectral_diffusion.designs'], check=True,
                   cwd=tmp_path)
    assert 'report' in subprocess.run([tmp_path/'venv'/'bin'/'sdiff_run', '--help'], check=True, cwd=tmp_path,
                                      capture_output=True, text=True).stdout
