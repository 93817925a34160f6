"`bgtasks.web` over real HTTP on loopback: status, events over SSE and WebSocket, who may see what, and bad input."
import json, os, re, signal, socket, subprocess, sys, threading, time
from contextlib import contextmanager

import apsw, httpx2, pytest, uvicorn
from starlette.exceptions import HTTPException
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

import web_app
from bgtasks.server import Server

@contextmanager
def serving(app):
    "A real server in a thread of this process; all its streams must have ended before it"
    with socket.create_server(('127.0.0.1', 0), backlog=500) as sock:
        config = uvicorn.Config(app, log_level='critical', timeout_graceful_shutdown=5)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs=dict(sockets=[sock]))
        thread.start()
        try:
            with httpx2.Client(base_url=f'http://127.0.0.1:{sock.getsockname()[1]}', timeout=30) as client: yield client
        finally:
            server.should_exit = True
            thread.join()

def soon(ready, seconds=20):
    "Wait until `ready()` is true, and give what it gave"
    end = time.monotonic()+seconds
    while not (res := ready()) and time.monotonic() < end: time.sleep(.02)
    return res

def start(client, **kw):
    "Start a job; give the address it can be seen at"
    answer = client.post('/start', params=kw)
    assert answer.status_code==202
    return answer.headers['location']

def go(client, n=1): assert client.post('/go', params=dict(n=n)).status_code==200

class Sse:
    "What comes over a stream, one event after the other"
    def __init__(self, resp): self.resp,self.lines,self.raw = resp,resp.iter_lines(),[]

    def __iter__(self):
        event = {}
        for line in self.lines:
            self.raw.append(line)
            if line.startswith(':'): continue
            if line:
                k,v = line.split(': ', 1)
                event[k] = v
            elif 'data' in event:
                event['data'] = json.loads(event['data'])
                yield event
                event = {}

@contextmanager
def stream(client, url, last=None, **kw):
    headers = dict(kw.pop('headers', {})) | ({} if last is None else {'Last-Event-ID': str(last)})
    with client.stream('GET', url, headers=headers, **kw) as resp:
        assert resp.status_code==200 and resp.headers['content-type'].startswith('text/event-stream')
        yield Sse(resp)

def take(events, n):
    it = iter(events)
    return [next(it) for _ in range(n)]

def kinds(events): return [e['event'] for e in events]

@pytest.fixture
def app(tmp_path): return web_app.starlette(tmp_path/'q.db', heartbeat=.2)

@pytest.fixture
def client(app):
    with serving(app) as client: yield client

# One job

@pytest.mark.parametrize('make', [web_app.starlette, web_app.fastapi, web_app.fasthtml])
def test_from_202_to_the_result(make, tmp_path):
    with serving(make(tmp_path/'q.db')) as client:
        answer = client.post('/start?n=2')
        url = answer.headers['location']
        assert (answer.status_code, answer.headers['retry-after'])==(202, '1')
        assert answer.json()['url']==url and answer.json()['state']=='queued' and client.get(url).json()['id'] in url
        with stream(client, answer.json()['events']) as events:
            go(client, 2)
            seen = list(events)
        assert seen[0]['event']=='job' and kinds(seen)[-1]=='succeeded'
        got = client.get(url).json()
        assert (got['state'], got['result'], got['error'])==('succeeded', '2 steps', None)
        for o,kind in (('script', 'text/javascript'), ('style', 'text/css')):
            assert client.get(f'/jobs/{o}').headers['content-type'].startswith(kind)

def test_a_failure_is_told_without_what_is_private(client):
    url = start(client, n=0, fail='no such row', text='s3cret')
    assert soon(lambda: client.get(url).json()['state']=='dead')
    got = client.get(url)
    assert got.json()['error']==dict(type='ValueError', message='no such row')
    told = client.get(f'{url}/events?after=0')
    assert told.text.count('no such row')==1
    for o in (got, told): assert not any(s in o.text for s in ('s3cret', 'Traceback', 'web_app.py'))

