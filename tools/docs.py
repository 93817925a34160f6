#!/usr/bin/env python
"""Check the documentation as far as that goes without Quarto, and render it where Quarto is on the PATH.

    python tools/docs.py                check every page, the sidebar and README.md
    python tools/docs.py --readme       first write README.md from nbs/index.ipynb
    python tools/docs.py --html DIR     also write plain HTML pages to look at
    python tools/docs.py --site         then render the real site into _docs (needs Quarto)

nbdev's own processing runs first; pandoc, on which Quarto stands, then reads each page, and the checks look at what it
read. Each fault names the page and, where it can be told, the cell (counted from 1) and its line.
"""
import argparse, json, re, shutil, subprocess, sys, yaml
from collections import Counter
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path, PurePosixPath
from posixpath import normpath
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pypandoc
from nbdev.config import get_config
from nbdev.quarto import nbdev_docs, refresh_quarto_yml
from nbdev.serve import proc_nbs

CALLOUTS = {'callout-note', 'callout-tip', 'callout-warning', 'callout-caution', 'callout-important'}
CALLOUT_ATTRS = {'title', 'collapse', 'appearance', 'icon'}
CELL_OPTIONS = {'echo', 'output', 'include', 'eval', 'warning', 'error', 'label', 'code-fold', 'code-summary',
                'code-overflow', 'code-line-numbers', 'lst-label', 'lst-cap', 'fig-cap', 'fig-alt', 'tbl-cap'}
NO_FENCE = '"{}" is no fence of a div, which is "::: {{.class}}" or ":::"'
MIMES = 'text/markdown', 'image/svg+xml', 'image/png', 'image/jpeg', 'text/html', 'text/plain'
RE_OPTION = re.compile(r'^#\|\s*([\w-]+):\s*(.*)$')
RE_NOTE = re.compile(r'#\s*<(\d+)>\s*$')
RE_BAD_NOTE = re.compile(r'#\s*(<\d+|\d+>)\s*$')
RE_LIST = re.compile(r'(?:[-*+]|\d+[.)])\s')


class Faults(list):
    "What is wrong, as lines to print"
    def add(self, where, what): self.append(f'{where}: {what}')

def pandoc(text, *args):
    "What pandoc makes of `text`, and what it warned of"
    res = subprocess.run([pypandoc.get_pandoc_path(), *args], input=text, capture_output=True, text=True)
    return (res.stdout if res.returncode==0 else None), res.stderr.strip()

def walk(node):
    "Every element of pandoc's tree below `node`, parents first"
    if isinstance(node, dict):
        if 't' in node: yield node
        node = list(node.values())
    if isinstance(node, list):
        for o in node: yield from walk(o)

def plain(node):
    "The words of an inline element"
    return ''.join(o['c'] if o['t']=='Str' else ' ' for o in walk(node) if o['t'] in ('Str', 'Space'))

def code_text(inl): return ''.join(o['c'][1] for o in walk(inl) if o['t']=='Code')
def joined(s): return s if isinstance(s, str) else ''.join(s or [])


# Notebook to markdown, as Quarto does it

def fence(text, lang=''):
    "`text` as a code block, with a fence longer than any in it"
    ticks = '`' * max([3, *(len(o)+1 for o in re.findall('`+', text))])
    return f'{ticks}{lang}\n{text.rstrip()}\n{ticks}'

def cell_options(cell):
    "The `#| key: value` lines that Quarto reads, and the source below them"
    lines = joined(cell['source']).splitlines()
    opts = {}
    while lines and (m := RE_OPTION.match(lines[0])):
        opts[m[1]] = m[2].strip()
        lines.pop(0)
    return opts, '\n'.join(lines).strip('\n')

