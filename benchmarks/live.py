"What a thousand readers of live events cost: `python benchmarks/live.py`. Nothing is asserted."
import asyncio, os, socket, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from bgtasks import TaskQueue
from bgtasks.job import Progress
from bgtasks.web import routes

READERS,EVENTS = 1000,60

# The server, in a process of its own: `live.py serve FILE FD HTTP`

def serve(path, fd, http):
    app = Starlette(routes=routes(TaskQueue(path), stall=30))
    uvicorn.run(app, fd=int(fd), log_level='warning', http=http)

# The readers, in this process: bytes are looked at as they come, and that is all, for they share the machine

class Reader(asyncio.Protocol):
    "Notes when the end of the n-th event arrived"
    def __init__(self, ask, seen): self.ask,self.seen,self.buffer,self.ready = ask,seen,b'',asyncio.Event()
    def connection_made(self, transport): transport.write(self.ask)

    def data_received(self, data):
        now,self.buffer = time.perf_counter(),self.buffer+data
        *parts,self.buffer = self.buffer.split(b'\n\n')
        for p in parts:
            if b'event: progress' in p: self.seen.append(now)
            else: self.ready.set() # the snapshot, or the first sign of life

async def connect(port, path, n, seen):
    "Open `n` streams, and return when the first bytes have come on all"
    ask = f'GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n'.encode()
    loop,res = asyncio.get_running_loop(),[]
    for _ in range(n):
        _,r = await loop.create_connection(lambda: Reader(ask, seen), '127.0.0.1', port)
        res.append(r)
    for r in res: await r.ready.wait()

def memory(pid):
    "Bytes that a process has for itself (Linux)"
    lines = Path(f'/proc/{pid}/smaps_rollup').read_text().splitlines()
    return 1024*sum(int(o.split()[1]) for o in lines if o.startswith('Private_'))

async def until(ready):
    while not ready(): await asyncio.sleep(.001)

async def measure(path, http, folder):
    "The seconds from a commit to the first and to the last of all readers, and the bytes that each of them takes."
    queue = TaskQueue(folder/'q.db')
    queue.task(lambda: None, name='work')
    job = queue.tasks['work'].enqueue()
    queue.store.join('w')
    queue.store.claim('w', ['work'])
    with socket.create_server(('127.0.0.1', 0), backlog=READERS) as sock:
        cmd = [sys.executable, __file__, 'serve', folder/'q.db', str(sock.fileno()), http]
        server = subprocess.Popen(cmd, pass_fds=[sock.fileno()])
        port,seen = sock.getsockname()[1],[]
    try:
        await connect(port, path.format(job.id), 20, seen) # what is loaded and made once is not counted
        base = memory(server.pid)
        await connect(port, path.format(job.id), READERS, seen)
        each = (memory(server.pid)-base)/READERS
        first,last = [],[]
        for n in range(EVENTS):
            await asyncio.sleep(.3)
            seen.clear()
            await asyncio.to_thread(queue.store.progress, [(job.seq, 1, Progress(n, EVENTS, 'so far'))])
            commit = time.perf_counter()
            await until(lambda: len(seen)==READERS+20)
            first.append(min(seen)-commit)
            last.append(max(seen)-commit)
        return first,last,each
    finally:
        server.kill()
        server.wait()

def main():
    print(f'Python {sys.version.split()[0]}, {os.cpu_count()} cores; {READERS} readers on one server process; '
          f'{EVENTS} commits, each a progress report\n')
    for http in ('httptools', 'h11'):
        for what,path in (('of one job', '/jobs/{}/events'), ('of all jobs', '/jobs/events')):
            with tempfile.TemporaryDirectory() as folder:
                first,last,each = asyncio.run(measure(path, http, Path(folder)))
            p95 = statistics.quantiles(last, n=20)[-1]
            ms = [f'{1000*o:.0f}' for o in (statistics.median(first), statistics.median(last), p95, max(last))]
            print(f'{http:<10} {what:<12} first reader after {ms[0]:>4} ms, last after {ms[1]:>4} ms '
                  f'(95 % {ms[2]:>4}, worst {ms[3]:>4} ms), {each/1024:.0f} KiB each', flush=True)

if __name__=='__main__':
    match sys.argv[1:]:
        case []: main()
        case ['serve', path, fd, http]: serve(path, fd, http)
