"Dramatiq with real brokers and real worker processes: what it promises, and what it does when something breaks."
import json, signal, subprocess, sys, time
from contextlib import suppress

import dramatiq_app
import live
import pika
import pytest
from live import until

from bgtasks import TaskQueue
from bgtasks.backends.dramatiq import _envelope
from bgtasks.conform import check_backend
from bgtasks.errors import BackendUnavailable, BadOption
from bgtasks.message import message_of
from bgtasks.publisher import Publisher

class Stage:
    "An app and its workers on one broker"
    def __init__(self, broker_url, records, workers, folder):
        self.url,self.records,self.start,self.folder,self.name = broker_url,records,workers,folder,live.unique()+'q'
        self.broker = dramatiq_app.make_broker(broker_url)
        self.queue,self.wrapped = dramatiq_app.declare(self.broker, records, self.name, str(folder))

    def environ(self):
        return dict(BGTASKS_TEST_BROKER=self.url, BGTASKS_TEST_RECORDS=self.records, BGTASKS_TEST_QUEUE=self.name,
                    BGTASKS_CHECK_DIR=str(self.folder))

    def worker(self, *more):
        args = sys.executable, '-m', 'dramatiq', 'dramatiq_app', '-p', '1', '-t', '4', '-Q', self.name, *more
        return self.start(*args, env=self.environ()).ready('is ready for action')

    def lines(self, mark):
        path = self.folder/mark
        return path.read_text().splitlines() if path.exists() else []

    def close(self):
        self.queue.close()
        self.broker.close()
        if self.url.startswith('amqp'): live.forget_queues([self.name, f'{self.name}.DQ', f'{self.name}.XQ'])

@pytest.fixture(params=['redis', 'rabbitmq'])
def stage(request, redis_url, workers, tmp_path):
    url = redis_url if request.param=='redis' else request.getfixturevalue('rabbit_url')
    s = Stage(url, redis_url, workers, tmp_path)
    yield s
    s.close()

def test_it_keeps_every_promise(stage, monkeypatch):
    monkeypatch.setenv('BGTASKS_CHECK_DIR', str(stage.folder))
    stage.worker()
    kept = check_backend(stage.queue, wrapped=stage.wrapped, slots=4, patience=30)
    assert len(kept) > 20

def test_green_threads_are_refused_where_they_would_run_our_jobs(stage):
    pytest.importorskip('gevent')
    def green(name):
        args = live.script('dramatiq-gevent'), 'dramatiq_app', '-p', '1', '-t', '2', '-Q', name
        return stage.start(*args, env=stage.environ())
    live.green_workers(green(stage.name), green('of-the-app-itself'), 'dramatiq -t 50', 'is ready for action')

def test_an_app_on_green_threads_hands_in_jobs_and_gets_results(stage):
    pytest.importorskip('gevent')
    stage.worker()
    stage.start(sys.executable, '-c', live.GREEN, 'dramatiq_app', env=stage.environ()).ready('True')

def test_a_job_whose_worker_is_killed_runs_again(stage):
    first = stage.worker()
    job = stage.queue.tasks['survive'].enqueue('a')
    until(lambda: stage.lines('a'))
    first.kill()
    stage.worker()
    (stage.folder/'a.go').touch()
    assert stage.queue.result(job, timeout=60)==2
    job = stage.queue.get(job)
    assert (job.tries, job.crashes, len(stage.lines('a')))==(1, 1, 2)

def test_a_job_that_is_recorded_is_sent_in_the_end(stage, monkeypatch):
    call = stage.queue.tasks['checks.grow'].call(('a',))
    stage.queue.store.records.late = 1
    stage.queue.store.records.add([message_of(call, time.time())]) # as an app leaves it that is killed before it sends
    monkeypatch.setenv('BGTASKS_TEST_LATE', '1')
    stage.worker()
    assert stage.queue.result(call.id, 40)=='aa'

def test_a_queue_that_another_engine_has_is_told(redis_url, rabbit_url, workers, tmp_path):
    stage = Stage(rabbit_url, redis_url, workers, tmp_path)
    line = live.rabbit_line()
    line.channel().queue_declare(stage.name, durable=True)
    was = stage.queue.store.last_event()
    with pytest.raises(BadOption, match='Another engine'): stage.queue.tasks['once'].enqueue('a')
    assert stage.queue.store.events(was)==[]
    line.close()
    stage.close()