def output_md(out, asis):
    "Markdown for one output of a code cell"
    if out['output_type']=='error': return fence(f"{out['ename']}: {out['evalue']}")
    if out['output_type']=='stream': return joined(out['text']) if asis else fence(joined(out['text']))
    mime = next((o for o in MIMES if o in out['data']), None)
    text = joined(out['data'].get(mime, ''))
    if mime in ('image/png', 'image/jpeg'): return f'![output of the cell](data:{mime};base64,{text.strip()})'
    return fence(text) if mime=='text/plain' and not asis else text

def code_md(cell):
    "Markdown for a code cell: what it holds, then what it gave"
    opts,src = cell_options(cell)
    if opts.get('include')=='false': return ''
    asis = opts.get('output')=='asis'
    parts = [fence(src, 'python')] if src and opts.get('echo')!='false' else []
    if opts.get('output')!='false':
        for o in cell.get('outputs', []):
            md = output_md(o, asis)
            parts.append(md if asis else f'::: {{.cell-output}}\n{md}\n:::')
    body = '\n\n'.join(parts)
    return body if asis or not body else f':::: {{.cell}}\n{body}\n::::'

def cell_md(cell):
    if cell['cell_type']=='code': return code_md(cell)
    return joined(cell['source']) if cell['cell_type']=='markdown' else ''

def front_matter(text):
    "The YAML between two lines of dashes on top of `text`, and the rest"
    m = re.match(r'---\n(.*?)\n---\s*?(?:\n|$)(.*)', text.strip(), re.DOTALL)
    return (yaml.safe_load(m[1]) or {}, m[2]) if m else ({}, text)

def notebook_md(nb, source):
    "Front matter and markdown of the processed notebook `nb`; for each line, where it is in `source`"
    meta,lines,where = {},[],[]
    ids = {c.get('id'): i for i,c in enumerate(source['cells'], 1)}
    for cell in nb['cells']:
        if cell['cell_type']=='raw':
            meta |= front_matter(joined(cell['source']))[0]
            continue
        new = cell_md(cell).splitlines() + ['']
        lines += new
        where += [ids.get(cell.get('id'))] * len(new)
    return meta, '\n'.join(lines), where


# Pages

def read_page(proc, nbs, path):
    "The processed file at `path` with all that the checks ask for"
    rel = PurePosixPath(path.relative_to(proc).as_posix())
    page = SimpleNamespace(rel=rel, name=f'{nbs.name}/{rel}', cells=[], where=None)
    text = path.read_text(encoding='utf-8')
    if path.suffix=='.ipynb':
        page.source = json.loads((nbs/rel).read_text(encoding='utf-8'))
        nb = json.loads(text)
        page.cells = nb['cells']
        page.meta,page.md,page.where = notebook_md(nb, page.source)
    else:
        page.meta,page.md = front_matter(text)
        page.source = {'cells': []}
    page.out = rel.with_name(page.meta.get('output-file', rel.with_suffix('.html').name))
    tree,page.warnings = pandoc(page.md, '-f', 'markdown', '-t', 'json')
    page.tree = json.loads(tree) if tree else {'blocks': []}
    page.ids = set(element_ids(page.tree['blocks']))
    return page

def element_ids(tree):
    "Every anchor on a page"
    for o in walk(tree):
        if o['t']=='Header': yield o['c'][1][0]
        if o['t'] in ('Div', 'Span', 'CodeBlock', 'Code', 'Link', 'Image', 'Table'): yield o['c'][0][0]
        if o['t'] in ('RawBlock', 'RawInline'): yield from re.findall(r'\b(?:id|name)="([^"]+)"', o['c'][1])

def locate(page, *needles):
    "Where in the source of `page` the first of `needles` that occurs is"
    for needle in needles:
        for i,c in enumerate(page.source['cells'], 1):
            lines = joined(c['source']).splitlines()
            for j,line in enumerate(lines, 1):
                if needle and needle in line: return f'{page.name} cell {i} line {j}'
    return page.name

def line_place(page, n):
    "Where in the source the line `n` of the page's markdown comes from"
    cell = page.where[n-1] if page.where and 0<n<=len(page.where) else None
    return f'{page.name} cell {cell}' if cell else page.name


