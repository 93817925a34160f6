"`tools/docs.py` finds each kind of fault, and finds none in a sound project."
import subprocess, sys
from pathlib import Path

import pytest
from execnb.nbio import mk_cell, new_nb, write_nb

ROOT = Path(__file__).parents[1]
SETTINGS = """[DEFAULT]
repo = tiny
lib_name = tiny
user = someone
author = someone
author_email = someone@example.org
description = A small project
branch = main
custom_sidebar = True
update_pyproject = False
"""
SIDEBAR = 'website:\n  sidebar:\n    contents:\n'
CORE = '''#| export
def double(x):
    "Twice `x`"
    return 2*x

class Box:
    "Holds `x`"
    def open(self): "Open it"'''
NOTED = 'a = 1 # <1>\nb = 2 # <2>'

def md(text): return mk_cell(text, 'markdown')
def py(text, *outputs):
    cell = mk_cell(text)
    cell.outputs = list(outputs)
    return cell

def stdout(text): return dict(output_type='stream', name='stdout', text=[text])
def result(text): return dict(output_type='execute_result', execution_count=1, metadata={}, data={'text/plain': [text]})
def page(*cells): return [md('# A page\n\n> One sentence.'), *(md(o) if isinstance(o, str) else o for o in cells)]

SOUND = {
    'index.ipynb': [md('# tiny\n\n> It doubles.'), md('Use `double`:\n\n- once\n- twice'),
                    py('double(2)', stdout('doubling\n'), result('4'))],
    'core.ipynb': page(py('#| default_exp core'), py(CORE), py('#| hide\nimport nbdev; nbdev.nbdev_export()')),
    'more/05_links.ipynb': page(
        '## Here\n\n[page](../core.ipynb#double), [address](../core.html), [here](#here), `double()`, `tiny.core.Box`, '
        '<https://someone.github.io/tiny/more/links.html#here>, [all](../more/), '
        '[code](https://github.com/someone/tiny/blob/main/tiny/core.py), ![a dot](dot.svg), '
        '[web](https://example.org/x)',
        '::: {.callout-note title="Note" collapse="true"}\nText.', ':::',
        py('#| echo: true\n'+NOTED, stdout('with output between')), '1. one\n2. two',
        '```python\nx = 1 # <1>\n```\n\n1. in a text cell'),
    'more/index.qmd': '---\ntitle: More\nlisting:\n  contents: ["*.ipynb"]\n---\n\nSee [core](../core.ipynb).\n'}

FAULTY = {
    'no_page': (page('See [it](nope.ipynb).'), 'cell 2 line 1: link to nope.ipynb: no such page or file'),
    'no_anchor': (page('First line\n\n[it](../core.ipynb#nope)'), 'cell 2 line 3: link to ../core.ipynb#nope: no'),
    'no_own_anchor': (page('[it](#nope)'), 'no heading #nope on nbs/bad/no_own_anchor.ipynb'),
    'doclink': (page('Call `Box.open`.'), 'cell 2 line 1: doclink `Box.open` to '),
    'name': (page('Call `tiny.core.halve()`.'), 'no such name: `tiny.core.halve()`'),
    'image': (page('![a dot](none.png)'), 'image to none.png: no such page or file'),
    'image_words': (page('![](../more/dot.svg)'), 'image ../more/dot.svg has no description'),
    'raw_link': (page('<p><a href="nope.html">it</a></p>'), 'href to nope.html: no such page or file'),
    'site_link': (page('<https://someone.github.io/tiny/nope.html>'), '/tiny/nope.html: no such page or file'),
    'blob': (page('[it](https://github.com/someone/tiny/blob/main/nope.py)'), 'the repository has no file nope.py'),
    'outside': (page('[it](../../settings.ini)'), 'outside the site'),
    'callout_kind': (page('::: {.callout-hint}\nText\n:::'), 'cell 2 line 1: no callout "callout-hint"'),
    'callout_empty': (page('::: {.callout-tip}\n:::'), 'the callout-tip is empty'),
    'callout_attr': (page('::: {.callout-tip titel="A"}\nText\n:::'), 'a callout has no attribute "titel"'),
    'callout_brace': (page('::: {.callout-tip\nText\n:::'), 'cell 2 line 1: "::: {.callout-tip" is no fence of a div'),
    'callout_text': (page('Fine.', '::: callout tip\nText'), 'cell 3 line 1: "::: callout tip" is no fence of a div'),
    'callout_open': (page('Fine.', '::: {.callout-tip}\nText'), 'cell 3: pandoc: [WARNING] Div'),
    'notes_alone': (page(py(NOTED), 'No list.'), 'cell 2 line 1: no numbered list right after the code'),
    'notes_few': (page(py(NOTED), '1. one'), '2 annotations, but the list after the code has 1'),
    'notes_gap': (page(py('a = 1 # <1>\nb = 2 # <3>'), '1. one\n2. two'), 'annotations count from 1 with no gap'),
    'notes_form': (page(py('a = 1 # <1')), 'cell 2 line 1: an annotation is "# <1>", not "a = 1 # <1"'),
    'option': (page(py('#| ecko: false\n1')), 'cell 2 line 1: Quarto has no cell option "ecko"'),
    'list': (page('They are\n- one\n- two'), 'cell 2 line 2: a list needs an empty line above it'),
    'untitled': ([md('Text without a heading')], 'no title'),
    'no_sentence': ([md('# Title'), md('Text')], 'no "> one sentence"'),
    '10_same': (page('Text'), 'bad/same.html: 2 pages have this address'),
    'lonely': (page('Text'), 'sidebar.yml: the sidebar does not name bad/lonely.ipynb')}