def test_what_is_known_already_is_not_sent_again(client):
    url = start(client, n=1)
    assert soon(lambda: client.get(url).json()['state']=='running')
    old = client.get(url)
    tag = old.headers['etag']
    for match in (tag, f'W/{tag}', f'"x", {tag}', '*'):
        again = client.get(url, headers={'If-None-Match': match})
        assert (again.status_code, again.content, again.headers['etag'])==(304, b'', tag)
    assert client.get(url, headers={'If-None-Match': '"x"'}).status_code==200
    assert client.head(url).headers['etag']==tag and client.head(url).content==b''
    html = client.get(url, headers={'Accept': 'text/html', 'If-None-Match': tag})
    assert html.status_code==200 and html.headers['vary']=='Accept'
    go(client)
    assert soon(lambda: client.get(url, headers={'If-None-Match': tag}).status_code==200)

@pytest.mark.parametrize('accept,html', [
    (None, False), ('*/*', False), ('text/html', True), ('application/json', False), ('TEXT/HTML;q=0.9', True),
    ('text/html,application/xhtml+xml,*/*;q=0.8', True), ('text/html;q=0.2, application/json;q=0.9', False),
    ('text/html;q=x', False), (b'text/html;q=\xb2', False), ('', False), (';;,,', False)])
def test_html_for_those_who_like_it(client, accept, html):
    url = start(client)
    got = client.get(url, headers={} if accept is None else {'Accept': accept})
    assert got.status_code==200 and got.text.startswith('<job-status')==html
    assert got.headers['content-type'].startswith('text/html' if html else 'application/json')

def test_cancel(client):
    url = start(client)
    assert soon(lambda: client.get(url).json()['state']=='running')
    with stream(client, f'{url}/events') as events:
        gone = client.delete(url)
        assert (gone.status_code, gone.json()['state'])==(200, 'cancelled')
        assert kinds(events)[-1]=='cancelled'
    assert client.delete(url).status_code==200
    done = start(client, n=0)
    assert soon(lambda: client.get(done).json()['state']=='succeeded')
    late = client.delete(done)
    assert (late.status_code, late.json()['state'])==(409, 'succeeded')

# Events

def test_two_readers_see_the_same_through_one_reader_of_the_log(client):
    url = start(client, n=3)
    assert soon(lambda: client.get(url).json()['state']=='running')
    events = f'{url}/events'
    with stream(client, events) as a, stream(client, events) as b, stream(client, '/jobs/events'):
        first = [take(o, 1)[0] for o in (a, b)]
        assert kinds(first)==['job', 'job'] and first[0]['data']['data']['state'] in ('queued', 'running')
        assert soon(lambda: client.get('/stats').json()['readers']==3)
        assert client.get('/stats').json()['feeds']==[True]
        for n in range(1, 4): # of two reports in a tenth of a second one is written
            go(client)
            assert soon(lambda: (client.get(url).json()['progress'] or {}).get('done')==n)
        seen = [list(a), list(b)]
    wanted = ['progress']*3+['succeeded']
    assert kinds(seen[0])==wanted and seen[0]==seen[1]
    ids = [int(e['id']) for e in seen[0]]
    assert ids==sorted(set(ids)) and all(int(e['id'])==e['data']['id'] for e in seen[0])
    assert seen[0][-2]['data']['data']==dict(done=3, total=3, message='step 3')
    assert soon(lambda: client.get('/stats').json()==dict(readers=0, dropped=0, shown=[], follows=[], feeds=[]))

def test_who_comes_back_has_missed_nothing(client):
    url = start(client, n=4)
    with stream(client, f'{url}/events', last=0) as events: seen = take(events, 2)
    go(client, 4)
    assert soon(lambda: client.get(url).json()['state']=='succeeded')
    with stream(client, f'{url}/events', last=seen[-1]['id']) as events: rest = list(events)
    with stream(client, f'{url}/events?after={seen[-1]["id"]}') as events: assert list(events)==rest
    with stream(client, f'{url}/events', last=0) as events: assert list(events)==seen+rest
    assert kinds(seen+rest)[:2]==['queued', 'running'] and kinds(rest)[-1]=='succeeded'
    # and who has seen the end is told not to come again
    over = client.get(f'{url}/events', headers={'Last-Event-ID': rest[-1]['id']})
    assert (over.status_code, over.content)==(204, b'')
    with stream(client, f'{url}/events') as events: assert kinds(events)==['job']

