"What nobody sane would pass: refused in words where it is passed, or run, and never an error of Python's inside."
import asyncio, contextvars, sys, threading
from datetime import UTC, datetime, timedelta, timezone
from enum import StrEnum

import pytest

from bgtasks.background import BackgroundTask
from bgtasks.errors import BgTasksError, JobFailed, NotPicklable, RemoteError, Retry, TaskTimeout
from bgtasks.job import Notice, Outcome
from bgtasks.periodic import Periodic
from bgtasks.queue import TaskQueue
from bgtasks.report import progress
from bgtasks.run import run as compute
from bgtasks.sqlite import SQLiteStore
from bgtasks.web import routes
from bgtasks.worker import Worker

HUGE = 2**62, 2**63-1, 2**63, 2**70+1, 10**400
NUMBERS = *HUGE, *(-n for n in HUGE), -1, float('nan'), float('inf'), float('-inf'), 1e308, 1.5, True
TEXTS = '', 'a\0b', 'x'*1_000_000, '\ud800', 'two\nlines', '💥', 1, b'x'

@pytest.fixture
def anyio_backend(): return 'asyncio'

@pytest.fixture
def queue(tmp_path):
    with TaskQueue(SQLiteStore(tmp_path/'q.db', 'process')) as q: yield q

async def run(queue, *jobs, **kw):
    "The results of jobs, or the errors in their place"
    async with Worker(queue, **kw):
        return await asyncio.gather(*(queue.aresult(j, 30) for j in jobs), return_exceptions=True)

@pytest.mark.anyio
async def test_numbers_beyond_all_measure(anyio_backend, queue):
    "As an argument each comes back as it is, also in a list and as a result; what JSON has no number for is refused"
    @queue.task(name='any')
    async def same(x): return x
    @queue.task(name='int')
    def double(x:int) -> int: return 2*x
    exact = [n for n in NUMBERS if n==n and abs(n)!=float('inf')]
    jobs = [same.enqueue(n) for n in exact]+[same.enqueue({'a': [n]}) for n in exact]
    assert await run(queue, *jobs)==exact+[{'a': [n]} for n in exact]
    whole = [n for n in exact if type(n) is int]
    assert await run(queue, *[double.enqueue(n) for n in whole])==[2*n for n in whole]
    for n in (float('nan'), float('inf'), 10**5000):
        with pytest.raises(BgTasksError, match="argument 'x' can't be recorded"): same.enqueue([n])

@pytest.mark.anyio
@pytest.mark.parametrize('option', ['priority', 'delay', 'timeout', 'retries', 'keep', 'run_at'])
async def test_numbers_as_options(anyio_backend, queue, option):
    "Each is refused in words, or the job is recorded and what is due runs"
    @queue.task(name='f')
    async def f(): return 1
    taken = []
    for n in NUMBERS:
        try: taken.append(f.using(**{option: n}).enqueue())
        except BgTasksError as e: assert option in str(e)
    assert 0 < len(taken) < len(NUMBERS)
    due = [j for j in taken if j.run_at <= queue.clock()]
    assert await run(queue, *due)==[1]*len(due) and len(queue.find())==len(taken)

@pytest.mark.anyio
async def test_times_from_the_first_year_to_the_last(anyio_backend, queue):
    @queue.task(name='t')
    async def same(at:datetime) -> datetime: return at
    zones = UTC, timezone(timedelta(hours=14)), timezone(-timedelta(hours=12)), timezone(timedelta(hours=5, minutes=45))
    times = [datetime(y, 1, 1, tzinfo=z) for y in (1, 1969, 9999) for z in zones]
    assert await run(queue, *[same.enqueue(t) for t in times])==times
    jobs = [same.using(run_at=t).enqueue(t) for t in times]
    assert (await run(queue, *[j for j in jobs if j.run_at < 0]))==[t for t in times if t.year < 1970]
    assert [queue.get(j).state for j in jobs if j.run_at > 1e11]==['queued']*4
    with pytest.raises(BgTasksError, match='no time zone'): same.using(run_at=datetime(2030, 1, 1))

