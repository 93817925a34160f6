"What bgtasks costs beside Starlette's own background tasks: `python benchmarks/background.py`. Nothing is asserted."
import http.client, os, socket, subprocess, sys, time
from contextlib import contextmanager
from statistics import median, quantiles

import anyio, uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask as Theirs
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from bgtasks import BackgroundTask as Ours

# The server, in a process of its own: `background.py serve PORT`

def spin(seconds):
    "Keep a processor busy."
    end = time.perf_counter()+seconds
    while time.perf_counter() < end: sum(range(1000))

async def slow(request):
    make = dict(theirs=Theirs, ours=Ours)[request.path_params['whose']]
    return PlainTextResponse('ok', background=make(time.sleep, 3))

def busy(request):
    task = Ours(spin, float(request.path_params['seconds'])).using(runner=request.path_params['runner'])
    return PlainTextResponse('ok', background=task)

def sync_page(request): return PlainTextResponse('ok')
async def async_page(request): return PlainTextResponse('ok')

app = Starlette(routes=[Route('/slow/{whose}', slow), Route('/busy/{runner}/{seconds}', busy),
                        Route('/sync', sync_page), Route('/async', async_page)])

@contextmanager
def server():
    with socket.create_server(('127.0.0.1', 0)) as s: port = s.getsockname()[1]
    process = subprocess.Popen([sys.executable, __file__, 'serve', str(port)])
    try:
        while True:
            try: get(port, '/async')
            except OSError: time.sleep(0.05)
            else: break
        yield port
    finally:
        process.terminate() # and it waits for its tasks
        process.wait()

def get(port, path, connection=None):
    "Ask for one page; give the seconds that it took."
    connection = connection or http.client.HTTPConnection('127.0.0.1', port)
    start = time.perf_counter()
    connection.request('GET', path)
    connection.getresponse().read()
    return time.perf_counter()-start

# The client, in a process of its own too: `background.py load PORT SECONDS`

def load(port, seconds):
    "Ask for the async page again and again; give the 99th percentile."
    connection,times,end = http.client.HTTPConnection('127.0.0.1', port),[],time.perf_counter()+seconds
    while time.perf_counter() < end: times.append(get(port, '/async', connection))
    return quantiles(times, n=100)[98]

def load_elsewhere(port, seconds):
    return float(subprocess.check_output([sys.executable, __file__, 'load', str(port), str(seconds)]))

# The measurements: each takes ours and the other in turns and gives the medians

async def nothing(x): pass
def sync_nothing(x): pass

async def per_task(make, func, n):
    start = time.perf_counter()
    for _ in range(n): await make(func, 1)()
    return (time.perf_counter()-start)/n

async def making_and_running(func, n, rounds=201):
    return [[await per_task(make, func, n) for make in (Ours, Theirs)] for _ in range(rounds)]

def in_turns(rounds, *measures): return [[m() for m in measures] for _ in range(rounds)]

def waiting_visitor(whose):
    "Leave 45 slow tasks, then ask for a page of a sync handler."
    with server() as port:
        for _ in range(45): get(port, f'/slow/{whose}')
        return get(port, '/sync')

def visitors(runner, seconds=4):
    "The 99th percentile of an async page while two tasks compute, or none."
    with server() as port:
        if runner:
            get(port, f'/busy/{runner}/0')
            time.sleep(1) # its processes have started
            for _ in range(2): get(port, f'/busy/{runner}/{seconds+1}')
        return load_elsewhere(port, seconds)

def import_time(name):
    code = f'import time; t = time.perf_counter(); import {name}; print(time.perf_counter()-t)'
    return float(subprocess.check_output([sys.executable, '-c', code]))

def show(what, turns, bound, unit, beside='Starlette'):
    "Print a line for `turns`, pairs of ours and the other: the medians of each and of their ratios."
    scale = {'µs':1e6, 'ms':1e3}[unit]
    ours,other = (median(o)*scale for o in zip(*turns))
    ratio = median(a/b for a,b in turns)
    print(f'{what:<39}{ours:>8.2f} {unit}  {beside:>9}{other:>9.2f} {unit}  ratio {ratio:>6.3f}  {bound}', flush=True)

def main():
    print(f'Python {sys.version.split()[0]}, {os.cpu_count()} cores; medians, measured in turns\n')
    show('make and run an async task', anyio.run(making_and_running, nothing, 2000), 'wanted: at most 1', 'µs')
    show('make and run a sync task', anyio.run(making_and_running, sync_nothing, 50), 'wanted: at most 1', 'µs')
    turns = in_turns(3, lambda: waiting_visitor('ours'), lambda: waiting_visitor('theirs'))
    show('a sync page beside 45 slow sync tasks', turns, 'wanted: under 50 ms', 'ms')
    turns = in_turns(5, *(lambda r=r: visitors(r) for r in (None, 'process', 'thread')))
    show('p99 of an async page, 2 busy processes', [(p, i) for i,p,_ in turns], 'wanted: at most 3', 'ms', 'idle')
    show('p99 of an async page, 2 busy threads', [(t, i) for i,_,t in turns], 'for comparison', 'ms', 'idle')
    turns = in_turns(15, lambda: import_time('bgtasks'), lambda: import_time('starlette.applications'))
    show('import', turns, 'wanted: at most 1.5', 'ms')

if __name__=='__main__':
    match sys.argv[1:]:
        case []: main()
        case ['serve', port]: uvicorn.run(app, port=int(port), log_level='error')
        case ['load', port, seconds]: print(load(int(port), float(seconds)))
