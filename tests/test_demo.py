"`bgtasks demo`: the whole story over HTTP, how it ends, and the page in a real browser."
import os, re, shutil, signal, socket, sqlite3, subprocess, sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx2, pytest
from bs4 import BeautifulSoup
from selenium.common.exceptions import WebDriverException
from starlette.responses import FileResponse
from starlette.routing import Route

from bgtasks.demo_app import dashboard
from bgtasks.server import Server
from bgtasks.signature import new_secret
from browser import browser, htmx_files, needs_browser, shoot, text_of
from test_web import serving, soon

ROOT = Path(__file__).parents[1]
BGTASKS = [sys.executable, '-c', 'from bgtasks.cli import main; main()']
HERE = 'http://127.0.0.1'
HTMX = {'HX-Request': 'true'}

def bgtasks(*args, cwd, **env):
    return subprocess.run([*BGTASKS, *map(str, args)], cwd=cwd, env=os.environ|env, capture_output=True, text=True,
                          timeout=120)

def states(*args):
    "Process numbers and the states of these processes, from `ps`"
    out = subprocess.run(['ps', '-o', 'pid=,stat=', *args], capture_output=True, text=True).stdout
    return {int(pid): stat for pid,stat in (l.split() for l in out.splitlines())}

def alive(pids): return [p for p,stat in states('-p', ','.join(map(str, pids))).items() if stat[0]!='Z']

class Demo:
    "A running `bgtasks demo`, and what it has said"
    def __init__(self, cwd, *args):
        self.proc = subprocess.Popen([*BGTASKS, 'demo', *map(str, args)], cwd=cwd, stdout=subprocess.PIPE,
                                     stderr=subprocess.PIPE, text=True)
        self.said = ''
        while 'Ctrl-C' not in self.said:
            if not (line := self.proc.stdout.readline()): raise AssertionError(self.said + self.proc.communicate()[1])
            self.said += line
        self.url = re.search(r'Dashboard\s+(\S+)', self.said)[1]
        self.data = Path(re.search(r'Data\s+(\S+)', self.said)[1])
        self.children = list(states('--ppid', str(self.proc.pid)))

    def __enter__(self): return self
    def __exit__(self, *_):
        if self.proc.poll() is None: self.end(signal.SIGTERM)

    def end(self, sig):
        "Send a signal, wait for all processes, and give exit code, standard output and error"
        self.proc.send_signal(sig)
        out,err = self.proc.communicate(timeout=20)
        assert soon(lambda: not alive(self.children)), alive(self.children)
        return self.proc.returncode,out,err

def dashboard_pid(demo):
    "The number of the process that serves the pages"
    ps = 'ps', '-wwo', 'pid=,args=', '--ppid', str(demo.proc.pid)
    out = subprocess.run(ps, capture_output=True, text=True).stdout
    return next(int(l.split()[0]) for l in out.splitlines() if 'demo_app:dashboard' in l)

@pytest.fixture
def signs(tmp_path):
    assert bgtasks('demo', '--make-csv', 'signs.csv', cwd=tmp_path).returncode==0
    return tmp_path/'signs.csv'

def closed_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

# The check

def test_check_tells_what_it_measured(signs):
    res = bgtasks('demo', '--check', signs, '--seconds', 1, '--pace', 0, cwd=signs.parent)
    rows = len(signs.read_text().splitlines())-1
    assert res.returncode==0, res.stdout+res.stderr
    assert res.stdout.count('✓')==9 and '✗' not in res.stdout
    assert re.search(r'button is answered .* 202 in \d+ ms', res.stdout)
    apart = float(re.search(r'they are ([\d.]+) s apart', res.stdout)[1])
    took = float(re.search(r'after ([\d.]+) s', res.stdout)[1])
    assert 1 <= apart <= took
    assert rows > 300 and re.search(rf'rows are processed .* {rows} of {rows} in [\d.]+ s', res.stdout)
    assert re.search(rf'kill in mid-upload .* killed at \d+ of {rows} rows', ' '.join(res.stdout.split()))
    assert f'{rows} done, {rows} of {rows} stored' in ' '.join(res.stdout.replace('│', ' ').split())
    assert 'Traceback' not in res.stderr

def test_check_counts_faulty_rows(tmp_path):
    (tmp_path/'messy.csv').write_bytes('name;town\nAda;"Lon\ndon"\n\nGrace\nJosé;Lima\n'.encode() + b'Jos\xe9;Lima\n')
    res = bgtasks('demo', '--check', 'messy.csv', '--seconds', 1, cwd=tmp_path)
    assert res.returncode==0, res.stdout+res.stderr
    assert re.search('rows are processed .* 4 of 4', res.stdout) and re.search('Faulty rows .* 2 of 2', res.stdout)