@pytest.mark.parametrize('text', TEXTS, ids=lambda t: repr(t)[:12])
def test_texts_as_names(queue, text):
    "A name is taken and found again, or refused in words; looking for one that can't be finds nothing"
    f = queue.task(lambda: 1, name='f')
    def tried(verb, *args, **kw):
        try: return verb(*args, **kw)
        except BgTasksError as e: assert str(e)
    for made,find in ((tried(queue.task, lambda: 2, name=text), lambda: queue.find(task=text)),
                      (tried(f.using, queue=text), lambda: queue.find(queue=text))):
        if made is not None: assert made.enqueue().id==find()[0].id
        else: assert not tried(find)
    if keyed := tried(f.using, key=text): assert keyed.enqueue().id==keyed.enqueue().id
    tried(f.using(key=lambda: text).enqueue)
    for verb in (queue.get, queue.cancel, queue.retry, queue.pause, queue.resume): tried(verb, text)
    tried(queue.result, text, timeout=0)
    assert queue.cancel(f.enqueue(), text).error.type=='Cancelled'
    tried(f.using, after=text)
    assert all(queue.get(j)==j for j in queue.find(limit=1000))

@pytest.mark.anyio
async def test_what_a_job_runs_after(anyio_backend, queue):
    @queue.task(name='f')
    async def f(n:int) -> int: return n
    with TaskQueue() as other: stranger = other.task(lambda: 1).enqueue()
    one = f.enqueue(1)
    many = f.enqueue_many([(n,) for n in range(3000)])
    twice,all_ = f.using(after=[one, one, one.id]).enqueue(2),f.using(after=many).enqueue(3)
    assert (len(twice.after), len(all_.after))==(1, 3000)
    for unknown in ('nobody', 'a\0b', stranger, [one, 'nobody'], [f'x{n}' for n in range(3000)]):
        job = f.using(after=unknown).enqueue(4)
        assert job.state=='cancelled' and 'which is unknown' in job.error.message
    for bad in ('', [''], [1], None, 5, b'abc', '\ud800', f, [[one]]):
        with pytest.raises(BgTasksError, match='after='): f.using(after=bad)
    assert await run(queue, twice, all_)==[2, 3]

class Odd(BaseException): pass
class Mute(Exception):
    def __str__(self): raise RuntimeError('no words')
    __repr__ = __str__

def raiser(e):
    def f(): raise e
    return f

def loop():
    e = ValueError('round'); e.__cause__ = e
    raise e

def forever(): return forever()
def deep():
    x = []
    for _ in range(100_000): x = [x]
    return x
def itself():
    x = []; x.append(x)
    return x

@pytest.mark.anyio
@pytest.mark.parametrize('is_async', [False, True])
async def test_what_a_task_may_raise_or_give(anyio_backend, queue, is_async):
    "Each of them ends its own job, with a reason"
    raises = [GeneratorExit(), KeyboardInterrupt(), SystemExit(3), StopIteration(1), StopAsyncIteration(),
              asyncio.CancelledError(), RecursionError(), MemoryError(), Odd('odd'), Mute(), ValueError('\ud800'),
              ValueError('x'*10_000_000), ExceptionGroup('g', [ValueError(1), Mute()]), TimeoutError()]
    gives = [lambda v=v: v for v in (object(), (i for i in range(3)), float('nan'), 10**5000, 'x'*10_000_000, '\ud800',
                                     {(1, 2): 3}, {1: 2}, {1, 'a'}, ValueError('v'), asyncio.Queue(), lambda: 1)]
    funcs = [*map(raiser, raises), *gives, loop, forever, deep, itself, lambda: Retry(after=10**400)]
    def task(n, f):
        async def af(): return f()
        return queue.task(af if is_async else f, name=f't{n}')
    jobs = [task(n, f).enqueue() for n,f in enumerate(funcs)]
    good = queue.task(lambda: 'good', name='good').enqueue()
    *ends,last = await run(queue, *jobs, good)
    assert {type(e) for e in ends}=={JobFailed} and last=='good'
    assert all(queue.get(j).error.type and len(str(queue.get(j).error)) < 5000 for j in jobs)

NONSENSE = [('x',), (float('nan'),), (None,), (10**400,), (-1,), (2, 1), (1, 0), (1, 2, object()), (1, 2, '\ud800'),
            (1, 2, 'y'*10**6), (1, 2, None), (True,), (1j,), (1e308, 1e308), ([],), (2**70, 2**71)]

@pytest.mark.anyio
async def test_progress_from_threads_with_nonsense(anyio_backend, queue):
    @queue.task(name='busy')
    def busy() -> int:
        said = []
        def tell(o):
            try: progress(*o)
            except BgTasksError as e: said.append(str(e))
        threads = [threading.Thread(target=contextvars.copy_context().run, args=(tell, o)) for o in NONSENSE*5]
        for t in threads: t.start()
        for t in threads: t.join()
        progress(3, 4, 'the last word')
        return len(said)
    job = busy.enqueue()
    refused, = await run(queue, job)
    assert refused==5*7, refused
    assert queue.get(job).progress.message=='the last word'
    assert all(e.data is not None for e in queue.store.events(job=job.id) if e.kind=='progress')