# Checks of one page

def check_reading(page, faults):
    "The page has a title, and pandoc reads it with no complaint"
    if not page.meta.get('title'): faults.add(page.name, 'no title: begin with a cell "# Title" and "> one sentence"')
    if page.rel.suffix=='.ipynb' and page.meta.get('title') and not page.meta.get('description'):
        faults.add(page.name, 'no "> one sentence" below the title')
    for w in filter(None, re.split(r'(?:^|\n)(?=\[)', page.warnings)):
        m = re.search(r'line (\d+)', w)
        faults.add(line_place(page, int(m[1])) if m else page.name, 'pandoc: ' + ' '.join(w.split()))

def check_options(page, faults):
    "Only cell options that Quarto has"
    for cell in page.cells:
        if cell['cell_type']!='code': continue
        for o in cell_options(cell)[0].keys() - CELL_OPTIONS:
            faults.add(locate(page, f'#| {o}', f'#|{o}'), f'Quarto has no cell option "{o}"')

def check_text(page, faults):
    "No div fence or list marker is left as text"
    for o in walk(page.tree['blocks']):
        if o['t'] not in ('Para', 'Plain'): continue
        lines = list(split_lines(o['c']))
        for l in lines:
            if l.startswith(':::'): faults.add(locate(page, l), NO_FENCE.format(l))
        item = next((l for l in lines[1:] if RE_LIST.match(l)), None)
        if item: faults.add(locate(page, item), f'a list needs an empty line above it: "{item}"')

def split_lines(inlines):
    "The words of each source line of a paragraph"
    line = []
    for o in inlines + [{'t': 'SoftBreak'}]:
        if o['t']!='SoftBreak': line.append(o)
        else:
            yield plain(line)
            line = []

def check_callouts(page, faults):
    "Callouts are of a kind and with attributes that Quarto knows, and hold something"
    for o in walk(page.tree['blocks']):
        if o['t']!='Div': continue
        (_,classes,attrs),body = o['c']
        for cls in classes:
            if '{' in cls: faults.add(locate(page, cls), NO_FENCE.format(f'::: {cls}'))
            if not cls.startswith('callout'): continue
            place = locate(page, cls)
            if cls not in CALLOUTS: faults.add(place, f'no callout "{cls}": use one of {", ".join(sorted(CALLOUTS))}')
            if not body: faults.add(place, f'the {cls} is empty')
            for k,_ in attrs:
                if k not in CALLOUT_ATTRS: faults.add(place, f'a callout has no attribute "{k}"')

def block_lists(node):
    "Every list of blocks in the tree: the page's own and those of divs, quotes and list items"
    if isinstance(node, dict): node = list(node.values())
    if not isinstance(node, list): return
    if node and all(isinstance(o, dict) and 't' in o for o in node): yield node
    for o in node: yield from block_lists(o)

def code_of(block):
    "The code of a code block or of a cell"
    if block['t']=='CodeBlock': return block['c'][1]
    if block['t']=='Div' and 'cell' in block['c'][0][1] and block['c'][1] and block['c'][1][0]['t']=='CodeBlock':
        return block['c'][1][0]['c'][1]

def check_annotations(page, faults):
    "`# <1>` marks at ends of lines count from 1 without a gap, and a numbered list right after the code explains each"
    cells = {id(o['c'][1]) for o in walk(page.tree['blocks']) if o['t']=='Div' and 'cell' in o['c'][0][1]}
    for blocks in block_lists(page.tree['blocks']):
        if id(blocks) in cells: continue
        for block,after in zip(blocks, blocks[1:]+[None]):
            code = code_of(block)
            if code is None: continue
            lines = code.splitlines()
            for l in lines:
                if RE_BAD_NOTE.search(l): faults.add(locate(page, l), f'an annotation is "# <1>", not "{l.strip()}"')
            marks = [(int(m[1]),l) for l in lines if (m := RE_NOTE.search(l))]
            if marks: check_marks(page, marks, after, faults)

