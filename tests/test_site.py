"The site as a reader gets it: made without Quarto, every page opened in a real browser. Skipped without a browser, unless SDIFF_BROWSER=required."
import json, os, re
from importlib.util import find_spec
from pathlib import Path
import pytest
from spectral_diffusion.book import (Browser, Served, check_site, elsewhere, find_browser, problems, render,
                                     stage)

root = Path(__file__).parent.parent
missing = [n for n, there in dict(smalldocs=find_spec('smalldocs'), playwright=find_spec('playwright'),
                                  browser=find_browser()).items() if not there]
pytestmark = pytest.mark.skipif(bool(missing) and os.environ.get('SDIFF_BROWSER') != 'required',
                                reason=f'no {", ".join(missing)}')

@pytest.fixture(scope='module')
def site(tmp_path_factory): return render(stage(root, tmp_path_factory.mktemp('book')/'book'))

@pytest.fixture(scope='module')
def tab():
    with Browser() as tab: yield tab

@pytest.fixture(scope='module')
def url(site):
    with Served(site) as url: yield url

def test_every_page(site):
    "No errors in the console, no link that leads nowhere, no figure that stays empty, no raw TeX, nothing wider than a phone"
    assert check_site(site) == []

def test_nothing_is_missing(site):
    "Every chapter, every result, front page, gallery, contributing, changes; every exported cell and every figure of them"
    pages = {f.relative_to(site).as_posix() for f in site.rglob('*.html')}
    for nb in (root/'nbs').glob('*.ipynb'):
        name = re.sub(r'^\d\d_', '', nb.stem) + '.html'
        assert name in pages, name
        text, cells = (site/name).read_text(), json.loads(nb.read_text())['cells']
        hidden = lambda c: re.search(r'^#\|.*\b(hide|default_exp|exporti)\b', ''.join(c['source']), re.M)
        code = [c for c in cells if c['cell_type'] == 'code' and not hidden(c)]
        figures = [''.join(o['data']['image/png']).replace('\n', '')[:2000]
                   for c in code for o in c['outputs'] if 'image/png' in o.get('data', {})]
        assert all(f in text for f in figures), name
        assert (text.count('class="exported"')
                == sum(bool(re.match(r'#\|\s*export\b', ''.join(c['source']))) for c in code)), name
    assert {'reports/index.html', 'contributing.html', 'changelog.html'} <= pages
    for f in (root/'reports'/'results').glob('*/metrics.json'):
        assert (f'reports/{f.parent.name}.html' in pages
                and f.read_text() == (site/'reports'/f.parent.name/'metrics.json').read_text())

def test_nothing_comes_from_elsewhere(site):
    "A page needs no other host for scripts, styles, fonts or pictures"
    assert elsewhere(site) == []

