"Celery as a backend, on real servers and with real workers in their own processes."
import os, signal, sys, threading, time

import pytest
import redis
from kombu import Queue
from kombu.exceptions import ChannelError
from live import (GREEN, RABBIT, MuteProxy, forget_queues, green_workers, not_confirmed, rabbit_behind, rabbit_line,
                  rabbit_proxy, script, unique, until)

from bgtasks.backends import celery
from bgtasks.conform import check_backend
from bgtasks.errors import BackendUnavailable, BadOption
from bgtasks.message import message_of

class Site:
    "The app of the checks, here as it is in its workers"
    def __init__(self, workers, monkeypatch, tmp_path, broker, records, **more):
        self.env = dict(CHECK_BROKER=broker, CHECK_RECORDS=records, CHECK_PREFIX=unique(),
                        BGTASKS_CHECK_DIR=str(tmp_path), **{f'CHECK_{k.upper()}': str(v) for k,v in more.items()})
        for k,v in self.env.items(): monkeypatch.setenv(k, v)
        sys.modules.pop('celery_checks', None)
        import celery_checks
        self.app,self.queue,self.wrapped = celery_checks.app,celery_checks.queue,celery_checks.wrapped
        self.workers,self.dir = workers,tmp_path

    def task(self, name): return self.queue.tasks[f'checks.{name}']

    def worker(self, *args, n=2):
        name = unique()+'@%h' # else a worker of somebody else may have the same name at the broker
        args = 'worker', '-c', str(n), '-n', name, '--without-gossip', '--without-mingle', '-l', 'INFO', *args
        return self.workers(script('celery'), '-A', 'celery_checks', *args, env=self.env).ready('ready.')

    def beat(self): return self.workers(script('celery'), '-A', 'celery_checks', 'beat', '-s', str(self.dir/'beat'),
                                        env=self.env)

    def lines(self, path): return path.read_text().splitlines() if path.exists() else []

    def close(self):
        self.app.close()
        self.queue.close()
        self.wrapped.close()

@pytest.fixture
def site(workers, monkeypatch, tmp_path):
    made = []
    def make(broker, records, **more):
        made.append(s := Site(workers, monkeypatch, tmp_path, broker, records, **more))
        return s
    yield make
    for s in made: s.close()

@pytest.fixture(params=['redis', 'rabbit'])
def everywhere(request, site, redis_url):
    "A function that makes the checks, on each broker; the queues in RabbitMQ are deleted again"
    if request.param=='redis': yield lambda records=redis_url, **more: site(redis_url, records, **more)
    else:
        url,made = request.getfixturevalue('rabbit_url'),[]
        def make(records=redis_url, **more):
            made.append(s := site(url, records, **more))
            return s
        yield make
        for s in made:
            for p in s.workers.started: p.end()
            forget_queues([s.env['CHECK_PREFIX']+o for o in ('default', 'default.dead', 'celery')])

@pytest.fixture
def anywhere(everywhere): return everywhere()

def test_it_keeps_its_promises(anywhere):
    anywhere.worker()
    anywhere.beat()
    kept = check_backend(anywhere.queue, wrapped=anywhere.wrapped, slots=2, patience=30)
    assert len(kept) > 20

@pytest.mark.parametrize('pool,slots', [('threads', 2), ('solo', 1)])
def test_other_pools_keep_them_too(site, redis_url, pool, slots):
    s = site(redis_url, redis_url)
    s.worker('--pool', pool, n=slots)
    s.beat()
    assert len(check_backend(s.queue, wrapped=s.wrapped, slots=slots, patience=30)) > 20

def test_a_time_limit_of_a_worker_is_refused(site, redis_url):
    s = site(redis_url, redis_url)
    limited = s.workers(script('celery'), '-A', 'celery_checks', 'worker', '--time-limit', '9', env=s.env)
    until(lambda: limited.popen.poll() is not None, 60)
    assert limited.popen.returncode and 'give timeout= to the tasks instead' in limited.said()

def test_green_threads_are_refused_where_they_would_run_our_jobs(site, redis_url):
    pytest.importorskip('gevent')
    s = site(redis_url, redis_url)
    def green(*args): return s.workers(script('celery'), '-A', 'celery_checks', 'worker', '--pool', 'gevent',
                                       '-n', unique()+'@%h', '-l', 'INFO', *args, env=s.env)
    green_workers(green(), green('-Q', 'of-the-app-itself'), '--pool threads -c 50', 'ready.')

def test_an_app_on_green_threads_hands_in_jobs_and_gets_results(anywhere):
    pytest.importorskip('gevent')
    anywhere.worker()
    anywhere.workers(sys.executable, '-c', GREEN, 'celery_checks', env=anywhere.env).ready('True')