def test_a_copied_message_is_what_dramatiq_writes_and_arrives(redis_url, rabbit_url, workers, tmp_path):
    proxy = live.rabbit_proxy()
    stage = Stage(live.rabbit_behind(proxy), redis_url, workers, tmp_path)
    line = live.rabbit_line()
    channel,once = line.channel(),stage.queue.tasks['once']
    def arrived(id, mark):
        _,properties,body = channel.basic_get(stage.name, auto_ack=True)
        m = json.loads(body)
        text = json.loads(m.pop('args')[0])
        assert (m.pop('message_id'), text['id'], text['payload'])==(id, id, [[mark], {}])
        assert abs(m.pop('message_timestamp')/1000-time.time()) < 60
        return m,properties.priority,properties.delivery_mode
    def sent(mark='a', **options): return arrived(once.using(**options).enqueue(mark).id, mark)
    def theirs(priority):
        m = message_of(once.using(priority=priority).call(('a',)), time.time())
        stage.broker.enqueue(_envelope(m)) # by Dramatiq alone
        return arrived(m.id, 'a')
    for priority in 0, 5:
        first = sent(priority=priority)
        assert first[1:]==(priority or None, 2) and first==sent(priority=priority)==theirs(priority)
    jobs = once.enqueue_many([(f'm{i}',) for i in range(250)])
    for i,job in enumerate(jobs): arrived(job.id, f'm{i}')
    channel.queue_delete(stage.name)
    sent() # there is no such queue any more: it is made again
    sent('x'*300_000)
    proxy.down() # as when the server is restarted
    proxy.up()
    sent()
    assert channel.queue_declare(stage.name, passive=True).method.message_count==0
    line.close()
    stage.queue.close()
    proxy.down()
    stage.url = live.RABBIT
    stage.close()

def test_a_publisher_that_rabbitmq_has_closed_for_its_silence_goes_on(rabbit_url):
    where = pika.URLParameters(rabbit_url.removesuffix('//')+'/%2F')
    where.heartbeat,name,publisher,line = 1,live.unique()+'q',Publisher(where),live.rabbit_line()
    channel = line.channel()
    channel.queue_declare(name, exclusive=True)
    def send(text):
        publisher.publish({0: (name, pika.BasicProperties(), text)})
        publisher.spare.put(used := publisher.spare.take())
        return used,channel.basic_get(name, auto_ack=True)[2]
    first,got = send(b'a')
    with suppress(ConnectionResetError):
        while first.sock.recv(1000): pass # heartbeats, to which nobody answers
    second,more = send(b'b')
    assert (got, more, second is first, channel.basic_get(name))==(b'a', b'b', False, (None, None, None))
    publisher.close()
    line.close()

def test_the_confirmation_of_an_earlier_message_confirms_no_later_one(rabbit_url):
    publisher = Publisher(pika.URLParameters(rabbit_url.removesuffix('//')+'/%2F'))
    name,properties,theirs = live.unique()+'q',pika.BasicProperties(),live.rabbit_line()
    theirs.channel().queue_declare(name, exclusive=True)
    publisher.publish({0: (name, properties, b'a')})
    line = publisher.spare.take()
    line._heard = lambda kind: None # gone before the answer has come
    with suppress(AttributeError): line.publish({0: (name, properties, b'b')})
    del line._heard
    with pytest.raises(ConnectionError, match='confirmed message 2 where 3 was due|NO_ROUTE'):
        line.publish({0: (name+'-gone', properties, b'c')})
    line.sock.close()
    theirs.close()

def test_a_job_that_kills_its_workers_is_dead(stage):
    job = stage.queue.tasks['die'].enqueue()
    for _ in range(6):
        worker = stage.worker()
        until(lambda: worker.popen.poll() is not None or stage.queue.get(job).state=='dead', 60)
        if stage.queue.get(job).state=='dead': break
    job = stage.queue.get(job)
    assert (job.state, job.crashes, job.error.type)==('dead', 4, 'WorkerLost')

def test_a_worker_that_is_told_to_stop_ends_its_job_first(stage):
    worker = stage.worker()
    job = stage.queue.tasks['survive'].enqueue('a')
    until(lambda: stage.lines('a'))
    worker.popen.send_signal(signal.SIGTERM)
    (stage.folder/'a.go').touch()
    assert stage.queue.result(job, timeout=30)==1
    assert worker.popen.wait(30)==0

# A broker that goes away

class Redis:
    "One that can be stopped and started, with all it had"
    def __init__(self, own, _): self.url,self.records,self.down,self.up = own.url,own.url,own.stop,own.start
    def close(self): pass

class RabbitMQ:
    "One behind a proxy: it is not ours to stop"
    def __init__(self, own, url):
        self.proxy = live.rabbit_proxy()
        self.url,self.records = live.rabbit_behind(self.proxy),own.url
        self.down,self.up,self.close = self.proxy.down,self.proxy.up,self.proxy.down

@pytest.fixture(params=[Redis, RabbitMQ])
def server(request, own_redis):
    url = request.getfixturevalue('rabbit_url') if request.param is RabbitMQ else None
    s = request.param(own_redis, url)
    yield s
    s.close()

