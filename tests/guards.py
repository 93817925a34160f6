"The rules of the house, each as a function that gives what breaks it. `test_guards.py` applies them."
import ast, builtins, inspect, re
from importlib import import_module
from pathlib import Path

from execnb.nbio import read_nb
from fastcore.docments import docments

ROOT = Path(__file__).parents[1]
DIRECTIVES = {'default_exp', 'export', 'exports', 'exporti', 'hide', 'hide_line', 'echo', 'output', 'include', 'eval',
              'warning', 'error', 'label', 'fig-cap', 'fig-alt', 'code-fold', 'code-summary', 'code-overflow'}
EXPORTS = {'export', 'exports', 'exporti'}
TELLING = (ast.Assign, ast.AugAssign, ast.Import, ast.ImportFrom, ast.Return, ast.FunctionDef, ast.ClassDef, ast.Assert,
           ast.Call, ast.Await)
RE_DIRECTIVE = re.compile(r'^\s*#\s*\|\s*([\w-]+)', re.M)
RE_PATH = re.compile(r'(?<![\w.:/])(?:/(?:work|root|tmp|home|Users|opt|mnt|var)/[\w.-]+|[A-Z]:\\\w+)')
RE_ADDRESS = re.compile(r'\b0x[0-9a-f]{6,}\b')

def notebooks(folder='nbs'):
    "The project's notebooks, without an editor's copies"
    return sorted(o for o in (ROOT/folder).rglob('*.ipynb') if '.ipynb_checkpoints' not in o.parts)

def text(s): return s if isinstance(s, str) else ''.join(s)
def directives(cell): return set(RE_DIRECTIVE.findall(cell.source)) if cell.cell_type=='code' else set()
def code_lines(cell): return [l for l in cell.source.splitlines() if l.strip() and not RE_DIRECTIVE.match(l)]

def parsed(cell):
    "The statements of a code cell, without magics"
    src = '\n'.join(l for l in cell.source.splitlines() if not re.match(r'\s*[%!]', l))
    try: return ast.parse(src).body
    except SyntaxError: return []

def visible(cells):
    "Pairs of a code cell and whether the reader of the docs sees it as an example"
    edge = 0
    for c in cells:
        m = re.match(r'(#+)\s(.*)', c.source) if c.cell_type=='markdown' else None
        if m and (not edge or len(m[1])<=edge): edge = len(m[1]) if m[2].rstrip().endswith(' -') else 0
        if c.cell_type=='code': yield c, not edge and not directives(c) & {'hide', *EXPORTS}

def _makes(o):
    "Names that a node of a syntax tree binds"
    if isinstance(o, (ast.Import, ast.ImportFrom)):
        for a in o.names:
            if a.name=='*': yield from vars(import_module(o.module))
            else: yield (a.asname or a.name).split('.')[0]
    elif isinstance(o, ast.Name) and not isinstance(o.ctx, ast.Load): yield o.id
    elif isinstance(o, ast.arg): yield o.arg
    elif isinstance(o, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler)): yield o.name

def from_nowhere(cells):
    "Names that the cells of a page use, and that no cell makes which the reader sees: typed from the page, it fails"
    nodes = [o for c,seen in visible(cells) if seen for s in parsed(c) for o in ast.walk(s)]
    made = {*dir(builtins), *(n for o in nodes for n in _makes(o))}
    return {o.id for o in nodes if isinstance(o, ast.Name)} - made

# Floors

def floors():
    "Floor of each module, from the names of the notebooks that export them"
    res = {}
    for path in notebooks('nbs/api'):
        names = [m[1] for c in read_nb(path).cells if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', c.source, re.M))]
        if names: res[names[0]] = int(path.name[0])
    return res

def imported(source, module):
    "Dotted names, below the package, of what `source` of `module` imports from it; '' is the package itself"
    for o in ast.walk(ast.parse(source)):
        if isinstance(o, ast.Import): names = [a.name for a in o.names]
        elif isinstance(o, ast.ImportFrom):
            base = ['bgtasks', *module.split('.')][:-o.level] if o.level else []
            stem = '.'.join(base + ([o.module] if o.module else []))
            names = [f'{stem}.{a.name}' for a in o.names]
        else: continue
        yield from (n.partition('.')[2] for n in names if n.split('.')[0]=='bgtasks')

def wrong_arrows(source, module, floors):
    "Imports of `module` that do not go down"
    for name in imported(source, module):
        target = next((o for o in sorted(floors, key=len, reverse=True) if name==o or name.startswith(o+'.')), None)
        if target is None: yield f'{module} imports bgtasks{"."+name if name else ""}: name the module that has it'
        elif floors[target]>=floors[module]:
            yield f'{module} (floor {floors[module]}) imports {target} (floor {floors[target]})'

# Public names

def undocumented(obj, name):
    "What lacks a docstring or a word on a parameter, in one public name"
    if not (inspect.isclass(obj) or inspect.isfunction(obj)): return
    if not inspect.getdoc(obj): yield f'{name} has no docstring'
    if inspect.isfunction(obj): yield from mute_params(obj, name)
    else:
        for k,v in vars(obj).items():
            f = getattr(v, '__func__', getattr(v, 'fget', v))
            if k.startswith('_') or not inspect.isfunction(f): continue
            if not inspect.getdoc(getattr(obj, k)): yield f'{name}.{k} has no docstring'
            yield from mute_params(f, f'{name}.{k}')

def mute_params(f, name):
    doc = docments(f, full=True)
    for p in inspect.signature(f).parameters.values():
        if p.name in ('self', 'cls') or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD): continue
        if p.annotation is p.empty and not (doc.get(p.name) or {}).get('docment'):
            yield f'{name}: nothing is said of its parameter {p.name}'

