"A worker on a real file, in real processes: signals, kills, the command, and who gets the jobs afterwards."
import asyncio, os, re, signal, subprocess, sys, time, urllib.request
from pathlib import Path

import msgspec, pytest

from bgtasks.errors import StoreError
from bgtasks.job import Call, Done, Notice, State, new_id
from bgtasks.queue import TaskQueue
from bgtasks.sqlite import SQLiteStore
from bgtasks.worker import Worker

ROOT = Path(__file__).parents[1]
APP = '''
import asyncio, os, signal, time
from pathlib import Path
from bgtasks.queue import TaskQueue
from bgtasks.report import progress
from bgtasks.run import current_job
from bgtasks.sqlite import SQLiteStore

queue = TaskQueue(SQLiteStore(Path(__file__).parent/'q.db', 'process'))

@queue.task(name='add')
async def add(a:int, b:int) -> int: return a+b
@queue.task(name='pid')
def pid() -> int: return os.getpid()
@queue.task(name='wait')
async def wait(seconds:float): await asyncio.sleep(seconds)
@queue.task(name='block')
def block(seconds:float): time.sleep(seconds)
@queue.task(name='hang')
async def hang():
    progress(0)
    await asyncio.to_thread(time.sleep, 3600)
@queue.task(name='die_once')
def die_once():
    if current_job().crashes==0: os.kill(os.getpid(), signal.SIGKILL)
    return current_job().tries
@queue.task(name='nap', runner='process')
def nap(seconds:float):
    progress(0)
    time.sleep(seconds)
@queue.task(name='afar', runner='process')
def afar(n:int) -> int:
    progress(1, 2, 'afar')
    return n*2 + (current_job().task=='afar')
'''

WEB = '''
import sys
from contextlib import asynccontextmanager
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from bgtasks.worker import Worker
from app import add, queue

async def home(request): return JSONResponse(add.enqueue(20, 22).id)

@asynccontextmanager
async def lifespan(app):
    async with Worker(queue, grace=float(sys.argv[1])): yield

if __name__=='__main__': uvicorn.run(Starlette(routes=[Route('/', home)], lifespan=lifespan), port=0)
'''

@pytest.fixture
def folder(tmp_path):
    (tmp_path/'app.py').write_text(APP)
    (tmp_path/'web.py').write_text(WEB)
    return tmp_path

@pytest.fixture
def queue(folder):
    "The queue as the app has it, in this process: it knows the tasks, and runs none"
    q = TaskQueue(SQLiteStore(folder/'q.db', 'process'))
    for name in ('add', 'pid', 'wait', 'block', 'die_once', 'hang', 'nap', 'afar'):
        q.task(lambda *args: None, name=name)
    yield q
    q.close()

class Command:
    "`bgtasks worker app:queue` in a process of its own"
    def __init__(self, folder, *words, **kw):
        code = 'from bgtasks.command import worker; worker()'
        env = dict(os.environ, PYTHONPATH=f'{ROOT}{os.pathsep}{folder}')
        self.p = subprocess.Popen([sys.executable, '-c', code, 'app:queue', *words], cwd=folder, env=env, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kw)
    def __enter__(self): return self
    def __exit__(self, *_):
        if self.p.poll() is None: self.p.send_signal(signal.SIGTERM)
        try: self.p.wait(30)
        except subprocess.TimeoutExpired: self.p.kill()
    def stop(self):
        self.p.send_signal(signal.SIGTERM)
        return self.p.communicate(timeout=60)[0]

def until(condition, seconds=60):
    end = time.monotonic()+seconds
    while not (got := condition()):
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.02)
    return got

def record(queue, name, *args):
    return queue.store.add([Call(id=new_id(), task=name, payload=msgspec.json.encode([args, {}]))])[0]

def state(queue, job): return queue.get(job).state.value