@pytest.mark.anyio
async def test_middleware_of_all_kinds(anyio_backend):
    "What it does to one job, it does to that job; the next one runs"
    async def raises(job, call): raise ValueError('in the middle')
    async def raises_after(job, call): await call(job); raise ValueError('in the middle')
    async def nothing(job, call): await call(job)
    async def never(job, call): return Outcome(value='instead')
    async def twice(job, call): await call(job); return await call(job)
    async def at_once(job, call): return (await asyncio.gather(call(job), call(job)))[1]
    async def value(job, call): return (await call(job)).value
    async def no_job(job, call): return await call()
    async def one_arg(job): return None
    async def leaves(job, call): sys.exit(1)
    async def closes(job, call): raise GeneratorExit
    async def cancels(job, call): raise asyncio.CancelledError
    async def elsewhere(job, call): return await asyncio.create_task(call(job))
    async def odd_value(job, call): return Outcome(value=object())
    async def odd_error(job, call): return Outcome(error='a text')
    want = {raises: (0, 'in the middle'), raises_after: (1, 'in the middle'), nothing: (1, 'gave NoneType in place of'),
            never: (0, 'instead'), twice: (2, 2), at_once: (2, 2), value: (1, 'gave int in place of'),
            no_job: (0, 'missing 1 required'), one_arg: (0, 'takes 1 positional'), leaves: (0, 'SystemExit'),
            closes: (0, 'GeneratorExit'), cancels: (0, 'CancelledError'), elsewhere: (1, 1),
            odd_value: (0, 'JSON has nothing'), odd_error: (0, '')}
    for mw,(runs,end) in want.items():
        with TaskQueue() as queue:
            ran = []
            async def only_first(job, call): return await (mw(job, call) if job.task=='first' else call(job))
            queue.use(mw if mw is one_arg else only_first)
            first = queue.task(lambda: ran.append(1) or len(ran), name='first').enqueue()
            second = queue.task(lambda: 'fine', name='second').enqueue()
            got,next_ = await run(queue, first, second)
            assert len(ran)==runs, mw
            assert got==end or isinstance(got, JobFailed) and end in str(got), (mw, got)
            assert next_=='fine' or mw is one_arg

def test_middleware_that_is_none():
    def sync(job, call): return call(job)
    async def gen(job, call): yield
    class Later:
        async def __call__(self, job, call): return await call(job)
    queue = TaskQueue()
    for bad in (sync, gen, Later, None, 5, lambda job, call: call(job), 'mw'):
        with pytest.raises(BgTasksError, match='give an async function'): queue.use(bad)
    assert queue.use(ok := Later()) is ok and queue.middleware==[ok]

def test_a_payload_of_100_megabytes(queue):
    "With a limit to match it goes in and comes out; by default it is refused"
    big = TaskQueue(queue.store, max_payload=2*10**8).task(lambda text: None, name='big')
    job = big.enqueue('x'*10**8)
    claimed, = queue.store.claim('w', ['big'])
    assert claimed.id==job.id and len(claimed.args[0])==10**8
    with pytest.raises(BgTasksError, match='100,000,00. bytes as JSON, and max_payload is'):
        queue.task(lambda text: None, name='small').enqueue('x'*10**8)

@pytest.mark.anyio
async def test_what_we_raise_ourselves_is_told_without_our_frames(anyio_backend, queue, caplog):
    "A timeout, or arguments that no longer fit, say all in the message; a task's own error keeps its traceback"
    slow = queue.task(asyncio.sleep, name='slow', timeout=.05)
    @queue.task(name='wrong')
    async def wrong(): raise BgTasksError('in the task')
    late,own = slow.enqueue(60),wrong.enqueue()
    await run(queue, late, own)
    assert queue.get(late).error.traceback=='' and 'in wrong' in queue.get(own).error.traceback
    for job,lines in ((late, 1), (own, 5)):
        said = [r.getMessage() for r in caplog.records if job.id in r.getMessage()]
        assert len(said)==1 and len(said[0].splitlines())>=lines and not said[0].endswith('\n')
        assert (len(said[0].splitlines())==1)==(job is late)

