"Dramatiq with real brokers and real worker processes: what it promises, and what it does when something breaks."
import os, signal, socket, subprocess, sys, threading, time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import dramatiq_app
import live
import pytest
from live import until

from bgtasks import TaskQueue
from bgtasks.conform import check_backend
from bgtasks.errors import BackendUnavailable
from bgtasks.job import State

class Stage:
    "An app and its workers on one broker"
    def __init__(self, broker_url, records, workers, folder):
        self.url,self.records,self.start,self.folder,self.name = broker_url,records,workers,folder,live.unique()+'q'
        self.broker = dramatiq_app.make_broker(broker_url)
        self.queue,self.wrapped = dramatiq_app.declare(self.broker, records, self.name, str(folder))

    def worker(self, *more):
        env = dict(BGTASKS_TEST_BROKER=self.url, BGTASKS_TEST_RECORDS=self.records, BGTASKS_TEST_QUEUE=self.name,
                   BGTASKS_CHECK_DIR=str(self.folder))
        args = sys.executable, '-m', 'dramatiq', 'dramatiq_app', '-p', '1', '-t', '4', '-Q', self.name, *more
        return self.start(*args, env=env).ready('is ready for action')

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
