"""The app that `engines.py` measures on Celery: the same function as a task of Celery, and as a task of bgtasks.

Both sides acknowledge late, as a job that must not be lost asks for, and keep their results in Redis."""
import os, time

import redis
from celery import Celery, signals

REDIS = os.environ.get('BENCH_REDIS', 'redis://127.0.0.1:6379/8')
AMQP = os.environ.get('BENCH_AMQP', 'amqp://guest:guest@127.0.0.1:5672/')
side,kind = os.environ.get('BENCH_SIDE', 'direct'),os.environ.get('BENCH_BROKER', 'redis')
QUEUE = f"bench_{os.environ.get('BENCH_RUN', '')}_{side}"
seen,start,of,skip = 0,None,*(int(os.environ.get(o, 0)) for o in ('BENCH_N', 'BENCH_SKIP'))

results = redis.Redis.from_url(REDIS)
app = Celery('bench', broker=REDIS if kind=='redis' else AMQP, backend=REDIS)
app.conf.update(task_default_queue=QUEUE, worker_prefetch_multiplier=1, broker_connection_retry_on_startup=True,
                broker_transport_options={} if kind=='redis' else dict(confirm_publish=True))

def clock(**_):
    "Tell, by way of Redis, how long the worker took for a round, the first messages left out"
    global seen,start
    seen += 1
    if seen==skip: start = time.perf_counter()
    if seen==of+skip:
        seen = 0
        results.rpush('bench:seconds', time.perf_counter()-start)

if of: signals.task_postrun.connect(clock, weak=False)

def echo(n:int) -> int: return n

if side=='direct': send = app.task(echo, name='echo', acks_late=True, reject_on_worker_lost=True).delay
else:
    from bgtasks import TaskQueue
    from bgtasks.backends.celery import CeleryBackend
    queue = TaskQueue(CeleryBackend(app))
    send = queue.task(echo, queue=QUEUE).enqueue
