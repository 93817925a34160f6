"""The real store, driven by hypothesis beside a model in plain Python: after every step both must say the same.
`BGTASKS_LONG=1` runs many more and longer stories."""
import os, tempfile, threading
from collections import Counter
from pathlib import Path

import apsw, pytest
from hypothesis import HealthCheck, Phase, settings, strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test
from msgspec.structs import replace

from bgtasks.check import check_store
from bgtasks.errors import StoreError
from bgtasks.job import Done, Failure, Progress, State
from bgtasks.schema import app_id, schemas
from bgtasks.sqlite import SQLiteStore
from bgtasks.store import Call
from model_store import ModelStore

LONG = bool(os.environ.get('BGTASKS_LONG'))
TASKS,QUEUES,WORKERS = ('t', 'u'), ('a', 'b'), ('w1', 'w2', 'w3')
MAY_FOLLOW = {None: {'queued'}, 'queued': {'running', 'cancelled'},
              'running': {'succeeded', 'dead', 'cancelled', 'queued'}, 'succeeded': set(),
              'dead': {'queued'}, 'cancelled': {'queued'}} # `retry` queues these again

some = lambda xs: st.lists(st.sampled_from(xs), min_size=1, max_size=len(xs), unique=True)
workers = st.sampled_from(WORKERS)
verdicts = st.sampled_from([State.succeeded, State.succeeded, State.dead, State.cancelled, State.queued])

def plain(job):
    "A job without the wording of its error, which the model doesn't know"
    return job and replace(job, error=job.error and job.error.type)