def test_command_runs_jobs_and_ends_on_sigterm(folder, queue):
    with Command(folder) as c:
        jobs = [record(queue, 'add', n, 1) for n in range(20)]+[record(queue, 'pid')]
        until(lambda: all(state(queue, j)=='succeeded' for j in jobs))
        assert queue.get(jobs[3]).result==4 and queue.get(jobs[-1]).result!=os.getpid()
        said = c.stop()
    assert c.p.returncode==0, said
    assert 'Told to stop' in said and 'Traceback' not in said

def test_a_worker_that_has_used_processes_leaves_nothing_behind(folder, queue):
    with Command(folder) as c:
        job = record(queue, 'afar', 1)
        until(lambda: state(queue, job)=='succeeded')
        said = c.stop()
    assert c.p.returncode==0 and 'leaked' not in said, said

def test_sigterm_gives_back_what_does_not_end_in_time(folder, queue):
    with Command(folder, '--grace', '0.2') as c:
        jobs = [record(queue, 'wait', 3600), record(queue, 'block', 3600)]
        until(lambda: all(state(queue, j)=='running' for j in jobs))
        said = c.stop()
    assert [state(queue, j) for j in jobs]==['queued', 'queued'], said
    assert [queue.get(j).tries for j in jobs]==[0, 0]

def test_what_hangs_in_a_thread_of_the_loop_keeps_no_process(folder, queue):
    with Command(folder, '--grace', '0.2') as c:
        job = record(queue, 'hang')
        until(lambda: queue.get(job).progress)
        said = c.stop()
    assert c.p.returncode==0 and state(queue, job)=='queued', said

def test_killed_process_is_replaced_and_its_job_runs_again(folder, queue):
    with Command(folder) as c:
        job = record(queue, 'die_once')
        until(lambda: state(queue, job)=='succeeded')
        job = queue.get(job)
        assert (job.crashes, job.attempt, job.result)==(1, 2, 1)
        assert 'another one takes its place' in c.stop()

def test_two_processes_share_the_work(folder, queue):
    with Command(folder, '--processes', '2') as c:
        first = [record(queue, 'pid') for _ in range(2)]
        until(lambda: all(state(queue, j)=='succeeded' for j in first))
        def both():
            jobs = [record(queue, 'pid') for _ in range(50)]
            until(lambda: all(state(queue, j)=='succeeded' for j in jobs))
            return len({queue.get(j).result for j in jobs})==2
        until(both)

def test_second_signal_ends_at_once(folder, queue):
    with Command(folder, '--grace', '60') as c:
        job = record(queue, 'wait', 3600)
        until(lambda: state(queue, job)=='running')
        c.p.send_signal(signal.SIGTERM)
        time.sleep(.5)
        assert c.p.poll() is None
        c.p.send_signal(signal.SIGTERM)
        assert c.p.wait(30)==128+signal.SIGTERM

def test_a_supervisor_that_tells_all_processes_to_stop_lets_jobs_end(folder, queue):
    "Worker processes get the signal from it and from their parent; the process of a task gets it, too"
    with Command(folder, '--processes', '2', start_new_session=True) as c:
        jobs = [*(record(queue, 'wait', 1) for _ in range(4)), record(queue, 'nap', 3600)]
        until(lambda: all(state(queue, j)=='running' for j in jobs) and queue.get(jobs[-1]).progress)
        os.killpg(c.p.pid, signal.SIGTERM)
        said = c.p.communicate(timeout=60)[0]
    assert c.p.returncode==0 and [state(queue, j) for j in jobs]==['succeeded']*4+['queued'], said
    assert (queue.get(jobs[-1]).tries, queue.get(jobs[-1]).crashes)==(0, 0)

def test_ctrl_c_lets_jobs_end(folder, queue):
    "A terminal sends it to the command and to its worker processes: these take it for one signal, not for two"
    with Command(folder, start_new_session=True) as c:
        job = record(queue, 'wait', 1)
        until(lambda: state(queue, job)=='running')
        os.killpg(c.p.pid, signal.SIGINT)
        said = c.p.communicate(timeout=60)[0]
    assert c.p.returncode==0 and state(queue, job)=='succeeded', said

