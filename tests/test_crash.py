"""Workers are killed and stopped at random while jobs come in: each accepted job succeeds, and no two workers hold one.
`BGTASKS_LONG=600` makes the storm last so many seconds."""
import os, random, signal, subprocess, sys, time
from collections import defaultdict
from math import inf
from pathlib import Path

import apsw, pytest

from bgtasks.job import State
from bgtasks.queue import TaskQueue
from bgtasks.sqlite import SQLiteStore

SECONDS = float(os.environ.get('BGTASKS_LONG') or 15)
HERE = Path(__file__).parent
ENDS = ('succeeded', 'dead', 'cancelled')
LEASE = 1.5 # seconds, as crash_app.py has it
NOTE = 'BEGIN INSERT INTO leases VALUES(new.seq, new.attempt, new.worker, new.until); END;'
LEDGER = f"""CREATE TABLE leases(seq, attempt, worker, until);
CREATE TRIGGER begun AFTER INSERT ON jobs WHEN new.st=2 {NOTE}
CREATE TRIGGER prolonged AFTER UPDATE OF until ON jobs WHEN new.st=2 {NOTE}"""

pytestmark = pytest.mark.skipif(sys.platform=='win32', reason='there are no such signals')

class Crew:
    "The processes of one test."
    def __init__(self, folder): self.folder,self.procs,self.killed = folder,[],{}

    def start(self, what, *args):
        env = os.environ | {'PYTHONPATH': os.pathsep.join([str(HERE.parent), os.environ.get('PYTHONPATH', '')])}
        with open(self.folder/'said', 'ab') as log:
            self.procs.append(p := subprocess.Popen([sys.executable, str(HERE/'crash_app.py'), what, str(self.folder),
                                                     *map(str, args)], stdout=log, stderr=log, env=env))
        return p

    def end(self, p):
        "Kill a process for good, stopped or not"
        self.killed[p.pid] = time.monotonic()
        p.kill(); p.wait()
        self.procs.remove(p)

    def said(self): return (self.folder/'said').read_text()[-5000:]

@pytest.fixture
def crew(tmp_path):
    crew = Crew(tmp_path)
    yield crew
    for p in list(crew.procs): crew.end(p)

def until(crew, done, seconds=120):
    "Wait for something that must come; the limit is a net, no measure"
    end = time.monotonic()+seconds
    while not done():
        assert time.monotonic() < end, f'it never came; the processes said:\n{crew.said()}'
        time.sleep(.05)

def lines(path): return [l.split() for l in path.read_text().splitlines()] if path.exists() else []

def storm(crew, workers, dice):
    "Kill one worker after the other, or stop it for longer than its lease or shorter"
    end,stopped = time.monotonic()+SECONDS,{}
    while time.monotonic() < end:
        time.sleep(dice.uniform(.05, .5))
        for p in [p for p,t in stopped.items() if t < time.monotonic()]: p.send_signal(signal.SIGCONT); del stopped[p]
        p = dice.choice(workers)
        if dice.random() < .5:
            stopped.pop(p, None)
            crew.end(p)
            workers[workers.index(p)] = crew.start('work', 10**6)
        elif p not in stopped:
            p.send_signal(signal.SIGSTOP)
            stopped[p] = time.monotonic() + dice.uniform(.1, 3)
    for p in stopped: p.send_signal(signal.SIGCONT)

def follow(events):
    "Check the log of one job: one attempt after the other, each taken back before the next begins, and one end"
    state,attempt = None,0
    for e in events:
        if e.kind=='running':
            assert state=='queued' and e.attempt==attempt+1, f'{e} after {state} of attempt {attempt}: two leases'
            attempt = e.attempt
        elif e.kind=='queued': assert state in (None, 'running') and e.attempt==attempt, f'{e} after {state}'
        else: assert state=='running' and e.attempt==attempt, f'{e} after {state} of attempt {attempt}'
        state = e.kind
    return state

def overlaps(leases, killed, given_back):
    "Which attempts were claimed while the one before had its lease, and a process that could go on?"
    last = {}
    for job,attempt,worker,until in leases: # a line for each claim and each renewal
        before,holder,end = last.get(job, (attempt, worker, 0))
        claimed = until-LEASE
        over = end < claimed+.001 or killed.get(pid_of(holder), inf) < claimed or (job, before) in given_back
        if attempt!=before and not over: yield f'{job}: attempt {attempt} began {end-claimed:.3f} s too early'
        last[job] = attempt,worker,until

def pid_of(worker): return int(worker.split('-')[-2])

def all_events(store):
    last = 0
    while page := store.events(last, limit=10_000):
        yield from page
        last = page[-1].id