def used(cells):
    "Names that visible examples use"
    for c,seen in visible(cells):
        if not seen: continue
        for o in (n for t in parsed(c) for n in ast.walk(t)):
            if isinstance(o, ast.Call) and getattr(o.func, 'id', '')=='show_doc': break
            if isinstance(o, ast.Name): yield o.id
            elif isinstance(o, ast.Attribute): yield o.attr

# Cells

def is_code(comment):
    "Is the text of a comment a statement rather than a sentence?"
    try: body = ast.parse(comment.strip()).body
    except (SyntaxError, ValueError): return False
    return any(isinstance(o.value if isinstance(o, ast.Expr) else o, TELLING) for o in body)

def dead(cell):
    "Why a cell is dead, if it is"
    if cell.cell_type=='raw': return None if cell.source.startswith('---') else 'a raw cell'
    if cell.cell_type!='code': return
    ds,lines = directives(cell),code_lines(cell)
    if not cell.source.strip(): return 'an empty code cell'
    if 'skip_exec' in cell.source or 'notest' in ds: return 'a cell that is never run'
    if re.search(r'^#\|\s*eval:\s*false', cell.source, re.M) and not any(l.startswith('# not run: ') for l in lines):
        return '`eval: false` with no line "# not run: why"'
    if lines and all(l.lstrip().startswith('#') for l in lines): return 'nothing but comments'
    for l in lines:
        if l.lstrip().startswith('#') and is_code(l.lstrip(' #')): return f'code in a comment: {l.strip()}'

def long_lines(source): return [l for l in source.splitlines() if len(l)>120]

def odd_directives(cell): return directives(cell) - DIRECTIVES

def shown_edges(cells):
    "Code cells under a heading that ends in ` -` which nbdev would show without their heading"
    hidden = {'hide', *EXPORTS}
    return [code_lines(c)[0] for c,seen in visible(cells) if not seen and not directives(c) & hidden]

def mixed(cell):
    "Does nbdev run this cell for the docs, because of an import, though it does more than import?"
    if cell.cell_type!='code' or directives(cell) & EXPORTS or 'nbdev_export()' in cell.source: return False
    kinds = {type(o) for t in parsed(cell) for o in ast.walk(t)}
    return bool(kinds & {ast.Import, ast.ImportFrom}) and bool(kinds & {ast.Expr, ast.Assign})

# Outputs

def output_text(out):
    if out['output_type']=='stream': return text(out['text'])
    if out['output_type']=='error': return f"{out['ename']}: {out['evalue']}"
    return '\n'.join(text(v) for k,v in out['data'].items() if k.startswith('text/') or k.endswith('xml'))

def bad_outputs(cell):
    "Errors, this machine's paths and addresses of objects in what a cell gave or says"
    outs = cell.get('outputs', [])
    if any(o['output_type']=='error' for o in outs): yield 'an error as output: catch it and print it'
    for what,s in [('source', cell.source), *(('output', output_text(o)) for o in outs)]:
        for m in RE_PATH.finditer(s): yield f'a path of one machine in its {what}: {m[0]}'
    for o in outs:
        for m in RE_ADDRESS.finditer(output_text(o)): yield f'an address in its output: {m[0]}'

def shows(cell):
    "Does the last statement of the cell certainly show something?"
    body = parsed(cell)
    if not body or cell.source.rstrip().endswith(';') or not isinstance(body[-1], ast.Expr): return False
    v = body[-1].value
    if isinstance(v, ast.Call): return getattr(v.func, 'id', '')=='print'
    return isinstance(v, (ast.Name, ast.JoinedStr, ast.BinOp, ast.Compare, ast.Tuple, ast.List, ast.Dict))

def lost_output(cell): return shows(cell) and not cell.get('outputs')
