"A store in plain Python that is too simple to be wrong: what the `Store` protocol says, in lists and dicts."
from msgspec import json
from msgspec.structs import replace

from bgtasks.begun import Begun
from bgtasks.job import Event, Failure, Job, State, deliveries

ENDS = {State.succeeded, State.dead, State.cancelled}

class Row:
    "A job with what a store knows beside it."
    def __init__(self, job, ready, notices):
        self.job,self.ready,self.notices,self.until,self.parents = job,ready,notices,None,set()
    def __getattr__(self, k): return getattr(self.job, k)
    def set(self, **kw): self.job = replace(self.job, **kw)

class ModelStore:
    "Keeps the promises of `Store`, slowly and in memory."
    def __init__(self, *, clock, ticks):
        self.clock,self.mono = clock,ticks
        self.rows,self.log_,self.number,self.off,self.seen = {},[],0,set(),{} # one line of numbers for jobs and events

    def _note(self, row, kind, data=None, attempt=None):
        self.number += 1
        self._log(self.number, row, kind, data, attempt)

    def _log(self, number, row, kind, data=None, attempt=None):
        self.log_.append(Event(id=number, job=row.id, kind=str(kind), at=self.clock(), data=data,
                               attempt=row.attempt if attempt is None else attempt))

    def _holder(self, key): return next((r for r in self.rows.values() if r.key==key and r.state not in ENDS), None)
    def _of(self, seq): return next((r for r in self.rows.values() if r.seq==seq), None)
    def _runs(self, seq, attempt):
        return (r := self._of(seq)) is not None and r.state is State.running and r.attempt==attempt

    def _end(self, row, state, **kw):
        now = self.clock()
        row.set(state=state, finished_at=now, **kw)
        row.until = now + row.keep
        self._note(row, state)
        self._add(deliveries(row.job, row.notices))
        for child in [r for r in self.rows.values() if row.id in r.parents]:
            gone = Failure('Cancelled', f'after {row.id}')
            if state is State.succeeded: child.parents.discard(row.id)
            elif child.state is State.queued: self._end(child, State.cancelled, error=gone)
            if child.state is State.queued and not child.parents: child.ready = child.run_at <= now

    def _queue(self, row, **kw):
        row.set(state=State.queued, **kw)
        row.ready = row.run_at <= self.clock()
        self._note(row, State.queued)

    def add(self, calls):
        if len({c.id for c in calls} | set(self.rows)) < len(calls) + len(self.rows): raise ValueError('an id twice')
        if any(c.key is not None and c.after for c in calls): ids = [self._add([c])[0] for c in calls]
        else: ids = self._add(calls)
        return [self.get(i) for i in ids]

    def _add(self, calls):
        ids,new = [],set(self.rows)
        for c in calls: ids.append(self._record(c))
        for c in calls:
            if c.id in self.rows and c.id not in new: self._await(c)
        return ids

    def _record(self, c):
        if c.key is not None and (other := self._holder(c.key)): return other.id
        now,(args, kwargs) = self.clock(),json.decode(c.payload)
        self.number += 1
        run_at = now if c.run_at is None else c.run_at
        row = self.rows[c.id] = Row(Job(id=c.id, task=c.task, queue=c.queue, args=tuple(args), kwargs=kwargs,
            run_at=run_at, priority=c.priority, created_at=now, retries=c.retries, timeout=c.timeout, key=c.key,
            after=c.after, keep=c.keep, seq=self.number), run_at <= now, c.notify)
        self._log(row.seq, row, State.queued)
        return c.id

    def _await(self, c):
        row = self.rows[c.id]
        row.parents = {i for i in c.after if getattr(self.get(i), 'state', None) is not State.succeeded}
        for i in c.after:
            unknown = i not in self.rows or self.rows[i].seq >= row.seq # itself, or a later one of a list
            if unknown or self.rows[i].state in (State.dead, State.cancelled):
                self._end(row, State.cancelled, error=Failure('Cancelled', f'after {i}'))
                if unknown: row.parents = set() # nobody brings it back
                break

    def _open(self, tasks, queues):
        return [r for r in self.rows.values() if r.state is State.queued and not r.parents and r.task in tasks
                and r.queue not in self.off and (queues is None or r.queue in queues)]

    def claim(self, worker, tasks, queues=None, *, limit=1, lease=30.0):
        now = self.clock()
        for r in (rows := self._open(tasks, queues)): r.ready = r.ready or r.run_at <= now
        res = sorted((r for r in rows if r.ready), key=lambda r: (-r.priority, r.seq))[:limit]
        for r in res:
            r.set(state=State.running, attempt=r.attempt+1, worker=worker, started_at=now, progress=None)
            r.until = self.mono() + lease
            self._note(r, State.running)
        return [r.job for r in res]

    def next_due(self, tasks, queues=None):
        rows = self._open(tasks, queues)
        if any(r.ready for r in rows): return 0.0
        return min(r.run_at for r in rows) - self.clock() if rows else None

    def renew(self, worker, jobs, lease=30.0):
        lost = [p for p in jobs if not (self._runs(*p) and self._of(p[0]).worker==worker)]
        for p in jobs:
            if p not in lost: self._of(p[0]).until = self.mono() + lease
        return lost
    def gone(self, jobs): return [p for p in jobs if not self._runs(*p)]

    def finish(self, done): return [self._finish(d) for d in done]
    def stand_by(self, *_, **__): pass # a store need not do it
    def exchange(self, done, worker, wants, queues=None, *, lease=30.0):
        return self.finish(done),[self.claim(worker, tasks, queues, limit=n, lease=lease) for tasks,n in wants]
    def _finish(self, d):
        if not self._runs(d.seq, d.attempt): return False
        row = self._of(d.seq)
        if d.state is not State.queued:
            self._end(row, d.state, error=d.error, result=None if d.value is None else json.decode(d.value))
        else: self._queue(row, run_at=self.clock() if d.run_at is None else d.run_at, error=d.error or row.error,
                          lost=row.lost + (not d.counts))
        return True

    def progress(self, reports):
        for s,a,p in reports:
            if not self._runs(s, a): continue
            self._of(s).set(progress=p)
            self._note(self._of(s), 'progress', json.decode(json.encode(p)))
    def log(self, lines):
        for s,a,level,text in lines:
            if row := self._of(s): self._note(row, 'log', dict(level=level, text=text), a)

    def sweep(self, max_crashes=3):
        gone = [r for r in self.rows.values() if r.state is State.running and r.until <= self.mono()]
        for r in gone:
            error = Failure('WorkerLost', f'worker {r.worker} vanished')
            r.set(crashes=r.crashes+1, lost=r.lost+1)
            if r.crashes > max_crashes: self._end(r, State.dead, error=error)
            else: self._queue(r, run_at=self.clock(), error=error)
        return [r.job for r in gone]

    def join(self, worker): return Begun()
    def leave(self, worker):
        for r in self.rows.values():
            if r.state is State.running and r.worker==worker: self._queue(r, run_at=self.clock(), lost=r.lost+1)

    def get(self, id): return self.rows[id].job if id in self.rows else None
    def find(self, *, state=None, task=None, queue=None, limit=100, before=None):
        jobs = [r.job for r in self.rows.values() if state in (None, r.state) and task in (None, r.task)
                and queue in (None, r.queue) and (before is None or r.seq < before)]
        return sorted(jobs, key=lambda j: -j.seq)[:limit]
    def counts(self): return {s: sum(r.state is s for r in self.rows.values()) for s in State}
    def waiting(self):
        tasks = [r.task for r in self.rows.values() if r.state is State.queued]
        return {t: tasks.count(t) for t in tasks}

    def cancel(self, id, why=''):
        if id in self.rows and self.rows[id].state not in ENDS:
            self._end(self.rows[id], State.cancelled, error=Failure('Cancelled', why))
            self.rows[id].parents = set()
        return self.get(id)
    def retry(self, id):
        if (r := self.rows.get(id)) and r.state in (State.dead, State.cancelled):
            if r.key is not None and self._holder(r.key): raise ValueError('its key is taken')
            r.parents = set()
            r.set(run_at=self.clock())
            line = [self._again(r)]
            for row in line:
                line += [self._again(r) for r in self.rows.values() if row.id in r.parents and self._may_wait(r)]
        return self.get(id)
    def _again(self, row):
        self._queue(row, finished_at=None, lost=row.attempt, crashes=0, error=None)
        return row
    def _may_wait(self, r):
        failed = [i for i in r.parents if i not in self.rows or self.rows[i].state in (State.dead, State.cancelled)]
        return r.state is State.cancelled and not failed and not (r.key and self._holder(r.key))

    def pause(self, queue): self.off.add(queue)
    def resume(self, queue): self.off.discard(queue)
    def paused(self): return sorted(self.off)

    def _forget(self, ids):
        for i in ids: del self.rows[i]
        self.log_ = [e for e in self.log_ if e.job not in ids]
        return len(ids)
    def purge(self, older_than, limit=1000):
        t = self.clock() - older_than
        return self._forget([r.id for r in self.rows.values() if r.state in ENDS and r.finished_at <= t][:limit])
    def prune(self, limit=1000):
        return self._forget([r.id for r in self.rows.values() if r.state in ENDS and r.until <= self.clock()][:limit])

    def tick(self, name, last, at, call):
        if self.seen.get(name) != last: return False
        self.seen[name] = at
        if call is not None: self._add([call])
        return True
    def last_tick(self, name): return self.seen.get(name)
    def events(self, after=0, *, job=None, limit=1000):
        return [e for e in self.log_ if e.id > after and job in (None, e.job)][:limit]
    def last_event(self): return self.number
    def close(self): pass
    def wait_fd(self, news=False): pass