def test_every_accepted_job_succeeds(crew):
    seed = random.randrange(10**6)
    print('seed', seed) # which signals were sent; when they arrive is up to the machine
    SQLiteStore(crew.folder/'q.db', 'process').close()
    with apsw.Connection(str(crew.folder/'q.db')) as cx: cx.execute(LEDGER)
    cx.close()
    workers,feeder = [crew.start('work', 10**6) for _ in range(3)],crew.start('feed')
    until(crew, lambda: lines(crew.folder/'accepted'))
    storm(crew, workers, random.Random(seed))
    crew.end(feeder) # in the middle of something, as likely as not
    store = SQLiteStore(crew.folder/'q.db', 'process')
    unfinished = lambda: sum(n for s,n in store.counts().items() if s not in ENDS)
    until(crew, lambda: not unfinished())
    for p in workers: p.terminate()
    for p in workers: assert p.wait(30) in (0, -signal.SIGTERM), crew.said() # one just started heeds no signal yet
    # what was accepted is there, and has succeeded
    accepted = [i for i, in lines(crew.folder/'accepted')]
    assert len(accepted) > 50 and len(set(accepted))==len(accepted)
    for id in accepted: assert store.get(id).state is State.succeeded, store.get(id)
    # one attempt came after the other, and nothing was written after the end
    logs = defaultdict(list)
    for e in all_events(store): logs[e.job].append(e)
    assert {follow(es) for es in logs.values()}=={'succeeded'}
    # the ledger of the file agrees: no two leases of a job were alive at once
    sql = 'SELECT id, l.attempt, l.worker, l.until FROM leases l JOIN jobs USING(seq) ORDER BY l.rowid'
    leases = store.file.read(sql)
    log = [e for es in logs.values() for e in es]
    assert {(i, n) for i,n,*_ in leases}=={(e.job, e.attempt) for e in log if e.kind=='running'}
    given_back = {(e.job, e.attempt) for e in log if e.kind=='queued' and e.attempt and e.data is None}
    assert not [*overlaps(leases, crew.killed, given_back)]
    # that of the workers, too: none began twice, or without a lease, or was given back; the last one ran to its end
    ran = [(what, id, int(n), int(pid)) for what,id,n,pid in lines(crew.folder/'ran')]
    once = set(ran)
    assert len(once)==len(ran)
    began = {(id, n, pid) for what,id,n,pid in ran if what=='start'}
    assert began <= {(i, n, pid_of(w)) for i,n,w,_ in leases} and not given_back & {(i, n) for i,n,_ in began}
    ended = {(id, n) for what,id,n,_ in ran if what=='end'}
    assert {(id, es[-1].attempt) for id,es in logs.items()} <= ended & {(i, n) for i,n,_ in began}
    again = sum(store.get(id).crashes > 0 for id in accepted)
    print(f'{len(accepted)} jobs, {again} of them more than once; {len(leases)} lines, {len(given_back)} given back')
    store.close()
    assert apsw.Connection(str(crew.folder/'q.db')).pragma('integrity_check')=='ok'

def test_a_job_that_kills_its_worker_each_time_is_dead(crew):
    queue = TaskQueue(SQLiteStore(crew.folder/'q.db', 'process'))
    deadly = queue.task(name='deadly')(lambda: None).enqueue()
    for n in range(3):
        assert queue.get(deadly.id).state in (State.queued, State.running)
        p = crew.start('work', 2)
        p.wait(60)
        assert p.returncode==-signal.SIGKILL, crew.said()
        crew.procs.remove(p)
    good = queue.task(name='wait')(lambda ms: None).enqueue(1)
    p = crew.start('work', 2)
    until(crew, lambda: queue.get(good.id).state=='succeeded' and queue.get(deadly.id).state=='dead')
    job = queue.get(deadly.id)
    assert (job.crashes, job.attempt)==(3, 3) and 'vanished' in str(job.error)
    p.terminate()
    assert p.wait(30)==0
    assert [what for what,*_ in lines(crew.folder/'ran')].count('start')==4
    queue.close()

def test_the_innocent_outlive_the_guilty(crew):
    "Three that kill each of their workers, among hundreds that run beside them or wait behind them"
    queue = TaskQueue(SQLiteStore(crew.folder/'q.db', 'process'))
    wait,deadly = queue.task(name='wait')(lambda ms: None),queue.task(name='deadly')(lambda: None)
    good,bad = [],[]
    for _ in range(3): good += wait.enqueue_many([(2,)]*100); bad.append(deadly.enqueue())
    good += wait.enqueue_many([(2,)]*100) + [wait.enqueue(3000)] # the last has run for long whenever a worker goes
    workers = [crew.start('work', 2) for _ in range(2)]
    def over():
        for p in list(workers):
            if p.poll() is None: continue
            assert p.returncode==-signal.SIGKILL, crew.said()
            workers.remove(p); crew.procs.remove(p); workers.append(crew.start('work', 2))
        counts = queue.counts() # one look: between two a sweep may move jobs from the second state to the first
        return not counts['queued']+counts['running']
    until(crew, over)
    assert {queue.get(j).state for j in good}=={'succeeded'}
    assert [(j.state, j.crashes) for j in map(queue.get, bad)]==[('dead', 3)]*3
    queue.close()
