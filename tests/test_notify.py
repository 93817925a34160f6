"Who asked to hear of the end of a job hears of it: real receivers, real processes, kills in between."
import asyncio, os, signal, socket, ssl, subprocess, sys, threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import apsw, pytest, trustme
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from msgspec.structs import replace

from bgtasks.attempt import verdict
from bgtasks.job import Done, Failure, Outcome, State
from bgtasks.mail import SMTP, mail_servers
from bgtasks.notify import email, new_secret, verify, webhook
from bgtasks.queue import TaskQueue
from bgtasks.schema import app_id, schemas
from bgtasks.sqlite import SQLiteStore
from bgtasks.worker import Worker
from test_worker import Command, until

SECRET = new_secret()
APP = '''
import os, signal
from pathlib import Path
from bgtasks.queue import TaskQueue
from bgtasks.sqlite import SQLiteStore

folder = Path(__file__).parent
queue = TaskQueue(SQLiteStore(folder/'q.db', 'process'))

@queue.task(name='work')
def work(n:int) -> int:
    with open(folder/'ran', 'a') as f: f.write(f'{n}\\n')
    return n*2
@queue.task(name='fail')
def fail(n:int): raise ValueError(f'no {n}')
@queue.task(name='deadly')
def deadly(): os.kill(os.getpid(), signal.SIGKILL)
@queue.task(name='wait')
async def wait(n:int): pass
'''

@pytest.fixture
def folder(tmp_path):
    (tmp_path/'app.py').write_text(APP)
    return tmp_path

@pytest.fixture
def queue(folder):
    "The queue in this process, which says who is to be told, and runs nothing"
    q = TaskQueue(SQLiteStore(folder/'q.db', 'process'))
    for name in ('work', 'fail', 'deadly', 'wait'): q.task(lambda *args: None, name=name)
    yield q
    q.close()

class Receiver:
    "A server that keeps what it verified; `first` is done once, before the first answer"
    def __init__(self, first=lambda: None, status=204):
        self.heard,self.ids,self.bad,self.first = [],[],[],iter([first])
        outer = self
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers['content-length']))
                outer.ids.append(self.headers['webhook-id'])
                next(outer.first, lambda: None)()
                try: outer.heard.append(verify(SECRET, self.headers, body))
                except ValueError as e: outer.bad.append(e)
                self.send_response(status); self.end_headers()
            def log_message(self, *_): pass
        self.server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}/'
    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self
    def __exit__(self, *_): self.server.shutdown(); self.server.server_close()
    def types(self): return [(o['type'], o['data']['id']) for o in self.heard]

@pytest.fixture(autouse=True)
def environment(monkeypatch): monkeypatch.setenv('HOOK_SECRET', SECRET)

def hook(r, **kw): return webhook(r.url, 'env:HOOK_SECRET', allow_private=True, **kw)

def test_a_worker_tells_though_it_has_never_heard_of_it(folder, queue):
    "The process that runs the jobs declares no notification and doesn't import bgtasks.notify"
    with Receiver() as r, Command(folder):
        good = queue.tasks['work'].using(notify=hook(r)).enqueue(21)
        bad = queue.tasks['fail'].using(notify=hook(r)).enqueue(7)
        quiet = queue.tasks['work'].using(notify=hook(r, on='dead')).enqueue(1)
        until(lambda: len(r.heard)==2 and queue.get(quiet).state=='succeeded')
        assert sorted(r.types())==sorted([('job.succeeded', good.id), ('job.dead', bad.id)]) and not r.bad
        data = {o['data']['id']: o['data'] for o in r.heard}
        assert data[good.id]['result']==42 and data[bad.id]['error']=={'type': 'ValueError', 'message': 'no 7'}
        until(lambda: [j.state.value for j in queue.find(task='bgtasks.webhook')]==['succeeded']*2)
        assert SECRET not in str([j.args for j in queue.find(task='bgtasks.webhook')])

def test_a_worker_killed_while_it_tells_runs_nothing_again(folder, queue):
    with Command(folder) as c:
        def kill(): # the one that sends: the child of the command
            os.kill(queue_worker_pid(queue), signal.SIGKILL)
        with Receiver(first=kill) as r:
            job = queue.tasks['work'].using(notify=hook(r)).enqueue(3)
            until(lambda: len(r.ids)==2 and queue.find(task='bgtasks.webhook')[0].state=='succeeded')
            told, = queue.find(task='bgtasks.webhook')
            assert len(set(r.ids))==1 and told.crashes==1
        assert (folder/'ran').read_text().split()==['3'] and queue.get(job).attempt==1

