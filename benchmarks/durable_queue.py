"""How fast and how small is the durable queue? Prints what was measured beside what was promised; asserts nothing.

    python benchmarks/durable_queue.py                      # everything, some minutes
    python benchmarks/durable_queue.py enqueue latency      # some sections: see SECTIONS at the end
    python benchmarks/durable_queue.py --scale 0.1 --json figures.json --folder /mnt/disk

Figures of a loaded machine wander, so each is the median of rounds that take turns with *bare apsw*, written by hand
with nothing around it. The ratio between the two is what counts. What is promised is a ratio to "the same writes": the
very rows that a job and its events are. Beside it stands a harder one, "to plain rows": one short row for each job. For
the start of a job that is the least possible: one such row, and one hop to the event loop."""
import argparse, asyncio, json, os, platform, resource, subprocess, sys, tempfile, threading, time
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from struct import Struct

import apsw

from bgtasks.job import new_id, new_ids
from bgtasks.queue import TaskQueue
from bgtasks.sqlite import SQLiteStore
from bgtasks.tables import insert_sql
from bgtasks.worker import Worker

ROUNDS,scale,folder,numbers = 5,1.0,None,count()
TIME = Struct('d') # as one process tells it to another

def n_of(n): return max(10, int(n*scale))
def new_path(): return Path(folder)/f'{next(numbers)}.db'
def rate(n, f, *args):
    start = time.perf_counter()
    f(*args)
    return n/(time.perf_counter()-start)

def in_turns(*runs):
    "Medians of what each of `runs` gives, called in turns so that all meet the same disturbances"
    res = [[] for _ in runs]
    for _ in range(ROUNDS):
        for r,run in zip(res, runs): r.append(run())
    return [median(r) for r in res]

def row(what, value, unit, at_least=None, at_most=None, ratio=None, ratio_at_least=None, same=None):
    return dict(what=what, value=value, unit=unit, at_least=at_least, at_most=at_most, ratio=ratio,
                ratio_at_least=ratio_at_least, ratio_to_same_writes=same)

def fsync_ms():
    "How long the disk takes: where it is next to nothing, there is nothing to gain by sharing it"
    times = []
    with tempfile.TemporaryFile(dir=folder) as f:
        for _ in range(200):
            f.write(bytes(4096)); f.flush()
            start = time.perf_counter()
            os.fsync(f.fileno())
            times.append(time.perf_counter()-start)
    return 1000*median(times)

# Bare apsw

BARE = '''CREATE TABLE j(seq INTEGER PRIMARY KEY, id TEXT UNIQUE, task TEXT, st INTEGER,
attempt INTEGER DEFAULT 0, worker TEXT, until REAL, payload BLOB, value BLOB); CREATE INDEX due ON j(seq) WHERE st=1;'''
INSERT = "INSERT INTO j(id,task,st,payload) VALUES(?,'noop',1,x'5b5b315d2c7b7d5d')"

CLAIMED = "INSERT INTO j(id,task,st,attempt,worker,until,payload) VALUES(?,'noop',2,1,'w',1,x'5b5b315d2c7b7d5d')"

CLAIM = '''UPDATE j SET st=2, attempt=attempt+1, worker='w', until=1 WHERE seq IN (SELECT seq FROM j WHERE st=1
ORDER BY seq LIMIT ?) RETURNING seq,attempt,payload'''
FINISH = 'UPDATE j SET st=4, value=? WHERE seq=? AND attempt=? AND st=2'

def bare(durability):
    cx = apsw.Connection(str(new_path()))
    sync = 'FULL' if durability=='power' else 'NORMAL'
    cx.execute(f'PRAGMA journal_mode=WAL; PRAGMA synchronous={sync}; {BARE}').fetchall()
    return cx

def bare_one_by_one(cx, n):
    for _ in range(n): cx.execute(INSERT, (new_id(),))

def bare_at_once(cx, n):
    with cx: cx.executemany(INSERT, [(i,) for i in new_ids(n)])

def bare_claim_finish(cx, batch=200):
    "What a worker writes at the least: take a batch, then write its results"
    while True:
        with cx: got = cx.execute(CLAIM, (batch,)).fetchall()
        if not got: return
        with cx: cx.executemany(FINISH, [(b'1', s, a) for s,a,_ in got])

def same(durability):
    "A connection to a file of ours, to do by hand the very writes that `enqueue` does"
    store = queue_at(new_path(), durability).store
    return store.file._cx