def test_a_worker_that_is_killed_loses_no_job(anywhere, tmp_path):
    path = tmp_path/'hold'
    threads = ['--pool', 'threads'] if anywhere.env['CHECK_BROKER'].startswith('amqp') else []
    worker = anywhere.worker(*threads)
    job = anywhere.task('hold').enqueue(str(path))
    pid = until(lambda: [int(o) for o in anywhere.lines(tmp_path/'hold.held')])[0]
    if pid != worker.popen.pid: os.kill(pid, signal.SIGKILL) # a child of the pool: its parent sees to it
    else:
        worker.kill()
        anywhere.worker()
    until(lambda: len(anywhere.lines(tmp_path/'hold.held')) > 1)
    path.touch()
    assert anywhere.queue.result(job, 30) is None
    job = anywhere.queue.get(job)
    assert (job.state, job.attempt, job.tries, job.crashes)==('succeeded', 2, 1, 1)

def test_a_job_that_no_worker_knows_is_dead_and_can_be_tried_again(anywhere):
    worker = anywhere.worker()
    job = anywhere.queue.task(name='late', queue=anywhere.env['CHECK_PREFIX']+'default')(print).enqueue()
    until(lambda: anywhere.queue.get(job).state=='dead')
    assert "no task 'late'" in anywhere.queue.get(job).error.message and worker.popen.poll() is None
    assert anywhere.queue.retry(job).state=='queued'

def test_without_records_the_message_of_a_job_that_no_worker_knows_is_kept(everywhere):
    s = everywhere(records='')
    s.worker()
    where = s.env['CHECK_PREFIX']+'default'
    s.queue.task(name='late', queue=where)(print).enqueue('kept')
    def kept():
        with s.app.connection_for_read() as line: return Queue(where+'.dead')(line.channel()).get(no_ack=True)
    until(lambda: tried(lambda: 'kept' in str((m := kept()) and m.payload)))

def tried(act):
    try: return act()
    except ChannelError: return # RabbitMQ has no such queue yet

def test_a_job_that_is_recorded_is_sent_in_the_end(everywhere):
    s = everywhere(late=1, sweeps=.5)
    call = s.task('grow').call(('a',))
    s.queue.store.records.add([message_of(call, time.time())]) # as an app leaves it that is killed before it sends
    s.worker()
    assert s.queue.result(call.id, 40)=='aa'

def test_a_message_that_redis_has_given_away_is_sent_again(site, redis_url):
    s = site(redis_url, redis_url, late=1, sweeps=.5)
    jobs = [s.task('grow').enqueue(str(i)) for i in range(3)]
    broker = redis.Redis.from_url(redis_url)
    for _ in 'two': broker.rpop(s.env['CHECK_PREFIX']+'default') # popped by a worker that dies before it notes them
    assert broker.llen(s.env['CHECK_PREFIX']+'default')==0
    s.worker()
    assert [s.queue.result(j, 40) for j in jobs]==['00', '11', '22']
    assert [s.queue.get(j).attempt for j in jobs]==[1]*3

def test_a_job_of_a_dead_worker_does_not_wait_for_the_visibility_timeout(site, redis_url, tmp_path):
    s = site(redis_url, redis_url, lease=2, sweeps=.5)
    worker = s.worker(n=1)
    job = s.task('hold').enqueue(str(tmp_path/'hold'))
    until(lambda: s.lines(tmp_path/'hold.held'))
    worker.kill()
    s.worker(n=1)
    (tmp_path/'hold').touch()
    assert s.queue.result(job, 60) is None
    assert (s.queue.get(job).crashes, s.app.conf.broker_transport_options['visibility_timeout'])==(1, 300)

def test_a_queue_that_another_engine_has_is_told(site, rabbit_url, redis_url):
    s = site(rabbit_url, redis_url)
    line = rabbit_line()
    line.channel().queue_declare(name := s.env['CHECK_PREFIX']+'default', durable=True)
    was = s.queue.store.last_event()
    with pytest.raises(BadOption, match='Another engine'): s.task('grow').enqueue('a')
    assert s.queue.store.events(was)==[]
    line.close()
    forget_queues([name])

def test_messages_may_be_compressed(site, redis_url):
    s = site(redis_url, redis_url)
    s.app.conf.task_compression = 'gzip'
    s.worker()
    jobs = [s.task('grow').enqueue('a') for _ in range(3)]
    assert [s.queue.result(j, 30) for j in jobs]==['aa']*3

def test_redis_gives_the_messages_of_a_dead_worker_to_another(site, redis_url, tmp_path):
    s = site(redis_url, redis_url, visible=3)
    path = tmp_path/'hold'
    worker = s.worker(n=1)
    job = s.task('hold').enqueue(str(path))
    until(lambda: s.lines(tmp_path/'hold.held'))
    worker.kill()
    s.worker(n=1)
    path.touch()
    assert s.queue.result(job, 40) is None
    assert s.queue.get(job).crashes==1