def test_check_where_the_output_has_few_letters(tmp_path):
    (tmp_path/'a.csv').write_bytes(b'a,b\n1,2\n')
    res = bgtasks('demo', '--check', 'a.csv', '--seconds', 1, cwd=tmp_path, PYTHONIOENCODING='ascii')
    assert res.returncode==0, res.stdout+res.stderr
    assert res.stdout.count('| + |')==9

def test_check_fails_when_the_service_is_down(signs):
    res = bgtasks('demo', '--check', signs, '--service', f'{HERE}:{closed_port()}', '--pace', 0, cwd=signs.parent)
    assert res.returncode==1
    assert '✗' in res.stdout and 'Failed, attempt 3 of 3' in ' '.join(res.stdout.replace('│', ' ').split())
    assert re.search('rows are processed .* 368 of 368', res.stdout) # the file needs no service

def test_check_of_no_file(tmp_path):
    (tmp_path/'void.csv').write_bytes(b'')
    (tmp_path/os.fsdecode(b'odd\xff.csv')).write_bytes(b'a,b\n1,2\n') # a name that can't be sent
    for name in ('none.csv', 'void.csv', 'odd\udcff.csv'):
        res = bgtasks('demo', '--check', name, cwd=tmp_path)
        assert (res.returncode, res.stdout)==(1, '')
        assert re.match(rf"Error: {name[:3]}.*csv can't be checked", res.stderr) and res.stderr.count('\n')==1

@pytest.mark.parametrize('missing', ['click', 'rich', 'httpx2'])
def test_a_missing_extra_is_named(missing, tmp_path):
    code = f"import sys; sys.modules[{missing!r}] = None; from bgtasks.cli import main; main(['demo', '--help'])"
    res = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert (res.returncode, res.stdout)==(1, '')
    assert f'needs {missing}' in res.stderr and "pip install 'bgtasks[demo]'" in res.stderr

# How it begins and ends

@pytest.mark.parametrize('sig,code', [('SIGINT', 0), ('SIGTERM', 0), ('SIGHUP', 0), ('SIGKILL', -9)])
def test_nothing_is_left_behind(sig, code, tmp_path):
    with Demo(tmp_path, '--port', 0, '--service-port', 0) as demo:
        assert len(demo.children)==3 and httpx2.post(f'{demo.url}/calls', headers=HTMX).status_code==202
        rc,out,err = demo.end(signal.Signals[sig])
    assert rc==code and not list(tmp_path.iterdir())
    if code==0: assert (out, err, demo.data.parent.exists())==('Stopped.\n', '', False)
    else: # nobody was left to clear up, and the call lost its service before its own process ended
        assert out=='' and 'Traceback' not in err
        shutil.rmtree(demo.data.parent)

def test_a_taken_port_is_no_obstacle(tmp_path):
    with socket.socket() as a, socket.socket() as b:
        ports = []
        for s in (a, b):
            s.bind(('127.0.0.1', 0)); s.listen(); ports.append(s.getsockname()[1])
        with Demo(tmp_path, '--port', ports[0], '--service-port', ports[1]) as demo:
            assert f'(port {ports[0]} is taken)' in demo.said
            assert f':{ports[0]} ' not in demo.said and f':{ports[1]} ' not in demo.said
            assert httpx2.get(demo.url).status_code==200

def card(demo, path):
    html = httpx2.get(demo.url+path, headers={'Accept': 'text/html'}).text
    return BeautifulSoup(html, 'html.parser').select_one('job-status')

def sent(demo, kind, **kw):
    "Post something, and give the address of its card"
    res = httpx2.post(f'{demo.url}/{kind}', headers=HTMX, **kw)
    assert res.status_code==202
    return BeautifulSoup(res.text, 'html.parser').select_one('job-status')['src']

def stored(data):
    with sqlite3.connect(f'file:{data}?mode=ro', uri=True) as db: return db.execute('select line from rows').fetchall()