def same_writes(cx, n, batch=1):
    for _ in range(n//batch):
        cx.execute('BEGIN IMMEDIATE')
        now = time.time()
        cx.executemany(insert_sql, [(None, i, 1, 1, 0, now, now, 0, None, 604800.0, None, None, b'[[1],{}]')
                                    for i in new_ids(batch)])
        cx.execute('COMMIT')

SAME_CLAIM = '''UPDATE jobs SET st=2, attempt=attempt+1, worker='w', started_at=1, until=1 WHERE seq IN
(SELECT seq FROM jobs WHERE st=1 AND lane=1 ORDER BY priority DESC, seq LIMIT ?) RETURNING seq,attempt,payload'''
SAME_FINISH = 'UPDATE jobs SET st=4, finished_at=1, until=1, value=? WHERE seq=? AND attempt=? AND st=2'
SAME_EVENT = 'INSERT INTO events(seq,kind,attempt,at) VALUES(?,?,?,1)'

def same_claim_finish(cx, batch=200):
    "The same with the rows that a job and its events are"
    while True:
        with cx:
            got = cx.execute(SAME_CLAIM, (batch,)).fetchall()
            cx.executemany(SAME_EVENT, [(s, 'running', a) for s,a,_ in got])
        if not got: return
        with cx:
            cx.executemany(SAME_FINISH, [(b'1', s, a) for s,a,_ in got])
            cx.executemany(SAME_EVENT, [(s, 'succeeded', a) for s,a,_ in got])

# The queue

started,ran = [],count()

def queue_at(path, durability='power'):
    queue = TaskQueue(SQLiteStore(path, durability))
    @queue.task(name='noop')
    async def noop(x):
        next(ran)
        return x
    @queue.task(name='noop_sync')
    def noop_sync(x): return x
    @queue.task(name='stamp')
    async def stamp(since): started.append(time.monotonic()-since)
    return queue

def fill(queue, task, n):
    for i in range(0, n, 100_000): queue.tasks[task].enqueue_many([(1,)]*min(100_000, n-i))

def enqueue():
    for durability,bound,n in (('process', .5, n_of(10_000)), ('power', .8, n_of(2_000))):
        cx,cx2,task = bare(durability),same(durability),queue_at(new_path(), durability).tasks['noop']
        def ours():
            for _ in range(n): task.enqueue(1)
        one,both,mine = in_turns(lambda: rate(n, bare_one_by_one, cx, n), lambda: rate(n, same_writes, cx2, n),
                                 lambda: rate(n, ours))
        yield row(f'enqueue, one at a time, {durability}', mine, 'jobs/s', ratio=mine/one, ratio_at_least=bound,
                  same=mine/both)

def aenqueue():
    n,cx,cx2,task = 1000,bare('power'),same('power'),queue_at(new_path()).tasks['noop']
    async def together(): await asyncio.gather(*[task.aenqueue(1) for _ in range(n)])
    one,both,mine = in_turns(lambda: rate(n, bare_one_by_one, cx, n), lambda: rate(n, same_writes, cx2, n),
                             lambda: rate(n, asyncio.run, together()))
    yield row('aenqueue, 1,000 callers at once, power', mine, 'jobs/s', ratio=mine/one, ratio_at_least=5,
              same=mine/both)

def enqueue_many():
    n = n_of(100_000)
    one,both,mine = in_turns(lambda: rate(n, bare_at_once, bare('power'), n),
                             lambda: rate(n, same_writes, same('power'), n, n),
                             lambda: rate(n, queue_at(new_path()).tasks['noop'].enqueue_many, [(1,)]*n))
    yield row('enqueue_many of 100,000', mine, 'jobs/s', 200_000, ratio=mine/one, ratio_at_least=.3, same=mine/both)

def drain(task, n):
    queue = queue_at(new_path())
    fill(queue, task, n)
    res = rate(n, lambda: asyncio.run(Worker(queue).run(until_empty=True)))
    queue.close()
    return res

def worker_async():
    n = n_of(60_000)
    def theirs():
        bare_at_once(cx := bare('power'), n)
        return rate(n, bare_claim_finish, cx)
    def both():
        same_writes(cx := same('power'), n, n)
        return rate(n, same_claim_finish, cx)
    theirs,both,mine = in_turns(theirs, both, lambda: drain('noop', n))
    yield row('worker, no-op async task, results kept', mine, 'jobs/s', 40_000, ratio=mine/theirs, ratio_at_least=.3,
              same=mine/both)

def worker_sync():
    n = n_of(30_000)
    mine, = in_turns(lambda: drain('noop_sync', n))
    yield row('worker, no-op sync task in threads', mine, 'jobs/s', 12_000)

def percentiles(name, p50, p99, bare=()):
    ms,theirs = sorted(1000*s for s in started),sorted(1000*s for s in bare); started.clear()
    for at,bound in ((.5, p50), (.99, p99)):
        mine = ms[int(len(ms)*at)]
        ratio = mine/theirs[int(len(theirs)*at)] if bare else None
        yield row(f'{name}, p{100*at:g}', mine, 'ms', at_most=bound, ratio=ratio)

async def bare_gaps(durability, n):
    "The least that it takes to record, claim and start a job: a thread commits one row, claimed, and tells the loop"
    loop,cx,inbox,res = asyncio.get_running_loop(),bare(durability),SimpleQueue(),[]
    async def job(since, ran):
        res.append(time.monotonic()-since)
        ran.set_result(None)
    def write():
        while call := inbox.get():
            cx.execute(CLAIMED, (new_id(),))
            loop.call_soon_threadsafe(lambda call=call: loop.create_task(job(*call)))
    thread = threading.Thread(target=write)
    thread.start()
    for _ in range(n):
        await asyncio.sleep(.01)
        inbox.put((time.monotonic(), ran := loop.create_future()))
        await ran
    inbox.put(None)
    thread.join()
    return res

async def bare_gaps_from_outside(durability, n):
    "The same with two processes: one commits a row and says so in a pipe, a thread of the other claims it"
    loop,cx,inbox,res = asyncio.get_running_loop(),bare(durability),SimpleQueue(),[]
    cx.execute('PRAGMA synchronous=NORMAL')
    async def job(since): res.append(time.monotonic()-since)
    def claim():
        while since := inbox.get():
            cx.execute(CLAIM, (1,)).fetchall()
            loop.call_soon_threadsafe(lambda since=since: loop.create_task(job(since)))
    ours,theirs = os.pipe()
    loop.add_reader(ours, lambda: inbox.put(*TIME.unpack(os.read(ours, TIME.size))))
    thread = threading.Thread(target=claim)
    thread.start()
    child = await asyncio.create_subprocess_exec(*child_command('bare', cx.filename, n+20, durability), stdout=theirs)
    await child.wait()
    while len(res) < n+20: await asyncio.sleep(.01)
    inbox.put(None)
    thread.join()
    loop.remove_reader(ours)
    for fd in (ours, theirs): os.close(fd)
    return res[20:]

async def gaps(queue, n):
    "Record jobs in this process, each when the worker has nothing to do"
    async with Worker(queue):
        for i in range(n+20):
            if i==20: started.clear() # warm by now
            await asyncio.sleep(.01)
            await queue.tasks['stamp'].aenqueue(time.monotonic())
        while len(started) < n: await asyncio.sleep(.01)

async def gaps_from_outside(queue, n):
    "Have another process do so"
    async with Worker(queue):
        words = child_command('record', queue.store.path, n+20, queue.store.durability)
        child = await asyncio.create_subprocess_exec(*words)
        await child.wait()
        while len(started) < n+20: await asyncio.sleep(.01)
    del started[:20]

def latency():
    "From the call of enqueue to the first line of the task; with 'power', an fsync lies between"
    for durability in ('process', 'power'):
        bare = asyncio.run(bare_gaps(durability, n_of(250)))
        asyncio.run(gaps(queue_at(new_path(), durability), n_of(500)))
        bare += asyncio.run(bare_gaps(durability, n_of(250)))
        yield from percentiles(f'enqueue → start, same process, {durability}', .3, 2, bare)
        bare = asyncio.run(bare_gaps_from_outside(durability, n_of(250)))
        asyncio.run(gaps_from_outside(queue_at(new_path(), durability), n_of(500)))
        bare += asyncio.run(bare_gaps_from_outside(durability, n_of(250)))
        yield from percentiles(f'enqueue → start, other process, {durability}', 1.5, 5, bare)

def so_far(): return int(repr(ran)[6:-1]) # looks at the counter without moving it

async def run_some(queue, n):
    "Give how many jobs a second end, once a worker is there"
    goal = so_far()+n
    async with Worker(queue):
        start = time.perf_counter()
        while so_far() < goal: await asyncio.sleep(.002)
        return n/(time.perf_counter()-start)

def waiting():
    "Ten thousand jobs are run, and as many or a million stay: the worker claims ahead in both"
    def run(queue, n): return asyncio.run(run_some(queue, n))
    n,many,few = n_of(10_000),queue_at(new_path()),queue_at(new_path())
    fill(many, 'noop', n_of(1_000_000))
    fill(few, 'noop', n)
    def little(): fill(few, 'noop', n); return run(few, n)
    a,b = in_turns(little, lambda: run(many, n))
    yield row('throughput with 1,000,000 waiting, against 10,000', b, 'jobs/s', ratio=b/a, ratio_at_least=.8)

def memory():
    queue = queue_at(path := new_path())
    fill(queue, 'noop', n_of(1_000_000))
    queue.close()
    mib = float(subprocess.check_output(child_command('memory', path, n_of(20_000))))
    yield row("worker's memory with 1,000,000 waiting, 20,000 run", mib, 'MiB', at_most=120)

def idle():
    queue_at(path := new_path()).close()
    share = float(subprocess.check_output(child_command('idle', path, 10)))
    yield row('an idle worker', 100*share, '% of a core', at_most=1)

# What other processes do

def child_command(what, path, n, durability='power'):
    return [sys.executable, __file__, '--child', what, str(path), str(n), durability]

def peak_mib():
    "The most memory that this process has had; `ru_maxrss` would count in the parent's, from before the exec"
    status = Path('/proc/self/status')
    if not status.exists(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    return int(next(l for l in status.read_text().splitlines() if l.startswith('VmHWM')).split()[1])/1024

def record_bare(path, n, durability):
    cx = apsw.Connection(path)
    cx.execute(f"PRAGMA synchronous={'FULL' if durability=='power' else 'NORMAL'}")
    for _ in range(n):
        time.sleep(.01)
        since = time.monotonic()
        bare_one_by_one(cx, 1)
        os.write(1, TIME.pack(since))

def child(what, path, n, durability):
    if what=='bare': return record_bare(path, int(n), durability)
    queue = queue_at(path, durability)
    if what=='record':
        for _ in range(int(n)):
            time.sleep(.01)
            queue.tasks['stamp'].enqueue(time.monotonic())
    if what=='memory':
        asyncio.run(run_some(queue, int(n)))
        print(peak_mib())
    if what=='idle':
        async def nothing():
            async with Worker(queue):
                await asyncio.sleep(2)
                cpu = time.process_time()
                await asyncio.sleep(float(n))
                return (time.process_time()-cpu)/float(n)
        print(asyncio.run(nothing()))

# The table

SECTIONS = [enqueue, aenqueue, enqueue_many, worker_async, worker_sync, latency, waiting, memory, idle]

def number(v): return '' if v is None else f'{v:,.0f}' if v >= 1000 else f'{v:.3g}'

def line(r):
    bound = f'≥ {number(r["at_least"])}' if r['at_least'] else f'≤ {number(r["at_most"])}' if r['at_most'] else ''
    least = f'≥ {r["ratio_at_least"]} ×' if r['ratio_at_least'] else ''
    plain,same = (f'{v:.2f} ×' if v else '' for v in (r['ratio'], r['ratio_to_same_writes']))
    if least and not same: plain,same = '',plain # the ratio that is promised, to something else
    return [r['what'], f'{number(r["value"])} {r["unit"]}', bound, same, least, 'yes' if kept(r) else 'NO', plain]

def kept(r):
    ok = not r['at_least'] or r['value'] >= r['at_least']
    ok = ok and (not r['at_most'] or r['value'] <= r['at_most'])
    return ok and (not r['ratio_at_least'] or (r['ratio_to_same_writes'] or r['ratio']) >= r['ratio_at_least'])

WIDTHS = 52,20,10,19,9,5,14
def show(words): print(' '.join(f'{w:<{n}}' for w,n in zip(words, WIDTHS)).rstrip(), flush=True)

def main():
    global scale, folder, ROUNDS
    parser = argparse.ArgumentParser(description='Measure the durable queue.')
    parser.add_argument('sections', nargs='*', metavar='section', help=', '.join(f.__name__ for f in SECTIONS))
    parser.add_argument('--scale', type=float, default=1.0, help='size of each run, 1 for the real one')
    parser.add_argument('--rounds', type=int, default=ROUNDS, help='how many rounds the median is of')
    parser.add_argument('--folder', help='where the files go; a folder for temporary files if missing')
    parser.add_argument('--json', help='a file for the figures')
    parser.add_argument('--child', nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child: return child(*args.child)
    if unknown := set(args.sections) - {f.__name__ for f in SECTIONS}: parser.error(f'no section {sorted(unknown)}')
    scale,ROUNDS,rows = args.scale,args.rounds,[]
    folder = args.folder
    print(f'{os.cpu_count()} cores, Python {platform.python_version()}, SQLite {apsw.sqlite_lib_version()}, '
          f'an fsync takes {fsync_ms():.2g} ms, scale {scale:g}\n')
    show(['what', 'measured', 'promised', 'to the same writes', 'promised', 'kept', 'to plain rows'])
    for section in SECTIONS:
        if args.sections and section.__name__ not in args.sections: continue
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            for r in section(): rows.append(r); show(line(r))
    if args.json: Path(args.json).write_text(json.dumps(rows, indent=1))

if __name__=='__main__': main()