def test_a_job_longer_than_the_visibility_timeout_runs_once(site, redis_url, tmp_path):
    s = site(redis_url, redis_url, visible=2)
    s.worker()
    job = s.task('asleep').enqueue(str(tmp_path/'a'), 6)
    s.queue.result(job, 30)
    assert (s.queue.get(job).attempt, s.lines(tmp_path/'a'))==(1, ['begun', 'through'])
    delayed = s.task('say').using(delay=5).enqueue(str(tmp_path/'b'), 'x')
    s.queue.result(delayed, 30)
    assert (s.queue.get(delayed).attempt, s.lines(tmp_path/'b'))==(1, ['x'])

def test_a_broker_that_is_down_is_told_soon(site, own_redis):
    s = site(own_redis.url, own_redis.url)
    kept = s.task('grow').enqueue('a')
    own_redis.stop()
    start = time.monotonic()
    for act in (lambda: s.task('grow').enqueue('b'), lambda: s.queue.get(kept)):
        with pytest.raises(BackendUnavailable): act()
    assert time.monotonic()-start < 20
    own_redis.start()
    s.worker()
    assert s.queue.result(kept, 30)=='aa'
    assert [e.job for e in s.queue.store.events() if e.kind=='queued']==[kept.id]

def test_a_broker_that_is_down_leaves_no_record(site, own_redis, redis_url):
    s = site(own_redis.url, redis_url)
    was = s.queue.store.last_event()
    own_redis.stop()
    with pytest.raises(BackendUnavailable, match='nothing was sent'): s.task('single').enqueue('k')
    with pytest.raises(BackendUnavailable): s.task('grow').enqueue_many([('a',), ('b',)])
    assert s.queue.store.events(was)==[]
    own_redis.start()
    s.worker()
    assert s.queue.result(s.task('single').enqueue(str(s.dir/'k')), 30)[5].startswith('checks:')

def test_a_broker_that_restarts_while_jobs_run(site, own_redis, tmp_path):
    s = site(own_redis.url, own_redis.url, visible=5)
    worker = s.worker()
    running = s.task('asleep').enqueue(str(tmp_path/'a'), 3)
    until(lambda: s.lines(tmp_path/'a'))
    waiting = s.task('say').using(delay=2).enqueue(str(tmp_path/'b'), 'x')
    until(lambda: own_redis.client().hlen('unacked')==2) # kombu first pops a message, and then notes that it has it
    own_redis.stop()
    time.sleep(1)
    own_redis.start()
    jobs = running,waiting,s.task('grow').enqueue('a')
    def all_ended():
        nonlocal worker
        if 'Unrecoverable error' in worker.said(): # kombu 5.7 may trip over its closed connection
            worker.kill()
            worker = s.worker()
        return all(s.queue.get(j).finished_at for j in jobs)
    until(all_ended, 60)
    assert [s.queue.get(j).state for j in jobs]==['succeeded']*3
    assert (s.lines(tmp_path/'b'), s.lines(tmp_path/'a')[-1])==(['x'], 'through')

@pytest.fixture
def behind_proxy(request, site, rabbit_url, redis_url):
    "The checks on a RabbitMQ behind a proxy, and that"
    proxy = rabbit_proxy(getattr(request, 'param', None))
    s = site(rabbit_behind(proxy), redis_url)
    yield s,proxy
    for p in s.workers.started: p.end()
    proxy.down()
    forget_queues([s.env['CHECK_PREFIX']+o for o in ('default', 'celery')])

@pytest.mark.parametrize('trouble', ['down', 'hang'])
def test_a_rabbitmq_that_is_down_or_hangs_is_told_and_leaves_no_record(behind_proxy, trouble):
    s,proxy = behind_proxy
    s.task('grow').enqueue('a') # a connection that was good before
    was,told = s.queue.store.last_event(),[]
    getattr(proxy, trouble)()
    def act():
        try: s.task('grow').enqueue('b')
        except BackendUnavailable as e: told.append(e)
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(60) # for ever is what it must not be
    assert (len(told), s.queue.store.events(was))==(1, [])

@pytest.mark.parametrize('behind_proxy', [MuteProxy], indirect=True)
@pytest.mark.parametrize('early', [True, False])
def test_a_rabbitmq_that_confirms_nothing_is_told_and_each_job_runs_once(behind_proxy, tmp_path, monkeypatch, early):
    s,proxy = behind_proxy
    monkeypatch.setattr(celery, '_patience', 1) # three times that for each try
    s.env['CHECK_BROKER'] = RABBIT
    not_confirmed(s.queue, proxy, str(tmp_path/'said'), s.worker, early)

def test_a_rabbitmq_that_is_away_while_jobs_run_loses_none(behind_proxy, tmp_path):
    s,proxy = behind_proxy
    s.worker()
    job,later = s.task('hold').enqueue(str(tmp_path/'hold')),s.task('grow').using(delay=3).enqueue('b')
    until(lambda: s.lines(tmp_path/'hold.held'))
    proxy.down()
    (tmp_path/'hold').touch() # it ends while RabbitMQ is away
    time.sleep(1)
    proxy.up()
    assert (s.queue.result(job, 60), s.queue.result(later, 60))==(None, 'bb')
    assert s.queue.result(s.task('grow').enqueue('c'), 60)=='cc'