def test_kill_9_loses_nothing(tmp_path, signs):
    data,quick,slow = tmp_path/'kept.db',['--seconds', .1, '--pace', .001],['--seconds', 3600, '--pace', .05]
    args = '--port', 0, '--service-port', 0, '--data', data
    with Demo(tmp_path, *args, *slow) as demo:
        call,file = sent(demo, 'calls'),sent(demo, 'uploads', files=dict(file=('signs.csv', signs.read_bytes())))
        for kills in range(5): # more often than a worker bears by default
            before = len(stored(data))
            assert soon(lambda: len(stored(data)) > before+1)
            assert soon(lambda: [card(demo, o)['data-state'] for o in (file, call)]==['running']*2) # not at once
            for pid in (*demo.children, demo.proc.pid): os.kill(pid, signal.SIGKILL)
            demo.proc.communicate()
            assert 0 < len(stored(data)) < 368
            if kills < 4: demo = Demo(tmp_path, *args, *slow)
            assert soon(lambda: kills==4 or card(demo, file)['data-state']=='running')
        assert all(o.stat().st_mode & 0o777 == 0o600 for o in tmp_path.glob('kept*.db'))
    with Demo(tmp_path, *args, *quick) as demo: # the service is at another port now, and in a better mood
        assert soon(lambda: [card(demo, o)['data-state'] for o in (call, file)]==['succeeded']*2, 40)
        assert len(card(demo, call).select('time'))==2 and '368 / 368' in card(demo, file).text
        assert 'after a crash' in card(demo, file).text
        demo.end(signal.SIGTERM)
    assert len(stored(data))==len(set(stored(data)))==368

@pytest.mark.parametrize('kept', [True, False])
def test_who_kills_the_dashboard_is_told_how_it_goes_on(tmp_path, kept):
    "The demo itself says which process to kill; so that is no accident"
    data = ['--data', tmp_path/'kept.db'] if kept else []
    with Demo(tmp_path, '--port', 0, '--service-port', 0, *data) as demo:
        pid = int(re.search(r'kill -9 (\d+)', demo.said)[1]) if kept else dashboard_pid(demo)
        os.kill(pid, signal.SIGKILL)
        _,err = demo.proc.communicate(timeout=20)
    assert err.startswith('Error: The dashboard was killed; ') and len(err.splitlines())==1
    assert (f'again with --data {data[1]}, and it goes on' if kept else 'kept only with --data') in err

def test_a_stop_in_mid_upload_is_no_crash(tmp_path, signs):
    args = '--port', 0, '--service-port', 0, '--data', (data := tmp_path/'kept.db')
    with Demo(tmp_path, *args, '--pace', .05) as demo:
        file = sent(demo, 'uploads', files=dict(file=('signs.csv', signs.read_bytes())))
        assert soon(lambda: len(stored(data)) > 3)
        assert demo.end(signal.SIGTERM)==(0, 'Stopped.\n', '')
    with Demo(tmp_path, *args, '--pace', 0) as demo:
        assert soon(lambda: card(demo, file)['data-state']=='succeeded')
        assert 'crash' not in card(demo, file).text
    assert len(stored(data))==368

def test_data_that_is_no_database_is_told(tmp_path):
    (tmp_path/'kept.tasks.db').write_text('a diary, and no database, and long enough to be taken for one'*20)
    res = bgtasks('demo', '--data', 'kept.db', '--port', 0, '--service-port', 0, cwd=tmp_path)
    assert (res.returncode, res.stdout)==(1, '') and 'not an SQLite database' in res.stderr
    assert 'Traceback' not in res.stderr

# The page in a browser

