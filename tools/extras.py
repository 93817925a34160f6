"""Try each extra of the package alone: in a fresh environment with this extra and nothing else, its modules are
imported and its main thing is done. Without any extra, what needs one must say which.

    python tools/extras.py               all of them, a minute or two
    python tools/extras.py celery demo   some
    python tools/extras.py --wheel dist/bgtasks-….whl
"""
import argparse, os, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).parents[1]

NONE = '''
import asyncio
from bgtasks import TaskQueue, Worker
import bgtasks.web, bgtasks.notify, bgtasks.status
queue = TaskQueue('tasks.db')
double = queue.task(lambda n: 2*n, name='double')
async def main():
    async with Worker(queue): assert await queue.aresult(double.enqueue(21), 30)==42
asyncio.run(main())
EDGES = {'backends.celery': 'celery', 'backends.dramatiq': 'dramatiq', 'fastapi': 'fastapi', 'command': 'worker'}
for module,extra in EDGES.items():
    try: __import__(f'bgtasks.{module}')
    except ModuleNotFoundError as e: assert f'pip install "bgtasks[{extra}]"' in str(e), e
    else: raise AssertionError(f'bgtasks.{module} can be imported without its extra')
import subprocess, sys
for command,extra in (('worker', 'worker'), ('demo', 'demo')):
    run = [sys.executable, '-c', 'from bgtasks.cli import main; main()', command]
    p = subprocess.run(run, capture_output=True, text=True)
    assert p.returncode and f"pip install 'bgtasks[{extra}]'" in p.stderr and 'Traceback' not in p.stderr, p.stderr
'''

FASTAPI = '''
from fastapi import FastAPI
from bgtasks.fastapi import BackgroundTasks
app,done = FastAPI(),[]
@app.get('/')
async def home(tasks:BackgroundTasks):
    tasks.add_task(done.append, 1)
    return {}
''' + (ASGI := '''
import asyncio
async def call(app):
    sent = []
    async def receive(): return {'type': 'http.request', 'body': b'', 'more_body': False}
    async def send(m): sent.append(m)
    scope = dict(type='http', method='GET', path='/', raw_path=b'/', root_path='', scheme='http', query_string=b'',
                 headers=[(b'host', b'localhost')], http_version='1.1', client=('127.0.0.1', 1),
                 server=('localhost', 80))
    await app(scope, receive, send)
    return sent[0]['status']
assert asyncio.run(call(app))==200 and done==[1], done
''')

FASTHTML = '''
from fasthtml.common import FastHTML, P
from bgtasks import BackgroundTask
app,done = FastHTML(),[]
@app.get('/')
async def home(): return P('hello'), BackgroundTask(done.append, 1)
''' + ASGI

WORKER = '''
import signal, subprocess, sys, time
from pathlib import Path
Path('app.py').write_text("""
from bgtasks import TaskQueue
queue = TaskQueue('tasks.db')
@queue.task(name='double')
def double(n:int) -> int: return 2*n
""")
from app import double, queue
job = double.enqueue(21)
p = subprocess.Popen([Path(sys.executable).parent/'bgtasks', 'worker', 'app:queue'])
assert queue.result(job, 60)==42
p.send_signal(signal.SIGTERM)
assert p.wait(30)==0
'''

NOTIFY = '''
import asyncio, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from bgtasks import TaskQueue, Worker
from bgtasks.notify import new_secret, verify, webhook
class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        got.append(verify(secret, self.headers, self.rfile.read(int(self.headers['content-length']))))
        self.send_response(204); self.end_headers()
    def log_message(self, *_): pass
got,secret = [],new_secret()
server = HTTPServer(('127.0.0.1', 0), Receiver)
threading.Thread(target=server.serve_forever, daemon=True).start()
queue = TaskQueue('tasks.db')
url = f'http://127.0.0.1:{server.server_port}/'
task = queue.task(lambda: 42, name='t', notify=[webhook(url, secret=secret, allow_private=True)])
async def main():
    async with Worker(queue):
        await queue.aresult(task.enqueue(), 30)
        async with asyncio.timeout(30):
            while not got: await asyncio.sleep(.05)
asyncio.run(main())
'''

CELERY = '''
from celery import Celery
from bgtasks import TaskQueue
from bgtasks.backends.celery import CeleryBackend
import redis
queue = TaskQueue(CeleryBackend(Celery('app', broker='redis://localhost:1')))
task = queue.task(lambda n: n, name='t')
assert task(3)==3 and 't' in queue.tasks
'''

DRAMATIQ = '''
from dramatiq.brokers.redis import RedisBroker
from bgtasks import TaskQueue
from bgtasks.backends.dramatiq import DramatiqBackend
import pika
queue = TaskQueue(DramatiqBackend(RedisBroker(url='redis://localhost:1')))
task = queue.task(lambda n: n, name='t')
assert task(3)==3 and 't' in queue.tasks
'''

DEMO = '''
import subprocess, sys
from pathlib import Path
bgtasks = Path(sys.executable).parent/'bgtasks'
subprocess.run([bgtasks, 'demo', '--make-csv', 'sample.csv'], check=True)
subprocess.run([bgtasks, 'demo', '--check', 'sample.csv'], check=True, timeout=120)
'''

EXTRAS = {'none': NONE, 'fastapi': FASTAPI, 'fasthtml': FASTHTML, 'worker': WORKER, 'notify': NOTIFY, 'celery': CELERY,
          'dramatiq': DRAMATIQ, 'demo': DEMO}

ENV = {k: v for k,v in os.environ.items() if k!='PYTHONPATH'} # else pip, and the programs, find the one of this folder

def run(*args, **kw):
    p = subprocess.run([*map(str, args)], capture_output=True, text=True, env=ENV, **kw)
    if p.returncode: raise SystemExit(f'{" ".join(map(str, args))[:200]}\n{p.stdout}{p.stderr}')

def wheel(folder):
    run(sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', folder, ROOT)
    return next(folder.glob('*.whl'))

def check(name, whl, folder):
    "One environment, one extra"
    run(sys.executable, '-m', 'venv', folder/'venv')
    python,work = folder/'venv/bin/python',folder/'work'
    run(python, '-m', 'pip', 'install', '-q', whl if name=='none' else f'{whl}[{name}]')
    work.mkdir()
    (work/'try_it.py').write_text(EXTRAS[name])
    run(python, 'try_it.py', cwd=work, timeout=180)

def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument('names', nargs='*', default=list(EXTRAS), help='extras; all if missing')
    args.add_argument('--wheel', type=Path, help='a wheel that is built already')
    o = args.parse_args()
    with tempfile.TemporaryDirectory() as d:
        whl = o.wheel.resolve() if o.wheel else wheel(Path(d))
        for name in o.names:
            began = time.monotonic()
            check(name, whl, Path(tempfile.mkdtemp(dir=d)))
            print(f'{name:10} ok, {time.monotonic()-began:.0f} s', flush=True)

if __name__=='__main__': main()
