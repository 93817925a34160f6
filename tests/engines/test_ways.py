"The ways to a Redis: a user with a password and a database, a socket, TLS, and sentinels that know where it is."
import json

import pytest
import redis
import trustme
from live import OwnRedis, Sentinel, free_port, redis_with_tls
from test_celery import site # noqa: F401
from test_dramatiq import Stage

from bgtasks.errors import JobCancelled

WAYS = 'user', 'socket', 'tls', 'sentinel'

class Way:
    "A Redis, its URL as Dramatiq takes it, and the settings of a Celery app that keeps its messages and results there"
    def __init__(self, own, url, theirs=None, **conf):
        self.own,self.url = own,url
        self.conf = dict(broker_url=theirs or url, result_backend=theirs or url) | conf

    def names(self, db): return redis.Redis(port=self.own.port, db=db, password=self.own.password).keys()

@pytest.fixture(params=WAYS)
def way(request, tmp_path):
    made,rights = [],('~*', '&*', '+@all')
    def own(*more, **kw):
        users = [o for k,v in dict(default='hush', bob='pw').items() for o in ('--user', k, 'on', f'>{v}', *rights)]
        made.append(res := OwnRedis(*users, *more, password='hush', **kw))
        return res
    def user(): return Way(o := own(), f'redis://bob:pw@127.0.0.1:{o.port}/3')
    def socket():
        path = f'{tmp_path}/redis'
        url = f'unix://bob:pw@{path}?db=3'
        return Way(own('--unixsocket', path), url, f'redis+socket://bob:pw@{path}?virtual_host=3')
    def tls():
        if not (program := redis_with_tls()): pytest.skip('no redis-server of this machine can do TLS')
        (ca := trustme.CA()).cert_pem.write_to_path(f'{tmp_path}/ca')
        (cert := ca.issue_cert('127.0.0.1')).private_key_and_cert_chain_pem.write_to_path(f'{tmp_path}/cert')
        files = dict(cert='cert', key='cert', ca_cert='ca')
        more = [o for k,v in files.items() for o in (f'--tls-{k.replace("_", "-")}-file', f'{tmp_path}/{v}')]
        own('--tls-port', str(port := free_port()), '--tls-auth-clients', 'no', *more, program=program)
        url = f'rediss://bob:pw@127.0.0.1:{port}/3?ssl_ca_certs={tmp_path}/ca'
        return Way(made[0], url, f'{url}&ssl_cert_reqs=CERT_REQUIRED')
    def sentinel():
        made.append(master := OwnRedis())
        made.append(s := Sentinel(master))
        named = dict(master_name='shop')
        return Way(master, f'sentinel://127.0.0.1:{s.port}/3', broker_transport_options=named,
                   result_backend_transport_options=named)
    yield locals()[request.param]()
    for o in reversed(made): o.close()

def all_goes_well(queue, path, way):
    grow,single = queue.tasks['checks.grow'],queue.tasks['checks.single']
    assert [queue.result(j, 40) for j in grow.enqueue_many([('a',), ('b',)])]==['aa', 'bb']
    first = single.using(delay=1).enqueue(str(path))
    assert single.enqueue(str(path)).id==first.id
    queue.result(first, 30)
    queue.cancel(late := grow.using(delay=60).enqueue('c'), 'no more')
    with pytest.raises(JobCancelled): queue.result(late, 5)
    assert way.names(3) and not way.names(0)

def test_celery_goes_this_way(way, site, tmp_path):
    s = site(way.conf['broker_url'], 'app', conf=json.dumps(way.conf))
    s.worker()
    all_goes_well(s.queue, tmp_path/'k', way)

def test_dramatiq_goes_this_way(way, workers, tmp_path):
    stage = Stage(way.url, '', workers, tmp_path)
    stage.worker()
    all_goes_well(stage.queue, tmp_path/'k', way)
    stage.close()
