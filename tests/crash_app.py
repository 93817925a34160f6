"The processes of the crash test: `python crash_app.py work|feed FOLDER`. Each writes what it does into a ledger."
import asyncio, os, random, signal, sys, time
from pathlib import Path

from bgtasks.queue import TaskQueue
from bgtasks.run import current_job
from bgtasks.sqlite import SQLiteStore
from bgtasks.worker import Worker

folder = Path(sys.argv[2])

def ledger(name):
    "A function that adds a line to a file: one write at its end, so that lines of many processes stay whole"
    fd = os.open(folder/name, os.O_WRONLY|os.O_CREAT|os.O_APPEND, 0o600)
    return lambda *words: os.write(fd, (' '.join(map(str, words))+'\n').encode())

queue = TaskQueue(SQLiteStore(folder/'q.db', 'process'))
ran = ledger('ran')

def told(what): ran(what, (j := current_job()).id, j.attempt, os.getpid())

@queue.task(name='wait')
async def wait(ms):
    told('start')
    await asyncio.sleep(ms/1000)
    told('end')
    return ms

@queue.task(name='block')
def block(ms):
    told('start')
    time.sleep(ms/1000)
    told('end')
    return ms

@queue.task(name='deadly')
def deadly():
    told('start')
    os.kill(os.getpid(), signal.SIGKILL)

def feed():
    "Record jobs one by one, many at once, and in chains, as a small web app does; note each when it is accepted."
    accepted = ledger('accepted')
    while True:
        ms = random.randrange(30)
        jobs = [wait.enqueue(ms), block.enqueue(ms), *wait.enqueue_many([(ms,)]*5)]
        jobs.append(wait.using(after=jobs[:2]).enqueue(ms))
        if random.random() < .03: jobs.append(wait.enqueue(2000)) # longer than a lease
        for j in jobs: accepted(j.id)
        time.sleep(.02)

if __name__=='__main__':
    if sys.argv[1]=='feed': feed()
    else: asyncio.run(Worker(queue, concurrency=8, threads=4, lease=1.5, max_crashes=int(sys.argv[3])).run())