@pytest.fixture
def shaky(server, workers, tmp_path):
    s = Stage(server.url, server.records, workers, tmp_path)
    yield s
    s.url = live.RABBIT if s.url.startswith('amqp') else s.url
    s.close()

def test_a_broker_that_is_down_is_told_and_leaves_nothing_behind(shaky, server):
    queue,once = shaky.queue,shaky.queue.tasks['once']
    once.enqueue('warm') # a connection that was good before
    server.down()
    start = time.monotonic()
    for act in (lambda: once.enqueue('a'), lambda: once.enqueue_many([('b',), ('c',)])):
        with pytest.raises(BackendUnavailable, match='reached'): act()
    assert time.monotonic()-start < 60 # for ever is what it must not be
    server.up()
    assert [e.kind for e in queue.store.events()]==['queued']
    job = until(lambda: tried(lambda: once.enqueue('d')))
    shaky.worker()
    queue.result(job, timeout=30)
    until(lambda: shaky.lines('warm'))
    assert [shaky.lines(o) for o in 'abcd']==[[], [], [], ['x']]

def tried(act):
    try: return act()
    except BackendUnavailable: pass

def test_a_broker_that_is_restarted_while_jobs_run_loses_none(shaky, server):
    survive = shaky.queue.tasks['survive']
    shaky.worker()
    jobs = [survive.enqueue(f'j{i}') for i in range(3)]+[survive.using(delay=1).enqueue('later')]
    until(lambda: all(shaky.lines(f'j{i}') for i in range(3)))
    server.down()
    for name in ('j0', 'j1', 'j2', 'later'): (shaky.folder/f'{name}.go').touch() # they end while it is away
    time.sleep(1)
    server.up()
    for job in jobs: assert shaky.queue.result(job, timeout=60) in (1, 2)
    assert shaky.queue.result(shaky.queue.tasks['checks.grow'].enqueue('x'), timeout=60)=='xx'
    assert [shaky.queue.get(j).state for j in jobs]==['succeeded']*4

def test_a_rabbitmq_that_hangs_is_told_in_the_end(own_redis, rabbit_url, workers, tmp_path):
    proxy = live.rabbit_proxy()
    stage = Stage(live.rabbit_behind(proxy), own_redis.url, workers, tmp_path)
    stage.queue.store._publisher.patience = 2 # so that the test need not wait for the usual nine
    once = stage.queue.tasks['once']
    once.enqueue('a')
    proxy.hang()
    try:
        with pytest.raises(BackendUnavailable): once.enqueue('b')
        assert [e.kind for e in stage.queue.store.events()]==['queued']
    finally:
        proxy.down()
        stage.url = live.RABBIT
        stage.close()

@pytest.mark.parametrize('early', [True, False])
def test_a_rabbitmq_that_confirms_nothing_is_told_and_each_job_runs_once(redis_url, rabbit_url, workers, tmp_path,
                                                                         early):
    proxy = live.rabbit_proxy(live.MuteProxy)
    stage = Stage(live.rabbit_behind(proxy), redis_url, workers, tmp_path)
    stage.broker.parameters.heartbeat = 2 # which it goes on sending
    stage.queue.store._publisher.patience,stage.url = 3,live.RABBIT
    live.not_confirmed(stage.queue, proxy, str(tmp_path/'said'), stage.worker, early)
    stage.close()
    proxy.down()

# From a file to Dramatiq

MOVE = """
import sys
from bgtasks.move import move
import dramatiq_app
print('moving', flush=True)
print(move(sys.argv[1], dramatiq_app.queue, batch=5))
"""

def test_a_move_that_is_killed_is_ended_by_the_next_and_each_job_runs_once(stage, tmp_path):
    file = str(tmp_path/'tasks.db')
    with TaskQueue(file) as old:
        def once(mark:str): raise AssertionError('the file has no worker')
        jobs = old.task(once, name='once', queue=stage.name).enqueue_many([(f'm{i}',) for i in range(300)])
    env,stopped = stage.environ(),0
    for n in range(40):
        p = live.Process(sys.executable, '-c', MOVE, file, env=env)
        until(lambda: 'moving' in p.said() or p.popen.poll() is not None, every=.005)
        time.sleep(.005*1.3**n) # each is given longer, so that on a slow machine, too, the last one comes to the end
        ended = p.popen.poll()
        p.kill()
        if ended is not None: break
        stopped = n+1
    assert stopped > 1 and ended==0
    stage.worker()
    for job in jobs: stage.queue.result(job, timeout=60)
    assert [stage.lines(f'm{i}') for i in range(300)]==[['x']]*300
    with TaskQueue(file) as old: assert {old.get(j).error.type for j in jobs}=={'Moved'}