def test_a_quiet_stream_shows_that_it_lives(client):
    url = start(client)
    with stream(client, f'{url}/events') as events:
        for line in events.lines:
            events.raw.append(line)
            if events.raw.count(': alive')==2: break
    at = events.raw.index(': alive')
    assert re.fullmatch(r'id: \d+', events.raw[at+1]) and events.raw[at+2]==''

def test_several_jobs_in_one_stream(client):
    a,b,c = (start(client, n=1) for _ in range(3))
    ids = [o.rpartition('/')[2] for o in (a, b)]
    with stream(client, f'/jobs/events?job={ids[0]}&job={ids[1]}') as events:
        seen = take(events, 2)
        assert (kinds(seen), [e['data']['job'] for e in seen])==(['job', 'job'], ids)
        assert seen[0]['data']['data']['url']==a
        go(client, 3)
        rest = list(events) # it ends when both have ended
    assert {e['data']['job'] for e in rest}==set(ids) and kinds(rest).count('succeeded')==2

def test_all_jobs(client):
    with stream(client, '/jobs/events') as events:
        a,b = start(client, n=0),start(client, n=0)
        seen = []
        for e in events:
            seen.append(e)
            if kinds(seen).count('succeeded')==2: break
    assert {e['data']['job'] for e in seen}=={o.rpartition('/')[2] for o in (a, b)}

@pytest.mark.parametrize('make', ['starlette', 'fastapi', 'fasthtml'])
def test_a_websocket_has_the_same_messages(make, tmp_path):
    with serving(getattr(web_app, make)(tmp_path/'q.db')) as client:
        url = start(client, n=2)
        at = str(client.base_url).rstrip('/').replace('http', 'ws')+f'{url}/events'
        with stream(client, f'{url}/events') as events, connect(at) as ws:
            first = json.loads(ws.recv(20))
            assert first['kind']=='job' and first['data']['url']==url
            go(client, 2)
            messages = [first]
            with pytest.raises(ConnectionClosed) as end:
                while True: messages.append(json.loads(ws.recv(20)))
            assert end.value.rcvd.code==1000
            theirs = [e['data'] for e in events]
        drop = ('running',) # that one may lie before the first look of the one and after that of the other
        assert [m for m in messages[1:] if m['kind'] not in drop]==[m for m in theirs[1:] if m['kind'] not in drop]
        with connect(f'{at}?after=0') as ws:
            again = []
            with pytest.raises(ConnectionClosed):
                while True: again.append(json.loads(ws.recv(20)))
        assert [m['kind'] for m in again][:2]==['queued', 'running'] and again[-1]==messages[-1]

def test_a_websocket_that_talks_or_leaves_does_no_harm(app):
    over = []
    async def watched(scope, receive, send):
        try: await app(scope, receive, send)
        except Exception as e: over.append(e); raise
        else:
            if scope['type']=='websocket': over.append(None)
    with serving(watched) as client:
        url = start(client)
        at = str(client.base_url).rstrip('/').replace('http', 'ws')+f'{url}/events'
        with connect(at) as ws:
            ws.recv(20)
            for text in ('hello', b'\0', '{}'): ws.send(text)
            assert client.get('/stats').json()['readers']==1
        assert soon(lambda: over)==[None]
        assert client.get('/stats').json()['readers']==0

@pytest.mark.parametrize('wrap', [False, True])
def test_a_reader_that_leaves_is_forgotten(tmp_path, wrap):
    "`wrap`: below GZipMiddleware and BaseHTTPMiddleware"
    with serving(web_app.starlette(tmp_path/'q.db', wrap=wrap)) as client:
        url = start(client)
        with stream(client, f'{url}/events') as events:
            take(events, 1)
            assert client.get('/stats').json()['readers']==1
            go(client)
            while take(events, 1)[0]['event']!='progress': pass
        assert soon(lambda: client.get('/stats').json()['readers']==0)

def mute(client, path, ask='GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n'):
    "A reader that asks and then reads nothing"
    s = socket.socket()
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    s.connect((client.base_url.host, client.base_url.port))
    s.sendall((ask % path).encode())
    return s

