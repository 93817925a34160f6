"""What does a job cost through bgtasks, compared with the engine used directly? Prints it; asserts nothing.

    python benchmarks/engines.py                     # every engine on every broker that answers, some minutes
    python benchmarks/engines.py dramatiq-redis --n 500 --rounds 3

Both sides run the same function on the same broker and keep its result, in turns, each with a worker process of its
own. `enqueue` is the time for a call in the app; `run` the time that a worker takes for a job of a queue that was
filled before it started. The first fifty of each are left out. The ratio is the median over the rounds."""
import argparse, json, os, signal, subprocess, sys, time
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
SIDES = 'direct', 'bgtasks'
FILL = '''
import sys, time, json
from {app} import send
for n in range(50): send(n)
start = time.perf_counter()
for n in range({n}): send(n)
print(json.dumps((time.perf_counter()-start)/{n}))'''
CELERY = [sys.executable, '-m', 'celery', '-A', 'engine_celery', 'worker', '-c', '1', '--without-gossip',
          '--without-mingle', '--without-heartbeat']
DRAMATIQ = [sys.executable, '-m', 'dramatiq', 'engine_dramatiq', '-p', '1', '-t', '8']
ENGINES = { # the app to import, its broker, and the command of its workers
    'celery-redis': ('engine_celery', 'redis', CELERY),
    'celery-rabbitmq': ('engine_celery', 'rabbitmq', CELERY),
    'dramatiq-redis': ('engine_dramatiq', 'redis', DRAMATIQ),
    'dramatiq-rabbitmq': ('engine_dramatiq', 'rabbitmq', DRAMATIQ)}

def client():
    import redis
    url = os.environ.get('BENCH_REDIS', 'redis://127.0.0.1:6379/8')
    return redis.Redis.from_url(url, socket_timeout=None)

def environ(broker, side, **more):
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get('PYTHONPATH')]))
    return os.environ | dict(PYTHONPATH=path, BENCH_BROKER=broker, BENCH_SIDE=side, **more)

def fill(name, side, n):
    "Enqueue `n` calls, and give the seconds that one took."
    app,broker,_ = ENGINES[name]
    done = subprocess.run([sys.executable, '-c', FILL.format(app=app, n=n)], cwd=HERE, env=environ(broker, side),
                          check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout))

def drain(name, side, n):
    "Have a worker run `n` jobs, and give the seconds that one took."
    _,broker,command = ENGINES[name]
    env = environ(broker, side, BENCH_N=str(n))
    worker = subprocess.Popen(command, cwd=HERE, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              start_new_session=True)
    try:
        if (got := client().blpop('bench:seconds', 120)) is None:
            raise SystemExit(f'{name}, {side}: no end of {n} jobs in 120 s')
        return float(got[1])/n
    finally:
        os.killpg(worker.pid, signal.SIGTERM)
        try: worker.wait(10)
        except subprocess.TimeoutExpired: os.killpg(worker.pid, signal.SIGKILL)

def measure(name, n, rounds):
    "Rows of what, microseconds of bgtasks and of the engine, and the ratio."
    took = {(what, side): [] for what in ('enqueue', 'run') for side in SIDES}
    for r in range(rounds):
        for side in SIDES if r%2==0 else SIDES[::-1]:
            took['enqueue', side].append(1e6*fill(name, side, n))
            took['run', side].append(1e6*drain(name, side, n))
    for side in SIDES: took['both', side] = [a+b for a,b in zip(took['enqueue', side], took['run', side])]
    for what in ('enqueue', 'run', 'both'):
        ours,theirs = took[what, 'bgtasks'],took[what, 'direct']
        yield what,median(ours),median(theirs),median(a/b for a,b in zip(ours, theirs))

def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('names', nargs='*', metavar='ENGINE', help=', '.join(ENGINES))
    parser.add_argument('--n', type=int, default=1000, help='jobs in one round')
    parser.add_argument('--rounds', type=int, default=5)
    args = parser.parse_args()
    client().delete('bench:seconds')
    print('| engine | what | bgtasks | directly | ratio |\n|---|---|---|---|---|')
    for name in args.names or ENGINES:
        for what,ours,theirs,ratio in measure(name, args.n, args.rounds):
            print(f'| {name} | {what} | {ours:.0f} µs | {theirs:.0f} µs | {ratio:.2f} |', flush=True)

if __name__=='__main__': main()