def test_formulas(tab, url):
    "As many as the notebook has, with a size, and a fraction is taller than a letter"
    tab.goto(url + 'schedules.html')
    sizes = tab.evaluate("[...document.querySelectorAll('math')].map(m => [m.getBoundingClientRect().width, "
                         "m.getBoundingClientRect().height, !!m.querySelector('mfrac')])")
    cells = [''.join(c['source'])
             for c in json.loads(next((root/'nbs').glob('*_schedules.ipynb')).read_text())['cells']
             if c['cell_type'] == 'markdown']
    n = sum(len(re.findall(r'\$\$.+?\$\$|\$(?!\s)[^$\n]+?(?<!\s)\$', re.sub(r'`[^`]*`', '', c), re.S)) for c in cells)
    assert len(sizes) == n > 20 and all(w > 3 and h > 3 for w, h, _ in sizes)
    assert max(h for *_, h, frac in sizes if frac) > 1.2*sorted(h for _, h, frac in sizes if not frac)[n//4]

def test_code_can_be_copied(tab, url):
    "On every chapter there is a button for each cell, and the first one copies all of it"
    squeeze = lambda s: re.sub(r'\s', '', s)
    for nb in sorted((root/'nbs').glob('[0-9]*.ipynb')):
        tab.goto(url + nb.stem[3:] + '.html'); tab.evaluate("navigator.clipboard.writeText('')")
        assert tab.locator('.code-copy-button').count() >= tab.locator('.cell-code').count() > 5, nb.stem
        cell = tab.locator('.cell').filter(has=tab.locator('.cell-code')).first; cell.hover()
        cell.locator('.code-copy-button').first.click(force=True)
        assert (squeeze(tab.evaluate('navigator.clipboard.readText()'))
                == squeeze(cell.locator('.cell-code').first.text_content()) != ''), nb.stem

def test_dark_mode(tab, url):
    "Paper and sidebar get dark, ink gets light; the choice survives a reload"
    mean = ("s => getComputedStyle(document.querySelector(s)).%s.match(/[\\d.]+/g).slice(0, 3)"
            ".reduce((a, b) => a + +b, 0)/765")
    light, ink = (f"() => ['body', '#quarto-sidebar'].map({mean % 'backgroundColor'})",
                  f"() => ['main p', 'main pre', '#quarto-sidebar a'].map({mean % 'color'})")
    tab.set_viewport_size(dict(width=1280, height=900)); tab.goto(url + 'fourier.html')
    assert min(tab.evaluate(light)) > .85 and max(tab.evaluate(ink)) < .55
    tab.locator('.quarto-color-scheme-toggle:visible').first.click(); tab.wait_for_timeout(400)
    assert max(tab.evaluate(light)) < .3 and min(tab.evaluate(ink)) > .55
    tab.reload(); tab.wait_for_timeout(400); assert max(tab.evaluate(light)) < .3
    tab.locator('.quarto-color-scheme-toggle:visible').first.click()

pale = """() => {
  const ctx = document.createElement('canvas').getContext('2d', {willReadFrequently: true}),\
 known = new Map(), out = new Set(), t = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const read = c => { ctx.clearRect(0, 0, 1, 1); ctx.fillStyle = c; ctx.fillRect(0, 0, 1, 1);\
 return [...ctx.getImageData(0, 0, 1, 1).data]; };
  const rgba = c => { if (!known.has(c)) known.set(c, read(c)); return known.get(c); };
  const over = (a, b) => b.map((v, i) => a[i]*a[3]/255 + v*(1 - a[3]/255));
  const paper = e => e ? over(rgba(getComputedStyle(e).backgroundColor), paper(e.parentElement)) : [255, 255, 255];
  const light = c => c.map(v => v/255).map(v => v <= .04045 ? v/12.92 : ((v + .055)/1.055)**2.4)\
.reduce((s, v, i) => s + v*[.2126, .7152, .0722][i], .05);
  while (t.nextNode()) {
    const e = t.currentNode.parentElement, c = getComputedStyle(e), size = parseFloat(c.fontSize);
    if (!t.currentNode.data.trim() || e.closest('script, style, noscript')\
 || !e.checkVisibility({visibilityProperty: true})) continue;
    const p = paper(e), [a, b] = [light(p), light(over(rgba(c.color), p))], ratio = Math.max(a, b)/Math.min(a, b);
    if (ratio < (size >= 24 || size >= 18.66 && c.fontWeight >= 600 ? 3 : 4.5))\
 out.add(`${e.tagName} ${e.className} in ${e.parentElement.className || e.parentElement.tagName}:\
 ${ratio.toFixed(2)} (${t.currentNode.data.trim().slice(0, 30)})`);
  }
  return [...out]; }"""

@pytest.mark.parametrize('page', ['index.html', 'schedules.html', 'reports/index.html', 'reports/00_quickstart.html'])
def test_legible(page, tab, url):
    "In both schemes letters stand out from their paper (WCAG: 4.5, large ones 3), and figures keep the white one that they were drawn on"
    tab.set_viewport_size(dict(width=1280, height=900)); tab.goto(url + page)
    for scheme in ('light', 'dark'):
        assert tab.evaluate(pale) == [], scheme
        assert {*tab.evaluate("[...document.querySelectorAll('main img')]"
                              ".map(i => getComputedStyle(i).backgroundColor)")} <= {'rgb(255, 255, 255)'}, scheme
        tab.locator('.quarto-color-scheme-toggle:visible').first.click(); tab.wait_for_timeout(400)

def test_wide_figures_on_a_phone(tab, url):
    "Four panels in a row are not squeezed into 360 pixels: they scroll, the page does not"
    tab.set_viewport_size(dict(width=390, height=900)); tab.goto(url + 'schedules.html')
    tab.wait_for_selector('.figure-scroll img')
    widths = tab.evaluate("[...document.querySelectorAll('main img')]"
                          ".filter(i => i.naturalWidth >= 760 && i.naturalWidth >= 1.6*i.naturalHeight)"
                          ".map(i => [i.naturalWidth, i.clientWidth, i.closest('.figure-scroll')?.scrollWidth])")
    assert widths and all(.6*natural < w <= scroll for natural, w, scroll in widths)
    assert tab.evaluate('document.documentElement.scrollWidth - window.innerWidth') <= 1

def test_search(tab, url):
    "A name leads to its chapter, and nonsense nowhere"
    tab.set_viewport_size(dict(width=1280, height=900)); tab.goto(url + 'index.html')
    box = tab.locator('input[type=search]:visible, input[placeholder=Search]:visible').first
    there = tab.locator('a[href*="fourier.html"]:visible'); before = there.count()
    box.click(); box.press_sequentially('rapsd'); tab.wait_for_timeout(1500); assert there.count() > before
    box.fill(''); box.press_sequentially('qxzvw'); tab.wait_for_timeout(1500); assert there.count() <= before

tables = """() => [...document.querySelectorAll('main table')].map(table => {
  const heads = [...(table.tHead?.rows[0]?.cells ?? [])], rows = () => [...(table.tBodies[0]?.rows ?? [])],\
 column = i => rows().map(r => r.cells[i].dataset.v ?? r.cells[i].textContent.trim());
  const click = (b, i) => { b.click(); return [heads.map(h => h.getAttribute('aria-sort')), column(i)]; },\
 buttons = heads.flatMap(h => [...h.querySelectorAll('button')]);
  return {heads: heads.length, rows: rows().length, buttons: buttons.length,\
 clicks: buttons.map((b, i) => [column(i), click(b, i), click(b, i)])};
})"""

def in_order(values, up=True):
    "Are cells sorted, as a reader would have it: numbers by value where all are numbers, empty ones last?"
    empty = [v in ('', '-') for v in values]
    full = [v for v, e in zip(values, empty) if not e]
    ns = [re.match(r'[+-]?(?:[\d,]*\.\d+|\d[\d,]*)(?:e[+-]?\d+)?(?=x?$|x? |%|[,;)\]])', v) for v in full]
    if not all(ns): return empty == sorted(empty)             # what text comes first is the browser's affair
    ns = [float(m[0].replace(',', '')) for m in ns]
    return empty == sorted(empty) and ns == sorted(ns, reverse=not up)

def test_in_order():
    assert (in_order(['-0.2 [-1, 1]', '3%', '1,013', '']) and in_order(['1,013', '3%', '-']) is False
            and in_order(['1,013', '2.5', '-'], up=False))
    assert not in_order(['2.5', '-', '3']) and not in_order(['10', '9'])

def test_tables_sort(tab, url):
    "Every table of a report with a head and more than three rows, by every column, both ways"
    found = 0
    for f in sorted((root/'reports'/'results').glob('*/metrics.json')):
        tab.goto(f'{url}reports/{f.parent.name}.html')
        for k, t in enumerate(tab.evaluate(tables)):
            assert t['buttons'] == (t['heads'] if t['rows'] > 3 else 0), (f.parent.name, k)
            for i, (before, *after) in enumerate(t['clicks']):
                for way, (marks, values) in zip(('ascending', 'descending'), after):
                    assert ([m for m in marks if m] == [marks[i]] == [way] and sorted(values) == sorted(before)
                            and in_order(values, way == 'ascending')), (f.parent.name, k, i, values)
            found += t['buttons'] > 0
    assert found > 20

columns = dict(interval=['10.0 [9, 11]', '-0.5 [-1, 0]', '-', '1.23 [1.1, 1.4]', '.5'],
               thousands=['1,013', '200', '2.5', '\u22127', '12,000.5'],
               percent=['5%', '100%', '-3%', '12% of all', '+7%'],
               power=['5.4e-10', '1e3', '2x', '', '0.003 s'],
               date=['2026-11-22', '2025-12-01', '2026-02-03', '2026-11-03', '2024-01-01'],
               text=['run 10', 'run 9', 'x', '3 of 4', '-'])
# rows, from the least; what has no value is last
expected = dict(interval='14302', thousands='32104', percent='20431', power='04213', date='41230', text='31024')

@pytest.fixture
def small(tab, tmp_path):
    rows = ''.join(f'<tr>{"".join(f"<td>{v}</td>" for v in r)}</tr>'
                   for r in zip(map(str, range(5)), *columns.values()))
    table = (f'<table><thead><tr>{"".join(f"<th>{k}</th>" for k in ("", *columns))}</tr></thead>'
             f'<tbody>{rows}</tbody></table>')
    three = table.replace(rows, ''.join(rows.partition('</tr>')[:2])*3)
    (tmp_path/'a.html').write_text('<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">'
                                   f'<main>{table}{three}<table><tr><td>no head</td></tr></table></main>'
                                   + (root/'nbs'/'site.html').read_text())
    with Served(tmp_path) as url: tab.goto(url + 'a.html'); yield tab

def order(tab):
    return ''.join(tab.evaluate("[...document.querySelector('table').tBodies[0].rows]"
                                ".map(r => r.cells[0].textContent)"))

@pytest.mark.parametrize('column', columns)
def test_every_kind_of_cell_sorts(column, small):
    "Intervals, thousands, percents, signs, powers; a date is text; what has no value comes last both ways"
    head = small.get_by_role('button', name=column)
    head.click(); up = order(small)
    assert up == expected[column]
    full = up.rstrip(''.join(str(i) for i, v in enumerate(columns[column]) if v in ('', '-')))
    head.click(); assert order(small) == full[::-1] + up[len(full):]

def test_sorting_without_a_mouse(small):
    "A head is a button in a column's head, with a name, reached by the keyboard; small tables and headless ones stay as they are"
    assert (small.locator('table button').count() == len(columns) + 1
            and small.get_by_role('button', name='column 1').count() == 1)
    small.get_by_role('button', name='interval').focus()
    for key, way in (('Enter', 'ascending'), ('Space', 'descending')):
        small.keyboard.press(key)
        assert small.get_by_role('columnheader', name='interval').first.get_attribute('aria-sort') == way
    assert order(small) == '03412' and small.locator('[aria-sort]').count() == 1

def test_gallery(tab, url):
    "A card with figure, verdict and date for each result, and it leads there"
    tab.goto(url + 'reports/index.html')
    names = sorted(f.parent.name for f in (root/'reports'/'results').glob('*/metrics.json'))
    cards = tab.locator('a.report')
    assert [c.get_attribute('href') for c in cards.all()] == [f'{n}.html' for n in names]
    assert all(c.locator('img').count() == 1 and c.locator('.verdict').inner_text()
               and re.search(r'\d{4}-\d\d-\d\d|not committed', c.inner_text()) for c in cards.all())
    cards.first.click(); tab.wait_for_load_state(); assert names[0] in tab.url

faults = {'console': '<script>console.error("oops")</script>', 'script': '<script>null.x</script>',
          '404': '<script src="gone.js"></script>', 'figure': '<img src="gone.png">',
          'raw TeX': '<p>so \\(a+b\\) is</p>', 'wider': '<div style="width:3000px">wide</div>'}
@pytest.mark.parametrize('word', faults)
def test_planted_faults_are_seen(word, tab, tmp_path):
    ok = '<!doctype html><link rel="icon" href="data:,"><main><p>fine, it costs 5 or more</p></main>'
    (tmp_path/'ok.html').write_text(ok)
    (tmp_path/'bad.html').write_text(ok.replace('</main>', faults[word] + '</main>'))
    with Served(tmp_path) as url:
        assert problems(tab, url + 'ok.html') == []
        assert any(word in p for p in problems(tab, url + 'bad.html'))

def test_an_earlier_page_is_not_blamed(tab, url, tmp_path):
    "A page that is left while it still loads has requests that fail: they are not the next page's"
    (tmp_path/'ok.html').write_text('<!doctype html><link rel="icon" href="data:,"><main><p>fine</p></main>')
    with Served(tmp_path) as here:
        for _ in range(5):
            tab.goto(url + 'reports/index.html', wait_until='commit')
            assert problems(tab, here + 'ok.html') == []
