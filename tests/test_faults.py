"What can go wrong with the file, the disk, the clock and the processes: a clear error, and nothing lost."
import asyncio, os, signal, subprocess, sys, textwrap, threading, time
from contextlib import nullcontext
from pathlib import Path

import apsw, pytest

from bgtasks.errors import StoreError
from bgtasks.job import Call, Done, State, new_id
from bgtasks.queue import TaskQueue
from bgtasks.sqlite import SQLiteStore
from bgtasks.tables import forget
from bgtasks.worker import Worker

ROOT = Path(__file__).parents[1]
posix = pytest.mark.skipif(sys.platform=='win32', reason='a thing of POSIX systems')

def calls(n=1, **kw): return [Call(id=new_id(), task='t', payload=b'[[],{}]', **kw) for _ in range(n)]
def finish(store, *jobs): return store.finish([Done(seq=j.seq, attempt=j.attempt, state=State.succeeded) for j in jobs])
def claim(store, n=100): return store.claim('w', ['t'], limit=n)
def sound(path): return apsw.Connection(str(path)).pragma('integrity_check')=='ok'

HEAD = '''
import os, signal, sys, time
from bgtasks.errors import StoreError
from bgtasks.job import Call, Done, State, new_id
from bgtasks.sqlite import SQLiteStore
def calls(n=1, size=0): return [Call(id=new_id(), task='t', payload=b'[["%s"],{}]' % (b'x'*size)) for _ in range(n)]
'''