def test_workers_end_when_their_parent_is_killed(folder, queue):
    with Command(folder) as c:
        job = record(queue, 'pid')
        until(lambda: state(queue, job)=='succeeded')
        c.p.kill()
        said = c.p.communicate(timeout=60)[0] # to its end: nobody holds the output any more
    assert 'has stopped' in said

def test_jobs_of_a_killed_worker_with_a_name_run_again(folder, queue):
    "The next one of that name takes its lock, so nobody else could tell that the first is dead"
    code = 'import asyncio, app; from bgtasks.worker import Worker; asyncio.run(Worker(app.queue, name="one").run())'
    job = record(queue, 'die_once')
    env = dict(os.environ, PYTHONPATH=f'{ROOT}{os.pathsep}{folder}')
    assert subprocess.run([sys.executable, '-c', code], env=env, timeout=60).returncode==-signal.SIGKILL
    with subprocess.Popen([sys.executable, '-c', code], env=env) as p:
        until(lambda: state(queue, job)=='succeeded', 20) # its lease is longer
        p.send_signal(signal.SIGTERM)

@pytest.mark.skipif(sys.platform!='linux', reason='there is no inotify')
def test_a_worker_that_cannot_hear_looks(folder, monkeypatch):
    def full(path): raise StoreError('too many watches')
    monkeypatch.setattr('bgtasks.file._watch', full)
    async def main():
        q,other = (TaskQueue(SQLiteStore(folder/'deaf.db', 'process')) for _ in range(2))
        with q, other:
            here = q.task(lambda: 1, name='t')
            async with Worker(q):
                assert await q.aresult(here.enqueue(), 30)==1
                assert await q.aresult(other.task(lambda: 1, name='t').enqueue(), 30)==1
    asyncio.run(main())

async def idle(queue):
    "Wait until a worker of `queue` has left an order"
    async with asyncio.timeout(30):
        while not queue.store.orders.open: await asyncio.sleep(.01)

def test_a_job_cancelled_on_its_way_to_the_worker_does_not_start(tmp_path):
    async def main():
        with TaskQueue(SQLiteStore(tmp_path/'q.db', 'process')) as q:
            ran = []
            task = q.task(lambda x: ran.append(x), name='t')
            async with Worker(q):
                await idle(q)
                assert q.get(job := task.enqueue(1)).state is State.running # claimed by the commit, not yet handed over
                assert q.cancel(job).state is State.cancelled
                await q.aresult(task.enqueue(2), 30)
            assert ran==[2]
    asyncio.run(main())

def test_a_job_cancelled_as_it_begins_is_stopped_long_before_its_lease_is_renewed(tmp_path):
    async def main():
        with TaskQueue(SQLiteStore(tmp_path/'q.db', 'process')) as q:
            begun,stopped = asyncio.Event(),asyncio.Event()
            @q.task(name='t')
            async def t():
                begun.set()
                try: await asyncio.Event().wait()
                finally: stopped.set()
            async with Worker(q, lease=3600), asyncio.timeout(30):
                job = t.using(delay=.5).enqueue() # nobody brings news when it begins
                await begun.wait()
                q.cancel(job)
                await stopped.wait()
    asyncio.run(main())

@pytest.mark.parametrize('cancelled', [True, False])
def test_a_worker_whose_loop_has_ended_holds_no_job(tmp_path, cancelled):
    with TaskQueue(SQLiteStore(tmp_path/'q.db', 'process')) as q:
        task,worker = q.task(lambda: 1, name='t'),Worker(q)
        async def leak():
            await worker.start()
            await idle(q)
        if cancelled: asyncio.run(leak())
        else:
            loop = asyncio.new_event_loop()
            loop.run_until_complete(leak())
            loop.close()
        job = task.enqueue()
        assert q.get(job).state is State.queued and q.get(job).crashes==0
        asyncio.run(Worker(q).run(until_empty=True))
        assert q.result(job, 30)==1