class StoreMachine(RuleBasedStateMachine):
    "Several handles on one file, as several processes have them, and the model."
    jobs,attempts = Bundle('jobs'),Bundle('attempts')

    def __init__(self):
        super().__init__()
        self.now,self.mono,self.n = 1e9,1000.0,0
        self.dir = tempfile.TemporaryDirectory()
        self.clocks = dict(clock=lambda: self.now, ticks=lambda: self.mono)
        self.model = ModelStore(**self.clocks)
        self.handles = [self.open() for _ in range(2)]
        self.read,self.last,self.live = 0,{},{}

    def open(self): return SQLiteStore(Path(self.dir.name)/'q.db', 'process', **self.clocks)
    def teardown(self):
        for o in self.handles: o.close()
        self.dir.cleanup()

    @property
    def real(self): return self.handles[self.n % len(self.handles)]

    def both(self, verb, *args, key=lambda o: o, **kw):
        "Do `verb` on store and model; they must give the same."
        self.n += 1
        got,want = [self._tried(o, verb, args, kw) for o in (self.real, self.model)]
        if isinstance(want, Exception): assert isinstance(got, Exception), f'{verb} gave {got} instead of an error'
        else:
            if isinstance(got, Exception): raise got
            assert key(got)==key(want), f'{verb}{args} gave\n{key(got)}\ninstead of\n{key(want)}'
        return got

    def _tried(self, store, verb, args, kw):
        try: return getattr(store, verb)(*args, **kw)
        except (StoreError, ValueError) as e: return e

    # What people and apps do

    @rule(target=jobs, data=st.data(), n=st.integers(1, 3))
    def add(self, data, n):
        calls,known = [],[*self.model.rows, 'nobody']
        for _ in range(n):
            self.n += 1
            calls.append(Call(id=f'j{self.n}', payload=b'[[1],{"x":2}]', **data.draw(st.fixed_dictionaries(dict(
                task=st.sampled_from(TASKS), queue=st.sampled_from(QUEUES), priority=st.integers(0, 2),
                retries=st.integers(0, 2), keep=st.sampled_from([0.0, 30.0, 1e6]),
                key=st.sampled_from([None, None, 'k1', 'k2']),
                run_at=st.sampled_from([None, None, self.now-5, self.now+5, self.now+3000]),
                after=st.just(()) | st.lists(st.sampled_from(known), max_size=2, unique=True).map(tuple))))))
            known.append(calls[-1].id)
        got = self.both('add', calls, key=lambda js: [plain(j) for j in js])
        return multiple(*{j.id for j in got})

    @rule(id=jobs)
    def add_with_an_id_twice(self, id):
        call = Call(id=f'new{self.n}', task='t', payload=b'[[],{}]')
        self.both('add', [call, call])
        if id in self.model.rows: self.both('add', [call, replace(call, id=id)])

    @rule(id=jobs)
    def cancel(self, id): self.both('cancel', id, 'no more', key=plain)

    @rule(id=jobs)
    def retry(self, id):
        self.both('retry', id, key=plain)

    @rule(queue=st.sampled_from(QUEUES), verb=st.sampled_from(['pause', 'resume', 'resume']))
    def steer(self, queue, verb): self.both(verb, queue)

    @rule(last=st.none() | st.integers(0, 5), at=st.integers(0, 5), record=st.booleans())
    def tick(self, last, at, record):
        self.n += 1
        call = Call(id=f'tick{self.n}', task='t', payload=b'[[],{}]') if record else None
        self.both('tick', 's', last, float(at), call)

    # What workers do

    @rule(target=attempts, worker=workers, tasks=some(TASKS), queues=st.none() | some(QUEUES), limit=st.integers(1, 4),
          lease=st.sampled_from([10.0, 30.0]))
    def claim(self, worker, tasks, queues, limit, lease):
        got = self.both('claim', worker, tasks, queues, limit=limit, lease=lease, key=lambda js: [plain(j) for j in js])
        return multiple(*self._taken(worker, got, lease))

    def _taken(self, worker, jobs, lease):
        for j in jobs:
            assert self.live.get(j.seq, 0) <= self.mono, f'{j.id} has two live leases'
            assert self.model.rows[j.id].state is State.running
            self.live[j.seq] = self.mono + lease
        return [(worker, j.seq, j.attempt) for j in jobs]

    @rule(held=st.lists(attempts, min_size=1, max_size=4, unique=True), worker=workers,
          lease=st.sampled_from([5.0, 30.0]))
    def renew(self, held, worker, lease):
        pairs = list(dict.fromkeys((s, a) for _,s,a in held))
        lost = self.both('renew', worker, pairs, lease)
        for s,_ in set(pairs) - set(lost): self.live[s] = self.mono + lease

    @rule(held=st.lists(attempts, min_size=1, max_size=4), counts=st.booleans(), wait=st.sampled_from([None, 0, 20]),
          state=verdicts)
    def finish(self, held, state, counts, wait):
        "At any time, however late, and even twice in one list"
        ok = state is State.succeeded
        error = None if ok or (state is State.queued and counts) else Failure('E', 'm')
        done = [Done(seq=s, attempt=a, state=state, value=b'[1]' if ok else None, error=error, counts=counts,
                     run_at=None if wait is None else self.now+wait) for _,s,a in held]
        good = self.both('finish', done)
        for d,g in zip(done, good):
            if g: self.live.pop(d.seq, None)

    @rule(target=attempts, held=st.lists(attempts, max_size=3), state=verdicts, worker=workers,
          wants=st.lists(st.tuples(some(TASKS), st.integers(0, 3)), max_size=2), queues=st.none() | some(QUEUES))
    def exchange(self, held, state, worker, wants, queues):
        "What a worker does most of the time: write, and take more, in one commit"
        ok = state is State.succeeded
        what = dict(value=b'[2]') if ok else dict(error=Failure('E', 'm'))
        done = [Done(seq=s, attempt=a, state=state, **what) for _,s,a in held]
        good,got = self.both('exchange', done, worker, wants, queues, lease=30.0,
                             key=lambda r: (r[0], [[plain(j) for j in o] for o in r[1]]))
        for d,g in zip(done, good):
            if g: self.live.pop(d.seq, None)
        return multiple(*[o for jobs in got for o in self._taken(worker, jobs, 30.0)])

    @rule(held=st.lists(attempts, min_size=1, max_size=3))
    def report(self, held):
        self.both('progress', [(s, a, Progress(1, 2)) for _,s,a in held])
        self.both('log', [(s, a, 'INFO', 'text') for _,s,a in held]) # some of these jobs may be forgotten

    @rule(worker=workers)
    def leave(self, worker):
        self.both('leave', worker)
        self._drop_dead_leases()

    @rule(most=st.integers(0, 2))
    def sweep(self, most):
        got = self.both('sweep', most, key=lambda js: {j.id: plain(j) for j in js})
        for j in got: assert self.live.pop(j.seq) <= self.mono, 'a live job was swept'

    @rule()
    def prune(self): self.both('prune')
    @rule(age=st.sampled_from([0, 10, 1000]))
    def purge(self, age): self.both('purge', age)

    # What the world does

    @rule(seconds=st.sampled_from([1, 9, 31, 3600]))
    def time_passes(self, seconds): self.now += seconds; self.mono += seconds
    @rule(seconds=st.sampled_from([-3600, -7, 3600]))
    def somebody_sets_the_clock(self, seconds): self.now += seconds
    @rule()
    def a_process_ends_and_another_comes(self):
        self.real.close()
        self.handles[self.n % len(self.handles)] = self.open()

    # What holds after every step

    def _drop_dead_leases(self):
        running = {r.seq for r in self.model.rows.values() if r.state is State.running}
        self.live = {s: t for s,t in self.live.items() if s in running}

    @invariant()
    def both_say_the_same(self):
        self._drop_dead_leases()
        real,model = self.real,self.model
        found = real.find(limit=10_000)
        assert [plain(j) for j in found]==[plain(j) for j in model.find(limit=10_000)]
        assert real.counts()==model.counts() and real.waiting()==model.waiting() and real.paused()==model.paused()
        for tasks in (TASKS, ['t']):
            for queues in (None, ['a']): assert real.next_due(tasks, queues)==model.next_due(tasks, queues)

    @invariant()
    def events_keep_step(self):
        new = self.real.events(self.read, limit=10_000)
        fact = lambda e: (e.job, e.kind, e.attempt, e.at)
        got,want = Counter(map(fact, new)),Counter(map(fact, self.model.events(self.read, limit=10_000)))
        assert got==want, f'events too many: {got-want}, missing: {want-got}'
        assert self.real.last_event()==self.model.last_event()
        for e in new:
            if e.kind not in list(State): continue
            assert e.kind in MAY_FOLLOW[self.last.get(e.job)], f'{e.job}: {e.kind} after {self.last.get(e.job)}'
            self.last[e.job] = e.kind
        self.read = self.real.last_event()
        for j in self.model.find(limit=10_000): assert self.last[j.id]==j.state

    @invariant()
    def no_job_is_lost(self):
        for id in self.model.rows: assert self.real.get(id) is not None