def queue_worker_pid(queue):
    "The pid is the second last part of a worker's name"
    return int(queue.find(task='bgtasks.webhook')[0].worker.rsplit('-', 2)[1])

def test_a_job_that_kills_its_worker_is_told_of(folder, queue):
    with Receiver() as r, Command(folder):
        job = queue.tasks['deadly'].using(notify=hook(r)).enqueue()
        until(lambda: r.heard, 120)
        assert r.types()==[('job.dead', job.id)] and r.heard[0]['data']['error']['type']=='WorkerLost'

def test_a_cancel_from_another_process_is_told_where_asked_for(folder, queue):
    with Receiver() as r:
        told,quiet = (queue.tasks['wait'].using(notify=hook(r, on=on), delay=3600).enqueue(1)
                      for on in ('cancelled', ('succeeded', 'dead')))
        child = queue.tasks['wait'].using(notify=hook(r, on='cancelled'), after=told).enqueue(2)
        for j in (told, quiet): queue.cancel(j, 'the customer has left')
        with Command(folder): until(lambda: len(r.heard)==2)
        assert sorted(r.types())==sorted(('job.cancelled', j.id) for j in (told, child))

def test_what_was_not_recorded_is_not_told(queue, monkeypatch):
    "The end of the job and what tells of it are one commit: if the one can't be written, nor can the other"
    with Receiver() as r:
        job = queue.tasks['work'].using(notify=hook(r)).enqueue(1)
        claimed, = queue.store.claim('w', ['work'])
        done = verdict(claimed, queue.tasks['work'], Outcome(2))
        with monkeypatch.context() as m:
            real = SQLiteStore._add
            def full(self, cx, calls): real(self, cx, calls); raise OSError('disk full')
            m.setattr(SQLiteStore, '_add', full)
            with pytest.raises(OSError): queue.store.finish([done])
        assert queue.get(job).state=='running' and not queue.find(task='bgtasks.webhook')
        assert queue.store.finish([done, done])==[True, False]
        assert queue.get(job).state=='succeeded' and len(queue.find(task='bgtasks.webhook'))==1
        # too late: nothing is told of it
        assert queue.store.finish([done])==[False] and len(queue.find(task='bgtasks.webhook'))==1

class Mailbox:
    def __init__(self): self.mails = []
    async def handle_DATA(self, server, session, envelope):
        self.mails.append(envelope)
        return '250 OK'

def free_port():
    with socket.create_server(('127.0.0.1', 0)) as s: return s.getsockname()[1]

@contextmanager
def mail_server(tls):
    "A mail server that wants TLS and a password"
    def login(server, session, envelope, mechanism, data):
        return AuthResult(success=(data.login, data.password)==(b'app', b'pw'), handled=False)
    c = Controller(Mailbox(), hostname='localhost', port=free_port(), server_hostname='mail.example.org',
                   tls_context=tls, require_starttls=True, authenticator=login, auth_required=True)
    c.start()
    try: yield c
    finally: c.stop()

def test_mail_from_a_worker_process(folder, queue, monkeypatch):
    "Its mail server is described by the environment; the certificate is checked"
    ca = trustme.CA()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert('localhost').configure_cert(tls)
    ca.cert_pem.write_to_path(str(folder/'ca.pem'))
    with mail_server(tls) as c:
        for k,v in dict(SMTP_HOST='localhost', SMTP_PORT=c.port, SMTP_USER='app', SMTP_PASSWORD='pw',
                        SMTP_SENDER='Shop <shop@example.org>', SSL_CERT_FILE=folder/'ca.pem').items():
            monkeypatch.setenv(k, str(v))
        with Command(folder):
            job = queue.tasks['fail'].using(notify=email(['ada@example.org', 'Bob <bob@example.org>'])).enqueue(5)
            until(lambda: c.handler.mails)
        mail, = c.handler.mails
    said = mail.content.decode()
    assert mail.rcpt_tos==['ada@example.org', 'bob@example.org'] and 'ValueError: no 5' in said and job.id in said
    told, = queue.find(task='bgtasks.email')
    assert f'Message-ID: <{told.id}@example.org>' in said and "'pw'" not in str(told)