def python(code, *args, **kw):
    "A process that runs `code`"
    env = os.environ | {'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    return subprocess.Popen([sys.executable, '-c', HEAD+textwrap.dedent(code), *map(str, args)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)

def ran(code, *args, code_=0, **kw):
    "What a process printed that ran `code` to its end"
    p = python(code, *args, **kw)
    out,err = p.communicate(timeout=120)
    assert p.returncode==code_, err
    return out.split()

@pytest.fixture
def anyio_backend(): return 'asyncio'

@pytest.fixture
def path(tmp_path): return tmp_path/'q.db'

# The file

@pytest.mark.parametrize('content', [b'name,price\n'*200, b'\0'*4096, b'SQLite format 3\0' + b'\xff'*4080])
def test_not_a_database(path, content):
    path.write_bytes(content)
    with pytest.raises(StoreError, match='q.db'): SQLiteStore(path)
    assert path.read_bytes()==content

def test_the_database_of_another_program(path):
    cx = apsw.Connection(str(path)); cx.execute('CREATE TABLE mine(x); INSERT INTO mine VALUES(1)'); cx.close()
    with pytest.raises(StoreError, match='another program'): SQLiteStore(path)
    assert apsw.Connection(str(path)).execute('SELECT x FROM mine').fetchall()==[(1,)]

def test_a_newer_version_is_refused_and_left_alone(path):
    store = SQLiteStore(path); a, = store.add(calls()); store.close()
    cx = apsw.Connection(str(path)); now = cx.pragma('user_version'); cx.pragma('user_version', now+1); cx.close()
    with pytest.raises(StoreError, match='newer bgtasks.*Upgrade'): SQLiteStore(path)
    cx = apsw.Connection(str(path)); assert cx.pragma('user_version')==now+1; cx.pragma('user_version', now); cx.close()
    assert SQLiteStore(path).get(a.id)==a

def test_a_folder_that_is_not_there_or_is_a_file(tmp_path):
    with pytest.raises(StoreError, match='folder'): SQLiteStore(tmp_path/'none'/'q.db')
    (tmp_path/'file').write_text('')
    with pytest.raises(StoreError): SQLiteStore(tmp_path/'file'/'q.db')
    with pytest.raises(StoreError): SQLiteStore(tmp_path)

@posix
def test_a_file_that_may_not_be_written(path):
    SQLiteStore(path).close()
    before = path.read_bytes()
    path.chmod(0o400); path.parent.chmod(0o500)
    try:
        code = '''
            if os.getuid()==0: os.setgroups([]); os.setgid(65534); os.setuid(65534)
            try: SQLiteStore(sys.argv[1]).add(calls())
            except StoreError as e: print('refused')
            '''
        assert ran(code, path)==['refused']
    finally: path.parent.chmod(0o700); path.chmod(0o600)
    assert path.read_bytes()==before

@posix
def test_only_the_owner_may_read_it(path):
    store = SQLiteStore(path); store.join('w'); store.add(calls())
    for o in path.parent.iterdir(): assert not o.stat().st_mode & 0o077, o

def test_a_lock_that_nobody_releases(path):
    store = SQLiteStore(path, timeout=.2)
    a, = store.add(calls())
    other = apsw.Connection(str(path)); other.execute('BEGIN IMMEDIATE')
    for verb in (lambda: store.add(calls()), lambda: store.cancel(a.id)):
        with pytest.raises(StoreError, match='locked') as e: verb()
        assert e.value.passes and e.value.waited
    assert store.get(a.id)==a and store.counts()[State.queued]==1 # reading goes on meanwhile
    other.execute('ROLLBACK')
    assert len(store.add(calls()))==1 and store.counts()[State.queued]==2

def test_a_job_that_moves_while_jobs_are_counted_is_counted_once(path, monkeypatch):
    store,other = SQLiteStore(path, 'process'),SQLiteStore(path, 'process')
    store.add(calls())
    def read(*args):
        out = real(*args)
        if not claim(other): other.leave('w') # due and running by turns
        return out
    real = store.file.read
    monkeypatch.setattr(store.file, 'read', read)
    assert [sum(store.counts().values()) for _ in range(2)]==[1, 1]
    assert [store.waiting(), store.waiting()]==[{'t': 1}, {}]
    store.close(); other.close()

def test_processes_that_make_the_file_at_once(path):
    procs = [python('SQLiteStore(sys.argv[1]).add(calls(3)); print("ok")', path) for _ in range(8)]
    assert [p.communicate(timeout=120)[0] for p in procs]==['ok\n']*8
    assert SQLiteStore(path).counts()[State.queued]==24 and sound(path)

# The disk

@posix
def test_a_full_disk_refuses_and_keeps_what_was_accepted(path):
    code = '''
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        store = SQLiteStore(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, resource.RLIM_INFINITY))
        for n in range(1000):
            try: ids = [j.id for j in store.add(calls(5, 20_000))]
            except StoreError: break
            print(*ids)
        else: sys.exit('it never got full')
        held = store.counts()
        assert held['queued']==5*n, held
        for _ in range(3): # it stays so, and does no harm
            try: store.add(calls(5, 20_000)); sys.exit('the disk is full, and yet it wrote')
            except StoreError: assert store.counts()==held
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(*[j.id for j in store.add(calls(5, 20_000))]) # there is room again: the same store goes on
        '''
    ids,store = ran(code, path),SQLiteStore(path)
    assert len(ids) > 20 and sorted(ids)==sorted(j.id for j in store.find(limit=10**6)) and sound(path)

@pytest.fixture
def small_disk(tmp_path):
    "A disk of eight megabytes"
    if subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', tmp_path], capture_output=True).returncode:
        pytest.skip('no tmpfs can be mounted here: that takes root on Linux')
    yield tmp_path
    subprocess.run(['umount', '-l', tmp_path], check=True)

@pytest.mark.skipif(sys.platform!='linux', reason='there is no tmpfs')
@pytest.mark.anyio
async def test_a_full_disk_and_room_again(anyio_backend, small_disk):
    "What was accepted stays, large results wait with the worker, and all goes on when there is room"
    rest,path = small_disk/'rest',small_disk/'q.db'
    with TaskQueue(SQLiteStore(path)) as queue:
        full = asyncio.Event()
        @queue.task(name='grow')
        async def grow(n:int, pad:str='') -> str:
            await full.wait()
            return str(n)*300_000
        async with Worker(queue, concurrency=5) as worker:
            accepted = [grow.enqueue(n) for n in range(10)] # the first five run, and wait
            while len(worker._running) < 5: await asyncio.sleep(.01)
            with pytest.raises(OSError), rest.open('wb', 0) as f:
                while f.write(b'x'*4096)==4096: pass # all of the disk
            with pytest.raises(StoreError, match='the disk is full'):
                for _ in range(1000): accepted.append(grow.enqueue(1, 'x'*50_000)) # until the log is full, too
            with pytest.raises(StoreError, match='the disk is full'): await grow.aenqueue(1, 'x'*100_000)
            os.truncate(rest, rest.stat().st_size-60_000) # room for a small verdict, and for none of these
            full.set()
            while worker._trouble < 5: await asyncio.sleep(.01) # what no store takes would be given up by now
            counts = queue.counts() # reading goes on
            assert counts[State.dead]==0 and sum(counts.values())==len(accepted)
            rest.unlink()
            assert [await queue.aresult(j, 60) for j in accepted]==[str(j.args[0])*300_000 for j in accepted]
            assert len(await queue.aresult(await grow.aenqueue(7), 60))==300_000
    assert sound(path)

def test_a_claim_that_fails_beside_late_verdicts_leaves_none_written(path, monkeypatch):
    "Else those that were in time would be tried again, and called late"
    store = SQLiteStore(path)
    store.add(calls(3))
    late,job,_ = store.claim('w', ['t'], limit=2)+store.find(state=State.queued)
    store.cancel(late.id)
    done = [Done(seq=j.seq, attempt=1, state=State.succeeded, value=b'1') for j in (late, job)]
    with monkeypatch.context() as m:
        def fail(*args): raise apsw.IOError('a bad sector')
        m.setattr('bgtasks.sqlite.claim_all', fail)
        with pytest.raises(StoreError, match='bad sector'): store.exchange(done, 'w', [(['t'], 1)])
    assert store.get(job.id).state is State.running
    written,(more,) = store.exchange(done, 'w', [(['t'], 1)])
    assert written==[False, True] and len(more)==1 and store.get(job.id).result==1

def test_errors_of_reading_and_writing_are_told(path, monkeypatch):
    store = SQLiteStore(path)
    a, = store.add(calls())
    def broken(*_): raise apsw.IOError('disk I/O error')
    with pytest.raises(StoreError, match='look at the disk'): store.file.write(broken)
    assert store.get(a.id)==a and len(store.add(calls()))==1

def test_a_corrupted_row_costs_only_its_own_job(path):
    store = SQLiteStore(path)
    jobs = store.add(calls(4))
    cx = apsw.Connection(str(path))
    bad = [(b'\xff\xfe', jobs[0].id), (b'{', jobs[1].id), (b'[1,2,3]', jobs[2].id)]
    cx.executemany('UPDATE jobs SET payload=? WHERE id=?', bad)
    cx.close()
    assert [j.id for j in claim(store)]==[jobs[3].id]
    assert [store.get(j.id).state for j in jobs]==['dead']*3 + ['running']
    assert all(store.get(j.id).error.message for j in jobs[:3]) and len(store.find())==4

ODD = 'NULL', "'abc'", "CAST(x'ff' AS TEXT)", "x''", "x'ff'", '-1', '1e6', '4e18', '9e999', '-9e999'
COLUMNS = """id lane st priority run_at created_at started_at finished_at until attempt lost crashes retries timeout
keep key after waits worker progress error payload value""".split()
LONG = {('running', 'until', '4e18'), ('running', 'until', '9e999'), ('later', 'run_at', '4e18'),
        ('blocked', 'run_at', '4e18')} # long, and no damage

async def until(condition, about):
    end = time.monotonic()+10
    while not condition():
        assert time.monotonic() < end, about() if callable(about) else about
        await asyncio.sleep(.002)

def damage(path, table, column, value, where='1'):
    "Write `value`, if the table takes it"
    with apsw.Connection(str(path)) as cx:
        try: cx.execute(f'UPDATE {table} SET "{column}"={value} WHERE {where}')
        except apsw.ConstraintError: return False
    cx.close()
    return True

@pytest.mark.anyio
@pytest.mark.parametrize('column', COLUMNS)
@pytest.mark.parametrize('state', ['due', 'later', 'blocked', 'running', 'succeeded'])
async def test_damage_of_any_kind_costs_only_its_own_job(anyio_backend, path, state, column):
    "Whatever stands in whatever column: the job has run or is dead with a reason, the others run, and all can be read"
    now = [1e9]
    with TaskQueue(SQLiteStore(path, 'process', clock=lambda: now[0], ticks=lambda: now[0])) as queue:
        task = queue.task(lambda n: n, name='t')
        before = task.using(delay=50).enqueue(0)
        options = dict(later=dict(delay=50), blocked=dict(after=before)).get(state, {})
        odd = {v: task.using(key=v, timeout=9, **options).enqueue(1) for v in ODD}
        if state in ('running', 'succeeded'): claimed = claim(queue.store)
        if state=='succeeded': assert all(finish(queue.store, *claimed))
        others = task.enqueue_many([(n,) for n in range(3)])
        other = queue.task(lambda: 4, name='other')
        children = [other.using(after=[others[0], j]).enqueue() for j in odd.values()]
        hurt = [v for v,j in odd.items()
                if (state, column, v) not in LONG and damage(path, 'jobs', column, v, f'seq={j.seq}')]
        found = queue.find()
        assert len(found)==24 and all(str(j.task) for j in found) and sum(queue.waiting().values()) >= 4
        now[0] += 100
        async with Worker(queue, grace=0):
            def ended():
                now[0] += .1
                return all(j.state not in ('queued', 'running') for j in queue.find())
            await until(lambda: ended() and sum(queue.counts().values())==24, queue.find)
        jobs = {j.seq:j for j in queue.find()}
        assert [jobs[j.seq].state for j in [before, *others]]==['succeeded']*4
        for value,child in zip(odd, children):
            got = jobs[odd[value].seq]
            assert got.state=='succeeded' or value in hurt and got.state=='dead' and got.error.message, (value, got)
            if state=='succeeded': continue
            assert jobs[child.seq].state==('succeeded' if got.state=='succeeded' else 'cancelled'), (value, got)
        assert queue.store.events(limit=10**6) and queue.purge(0) >= 14
        assert {task.using(key=v).enqueue(5).state for v in odd}=={'queued'}

@pytest.mark.anyio
@pytest.mark.parametrize('table,column', [('lanes', 'task'), ('lanes', 'queue'), ('deps', 'parent'), ('deps', 'child'),
    ('events', 'seq'), ('events', 'kind'), ('events', 'attempt'), ('events', 'at'), ('events', 'data'),
    ('notices', 'what'), ('paused', 'queue')])
async def test_damage_beside_the_jobs(anyio_backend, path, table, column):
    "In the other tables: jobs that are not concerned run, those that wait for what is gone end, the file opens again"
    for value in ODD:
        file = path.with_name(f'{abs(hash(value))}.db')
        with TaskQueue(SQLiteStore(file, 'process')) as queue:
            task,odd = queue.task(lambda n: n, name='t'),queue.task(lambda n: n, name='odd')
            queue.pause('resting')
            jobs = task.enqueue_many([(n,) for n in range(3)])
            waits = task.using(after=jobs[0]).enqueue(9)
            odd.using(queue='other').enqueue(1)
            where = dict(lanes="task='odd'").get(table, '1')
            if not damage(file, table, column, value, where): continue
        with TaskQueue(SQLiteStore(file, 'process')) as queue:
            task = queue.task(lambda n: n, name='t')
            more = task.enqueue(4)
            async with Worker(queue):
                def ended(): return all(queue.get(j).state=='succeeded' for j in [*jobs, more])
                def waited(): return queue.get(waits).state!='queued' and sum(queue.waiting().values()) <= 1
                await until(lambda: ended() and waited(), value)
            assert len(queue.find())==6 and queue.store.events() is not None
            assert queue.purge(0) >= 4

@pytest.mark.parametrize('value', ODD)
@pytest.mark.parametrize('column', ['floor', 'born', 'boot', 'lanes'])
def test_a_damaged_counter_is_told_or_put_right(path, column, value):
    store = SQLiteStore(path); store.add(calls(3)); store.close()
    if not damage(path, 'counter', column, value): return
    try: store = SQLiteStore(path)
    except StoreError as e: assert 'counter' in str(e); return
    assert len(store.add(calls(2)))==2 and len(store.find())==5 and len(claim(store))==5 and store.last_event() >= 5

@pytest.mark.parametrize('table, column', [('jobs', 'seq'), ('events', 'id'), ('counter', 'floor')])
def test_a_number_after_which_none_can_come_is_told(path, table, column):
    def do(sql): cx = apsw.Connection(str(path)); cx.execute(sql); cx.close()
    store = SQLiteStore(path); store.add(calls(2)); claim(store, 1)
    do(f'UPDATE {table} SET {column}={2**63-1} WHERE {column}=(SELECT max({column}) FROM {table})')
    for verb in (lambda: store.add(calls()), lambda: claim(store), lambda: store.cancel(store.find()[-1].id)):
        with pytest.raises(StoreError, match=rf'q\.db: it is damaged.*{table} .{column}'): verb()
    assert len(store.find())==2 # to look at them needs no number
    do('UPDATE counter SET floor=0' if table=='counter' else f'DELETE FROM {table} WHERE {column}>{2**62}') # as it says
    assert len(store.add(calls(2)))==2 and len(claim(store)) >= 2 and len(store.events()) >= 4
    store.close()

@pytest.mark.anyio
async def test_an_event_that_cannot_be_read(anyio_backend, path):
    with TaskQueue(SQLiteStore(path, 'process')) as queue:
        job = queue.task(lambda: 1, name='t').enqueue()
        await Worker(queue).run(until_empty=True)
        cx = apsw.Connection(str(path)); cx.execute("UPDATE events SET data='{'"); cx.close()
        assert [(e.kind, e.data) for e in queue.store.events(job=job.id)]==[('queued', None), ('running', None),
                                                                            ('succeeded', None)]

def test_a_payload_too_deep_to_be_read_costs_only_its_own_job(path):
    "Who records it may have more room on the stack than who claims it"
    def further_in(n, call): return call() if n==0 else further_in(n-1, call)
    store = SQLiteStore(path, 'process')
    deep, = store.add([Call(id=new_id(), task='t', payload=b'[[' + b'['*850 + b']'*850 + b'],{}]')])
    other, = store.add(calls())
    assert [j.id for j in further_in(300, lambda: claim(store))]==[other.id]
    assert store.get(deep.id).state is State.dead and 'recursion' in store.get(deep.id).error.message
    assert further_in(300, lambda: store.get(deep.id)).state is State.dead
    store.close()

@pytest.mark.parametrize('undone', [False, True])
def test_a_worker_that_leaves_while_a_job_is_recorded_gets_none(path, undone):
    store,left = SQLiteStore(path, 'process'),threading.Event()
    given = []
    store.join('w'); store.stand_by('w', [(['t'], 5)], give=given.append)
    def leave(): store.leave('w'); left.set()
    def on_commit(): # here the order has been served, and the transaction is not over
        store.file._cx.set_commit_hook(None)
        threading.Thread(target=leave).start()
        time.sleep(.1)
        return undone
    store.file._cx.set_commit_hook(on_commit)
    with pytest.raises(StoreError) if undone else nullcontext(): store.add(calls())
    assert left.wait(30)
    store.add(calls())
    assert store.counts()[State.running]==0 and not store.orders.open and len(given)==(not undone)
    store.close()

@posix
def test_what_a_worker_holds_that_could_not_take_leave_goes_to_others_at_once(path):
    store,other = SQLiteStore(path, 'process', timeout=.1),SQLiteStore(path, 'process')
    store.join('w'); store.add(calls()); claim(store)
    other.file._cx.execute('BEGIN IMMEDIATE')
    with pytest.raises(StoreError, match='locked'): store.leave('w')
    other.file._cx.execute('ROLLBACK')
    assert [j.state for j in other.sweep()]==[State.queued]
    store.join('w') # the name is free again
    store.close(); other.close()

def test_large_payloads_and_results_need_little_more_than_their_room(path):
    code = '''
        import resource
        store = SQLiteStore(sys.argv[1], 'process')
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform=='darwin' else 1024)
        for _ in range(10): store.add([Call(id=new_id(), task='t', payload=b'[["%s"],{}]' % (rb'\\"'*500_000))
                                       for _ in range(10)])
        before = peak()
        jobs = store.claim('w', ['t'], limit=100)
        size = sum(len(j.args[0]) for j in jobs)
        claimed = peak()
        value = b'"%s"' % (rb'\\"'*500_000)
        store.finish([Done(seq=j.seq, attempt=1, state=State.succeeded, value=value) for j in jobs])
        print(size, claimed-before, peak()-claimed)
        '''
    if sys.platform=='win32': pytest.skip('no resource there')
    size,claimed,finished = map(int, ran(code, path))
    assert size==50_000_000 and claimed < 5*size and finished < 4*size

def test_damage_in_the_file_is_told(path):
    store = SQLiteStore(path); store.add(calls(2000)); store.close()
    with open(path, 'r+b') as f: f.seek(8192); f.write(os.urandom(os.path.getsize(path)-8192))
    with pytest.raises(StoreError, match='damaged|not an SQLite'):
        store = SQLiteStore(path); store.find(limit=5000); store.add(calls(100))

# Processes

@posix
def test_a_fork_with_an_open_store(path):
    code = '''
        store = SQLiteStore(sys.argv[1]); store.join('parent')
        a, = store.add(calls())
        if (child := os.fork())==0:
            b, = store.add(calls())
            store.join('child')
            ok = store.get(a.id)==a and [j.id for j in store.claim('child', ['t'], limit=9)]==[a.id, b.id]
            store.close()
            os._exit(0 if ok else 3)
        status = os.waitpid(child, 0)[1]
        print(status, len(store.add(calls())), len(store.sweep())) # the child is dead; the parent's own locks hold
        '''
    assert ran(code, path)==['0', '1', '2']
    assert sound(path)

@posix
@pytest.mark.parametrize('parent', ['closes', 'is killed'])
@pytest.mark.parametrize('how', ['inherited', 'opened anew', 'inherited twice', 'a fork of a fork', 'multiprocessing'])
def test_what_a_forked_child_records_outlives_its_parent(path, how, parent):
    "With each look another process opens the file and closes it; one that took itself for the last removed the WAL"
    code = '''
        import multiprocessing
        path,how,parent = sys.argv[1:]
        signal.alarm(60)
        store = SQLiteStore(path); store.add(calls())
        if how=='inherited twice': twin = SQLiteStore(path); twin.add(calls())
        ready,say = os.pipe()
        def work():
            signal.alarm(60)
            mine = SQLiteStore(path) if how=='opened anew' else store
            mine.add(calls()); os.write(say, b'x')
            os.read(0, 1) # the parent has gone, and there was a first look
            jobs = mine.add(calls(300)); print('added', flush=True)
            os.read(0, 1) # and a second one
            print(len([j for j in jobs if mine.get(j.id)]), len(mine.add(calls())), flush=True)
            mine.close()
        def fork(f):
            if (child := os.fork())==0: f(); os._exit(0)
            return child
        if how=='multiprocessing': multiprocessing.get_context('fork').Process(target=work).start()
        else: fork((lambda: os.waitpid(fork(work), 0)) if how=='a fork of a fork' else work)
        os.read(ready, 1)
        if parent=='is killed': os.kill(os.getpid(), signal.SIGKILL)
        store.close()
        if how=='inherited twice': twin.close()
        print('closed', flush=True)
        '''
    def look():
        store = SQLiteStore(path)
        try: return sum(store.counts().values())
        finally: store.close()
    p,first = python(code, path, how, parent, stdin=subprocess.PIPE),2 + (how=='inherited twice')
    if parent=='is killed': p.wait(timeout=60)
    else: assert p.stdout.readline()=='closed\n'
    assert look()==first
    p.stdin.write('x'); p.stdin.flush()
    assert p.stdout.readline()=='added\n' and look()==first+300
    out,err = p.communicate('x', timeout=60)
    assert out.split()==['300', '1'], err
    assert look()==first+301 and sound(path)

@posix
def test_a_forked_child_that_never_uses_the_store_removes_nobodys_wal(path):
    code = '''
        signal.alarm(60)
        store = SQLiteStore(sys.argv[1]); store.add(calls())
        if os.fork()==0: os.read(0, 1); sys.exit() # an end in order, with all finalizers
        store.close(); print('closed', flush=True)
        os.wait()
        '''
    p = python(code, path, stdin=subprocess.PIPE)
    assert p.stdout.readline()=='closed\n'
    ran('store = SQLiteStore(sys.argv[1]); store.add(calls(300)); os.kill(os.getpid(), signal.SIGKILL)', path,
        code_=-signal.SIGKILL) # what it has committed is in the WAL alone
    assert p.communicate('x', timeout=60)[1]==''
    assert SQLiteStore(path).counts()[State.queued]==301 and sound(path)

@posix
def test_threads_of_a_forked_child_share_its_own_connection(path):
    code = '''
        import resource, threading
        store = SQLiteStore(sys.argv[1], 'process'); store.add(calls())
        theirs,used,start = store.file._cx,[],threading.Barrier(4)
        def write(): start.wait(); store.file.write(used.append)
        def work():
            signal.alarm(20)
            _,most = limit = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, most)) # no descriptor is free: the first opening fails
            try: store.add(calls()); os._exit(3)
            except StoreError: resource.setrlimit(resource.RLIMIT_NOFILE, limit)
            threads = [threading.Thread(target=write) for _ in range(4)]
            for t in threads: t.start()
            for t in threads: t.join()
            os._exit(0 if len(used)==4 and used==[store.file._cx]*4 and theirs not in used else 4)
        for _ in range(10):
            if (child := os.fork())==0: work()
            print(os.waitpid(child, 0)[1])
        '''
    assert ran(code, path)==['0']*10

@posix
def test_what_a_forked_child_records_is_not_handed_to_its_parents_worker(path):
    code = '''
        given = []
        store = SQLiteStore(sys.argv[1]); store.join('w')
        store.stand_by('w', [(['t'], 5)], give=given.append)
        if (child := os.fork())==0: os._exit(0 if store.add(calls()) and not given else 3)
        status = os.waitpid(child, 0)[1]
        mine, = store.add(calls()) # the parent's own order stands
        print(status, [[j.id for j in o] for o in given[0]]==[[mine.id]], store.counts()[State.queued])
        '''
    assert ran(code, path)==['0', 'True', '1']

@posix
def test_forks_while_other_threads_write_and_read(path):
    code = '''
        import threading
        store,going = SQLiteStore(sys.argv[1], 'process'),True
        def write():
            while going: store.add(calls())
        def read():
            while going: store.counts()
        def reopen():
            while going: SQLiteStore(sys.argv[1]+'2', 'process').close()
        threads = [threading.Thread(target=f) for f in (write, write, read, reopen)]
        for t in threads: t.start()
        ended = 0
        for _ in range(20):
            if (child := os.fork())==0: signal.alarm(20); store.add(calls()); store.counts(); os._exit(0)
            ended += os.waitpid(child, 0)[1]==0
        going = False
        for t in threads: t.join()
        print(ended)
        '''
    assert ran(code, path)==['20']
    assert sound(path)

@posix
def test_a_forked_child_does_not_keep_its_parents_worker_alive(path):
    "One that a task has made, say, and that outlives the worker"
    code = '''
        store = SQLiteStore(sys.argv[1]); store.join('w'); store.add(calls()); store.claim('w', ['t'])
        if os.fork()==0: os.close(1); os.close(2); time.sleep(20); os._exit(0)
        sys.stdout.flush(); os.kill(os.getpid(), signal.SIGKILL)
        '''
    ran(code, path, code_=-signal.SIGKILL)
    assert [j.state.value for j in SQLiteStore(path).sweep()]==['queued']

def test_a_fork_with_a_store_in_memory():
    if not hasattr(os, 'fork'): pytest.skip('no fork here')
    code = '''
        store = SQLiteStore(); store.add(calls())
        if (child := os.fork())==0:
            try: store.counts()
            except StoreError as e: os._exit(0 if 'file' in str(e) else 3)
            os._exit(4)
        print(os.waitpid(child, 0)[1], store.counts()['queued'])
        '''
    assert ran(code)==['0', '1']

@posix
def test_a_sweep_spares_a_worker_that_has_started_again_meanwhile(path):
    old,new,other = (SQLiteStore(path, 'process') for _ in range(3))
    old.join('one'); old.add(calls()); old.claim('one', ['t']); old.close() # as if killed
    real = other._write
    def late(*args, **kw): # it was found dead, but the file is waited for
        other._write = real
        assert len(new.sweep())==1
        new.join('one'); new.claim('one', ['t'])
        return real(*args, **kw)
    other._write = late
    assert other.sweep()==[] and claim(other)==[]
    with pytest.raises(StoreError, match='its own name'): other.join('one')
    new.close()
    assert [j.attempt for j in other.sweep()]==[2] # its lock was still there to tell

@pytest.mark.anyio
async def test_a_worker_hears_once_that_its_queue_has_been_closed():
    heard = []
    class Counts(Worker):
        def _heard(self): heard.append(1); super()._heard()
    worker = Counts(TaskQueue(), grace=0)
    await worker.start()
    worker.queue.close()
    await asyncio.sleep(.1)
    await worker.stop()
    assert len(heard) < 3

STEPS = ['add', 'claim', 'renew', 'finish', 'exchange', 'leave']

@posix
@pytest.mark.parametrize('when', ['before', 'inside', 'after'])
@pytest.mark.parametrize('verb', STEPS)
def test_killed_between_each_two_steps(path, verb, when):
    "A process does all the flow and is killed at one point of it; another one finishes what was accepted"
    code = '''
        path,verb,when = sys.argv[1:]
        def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
        real = getattr(SQLiteStore, verb)
        def wrapped(self, *args, **kw):
            if when=='before': die()
            if when=='inside': self.file._cx.set_commit_hook(die) # all is written but the commit
            res = real(self, *args, **kw)
            die()
        store = SQLiteStore(path)
        def at(name): # the verb is deadly from its second use on
            if name==verb: setattr(SQLiteStore, verb, wrapped)
        store.join('w')
        for n in (1, 2):
            if n==2: at('add')
            print(*[j.id for j in store.add(calls(2))], flush=True)
            if n==2: at('claim')
            jobs = store.claim('w', ['t'], limit=2)
            if n==2: at('renew')
            store.renew('w', [(j.seq, j.attempt) for j in jobs])
            if n==2: at('finish')
            store.finish([Done(seq=j.seq, attempt=j.attempt, state=State.succeeded) for j in jobs[:1]])
            if n==2: at('exchange')
            rest = [Done(seq=j.seq, attempt=j.attempt, state=State.succeeded) for j in jobs[1:]]
            store.exchange(rest, 'w', [(['t'], 2)])
        at('leave')
        store.leave('w')
        '''
    accepted = ran(code, path, verb, when, code_=-signal.SIGKILL)
    store = SQLiteStore(path)
    assert all(store.get(i) for i in accepted)
    swept = store.sweep() # it is told at once: no lease has to run out
    assert {j.state for j in swept} <= {'queued'} and not store.counts()[State.running]
    while jobs := claim(store): assert all(finish(store, *jobs))
    assert {store.get(i).state for i in accepted}=={'succeeded'}
    assert store.counts()[State.succeeded] >= len(accepted) and sound(path)

# Tasks and clocks

@pytest.mark.anyio
async def test_a_task_that_nobody_knows_waits_and_is_listed(anyio_backend, path):
    with TaskQueue(SQLiteStore(path)) as old: gone = old.task(name='gone')(lambda: 1).enqueue()
    with TaskQueue(SQLiteStore(path)) as new:
        here = new.task(name='here')(lambda: 2).enqueue()
        await Worker(new).run(until_empty=True)
        assert new.result(here)==2 and new.get(gone).state=='queued' and new.store.waiting()=={'gone': 1}
        new.task(name='gone')(lambda: 3)
        await Worker(new).run(until_empty=True)
        assert new.result(gone)==3

@pytest.mark.parametrize('step', [-3600, 3600, -10**7, 10**7])
def test_a_clock_that_is_set(path, step):
    now = [1e9]
    store = SQLiteStore(path, clock=lambda: now[0], ticks=time.monotonic)
    a,later = store.add(calls())[0],store.add(calls(run_at=now[0]+60))[0]
    r, = claim(store, 1)
    b, = store.add(calls())
    now[0] += step
    assert store.sweep()==[] and store.renew('w', [(r.seq, 1)])==[] # a lease runs by the clock that nobody sets
    assert b.id in {j.id for j in claim(store)} # what was due stays due
    assert finish(store, r)==[True]
    now[0] = 1e9+61
    assert store.get(later.id).state=='running' or [j.id for j in claim(store)]==[later.id]

def test_a_payload_that_is_too_large_says_so(path):
    with TaskQueue(SQLiteStore(path)) as queue:
        task = queue.task(name='t')(lambda text: None)
        with pytest.raises(Exception, match='bytes|large|long'): task.enqueue('x'*100_000_000)
        assert queue.counts()[State.queued]==0
        task.enqueue('x')

def test_a_claim_and_forgetting_wait_for_no_disk_and_all_else_does(path, monkeypatch):
    "With 'power' each commit is synced but that of a claim alone and that of a pruning, also after trouble"
    store = SQLiteStore(path)
    level,seen = lambda: store.file._cx.pragma('synchronous'),[]
    def noted(verb, real):
        def run(*args): seen.append((verb, level())); return real(*args)
        return run
    for verb in ('_add', '_claim', '_finish'): monkeypatch.setattr(store, verb, noted(verb, getattr(store, verb)))
    store.add(calls(2))
    jobs = claim(store)
    done = [Done(seq=j.seq, attempt=j.attempt, state=State.succeeded) for j in jobs]
    store.exchange(done[:1], 'w', [(['t'], 1)])
    assert seen==[('_add', 2), ('_claim', 1), ('_finish', 2), ('_claim', 2)]
    monkeypatch.setattr(store, '_claim', lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): claim(store)
    assert len(store.add(calls()))==1 and seen[-1]==('_add', 2)
    monkeypatch.setattr('bgtasks.sqlite.forget', noted('forget', forget))
    store.clock = lambda: time.time()+8*24*3600
    assert (store.prune(), store.purge(0))==(1, 0) and seen[-2:]==[('forget', 1), ('forget', 2)]
    store.close()