def check_marks(page, marks, after, faults):
    nums,place = {n for n,_ in marks}, locate(page, marks[0][1])
    if nums!=set(range(1, len(nums)+1)): faults.add(place, f'annotations count from 1 with no gap, not {sorted(nums)}')
    if not after or after['t']!='OrderedList': return faults.add(place, 'no numbered list right after the code')
    (start,*_),items = after['c']
    if start!=1 or len(items)!=len(nums):
        faults.add(place, f'{len(nums)} annotations, but the list after the code has {len(items)} from {start}')

def check_names(page, lib, faults):
    "A dotted name of ours in backticks is a name that can be imported"
    for name in {o['c'][1] for o in walk(page.tree['blocks']) if o['t']=='Code'}:
        if re.fullmatch(rf'{lib}(\.\w+)+(\(\))?', name) and not importable(name.removesuffix('()')):
            faults.add(locate(page, f'`{name}'), f'no such name: `{name}`')

def importable(name):
    "Can the dotted `name` be reached by an import and attributes?"
    parts = name.split('.')
    for n in range(len(parts), 0, -1):
        try: obj = import_module('.'.join(parts[:n]))
        except ImportError: continue
        for o in parts[n:]:
            if o in getattr(obj, '__annotations__', {}): return True
            if not hasattr(obj, o): return False
            obj = getattr(obj, o)
        return True
    return False


# Links

def page_links(page):
    "Every link and image of the page: kind, target, text"
    for o in walk(page.tree['blocks']):
        if o['t'] in ('Link', 'Image'): yield o['t'], o['c'][2][0], plain(o['c'][1]) or code_text(o['c'][1])
        if o['t'] in ('RawBlock', 'RawInline'):
            for attr,target in re.findall(r'\b(href|src)="([^"]+)"', o['c'][1]): yield attr, target, ''

def check_links(page, site, faults):
    "Every link that stays within the site or the repository ends somewhere"
    for kind,target,text in page_links(page):
        if target.startswith('data:'): continue
        if kind=='Image' and not text: faults.add(locate(page, target), f'image {target} has no description')
        wrong = link_fault(page, target, site)
        if wrong:
            doclink = target.startswith(site.url) and f'`{text}`' in page.md
            what = f'doclink `{text}`' if doclink else kind.lower()
            faults.add(locate(page, target, f'`{text}', text), f'{what} to {target}: {wrong}')

def link_fault(page, target, site):
    "What is wrong with `target` on `page`, if anything"
    if target.startswith(site.blob):
        path = target.removeprefix(site.blob).partition('#')[0].lstrip('/')
        return None if (site.root/path).exists() else f'the repository has no file {path}'
    ours = target==site.url or target.startswith(site.url+'/')
    url = urlsplit(target.removeprefix(site.url) if ours else target)
    if url.scheme or url.netloc: return
    path = unquote(url.path)
    if ours or path.startswith('/'): path = normpath(path.lstrip('/'))
    else: path = normpath(f'{page.rel.parent}/{path}') if path else str(page.out)
    return path_fault(path, unquote(url.fragment), site)

def path_fault(path, anchor, site):
    if path.startswith('..'): return 'outside the site: link to the repository instead'
    found = site.pages.get(path) or site.pages.get(normpath(f'{path}/index.html'))
    if not found: return None if (site.proc/path).is_file() else 'no such page or file'
    if anchor and anchor not in found.ids:
        return f'no heading #{anchor} on {found.name} (for a method, add a cell `show_doc(Class.method)` there)'


# Checks of the whole site

def hrefs(node):
    "Every file that a sidebar or navbar names"
    if isinstance(node, str): yield node
    elif isinstance(node, list):
        for o in node: yield from hrefs(o)
    elif isinstance(node, dict):
        for k in ('href', 'file'):
            if k in node: yield node[k]
        for k in ('contents', 'left', 'right', 'menu', 'tools'): yield from hrefs(node.get(k, []))