def test_a_reader_that_does_not_read_is_dropped(tmp_path):
    app = web_app.starlette(tmp_path/'q.db', stall=.5, logs=True)
    store = app.state.o.queue.store
    with serving(app) as client:
        url = start(client, n=1)
        upgrade = ('GET %s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n'
                   'Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n')
        assert soon(lambda: client.get(url).json()['state']=='running')
        job = store.get(url.rpartition('/')[2])
        with mute(client, '/jobs/events') as slow, mute(client, f'{url}/events', upgrade) as ws:
            assert soon(lambda: client.get('/stats').json()['readers']==2)
            with stream(client, f'{url}/events') as events:
                got = threading.Thread(target=lambda: seen.extend(events))
                seen = []
                got.start()
                for _ in range(20): store.log([(job.seq, job.attempt, 'INFO', 'x'*4000)]*100) # 8 MB
                assert soon(lambda: client.get('/stats').json()['dropped']==2)
                go(client)
                got.join()
            assert kinds(seen).count('log')==2000 and kinds(seen)[-1]=='succeeded' # nobody else has missed anything
            assert soon(lambda: client.get('/stats').json()['readers']==0)
            slow.settimeout(20)
            while len(part := slow.recv(1<<20)): last = part
            assert not last.endswith(b'0\r\n\r\n') # what it finds at last is a stream that broke off
        # it comes back with what it has seen, and there is the rest
        with stream(client, f'{url}/events', last=seen[1000]['id']) as events: assert list(events)==seen[1001:]

def test_who_looks_does_not_wait_for_who_writes(tmp_path):
    "Another process holds the file's lock for writing: what is to be written waits, what is asked is answered"
    with serving(web_app.starlette(tmp_path/'q.db')) as client:
        url = start(client)
        assert soon(lambda: client.get(url).json()['state']=='running')
        with stream(client, f'{url}/events') as events:
            take(events, 1)
            other = apsw.Connection(str(tmp_path/'q.db'))
            other.execute('BEGIN IMMEDIATE')
            late = threading.Thread(target=start, args=(client,))
            late.start()
            time.sleep(.2)
            for ask in (url, f'{url}/events?after=0', f'/jobs/events?job={url[6:]}'):
                with client.stream('GET', ask) as resp: assert resp.status_code==200 and next(resp.iter_bytes())
                assert late.is_alive()
            other.execute('COMMIT')
            late.join()

# The server

def test_a_server_killed_in_mid_stream_loses_nothing(tmp_path):
    server = Server('web_app:starlette', path=str(tmp_path/'q.db')).start()
    try:
        with httpx2.Client(base_url=server.url) as client:
            url = start(client, n=3)
            with stream(client, f'{url}/events', last=0) as events:
                go(client)
                seen = take(events, 3)
                os.kill(server.pid, signal.SIGKILL)
                with pytest.raises(httpx2.HTTPError): list(events)
        server.stop()
        with httpx2.Client(base_url=server.start().url) as client:
            with stream(client, f'{url}/events', last=seen[-1]['id']) as events:
                go(client, 3)
                rest = list(events)
            with stream(client, f'{url}/events', last=0) as events: assert list(events)==seen+rest
        assert kinds(seen)==['queued', 'running', 'progress'] and kinds(rest)[-1]=='succeeded'
        assert 'queued' in kinds(rest) # the crash is part of the story
    finally: server.stop()

@pytest.mark.parametrize('sig', [signal.SIGTERM, signal.SIGINT])
def test_open_streams_do_not_keep_a_server_from_stopping(tmp_path, sig):
    code = ('import sys, uvicorn, web_app; uvicorn.run(web_app.starlette(sys.argv[1]), fd=int(sys.argv[2]), '
            'log_level="warning")')
    with socket.create_server(('127.0.0.1', 0)) as sock:
        here = os.path.dirname(web_app.__file__)
        env = os.environ | {'PYTHONPATH': os.pathsep.join([here, *sys.path])}
        proc = subprocess.Popen([sys.executable, '-c', code, tmp_path/'q.db', str(sock.fileno())], env=env,
                                pass_fds=[sock.fileno()], stderr=subprocess.PIPE, text=True)
        url = f'http://127.0.0.1:{sock.getsockname()[1]}'
    try:
        with httpx2.Client(base_url=url, timeout=30) as client:
            job = start(client)
            assert soon(lambda: client.get(job).json()['state']=='running')
            with stream(client, f'{job}/events') as events, connect(f'{url.replace("http", "ws")}{job}/events') as ws:
                take(events, 1), ws.recv(20)
                proc.send_signal(sig)
                list(events) # a stream that ends in order
                with pytest.raises(ConnectionClosed) as end:
                    while True: ws.recv(20)
                assert end.value.rcvd.code==1012
        assert 'Traceback' not in proc.communicate(timeout=30)[1]
    finally: proc.kill()
    # the worker has had its time to hand the job back: that is no crash
    job = web_app.queue_at(tmp_path/'q.db')[0].get(job.rpartition('/')[2])
    assert (job.state, job.crashes)==('queued', 0)

