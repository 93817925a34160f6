"The house is tidy, and each guard of it can fail."
import json, subprocess, sys
from importlib import import_module

import pytest
from execnb.nbio import mk_cell, read_nb

import guards
from guards import ROOT, notebooks

FLOORS = guards.floors()
MODULES = sorted(FLOORS)
NBS = [str(o.relative_to(ROOT)) for o in notebooks()]
SCRIPTS = [o for d in ('tests', 'tools', 'benchmarks') for o in sorted((ROOT/d).rglob('*.py'))]
PY = ['setup.py', *(str(o.relative_to(ROOT)) for o in SCRIPTS)]

def cells(name): return read_nb(ROOT/name).cells
def source(module): return (ROOT/'bgtasks'/f'{module.replace(".", "/")}.py').read_text(encoding='utf-8')

def none(faults):
    "Fail with one line for each of `faults`"
    faults = sorted(set(faults))
    if faults: pytest.fail('\n'.join(faults), pytrace=False)

def each(name, find):
    "What `find` says of each cell of the notebook `name`, with the number of the cell"
    return [f'{name} cell {i}: {o}' for i,c in enumerate(cells(name), 1) for o in find(c)]

# The house

def test_notebooks_are_named_by_floor_and_module():
    for path in notebooks('nbs/api'):
        mods = [o for o in MODULES if path.stem[3:]==o.split('.')[-1]]
        assert path.stem[:2].isdigit() and path.stem[2]=='_' and mods, f'{path.name} is not FN_module.ipynb'
    files = [o.relative_to(ROOT/'bgtasks').with_suffix('') for o in (ROOT/'bgtasks').rglob('*.py')]
    assert {'.'.join(o.parts) for o in files if not o.name.startswith('_')}==set(MODULES)

@pytest.mark.parametrize('module', MODULES)
def test_imports_go_down(module): none(guards.wrong_arrows(source(module), module, FLOORS))

@pytest.mark.parametrize('module', MODULES)
def test_no_module_is_long(module): assert len(source(module).splitlines())<=400

@pytest.mark.parametrize('module', MODULES)
def test_public_names_say_what_they_do(module):
    mod = import_module(f'bgtasks.{module}')
    none(o for n in mod.__all__ for o in guards.undocumented(getattr(mod, n), n))

@pytest.mark.parametrize('module', MODULES)
def test_public_names_are_used_where_the_reader_sees_it(module):
    path = next(o for o in notebooks('nbs/api') if o.stem[3:]==module.split('.')[-1])
    none(set(import_module(f'bgtasks.{module}').__all__) - set(guards.used(read_nb(path).cells)))

DOOR = '''
import bgtasks, json, sys
names = [o for o in vars(bgtasks) if o[0]!='_' and getattr(vars(bgtasks)[o], '__name__', '')!='bgtasks.'+o]
print(json.dumps([names, sorted({o.partition('.')[0] for o in sys.modules})]))'''