def read_yaml(path): return yaml.safe_load(path.read_text(encoding='utf-8')) or {}

def check_site(site, faults):
    "Sidebar, navbar and listings name pages that exist; every page is in the sidebar and has an address of its own"
    sources = {str(p.rel) for p in site.pagelist}
    named = set()
    for f in ('_quarto.yml', 'sidebar.yml'):
        web = (read_yaml(site.proc/f) if (site.proc/f).exists() else {}).get('website', {})
        for part in ('navbar', 'sidebar'):
            for h in hrefs(web.get(part, {})):
                if urlsplit(h).scheme: continue
                hits = {o for o in sources if PurePosixPath(o).match(h)}
                if not hits: faults.add(f, f'{part} names {h}, which is no page')
                if part=='sidebar': named |= hits
    for o in sorted(sources-named): faults.add('sidebar.yml', f'the sidebar does not name {o}')
    for out,n in Counter(str(p.out) for p in site.pagelist).items():
        if n>1: faults.add(out, f'{n} pages have this address: rename all but one')
    for p in site.pagelist: check_listing(p, sources, faults)

def check_listing(page, sources, faults):
    listing = page.meta.get('listing') or {}
    contents = listing.get('contents', []) if isinstance(listing, dict) else []
    for pat in [contents] if isinstance(contents, str) else contents:
        if not any(PurePosixPath(o).match(str(page.rel.parent/pat)) for o in sources):
            faults.add(page.name, f'its listing {pat} finds no page')


# README

def unwrap(blocks):
    "`blocks` without the divs around them, which GitHub has no use for"
    for o in blocks:
        if o['t']=='Div': yield from unwrap(o['c'][1])
        else: yield o

def render_readme(page):
    "GitHub's markdown of the page, as `nbdev_readme` lays it out"
    tree = page.tree | {'blocks': list(unwrap(page.tree['blocks']))}
    md,err = pandoc(json.dumps(tree), '-f', 'json', '-t', 'gfm')
    if md is None: raise SystemExit(f'{page.name}: pandoc: {err}')
    return f'# {page.meta["title"]}\n\n\n{md}'

def check_readme(site, faults):
    page = site.pages.get('index.ipynb')
    if not page: return faults.add(str(site.nbs.name), 'no index.ipynb, which README.md is made from')
    path,want = site.root/'README.md', render_readme(page)
    if not path.exists() or path.read_text(encoding='utf-8')!=want:
        faults.add('README.md', 'is not what index.ipynb gives: run python tools/docs.py --readme')
    if (n := len(want.splitlines())) > 150: faults.add('README.md', f'{n} lines, but at most 150 are wanted')


# Plain pages

STYLE = """<style>
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 25%, transparent); }
body { max-width: 52rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.55 system-ui, sans-serif; }
pre, code { font-family: ui-monospace, monospace; font-size: .92em; }
pre { padding: .6rem .8rem; border: 1px solid var(--line); border-radius: 4px; overflow-x: auto; }
.cell-output pre { border: 0; border-left: 3px solid var(--line); border-radius: 0; }
[class*=callout-] { border-left: 4px solid #58a; padding: .1rem 1rem; margin: 1rem 0; }
table { border-collapse: collapse; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: left; }
nav { font-size: .9em; } img { max-width: 100%; }
</style>"""

def local_links(page, site):
    "The page's tree with links to sources turned into links to plain pages"
    tree = json.loads(json.dumps(page.tree))
    up = '../' * (len(page.out.parts)-1)
    for o in walk(tree['blocks']):
        if o['t']!='Link': continue
        target,hash_,anchor = o['c'][2][0].partition('#')
        if target.startswith(site.url): o['c'][2][0] = up + (target[len(site.url)+1:] or 'index.html') + hash_ + anchor
        elif (found := site.pages.get(normpath(f'{page.rel.parent}/{target}'))) and target:
            o['c'][2][0] = up + str(found.out) + hash_ + anchor
    return tree

