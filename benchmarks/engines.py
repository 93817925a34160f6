"""What does a job cost through bgtasks, compared with the engine used directly? Prints it; asserts nothing.

    python benchmarks/engines.py                     # every engine on every broker that answers, some minutes
    python benchmarks/engines.py dramatiq-redis --n 100 --rounds 11

Both sides run the same function on the same broker and keep its result. Each has an app process and a worker process
that live through all rounds, and a queue of its own. A round is short: one side enqueues, then its worker runs what is
there, then the other side does the same, first in turns. `enqueue` is the time for a call in the app, while both
workers are stopped (SIGSTOP); `run` the time that a worker takes for a job, from the eleventh of the round to the last
one. The ratio is the median of the ratios of the rounds, and the first two rounds don't count."""
import argparse, os, secrets, signal, subprocess, sys, time
from pathlib import Path
from statistics import median, quantiles

HERE = Path(__file__).parent
SIDES = 'direct', 'bgtasks'
SKIP = 10
APP = '''
import sys, time
from {app} import send
for line in sys.stdin:
    n = int(line)
    start = time.perf_counter()
    for i in range(n): send(i)
    print((time.perf_counter()-start)/n, flush=True)'''
CELERY = [sys.executable, '-m', 'celery', '-A', 'engine_celery', 'worker', '-c', '1', '--without-gossip',
          '--without-mingle', '--without-heartbeat', '-n'] # and a name, which the broker knows only once
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

class Side:
    "One side: its app, its worker, and what they took in each round, in microseconds"
    def __init__(self, name, side, n, run):
        app,broker,command = ENGINES[name]
        self.n,self.took,self.redis = n,[],client()
        path = os.pathsep.join(filter(None, [str(HERE), os.environ.get('PYTHONPATH')]))
        self.name,self.env = f'{name}, {side}',os.environ | dict(PYTHONPATH=path, BENCH_BROKER=broker, BENCH_SIDE=side,
                                                                 BENCH_RUN=run)
        self.app = self._start([sys.executable, '-c', APP.format(app=app)], stdin=subprocess.PIPE, text=True,
                               stdout=subprocess.PIPE)
        if app=='engine_celery': command = [*command, f'{run}-{side}@%h']
        self.worker = self._start(command, stdout=subprocess.DEVNULL, BENCH_N=str(n), BENCH_SKIP=str(SKIP))
        self._fill()
        self._drained()

    def _start(self, command, stdout, stdin=None, text=None, **env):
        return subprocess.Popen(command, cwd=HERE, env=self.env | env, stdin=stdin, stdout=stdout, text=text,
                                stderr=subprocess.DEVNULL, start_new_session=True)

    def tell(self, number): os.killpg(self.worker.pid, number)

    def _fill(self):
        print(self.n+SKIP, file=self.app.stdin, flush=True)
        return 1e6*float(self.app.stdout.readline())

    def _drained(self):
        if (got := self.redis.blpop('bench:seconds', 60)) is None:
            raise SystemExit(f'{self.name}: no end of {self.n} jobs in 60 s')
        return 1e6*float(got[1])/self.n

    def round(self):
        enqueue = self._fill()
        self.tell(signal.SIGCONT)
        run = self._drained()
        time.sleep(.05) # for the acknowledgement of the last one
        self.tell(signal.SIGSTOP)
        self.took.append(dict(enqueue=enqueue, run=run, both=enqueue+run))

    def end(self):
        self.app.stdin.close()
        self.app.wait(10)
        self.tell(signal.SIGCONT)
        self.tell(signal.SIGTERM)
        try: self.worker.wait(10)
        except subprocess.TimeoutExpired: self.tell(signal.SIGKILL)

def forget(name, run):
    "Delete the queues of this run in RabbitMQ"
    if ENGINES[name][1]=='redis': return
    import pika
    line = pika.BlockingConnection(pika.URLParameters(os.environ.get('BENCH_AMQP', 'amqp://guest:guest@127.0.0.1/%2F')))
    for side in SIDES:
        for end in '', '.DQ', '.XQ': line.channel().queue_delete(f'bench_{run}_{side}{end}')
    line.close()

def measure(name, n, rounds):
    "Rows of what, microseconds of bgtasks and of the engine, and the quartiles of the ratio."
    run,sides = secrets.token_hex(3),[]
    try:
        for side in SIDES: sides.append(Side(name, side, n, run))
        direct,ours = sides
        for s in sides: s.tell(signal.SIGSTOP)
        for r in range(rounds+2):
            for s in (sides if r%2==0 else sides[::-1]): s.round()
    finally:
        for s in sides: s.end()
        forget(name, run)
    for what in ('enqueue', 'run', 'both'):
        a,b = ([o[what] for o in s.took[2:]] for s in (ours, direct))
        yield what,median(a),median(b),quantiles([x/y for x,y in zip(a, b)], n=4)

def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('names', nargs='*', metavar='ENGINE', help=', '.join(ENGINES))
    parser.add_argument('--n', type=int, default=100, help='jobs in one round')
    parser.add_argument('--rounds', type=int, default=41)
    args = parser.parse_args()
    if client().dbsize(): raise SystemExit('the database of BENCH_REDIS is in use; this wants an empty one')
    print('| engine | what | bgtasks | directly | ratio | middle half |\n|---|---|---|---|---|---|')
    try:
        for name in args.names or ENGINES:
            for what,ours,theirs,(low,mid,high) in measure(name, args.n, args.rounds):
                print(f'| {name} | {what} | {ours:.0f} µs | {theirs:.0f} µs | {mid:.2f} | {low:.2f} – {high:.2f} |',
                      flush=True)
    finally: client().flushdb()

if __name__=='__main__': main()