# Who may see what

@pytest.mark.parametrize('auth', ['sync', 'later'])
def test_a_job_of_somebody_else_does_not_exist(tmp_path, auth):
    with serving(web_app.starlette(tmp_path/'q.db', auth=auth)) as client:
        mine,theirs = start(client, who='ada', n=1),start(client, who='bob', n=1)
        ada = {'x-user': 'ada'}
        none = client.get('/jobs/none', headers=ada)
        assert none.status_code==404
        for method,url in (('GET', theirs), ('DELETE', theirs), ('GET', f'{theirs}/events'), ('HEAD', theirs),
                           ('GET', f'/jobs/events?job={mine[6:]}&job={theirs[6:]}')):
            got = client.request(method, url, headers=ada)
            assert got.status_code==404, (method, url)
            if method!='HEAD': assert got.json()['detail'].replace(theirs[6:], 'none')==none.json()['detail']
        with pytest.raises(InvalidStatus) as refused:
            connect(str(client.base_url).rstrip('/').replace('http', 'ws')+f'{theirs}/events', additional_headers=ada)
        assert refused.value.response.status_code==404
        assert client.get(mine, headers=ada).status_code==200 and client.get(mine).status_code==404
        assert client.get(theirs, headers={'x-user': 'bob'}).json()['state'] in ('queued', 'running')
        # all events are all of one's own
        with stream(client, '/jobs/events', last=0, headers=ada) as events:
            go(client, 2)
            for e in events:
                assert e['data']['job']==mine[6:]
                if e['event']=='succeeded': break
        # auth may have an answer of its own
        assert client.get(mine, headers={'x-user': 'broken'}).status_code==401
        with pytest.raises(InvalidStatus) as refused:
            connect(str(client.base_url).rstrip('/').replace('http', 'ws')+f'{mine}/events',
                    additional_headers={'x-user': 'broken'})
        assert refused.value.response.status_code==401

@contextmanager
def changing(tmp_path):
    "An app whose `auth` says what the test says, or raises that"
    says = [True]
    def auth(request, job):
        if isinstance(says[0], Exception): raise says[0]
        return says[0]
    with serving(web_app.starlette(tmp_path/'q.db', auth=auth, heartbeat=.2)) as client:
        def say(answer):
            says[0] = answer
            time.sleep(.3) # as long as the last answer is believed
        yield client,say

@pytest.mark.parametrize('answer', [False, HTTPException(403), ZeroDivisionError('no such table')])
def test_what_may_not_be_seen_any_more(tmp_path, caplog, answer):
    with changing(tmp_path) as (client, say):
        url = start(client, n=3)
        assert soon(lambda: client.get(url).json()['state']=='running')
        at = str(client.base_url).rstrip('/').replace('http', 'ws')
        with (stream(client, '/jobs/events') as everything, stream(client, f'{url}/events', last=0) as one,
              connect(f'{at}{url}/events?after=0') as ws, connect(f'{at}/jobs/events') as ws_all):
            go(client)
            assert kinds(take(everything, 1))==['progress'] and json.loads(ws_all.recv(20))['kind']=='progress'
            assert kinds(take(one, 3))[-1]=='progress'
            assert [json.loads(ws.recv(20))['kind'] for _ in range(3)][-1]=='progress'
            say(answer)
            go(client)
            assert list(one)==[] # it ends in order, without what was not for it
            with pytest.raises(ConnectionClosed) as end: ws.recv(20)
            assert end.value.rcvd.code==1012
            again = client.get(f'{url}/events', headers={'Last-Event-ID': '3'})
            assert again.status_code==(500 if str(answer)=='no such table' else 403 if answer else 404)
            say(True)
            go(client)
            seen = take(everything, 2)
            assert [json.loads(ws_all.recv(20)) for _ in range(2)]==[e['data'] for e in seen]
        assert [e['data']['data'] for e in seen[:1]]==[dict(done=3, total=3, message='step 3')]
        assert kinds(seen)==['progress', 'succeeded']
    assert ('auth has failed' in caplog.text and 'no such table' in caplog.text)==isinstance(answer, ZeroDivisionError)