def test_a_mail_server_that_hangs_stops_nothing_else(folder):
    async def main():
        q = TaskQueue(SQLiteStore(folder/'q2.db', 'process'))
        @q.task(name='quick')
        async def quick(n:int) -> int: return n
        with socket.create_server(('127.0.0.1', 0)) as mute:
            mail_servers['mute'] = SMTP('127.0.0.1', 'a@b.example', mute.getsockname()[1], tls='none', timeout=60)
            told = lambda: q.find(task='bgtasks.email', limit=1)
            async with Worker(q, grace=0):
                quick.using(notify=email('ada@example.org', via='mute')).enqueue(1)
                while not (told() and told()[0].state=='running'): await asyncio.sleep(.01)
                for n in range(20): assert await q.aresult(quick.enqueue(n), 30)==n
                assert told()[0].state=='running'
        del mail_servers['mute']
        q.close()
    asyncio.run(main())

def test_a_private_address_is_not_reached(folder, queue):
    "A name that leads into our own network: refused by the worker, and nobody is asked again"
    with Receiver() as r, Command(folder):
        url = r.url.replace('127.0.0.1', 'localhost.localdomain') if can_resolve('localhost.localdomain') else r.url
        notice = webhook('http://10.0.0.1/', 'env:HOOK_SECRET', allow_private=True)
        args = (url, 'env:HOOK_SECRET', False)
        queue.tasks['work'].using(notify=replace(notice, args=args)).enqueue(1)
        until(lambda: [j.state for j in queue.find(task='bgtasks.webhook')]==['dead'])
        told, = queue.find(task='bgtasks.webhook')
        assert not r.ids and told.attempt==1 and 'not on the public internet' in told.error.message

def can_resolve(name):
    try: return bool(socket.getaddrinfo(name, 80))
    except OSError: return False

def test_a_file_from_before_there_were_notifications(tmp_path):
    "It is brought forward, and its jobs end as ever; new ones tell"
    cx = apsw.Connection(str(tmp_path/'old.db'))
    cx.execute(schemas[0] + f'PRAGMA application_id={app_id}; PRAGMA user_version=1')
    cx.execute("INSERT INTO lanes VALUES(1, 'work', 'default'); UPDATE counter SET seq=1, event=1, lanes=1")
    cx.execute("""INSERT INTO jobs(seq,id,lane,st,priority,run_at,created_at,retries,keep,payload)
        VALUES(1,'old',1,1,0,0,0,0,604800,CAST('[[1],{}]' AS BLOB))""")
    cx.close()
    q = TaskQueue(tmp_path/'old.db')
    work = q.task(lambda n: n, name='work')
    new = work.using(notify=webhook('https://example.org/', 'env:HOOK_SECRET')).enqueue(2)
    jobs = q.store.claim('w', ['work'], limit=9)
    assert [j.id for j in jobs]==['old', new.id]
    done = [Done(seq=j.seq, attempt=1, state=State.dead, error=Failure('E', 'm')) for j in jobs]
    assert q.store.finish(done)==[True]*2
    assert [j.args[-1]['id'] for j in q.find(task='bgtasks.webhook')]==[new.id]
    q.close()

@pytest.mark.parametrize('there', ['httpx2', 'httpx', None])
def test_either_client_sends_webhooks(there, tmp_path):
    "In a process where the other one can't be imported"
    if there: pytest.importorskip(there)
    names = [o for o in ('httpx2', 'httpx') if o!=there]
    ca = trustme.CA()
    cert = ca.issue_cert('localhost').private_key_and_cert_chain_pem
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    with cert.tempfile() as pem: tls.load_cert_chain(pem)
    ca.cert_pem.write_to_path(str(tmp_path/'ca.pem'))
    with Receiver() as r:
        r.server.socket = tls.wrap_socket(r.server.socket, server_side=True)
        url = f'https://localhost:{r.server.server_port}/'
        code = (f'import asyncio, sys; sys.modules.update(dict.fromkeys({names}))\n'
                'from bgtasks.post import deliver_webhook\n'
                "news = dict(id='a', task='t', state='succeeded', finished_at=1e9, result=7)\n"
                f"print(asyncio.run(deliver_webhook('{url}', 'env:HOOK_SECRET', True, 'm', news)))")
        res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60,
                             env=os.environ | {'SSL_CERT_FILE': str(tmp_path/'ca.pem')})
        if there: assert (res.stdout, r.types(), r.bad)==('204\n', [('job.succeeded', 'a')], []), res.stderr
        else: assert 'pip install "bgtasks[notify]"' in res.stderr and not r.ids