@pytest.mark.anyio
async def test_a_background_task_that_takes_too_long_is_logged_in_a_line(anyio_backend, caplog):
    def wrong(): raise ValueError('in the task')
    for task,framed in ((BackgroundTask(asyncio.sleep, 60).using(timeout=.05), False), (BackgroundTask(wrong), True)):
        caplog.clear()
        with pytest.raises((TaskTimeout, ValueError)): await task()
        assert [bool(r.exc_info) for r in caplog.records]==[framed]

class Text(str): pass
class Lane(StrEnum): mail = 'mail'

@pytest.mark.anyio
@pytest.mark.parametrize('name', [Lane.mail, Text('mail')], ids=['enum', 'subclass'])
async def test_a_name_that_is_a_kind_of_text(anyio_backend, queue, name):
    "A member of an enum, or what a template made, is a text; a job has the plain one from the start"
    f = queue.task(lambda: 1, name=name, queue=name, key=name)
    job = f.enqueue()
    assert [type(o) for o in (job.task, job.queue, job.key)]==[str]*3 and job==queue.get(job)
    other = queue.task(lambda: 2, name='other', key=lambda: name)
    assert other.enqueue().id==job.id
    later = other.using(key=None, after=Text(job.id)).enqueue()
    assert later.after==(job.id,) and await run(queue, job, queues=[name], name=name)==[1]
    assert await run(queue, later)==[2]

def test_what_is_no_list_and_no_number_is_named(queue):
    f = queue.task(lambda x: 1, name='f')
    for bad in (5, None, 1.5, f):
        with pytest.raises(BgTasksError, match='enqueue_many takes'): f.enqueue_many(bad)
    for bad in (5, 1.5, object(), 'q', [], [1]):
        with pytest.raises(BgTasksError, match='queues='): Worker(queue, queues=bad)
    assert Worker(queue, queues=(q for q in ['a\ud800'])).queues==('a\\ud800',) # as `pause` and `find` have it
    for bad in (-1, 1.5, '1', b'1', True, float('nan'), -10**400, object()):
        with pytest.raises(BgTasksError, match='after='): queue.events(after=bad)
    for verb in (queue.pause, queue.resume):
        with pytest.raises(BgTasksError, match='queue=None'): verb(None)
    for bad in (-1, 'x', None, float('nan'), object()):
        with pytest.raises(BgTasksError, match='look='): Periodic(queue, bad)

@pytest.mark.parametrize('path', ['a\0b', '\ud800.db', '\udcff.db', b'\xff', 5, object()], ids=repr)
def test_a_path_that_is_none(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for make in (SQLiteStore, TaskQueue):
        with pytest.raises(BgTasksError, match=r'is no path of a file|give the path of a file'): make(path)
    assert not list(tmp_path.iterdir())

@pytest.mark.anyio
async def test_the_name_of_a_worker_that_utf8_does_not_have(anyio_backend, queue):
    job = queue.task(lambda: 1, name='f').enqueue()
    assert await run(queue, job, name='w\ud800')==[1] and queue.get(job).worker=='w\\ud800'

class Leaves(Exception):
    def __reduce__(self): return sys.exit, (3,)
class Refuses:
    def __reduce__(self): sys.exit(4)
class Leaver:
    def __reduce__(self): return sys.exit, (5,)
def leaving(): raise Leaves('bye')
def refusing(): return Refuses()
def left(): return Leaver()

@pytest.mark.anyio
@pytest.mark.parametrize('func', [leaving, refusing, left])
async def test_what_ends_a_program_when_it_is_pickled(anyio_backend, func):
    "The way home from a process runs code of the task's own; a server must not end by it"
    task = BackgroundTask(func).using(runner='process')
    if func is leaving:
        with pytest.raises(RemoteError, match='bye'): await task()
    else: assert isinstance((await compute(func, runner='process')).error, NotPicklable)

@pytest.mark.parametrize('bad', ['\ud800', {1, object()}], ids=['surrogate', 'object'])
def test_a_notice_that_can_not_be_recorded(queue, bad):
    "It is refused where it is declared: all calls of the task would fail"
    with pytest.raises(BgTasksError, match="notify=.* can't be recorded"):
        queue.task(lambda: 1, name='f', notify=Notice(task='tell', args=(bad,)))

@pytest.mark.parametrize('option', [dict(queue='q.db'), dict(prefix=5), dict(prefix=None),
    dict(origins='https://a.org'), dict(origins=None), dict(heartbeat=0), dict(heartbeat=float('nan')),
    dict(stall='x'), dict(stall=None)], ids=repr)
def test_routes_that_could_not_serve(queue, option):
    with pytest.raises(BgTasksError, match=f'{option.get("queue", next(iter(option)))}'):
        routes(**({'queue': queue} | option))
