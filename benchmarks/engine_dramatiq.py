"""The app that `engines.py` measures on Dramatiq: the same function as an actor, and as a task of bgtasks.

Which broker, and which of the two, the environment says; a worker imports it as any other app."""
import os, threading, time

import dramatiq
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

REDIS = os.environ.get('BENCH_REDIS', 'redis://127.0.0.1:6379/8')
AMQP = os.environ.get('BENCH_AMQP', 'amqp://guest:guest@127.0.0.1:5672/')
side,kind = os.environ.get('BENCH_SIDE', 'direct'),os.environ.get('BENCH_BROKER', 'redis')
QUEUE = f"bench_{os.environ.get('BENCH_RUN', '')}_{side}"

def make_broker():
    if kind=='redis':
        from dramatiq.brokers.redis import RedisBroker
        return RedisBroker(url=REDIS)
    from dramatiq.brokers.rabbitmq import RabbitmqBroker
    return RabbitmqBroker(url=AMQP, confirm_delivery=True) # bgtasks turns it on: a message that may be lost is no job

class Clock(dramatiq.Middleware):
    "Tell, by way of Redis, how long the worker took for a round, the first messages left out"
    def __init__(self):
        self.n,self.start,self.lock,self.client = 0,None,threading.Lock(),RedisBackend(url=REDIS).client
        self.of,self.skip = (int(os.environ[o]) for o in ('BENCH_N', 'BENCH_SKIP'))

    def after_ack(self, broker, message):
        with self.lock:
            self.n += 1
            if self.n==self.skip: self.start = time.perf_counter()
            if self.n < self.of+self.skip: return
            self.n = 0
            self.client.rpush('bench:seconds', time.perf_counter()-self.start)

broker = make_broker()
dramatiq.set_broker(broker)
if 'BENCH_N' in os.environ: broker.add_middleware(Clock())

def echo(n:int) -> int: return n

if side=='direct':
    broker.add_middleware(Results(backend=RedisBackend(url=REDIS), store_results=True))
    actor = dramatiq.actor(echo, queue_name=QUEUE)
    send = actor.send
else:
    from bgtasks import TaskQueue
    from bgtasks.backends.dramatiq import DramatiqBackend
    queue = TaskQueue(DramatiqBackend(broker, REDIS))
    send = queue.task(echo, queue=QUEUE).enqueue