def test_a_worker_goes_on_while_more_jobs_come_of_age_than_one_claim_looks_through(tmp_path):
    now = [time.time()]
    with TaskQueue(SQLiteStore(tmp_path/'q.db', 'process', clock=lambda: now[0])) as q:
        ran = []
        @q.task(name='t')
        async def t(x): ran.append(x)
        t.using(run_at=now[0]+60).enqueue_many([(x,) for x in range(20_000)])
        t.using(run_at=now[0]+90, priority=1).enqueue('first')
        now[0] += 100
        asyncio.run(Worker(q, concurrency=1).run(until_empty=True))
        assert ran==['first', *range(20_000)]

@pytest.mark.parametrize('how', ['all at once', 'beside run', 'given up', 'in a job', 'without a pump'])
def test_a_worker_ends_once_however_often_it_is_asked(tmp_path, how):
    "Nothing of it is left, so it can be started again under its name"
    async def main(q):
        gate = asyncio.Event()
        @q.task(name='hold')
        async def hold(asks):
            if asks: await worker.stop()
            await gate.wait()
        async def until(condition):
            async with asyncio.timeout(60):
                while not condition(): await asyncio.sleep(.01)
        worker = Worker(q, name='one', grace=.1 if how=='in a job' else 60)
        run = asyncio.create_task(worker.run() if how=='beside run' else worker.start())
        await until(lambda: worker._pump_task)
        job = hold.enqueue(how=='in a job')
        await until(lambda: worker._running)
        if how=='given up':
            with pytest.raises(TimeoutError): await asyncio.wait_for(worker.stop(), .05)
        elif how!='in a job':
            stops = [asyncio.create_task(worker.stop()) for _ in range(3)]
            await asyncio.sleep(.05)
            if how=='without a pump': worker._pump_task.cancel() # as one does that cancels all tasks of a loop
            gate.set()
            await asyncio.wait_for(asyncio.gather(*stops), 60)
        gate.set()
        await until(lambda: worker._pump_task is None)
        await asyncio.wait_for(run, 60)
        again = how in ('in a job', 'without a pump')
        assert q.get(job).state is (State.queued if again else State.succeeded) and not q.store.file._locks
        if again: q.cancel(job)
        async with worker:
            assert await q.aresult(hold.enqueue(False), 60) is None
            await worker.stop()
    with TaskQueue(SQLiteStore(tmp_path/'q.db', 'process')) as q: asyncio.run(main(q))

def at_once(loop, coro, **kw):
    "As `asyncio.eager_task_factory` of Python 3.12: an attempt that waits for nothing ends before it is a task"
    if coro.__name__!='_one': return asyncio.Task(coro, loop=loop, **kw)
    res = loop.create_future()
    try: kw['context'].run(coro.send, None)
    except StopIteration as e: res.set_result(e.value)
    return res

def test_a_loop_whose_tasks_begin_at_once(tmp_path):
    async def main():
        asyncio.get_running_loop().set_task_factory(getattr(asyncio, 'eager_task_factory', at_once))
        with TaskQueue() as q:
            @q.task(name='t')
            async def t(n:int) -> int: return n
            async with Worker(q), asyncio.timeout(30):
                for _ in range(3):
                    jobs = t.enqueue_many([(n,) for n in range(10_000)])
                    assert await q.aresult(jobs[-1])==9_999
                while q.counts()[State.succeeded] < 30_000: await asyncio.sleep(.01)
    asyncio.run(main())

def test_what_is_handed_over_without_a_place_is_given_back(tmp_path):
    async def main():
        with TaskQueue(SQLiteStore(tmp_path/'q.db', 'process')) as q:
            ran = asyncio.Event()
            @q.task(name='t')
            async def t(): await ran.wait()
            async with Worker(q, concurrency=1, lease=60) as worker:
                await idle(q)
                worker._rooms[None].rate = 1000 # as after many short jobs
                worker._chores_at = worker._ask_at = float('inf') # but for its leases, nothing wakes it by the clock
                worker._stir.set()
                async with asyncio.timeout(30):
                    while q.store.orders.open[worker.name][0][0][1]==1: await asyncio.sleep(.01)
                jobs = t.enqueue_many([()]*4)
                assert q.counts()[State.running]==4
                async with asyncio.timeout(6):
                    while q.counts()[State.running] > 1: await asyncio.sleep(.01)
                ran.set()
                for job in jobs: await q.aresult(job, 30)
    asyncio.run(main())