OTHER = ['sidebar.yml: sidebar names gone.ipynb, which is no page',
         'nbs/bad/index.qmd: its listing *.html finds no page',
         'README.md: is not what index.ipynb gives']

def run(root, *cmd):
    res = subprocess.run([sys.executable, *map(str, cmd)], cwd=root, capture_output=True, text=True)
    return res.returncode, res.stdout + res.stderr

def docs(root, *args): return run(root, ROOT/'tools'/'docs.py', *args)

def build(root, pages, named):
    "A project in `root` of notebooks and texts, installed as far as nbdev's doclinks ask for it"
    (root/'settings.ini').write_text(SETTINGS)
    for name,cells in pages.items():
        path = root/'nbs'/name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(cells, str): path.write_text(cells)
        else: write_nb(new_nb(cells), path)
    (root/'nbs'/'sidebar.yml').write_text(SIDEBAR + ''.join(f'      - {o}\n' for o in named))
    (root/'nbs'/'more'/'dot.svg').write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    info = root/'tiny-0.dist-info'
    info.mkdir()
    (info/'METADATA').write_text('Metadata-Version: 2.1\nName: tiny\nVersion: 0\n')
    (info/'entry_points.txt').write_text('[nbdev]\ntiny = tiny._modidx:d\n')
    code,out = run(root, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()')
    assert not code, out
    return root

@pytest.fixture(scope='module')
def sound(tmp_path_factory): return build(tmp_path_factory.mktemp('sound'), SOUND, SOUND)

@pytest.fixture(scope='module')
def faults(tmp_path_factory):
    "What the check says of a project with every fault"
    bad = {f'bad/{k}.ipynb': cells for k,(cells,_) in FAULTY.items()}
    listing = '---\ntitle: Bad\nlisting:\n  contents: ["*.html"]\n---\n\nText\n'
    pages = SOUND | bad | {'bad/20_same.ipynb': page('Text'), 'bad/index.qmd': listing}
    root = build(tmp_path_factory.mktemp('faulty'), pages, [*(o for o in pages if 'lonely' not in o), 'gone.ipynb'])
    code,out = docs(root)
    assert code==1, out
    return out.splitlines()

def test_a_sound_project_has_no_faults(sound):
    code,out = docs(sound, '--readme', '--html', sound/'html')
    assert (code,out)==(0, '4 pages, 0 faults\n')

def test_the_readme_is_in_the_form_that_nbdev_readme_gives(sound):
    docs(sound, '--readme')
    assert (sound/'README.md').read_text()=='''# tiny


<!-- WARNING: THIS FILE WAS AUTOGENERATED! DO NOT EDIT! -->

Use [`double`](https://someone.github.io/tiny/core.html#double):

- once
- twice

``` python
double(2)
```

    doubling

    4
'''

def test_plain_pages_link_to_each_other(sound):
    docs(sound, '--html', sound/'html')
    html = ' '.join((sound/'html'/'more'/'links.html').read_text().split())
    assert '<a href="../core.html#double">page</a>' in html and '<a href="../more/links.html#here"' in html
    assert '<a href="../core.html">A page</a>' in html # the list of pages on top
    assert (sound/'html'/'more'/'dot.svg').exists()

@pytest.mark.parametrize('name', FAULTY)
def test_fault(faults, name):
    want = FAULTY[name][1]
    assert [o for o in faults if want in o and (name in o or 'same.html' in o)], '\n'.join(faults)

@pytest.mark.parametrize('want', OTHER)
def test_fault_of_the_site(faults, want): assert want in '\n'.join(faults)

def test_nothing_else_is_called_a_fault(faults):
    wanted = [o for _,o in FAULTY.values()] + OTHER
    assert [o for o in faults[:-1] if not any(w in o for w in wanted)]==[]
    assert len(faults)-1==len(wanted), '\n'.join(faults)

def test_what_stops_nbdev_is_said(tmp_path):
    broken = {'broken.ipynb': page(py('#| default_exp broken'), py('#| export\nraise ValueError("oh")'))}
    code,out = docs(build(tmp_path, SOUND | broken, SOUND))
    assert code==1 and 'cell' in out and 'ValueError' in out
