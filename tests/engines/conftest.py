"Servers for the tests of the engines: those of this machine, else what PyPI has."
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import live

@pytest.fixture(scope='session')
def redis_url():
    "A database in a real Redis, for this run alone"
    with live.any_redis() as url: yield url

@pytest.fixture
def own_redis():
    "A Redis that the test may stop and start"
    own = live.OwnRedis()
    try: yield own
    finally: own.close()

@pytest.fixture(scope='session')
def rabbit_url():
    "A real RabbitMQ; without one the test is skipped, and says why"
    if why := live.no_rabbit(): pytest.skip(why)
    return live.RABBIT

@pytest.fixture
def workers():
    "Start processes with `workers(*args, env=…)`; all end with the test"
    started = []
    def start(*args, **kwargs):
        started.append(p := live.Process(*args, **kwargs))
        return p
    start.started = started
    yield start
    for p in started: p.end()