def test_what_was_claimed_ahead_is_not_started_when_others_may_have_it(tmp_path):
    queue,other = (TaskQueue(SQLiteStore(tmp_path/'q.db', 'process')) for _ in range(2))
    ran,taken,after = [],[],[]

    @queue.task(name='halt')
    async def halt(n:int):
        ran.append(n)
        if n%100 or len(taken) > 1: return # once it had only this one: again
        time.sleep(1) # the loop stands still for longer than a lease
        taken[:] = [j.args[0] for j in other.store.sweep()]
        after[:] = [len(ran)]
        if len(taken) > 1: other.store.pause('default')

    halt.enqueue_many([(n,) for n in range(1, 3000)])
    async def main():
        async with Worker(queue, concurrency=1, lease=.5):
            while len(taken) < 2: await asyncio.sleep(.01)
    asyncio.run(main())
    assert not set(ran[after[0]:]) & set(taken) and queue.counts()[State.running]==0

def test_many_that_lost_workers_leave_room_for_others(tmp_path):
    "Each of them begins alone; between two of them others do, whether they run elsewhere or stand behind them"
    async def main():
        q,begun = TaskQueue(SQLiteStore(tmp_path/'q.db', 'process')),[]
        @q.task
        async def crashed(): begun.append(1); await asyncio.sleep(3600)
        @q.task
        async def beside(): return len(begun)
        @q.task
        def elsewhere(): return len(begun)
        crashed.enqueue_many([()]*60)
        q.store.file.write(lambda cx: cx.execute('UPDATE jobs SET crashes=2'))
        async with Worker(q, grace=0):
            while not begun: await asyncio.sleep(.01)
            jobs = beside.enqueue(),elsewhere.enqueue()
            assert max([await q.aresult(j, 60) for j in jobs]) < 60
        q.close()
    asyncio.run(main())

def test_what_was_claimed_when_nothing_had_begun_counts_no_crash(tmp_path):
    "One worker of a process is about to take its jobs in when a job of the other one ends the process"
    code = 'import os,signal,sys; from bgtasks.sqlite import SQLiteStore; s = SQLiteStore(sys.argv[1]); ' \
        's.join("one").add((1, 1)); s.claim("one", ["t"]); s.join("two"); s.claim("two", ["t"], limit=9); ' \
        'os.kill(os.getpid(), signal.SIGKILL)'
    store = SQLiteStore(tmp_path/'q.db')
    store.add([Call(id=new_id(), task='t', payload=b'[[],{}]') for _ in range(4)])
    subprocess.run([sys.executable, '-c', code, str(tmp_path/'q.db')], env=os.environ|{'PYTHONPATH': str(ROOT)})
    assert sorted((j.crashes, j.state.value) for j in store.sweep(0))==[*[(0, 'queued')]*3, (1, 'dead')]
    store.close()

def test_a_key_that_comes_twice_is_one_job_for_an_idle_worker(tmp_path):
    async def main():
        with TaskQueue(SQLiteStore(tmp_path/'q.db', 'process')) as q:
            ran = []
            task = q.task(lambda x: ran.append(x), name='t', key=lambda x: f'key {x}')
            async with Worker(q):
                await idle(q)
                a,b,c = task.enqueue_many([(1,), (1,), (2,)])
                for job in (a, c): await q.aresult(job, 30)
            assert a.id==b.id and sorted(ran)==[1, 2]
            assert [e.kind for e in q.store.events(job=a.id)]==['queued', 'running', 'succeeded']
    asyncio.run(main())