StoreMachine.TestCase.settings = settings(
    max_examples=1500 if LONG else 40, stateful_step_count=60 if LONG else 40, deadline=None, database=None,
    suppress_health_check=list(HealthCheck), phases=[Phase.generate, *([Phase.shrink] if LONG else [])])
TestStoreMachine = StoreMachine.TestCase

# The model itself

class LockedModel(ModelStore):
    "The check claims from several threads."
    lock = threading.RLock()
    def claim(self, *args, **kw):
        with self.lock: return super().claim(*args, **kw)

def test_the_model_keeps_the_promises(): assert len(check_store(LockedModel)) > 20

class FinishingMachine(StoreMachine):
    "Most of what it does is to claim and to finish."
    add_with_an_id_twice = retry = steer = tick = renew = report = leave = sweep = prune = purge = time_passes = None
    somebody_sets_the_clock = a_process_ends_and_another_comes = None

    @rule(worker=workers, times=st.integers(1, 3))
    def work(self, worker, times):
        ids = lambda jobs: [j.id for j in jobs]
        for j in self.both('claim', worker, TASKS, limit=2, key=ids):
            done = Done(seq=j.seq, attempt=j.attempt, state=State.succeeded, value=b'[1]')
            for _ in range(times): self.both('finish', [done])

def test_the_machine_finds_a_store_without_a_fence(monkeypatch):
    "A machine that finds nothing proves nothing: here is a store that takes whatever comes late."
    def finish(self, done, real=SQLiteStore.finish): real(self, done); return [True]*len(done)
    monkeypatch.setattr(SQLiteStore, 'finish', finish)
    with pytest.raises(AssertionError, match='^(finish|exchange)'): # which finishes, too
        run_state_machine_as_test(FinishingMachine, settings=settings(StoreMachine.TestCase.settings, max_examples=200))

def test_a_file_whose_jobs_have_their_beginnings_in_the_log(tmp_path):
    "Schema 3 had a row for it, and numbers of their own for jobs and events: no event is lost, doubled or out of order"
    cx = apsw.Connection(str(tmp_path/'old.db'))
    for script in schemas[:3]: cx.execute(script)
    cx.execute(f'PRAGMA application_id={app_id}; PRAGMA user_version=3; INSERT INTO lanes VALUES(1, "t", "default")')
    cx.execute("""INSERT INTO jobs(seq,id,lane,st,priority,run_at,created_at,retries,keep,payload)
        VALUES(1,'a',1,1,0,0,5,0,604800,CAST('[[],{}]' AS BLOB)), (2,'b',1,6,0,0,5,0,604800,CAST('[[],{}]' AS BLOB));
        INSERT INTO events(id,seq,kind,attempt,at) VALUES(1,1,'queued',0,5), (2,2,'queued',0,5), (3,2,'cancelled',0,6);
        UPDATE counter SET seq=2, event=3, lanes=1""")
    cx.close()
    store = SQLiteStore(tmp_path/'old.db')
    c, = store.add([Call(id='c', task='t', payload=b'[[],{}]')])
    a, = store.claim('w', ['t'], limit=1)
    store.retry('b')
    facts = [(1, 'a', 'queued'), (2, 'b', 'queued'), (3, 'b', 'cancelled'), (4, 'c', 'queued'), (5, 'a', 'running'),
             (6, 'b', 'queued')]
    assert (a.id, c.seq, store.last_event())==('a', 4, 6)
    for after in range(7): assert [(e.id, e.job, e.kind) for e in store.events(after)]==facts[after:]
    assert [e.id for j in 'abc' for e in store.events(job=j)]==[1, 5, 2, 3, 6, 4]
    for n in range(1, 7): assert [e.id for e in store.events(n-1, limit=1)]==[n]
    store.close()