def write_html(site, dest):
    "Plain pages in `dest`, with the site's other files beside them"
    shutil.copytree(site.proc, dest, dirs_exist_ok=True, ignore=shutil.ignore_patterns('*.ipynb', '*.qmd', '*.yml'))
    head = dest/'head.html'
    head.write_text(STYLE)
    for p in site.pagelist:
        (dest/p.out).parent.mkdir(parents=True, exist_ok=True)
        up = '../' * (len(p.out.parts)-1)
        nav = ' · '.join(f'<a href="{up}{o.out}">{o.meta.get("title", o.rel)}</a>' for o in site.pagelist)
        named = [f'--metadata={k}={p.meta.get(v, "")}' for k,v in dict(title='title', subtitle='description').items()]
        html,err = pandoc(json.dumps(local_links(p, site)), '-f', 'json', '-t', 'html5', '-s', '-H', str(head), *named)
        if html is None: raise SystemExit(f'{p.name}: pandoc: {err}')
        (dest/p.out).write_text(html.replace('<body>', f'<body>\n<nav>{nav}</nav>', 1), encoding='utf-8')
    head.unlink()


# All together

def installed(lib): return any(o.name==lib for o in entry_points(group='nbdev'))

def first_lines(e, n=5): return '\n'.join(str(e).splitlines()[:n])

def cause(e):
    "The line that names the error behind `e`, which comes from another process as text"
    lines = str(e.__cause__ or '').splitlines()
    return next((o for o in lines if re.match(r'\w*(Error|Exception)\b: ', o)), '')

def read_site(cfg):
    "Run nbdev's processing and read what it gave"
    refresh_quarto_yml()
    try: proc = proc_nbs(force=True)
    except Exception as e: sys.exit(f'nbdev cannot process the notebooks: {first_lines(e)}\n{cause(e)}')
    files = sorted(o for o in proc.rglob('*') if o.suffix in ('.ipynb', '.qmd'))
    site = SimpleNamespace(root=cfg.config_path, nbs=cfg.nbs_path, proc=proc, blob=f'{cfg.git_url}/blob/{cfg.branch}',
                           url=f'{cfg.doc_host}{cfg.doc_baseurl}'.rstrip('/'))
    site.pagelist = [read_page(proc, cfg.nbs_path, o) for o in files]
    site.pages = {str(n): p for p in site.pagelist for n in (p.rel, p.out)}
    return site

def check_all(site, lib):
    "All faults of the site"
    faults = Faults()
    for p in site.pagelist:
        for f in (check_reading, check_options, check_text, check_callouts, check_annotations): f(p, faults)
        check_names(p, lib, faults)
        check_links(p, site, faults)
    check_site(site, faults)
    check_readme(site, faults)
    return faults

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--readme', action='store_true', help='write README.md from index.ipynb')
    ap.add_argument('--html', type=Path, metavar='DIR', help='write plain HTML pages to DIR')
    ap.add_argument('--site', action='store_true', help='render the real site with Quarto')
    args = ap.parse_args()
    cfg = get_config()
    sys.path.insert(0, str(cfg.config_path))
    if not installed(cfg.lib_name):
        sys.exit(f"{cfg.lib_name} is not installed, so nbdev makes no doclinks: pip install -e '.[dev]'")
    site = read_site(cfg)
    if args.readme: (site.root/'README.md').write_text(render_readme(site.pages['index.ipynb']), encoding='utf-8')
    if args.html: write_html(site, args.html)
    faults = check_all(site, cfg.lib_name)
    print(*faults, sep='\n', end='\n' if faults else '')
    print(f'{len(site.pagelist)} pages, {len(faults)} faults')
    if faults: sys.exit(1)
    if args.site or shutil.which('quarto'): render_site()

def render_site():
    if not shutil.which('quarto'): sys.exit('--site needs the program quarto on the PATH')
    nbdev_docs.__wrapped__()

if __name__=='__main__': main()