def test_a_standing_order_brings_no_old_job_that_has_the_key(tmp_path):
    "Its row may be damaged, which only a claim finds out"
    with TaskQueue(SQLiteStore(tmp_path/'q.db', 'process')) as q:
        task,given = q.task(lambda: 1, name='t', key='k'),[]
        old = task.enqueue()
        q.store.stand_by('w', [(['t'], 5)], give=given.append)
        assert task.enqueue().id==old.id and not given and q.get(old).state is State.queued
        task.using(key='other').enqueue() # one that is new comes, with its key
        assert given==[[[q.get(q.find(limit=1)[0])]]] and given[0][0][0].key=='other'

def test_what_the_store_records_by_itself_comes_to_an_idle_worker_too(tmp_path):
    "A tick of a schedule, and the news of an end; what is undone comes to nobody"
    with TaskQueue(SQLiteStore(tmp_path/'q.db', 'process')) as q:
        store,given = q.store,[]
        def call(**kw): return Call(id=new_id(), task='t', payload=b'[[],{}]', **kw)
        def wait(): store.stand_by('w', [(['t', 'tell'], 5)], give=given.append)
        wait(); store.tick('s', 1.0, 2.0, call())
        assert not given # it was no tick
        store.tick('s', None, 2.0, call(notify=(Notice(task='tell'),)))
        job, = given.pop()[0]
        assert store.get(job.id)==job and job.state is State.running
        wait(); done = Done(seq=job.seq, attempt=1, state=State.succeeded)
        store.finish([done, done]) # the second is late, so the transaction is undone and done again
        news, = given.pop()[0]
        assert (news.task, given, store.counts()[State.running])==('tell', [], 1)
        assert [e.kind for e in store.events(job=news.id)]==['queued', 'running']

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='there is no fork')
def test_a_task_may_end_its_forked_child_by_a_signal(tmp_path):
    "The child has the handlers of the program, and its parent does not take the signal for its own"
    code = """
import asyncio, multiprocessing, time
from bgtasks import TaskQueue, Worker
queue = TaskQueue()
@queue.task
def end_child():
    fork = multiprocessing.get_context('fork')
    begun = fork.Event()
    p = fork.Process(target=lambda: (begun.set(), time.sleep(60)))
    p.start(); begun.wait(30); p.terminate(); p.join(30)
    return p.exitcode
async def main():
    worker = Worker(queue)
    run = asyncio.create_task(worker.run())
    print(await queue.aresult(end_child.enqueue(), 40), worker._told.is_set())
    await worker.stop()
    await run
asyncio.run(main())"""
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    out = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True, timeout=120)
    assert out.stdout==f'{-signal.SIGTERM} False\n', out.stderr

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='there is no fork')
def test_a_forked_child_that_has_had_a_worker_can_be_ended_by_a_signal(tmp_path):
    "Its own worker leaves the handlers of the program, though its parent's has not ended; so does the parent's block"
    code = """
import asyncio, os, signal, sys
from bgtasks import TaskQueue, Worker
from bgtasks.signals import on_signals
def handlers(): return [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
before = handlers()
async def work(): await Worker(TaskQueue()).run(until_empty=True)
loop = asyncio.new_event_loop()
with on_signals(loop, print):
    if (child := os.fork())==0:
        asyncio.run(work())
        if handlers()!=before: os._exit(3)
    else: assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])==0
assert handlers()==before
loop.close()"""
    env = dict(os.environ, PYTHONPATH=str(ROOT))
    out = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True,
                         timeout=120)
    assert out.returncode==0, out.stderr