def test_the_door_is_small_and_light():
    out = subprocess.run([sys.executable, '-c', DOOR], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names,loaded = json.loads(out)
    assert 0 < len(names) <= 20
    assert not {'fastapi', 'fasthtml', 'pebble', 'IPython', 'nbdev', 'pydantic', 'uvicorn', 'apsw'} & set(loaded)

# The notebooks

@pytest.mark.parametrize('name', NBS)
def test_no_cell_is_dead(name): none(each(name, lambda c: filter(None, [guards.dead(c)])))

@pytest.mark.parametrize('name', NBS)
def test_directives_are_those_of_nbdev_and_quarto(name): none(each(name, guards.odd_directives))

@pytest.mark.parametrize('name', NBS)
def test_edges_are_hidden(name):
    "nbdev leaves out a heading that ends in ` -`, but not the cells below it: each needs `#| hide`"
    none(guards.shown_edges(cells(name)))

@pytest.mark.parametrize('name', [o for o in NBS if o.startswith('nbs/api/')])
def test_imports_have_a_cell_of_their_own(name):
    "To make the docs of a module nbdev runs each cell with an import, but not the cells that it stands on"
    none(each(name, lambda c: c.source.splitlines()[:1] if guards.mixed(c) else []))

@pytest.mark.parametrize('name', [o for o in NBS if not o.startswith('nbs/api/')])
def test_a_page_can_be_typed_as_it_is_seen(name): none(guards.from_nowhere(cells(name)))

@pytest.mark.parametrize('name', NBS)
def test_outputs_are_kept_and_clean(name):
    none(each(name, guards.bad_outputs))
    none(c.source for c,seen in guards.visible(cells(name)) if seen and guards.lost_output(c))

@pytest.mark.parametrize('name', NBS)
def test_lines_of_cells_are_short(name):
    none(each(name, lambda c: guards.long_lines(c.source) if c.cell_type=='code' else []))

@pytest.mark.parametrize('name', PY)
def test_lines_of_files_are_short(name): none(guards.long_lines((ROOT/name).read_text(encoding='utf-8')))

# Each guard can fail

def py(src, out=None):
    c = mk_cell(src)
    if out: c.outputs = [dict(output_type='stream', name='stdout', text=out)]
    return c

def md(src): return mk_cell(src, 'markdown')

@pytest.mark.parametrize('src,want', [
    ('from .run import x', 'job (floor 0) imports run (floor 2)'), ('from bgtasks.run import x', 'imports run'),
    ('from .errors import x', 'imports errors (floor 0)'), ('def f():\n    import bgtasks.run', 'imports run'),
    ('from . import run', 'imports run'), ('import bgtasks', 'name the module'),
    ('from bgtasks import Job', 'name the module')])
def test_an_arrow_up_is_found(src, want):
    assert want in str(list(guards.wrong_arrows(src, 'job', dict(job=0, errors=0, run=2, sub=1))))

def test_an_arrow_down_is_none():
    src = 'import json\nfrom .job import Job\nfrom bgtasks.errors import A, B\nfrom ..retry import C'
    assert not list(guards.wrong_arrows(src.replace('..retry', '.retry'), 'run', dict(job=0, errors=0, retry=1, run=2)))
    assert not list(guards.wrong_arrows('from ..job import Job', 'backends.celery', {'job': 0, 'backends.celery': 5}))

def test_silence_about_a_name_is_found():
    class Bad:
        def act(self, x): pass
    def worse(x,
              y=1 # a word
    ): "Says something"
    assert list(guards.undocumented(Bad, 'Bad'))==['Bad has no docstring', 'Bad.act has no docstring',
                                                         'Bad.act: nothing is said of its parameter x']
    assert list(guards.undocumented(worse, 'worse'))==['worse: nothing is said of its parameter x']

def test_only_what_the_reader_sees_counts_as_used():
    nb = [py('#| export\na'), py('#| hide\nb'), py('c(d.e)'), md('## Edges -'), py('f'), md('### Deeper'), py('g'),
          md('## Next'), py('h'), py('show_doc(i)')]
    assert {'c', 'd', 'e', 'h'} == set(guards.used(nb))

def test_what_a_page_hides_is_missed():
    nb = [py('#| hide\nimport json\nkept = 1'), py('from math import *\ndef f(x): return [y for y in x if sin(y)]'),
          py('try: json.dumps(f([kept]))\nexcept ValueError as e: print(e)')]
    assert guards.from_nowhere(nb)=={'json', 'kept'}

@pytest.mark.parametrize('cell', [
    py(''), py('#| hide\n# only words'), py('#| notest\n1'), py('#| eval: false\n1'), py('1\n# test_eq(a, b)'),
    py('# x = 1\n1'), mk_cell('assert 1', 'raw')])
def test_a_dead_cell_is_found(cell): assert guards.dead(cell)

@pytest.mark.parametrize('cell', [
    py('#| default_exp x'), py('#| eval: false\n# not run: it needs a broker\n1'), py('x = 1 # why'),
    py('# proves that it ends\n1'), mk_cell('---\na: b\n---', 'raw'), md('')])
def test_a_live_cell_is_not(cell): assert not guards.dead(cell)

def test_other_faults_of_cells_are_found():
    assert guards.odd_directives(py('#| hides\n1'))=={'hides'}
    assert guards.shown_edges([md('## Edges -'), py('a'), py('#| hide\nb'), md('## Next'), py('c')])==['a']
    assert guards.mixed(py('import a\na.b()')) and not guards.mixed(py('import a, b\nfrom c import d'))
    assert guards.long_lines('x'*121) and not guards.long_lines('x'*120)
    assert guards.lost_output(py('x + 1')) and guards.lost_output(py('print(x)'))
    assert not guards.lost_output(py('x', '1')) and not guards.lost_output(py('test_eq(a, b)'))

@pytest.mark.parametrize('cell', [
    py('1', 'saved in /tmp/xyz'), py('open("/home/me/x")'), md('See /Users/me/app.'), py('f', '<f at 0x7f00aa11bb22>')])
def test_traces_of_one_machine_are_found(cell): assert list(guards.bad_outputs(cell))

def test_an_error_left_as_output_is_found():
    cell = py('1/0')
    cell.outputs = [dict(output_type='error', ename='ZeroDivisionError', evalue='', traceback=[])]
    assert list(guards.bad_outputs(cell))

def test_routes_and_addresses_are_no_paths():
    assert not list(guards.bad_outputs(py('get("/home"); get("http://a/tmp/x")')))