def test_auth_that_raises_is_heard_before_a_stream_begins(tmp_path):
    with changing(tmp_path) as (client, say):
        with stream(client, '/jobs/events'): pass # there is no job yet to ask about
        start(client)
        for answer,status in ((ZeroDivisionError(), 500), (HTTPException(401), 401)):
            say(answer)
            assert client.get('/jobs/events').status_code==status
            with pytest.raises(InvalidStatus) as refused:
                connect(str(client.base_url).rstrip('/').replace('http', 'ws')+'/jobs/events')
            assert refused.value.response.status_code==status

def test_the_stream_of_all_jobs_is_not_for_strangers(client):
    for head in ({'X-Forwarded-For': '203.0.113.9'}, {'Forwarded': 'for=203.0.113.9'}, {'Host': 'shop.example'},
                 {'Host': 'localhost.shop.example'}, {'Host': ''}):
        got = client.get('/jobs/events', headers=head)
        assert got.status_code==403 and 'auth=' in got.json()['detail']

def test_pages_of_other_sites_open_no_websocket(tmp_path):
    with serving(web_app.starlette(tmp_path/'q.db', origins=['https://ok.example'])) as client:
        host = str(client.base_url).rstrip('/')
        at = host.replace('http', 'ws')+start(client)+'/events'
        for origin in ('https://evil.example', 'null', f'{host}.evil.example'):
            with pytest.raises(InvalidStatus) as refused: connect(at, origin=origin)
            assert refused.value.response.status_code==403
        for origin in (host, 'https://ok.example', None):
            with connect(at, origin=origin) as ws: assert json.loads(ws.recv(20))['kind']=='job'

# Bad input

@pytest.mark.parametrize('last', ['x', '-1', '1.5', '1e3', '9'*19, '١', '1 2', '0x1'])
def test_a_malformed_last_event_id_is_told(client, last):
    url = start(client)
    for path in (f'{url}/events', '/jobs/events'):
        got = client.get(path, headers={'Last-Event-ID': last.encode()})
        assert got.status_code==400 and 'Last-Event-ID' in got.json()['detail']
    with pytest.raises(InvalidStatus) as refused:
        connect(str(client.base_url.copy_with(scheme='ws', path=f'{url}/events', params=dict(after=last))))
    assert refused.value.response.status_code==400

def test_an_id_of_another_log_counts_as_a_first_time(client):
    url = start(client)
    with stream(client, f'{url}/events', last=10**15) as events: assert kinds(take(events, 1))==['job']

@pytest.mark.parametrize('path', ['none', 'none/events', 'events?job=none', '%3Cscript%3E', 'a%2Fb', 'x'*5000])
def test_an_unknown_id(client, path):
    for accept in ('text/event-stream', 'application/json', 'text/html'):
        got = client.get(f'/jobs/{path}', headers={'Accept': accept})
        assert got.status_code==404
        assert '<script>' not in got.text or got.headers['content-type']=='application/json'
    assert client.delete(f'/jobs/{path.partition("/")[0]}').status_code in (404, 405)

def test_what_else_is_refused(client):
    assert client.get('/jobs/events?'+'&'.join(f'job={i}' for i in range(101))).status_code==400
    for method in ('POST', 'PUT', 'PATCH'): assert client.request(method, start(client)).status_code==405
    head = client.head(f'{start(client)}/events')
    assert head.status_code==200 and head.headers['content-type'].startswith('text/event-stream')