class Server(Command):
    "An app under uvicorn, in a process of its own, with a worker in its lifespan"
    def __init__(self, folder, grace):
        env = dict(os.environ, PYTHONPATH=f'{ROOT}{os.pathsep}{folder}')
        self.p = subprocess.Popen([sys.executable, 'web.py', str(grace)], cwd=folder, env=env, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.said = ''
        while not (found := re.search(r'http://[\d.]+:\d+', self.said)):
            line = self.p.stdout.readline()
            assert line, self.said
            self.said += line
        self.url = found[0]
    def get(self): return msgspec.json.decode(urllib.request.urlopen(self.url, timeout=30).read())

@pytest.mark.parametrize('signals', [1, 2])
def test_worker_in_a_web_app_ends_with_the_server(folder, queue, signals):
    "What fits into the grace time is finished, the rest is queued again, and the server does not hang"
    with Server(folder, grace=2) as web:
        done = web.get()
        until(lambda: state(queue, done)=='succeeded')
        short,long,thread = record(queue, 'wait', .5),record(queue, 'wait', 3600),record(queue, 'block', 3600)
        until(lambda: all(state(queue, j)=='running' for j in (short, long, thread)))
        web.p.send_signal(signal.SIGTERM)
        if signals==2: # an impatient one
            time.sleep(.1)
            web.p.send_signal(signal.SIGTERM)
        said = web.p.communicate(timeout=60)[0]
    assert web.p.returncode in (0, -signal.SIGTERM), said
    if signals==2: # nothing could be said to the store in order: the next one who looks sees that the worker is dead
        until(lambda: queue.store.sweep() or state(queue, long)=='queued')
        assert state(queue, short) in ('queued', 'succeeded')
    else:
        assert 'Traceback' not in said and state(queue, short)=='succeeded', said
        assert [queue.get(j).tries for j in (long, thread)]==[0, 0]
    assert [state(queue, j) for j in (long, thread)]==['queued', 'queued'], said

def test_task_in_another_process_is_found_and_reports(folder, queue):
    with Command(folder) as c:
        job = record(queue, 'afar', 20)
        until(lambda: state(queue, job) in ('succeeded', 'dead'))
        job = queue.get(job)
        assert job.result==41, job.error
        assert (job.progress.done, job.progress.message)==(1, 'afar')

def test_wrong_place_is_told(folder):
    code = 'from bgtasks.command import worker; worker()'
    out = subprocess.run([sys.executable, '-c', code, 'app:nothing'], cwd=folder, capture_output=True, text=True,
                         env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert out.returncode==1 and "'app' has no 'nothing'; it has queue" in out.stderr

def test_a_late_worker_is_fenced(folder):
    "A worker that was stopped for longer than its lease gives its result too late; nothing of it is kept"
    async def main():
        q = TaskQueue(SQLiteStore(folder/'late.db', 'process'))
        gate,ran = asyncio.Event(),[]
        @q.task
        async def hold(n:int):
            ran.append(n)
            if len(ran)==1: await gate.wait()
            return len(ran)
        async with Worker(q, name='late') as w:
            job = hold.enqueue(1)
            while not ran: await asyncio.sleep(.01)
            key = next(iter(w._running))
            # somebody else has taken the job over, and ended it
            seq,attempt = key
            q.store.finish([Done(seq=seq, attempt=attempt, state=State.queued, counts=False)])
            while q.get(job).state.value!='succeeded': await asyncio.sleep(.01)
            assert q.get(job).result==2
            gate.set()
            while w._running: await asyncio.sleep(.01)
        assert q.get(job).result==2 and q.get(job).attempt==2
        q.close()
    asyncio.run(main())

def test_an_idle_worker_hardly_costs(folder):
    async def main():
        q = TaskQueue(SQLiteStore(folder/'idle.db'))
        @q.task
        async def f(): pass
        turns = 0
        async with Worker(q) as w:
            await asyncio.sleep(.5)
            gather = w._gather
            def counted(now):
                nonlocal turns
                turns += 1
                return gather(now)
            w._gather = counted
            await asyncio.sleep(2)
        q.close()
        return turns
    assert asyncio.run(main()) < 12

def test_a_job_of_another_process_starts_without_polling(folder, queue):
    "The worker hears of a commit of another process: it has not looked for itself in the meantime"
    async def main():
        q = TaskQueue(SQLiteStore(folder/'q.db', 'process'))
        @q.task(name='add')
        async def add(a:int, b:int) -> int: return a+b
        async with Worker(q) as w:
            await asyncio.sleep(.3)
            w._gap = 1
            job = await asyncio.to_thread(record, queue, 'add', 1, 2)
            assert await q.aresult(job, 30)==3
        q.close()
    asyncio.run(main())