@needs_browser
def test_the_page_in_a_browser(browser, tmp_path, signs):
    find = lambda css: browser.find_elements('css selector', css)
    text = partial(text_of, browser)
    def upload(path):
        find('#file')[0].send_keys(str(path))
        find('form[action="/uploads"] button')[0].click()
    messy,void = tmp_path/'"><b>.csv',tmp_path/'void.csv'
    messy.write_bytes(b''.join(signs.read_bytes().splitlines(keepends=True)[:9]) + b'U+0041,A\nU+00E9,\xe9,E,Ll,0\n')
    void.write_bytes(b'')
    with Demo(tmp_path, '--port', 0, '--service-port', 0) as demo:
        browser.get(demo.url)
        assert browser.title=='Background tasks at work' and not find('job-status')
        shoot(browser, 'demo-new')
        # two presses are answered while the service thinks about the first one, and the file is on its way beside them
        for n in (1, 2):
            find('form[action="/calls"] button')[0].click()
            assert soon(lambda: len(find('#call_service [data-state=running]'))==n)
        upload(signs)
        assert soon(lambda: find('#process_upload [data-state=running] progress[value]:not([value="0"])'))
        assert 'answered in' in text('form[action="/calls"] output')
        assert len(find('#call_service [data-state=running]'))==2
        shoot(browser, 'demo-working')
        # both ends are reached without another press, and then nothing is asked any more
        done = '#call_service [data-state=succeeded], #process_upload [data-state=succeeded]'
        assert soon(lambda: len(find(done))==3, 40)
        assert len(find('#call_service time'))==2*len(find('#call_service job-status'))
        assert '368 / 368' in text('#process_upload')
        assert soon(lambda: len(find('.job-toast[data-state=succeeded]'))>=3)
        # a partner and a mailbox have heard of the file; what they got is on the page without a reload
        assert soon(lambda: len(find('#told [data-state=succeeded] details'))==2)
        def told(): # a card that is renewed in this moment comes closed
            browser.execute_script("document.querySelectorAll('#told details').forEach(o => o.open = true)")
            return text('#told pre')
        assert 'Arrived: job.succeeded' in text('#told')
        for what in ('"task": "process_upload"', 'of process_upload succeeded at'): assert soon(lambda: what in told())
        shoot(browser, 'demo-told')
        def escape():
            with suppress(WebDriverException): # it may go by itself
                for o in find('.job-toast button')[-1:]: o.send_keys('\ue00c')
            return not find('.job-toast')
        assert soon(escape)
        # what is refused says why, where it is read out; what is faulty is counted; a name stays a name
        upload(void)
        assert soon(lambda: text('#refused')=='void.csv is empty.')
        browser.refresh()
        upload(messy)
        assert soon(lambda: '10 / 10 · 2 faulty' in ' '.join(text('#process_upload').split()))
        assert soon(lambda: find('#process_upload summary') and len(find('#told [data-state=succeeded] details'))==4)
        assert soon(escape)
        find('#process_upload summary')[0].click()
        assert '2 of 5 columns' in text('#process_upload details li') and not find('job-status b')
        assert not find('#refused:not(:empty)')
        # a service that is down is a failed request on the page
        os.kill(int(re.search(r'kill (\d+)', demo.said)[1]), signal.SIGKILL)
        find('form[action="/calls"] button')[0].click()
        assert soon(lambda: 'Failed, attempt 3 of 3' in text('#call_service'))
        assert 'ConnectionError' in text('#call_service')
        shoot(browser, 'demo-done')
        # all it loaded came from the demo itself
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map(o => o.name)")
        assert {o.rpartition('/')[2] for o in loaded} >= {'demo.js', 'demo.css', 'script', 'style'}
        assert all(o.startswith((demo.url+'/', 'data:')) for o in loaded), loaded
        # and when it is gone, the page says so
        demo.end(signal.SIGTERM)
        find('form[action="/calls"] button')[0].click()
        assert soon(lambda: 'doesn’t answer' in text('#offline'))

@needs_browser
@pytest.mark.parametrize('version', ['htmx-2', 'htmx-4'])
def test_the_page_with_the_real_htmx(browser, tmp_path, signs, version, monkeypatch):
    "In the place of demo.js: its attributes are what HTMX understands by them"
    file = next((o for o in htmx_files() if o.name.startswith(version)), None)
    if not file: pytest.skip(f'needs {version}, as django-htmx 1.29 ships it (the extra `dev`)')
    monkeypatch.setenv('BGTASKS_DEMO_SECRET', new_secret())
    find = lambda css: browser.find_elements('css selector', css)
    text = partial(text_of, browser)
    def press(action): # though a note may lie over it
        browser.execute_script('arguments[0].click()', *find(f'form[action="{action}"] button'))
    data = str(tmp_path/'demo.db')
    with (Server('bgtasks.demo_app:slow_service', seconds=.1) as slow,
          Server('bgtasks.catcher:catcher', path=f'{data}.caught') as partner):
        app = dashboard(data, slow.url, pace=0, partner=partner.url)
        app.routes.insert(0, Route('/demo.js', lambda request: FileResponse(file)))
        with serving(app) as client:
            browser.get(str(client.base_url))
            assert soon(lambda: browser.execute_script('return !!window.htmx')) and text('#told')=='Nobody yet.'
            press('/calls')
            assert soon(lambda: len(find('#call_service [data-state=succeeded]'))==1)
            (void := tmp_path/'void.csv').write_bytes(b'')
            find('#file')[0].send_keys(str(void))
            press('/uploads')
            assert soon(lambda: text('#refused')=='void.csv is empty.') and not find('#process_upload job-status')
            find('#file')[0].send_keys(str(signs))
            press('/uploads')
            assert soon(lambda: find('#process_upload [data-state=succeeded]'))
            assert '368 / 368' in text('#process_upload')
            assert soon(lambda: len(find('#told [data-state=succeeded] details'))==2)
            assert text('#refused')=='' and not find('#file')[0].get_property('value')
            assert not [o for o in browser.get_log('browser') if 'Content Security' in o['message']]
