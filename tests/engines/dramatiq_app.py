"The app of the tests on Dramatiq, for a worker (`dramatiq dramatiq_app`) and for the test; the environment says where."
import os, time
from urllib.parse import urlsplit

import dramatiq

from bgtasks import TaskQueue, current_job
from bgtasks.backends.dramatiq import DramatiqBackend
from bgtasks.checks import declare_checks, declare_wrapped
from bgtasks.records import Records

def make_broker(url, heartbeat=4000):
    if url.startswith('amqp'):
        from dramatiq.brokers.rabbitmq import RabbitmqBroker
        return RabbitmqBroker(url=url.removesuffix('//')+'/%2F', max_priority=10)
    from dramatiq.brokers.redis import RedisBroker
    if not url.startswith('sentinel'): return RedisBroker(url=url, heartbeat_timeout=heartbeat)
    from redis.sentinel import Sentinel
    where = urlsplit(url)
    client = Sentinel([(where.hostname, where.port)]).master_for('shop', db=int(where.path[1:]))
    return RedisBroker(client=client, heartbeat_timeout=heartbeat)

def declare(broker, records, name, folder):
    "Two queues with their tasks, and some for the tests of failures"
    backend = DramatiqBackend(broker, Records(records) if records else None, queues=[name])
    backend.records.late = float(os.environ.get('BGTASKS_TEST_LATE', 60))
    queue,wrapped = TaskQueue(backend),TaskQueue(backend)
    declare_checks(queue, name)
    declare_wrapped(wrapped, name)
    def survive(mark:str) -> int:
        "Say that it has begun, and go on when it may"
        with open(f'{folder}/{mark}', 'a') as f: f.write(f'{current_job().attempt} {os.getpid()}\n')
        while not os.path.exists(f'{folder}/{mark}.go'): time.sleep(.02)
        return current_job().attempt
    def once(mark:str):
        with open(f'{folder}/{mark}', 'a') as f: f.write('x\n')
    def die(): os.kill(os.getpid(), 9)
    for f in (survive, once, die): queue.task(name=f.__name__, queue=name)(f)
    return queue,wrapped

if 'BGTASKS_TEST_BROKER' in os.environ:
    broker = make_broker(os.environ['BGTASKS_TEST_BROKER'])
    dramatiq.set_broker(broker)
    queue,wrapped = declare(broker, os.environ['BGTASKS_TEST_RECORDS'], os.environ['BGTASKS_TEST_QUEUE'],
                            os.environ['BGTASKS_CHECK_DIR'])
