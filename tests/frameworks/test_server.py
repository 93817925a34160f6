"Tasks under a real server, in a process of its own: who waits for whom, and what is left when it ends."
import http.client, os, re, signal, subprocess, sys, threading, time
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

pytestmark = pytest.mark.skipif(os.name!='posix', reason='signals and /proc')

def until(found, what, seconds=60):
    "Wait until `found()` gives something and give that; the limit is a net, not a measure."
    end = time.monotonic()+seconds
    while time.monotonic() < end:
        if value := found(): return value
        time.sleep(0.01)
    raise TimeoutError(f'{what} did not happen in {seconds} s')

def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] not in 'ZX'
    except (FileNotFoundError, ProcessLookupError): return False

def children(pid):
    "The processes below `pid`, the children's children included."
    try: found = [int(c) for t in Path(f'/proc/{pid}/task').iterdir() for c in (t/'children').read_text().split()]
    except FileNotFoundError: return []
    return found + [o for c in found for o in children(c)]

class Server:
    def __init__(self, spots):
        self.spots,self.lines = spots,[]
        here = str(Path(__file__).parent)
        env = {**os.environ, 'SPOTS':str(spots), 'PYTHONPATH':os.pathsep.join([here, *filter(None, sys.path)])}
        command = [sys.executable, '-m', 'uvicorn', 'served:app', '--port', '0', '--no-use-colors']
        self.process = subprocess.Popen(command, env=env,
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True)
        self.pid = self.process.pid
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)
        self.reader.start()
        started = lambda: re.search(r'running on http://127.0.0.1:(\d+)', self.log)
        self.port = int(until(started, 'the start of the server')[1])

    @property
    def log(self): return ''.join(self.lines)
    def get(self, path, connection=None):
        connection = connection or http.client.HTTPConnection('127.0.0.1', self.port, timeout=60)
        connection.request('GET', path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    def has(self, name): return (self.spots/name).exists()
    def text(self, name): return until(lambda: self.has(name), f'{name!r}') and (self.spots/name).read_text()
    def go(self): (self.spots/'go').touch()
    def ended(self):
        "The exit code, when the server and all that wrote to its log have ended."
        code = self.process.wait(60)
        self.reader.join(60)
        assert not self.reader.is_alive()
        return code

@pytest.fixture
def server(tmp_path):
    s = Server(tmp_path)
    yield s
    s.go()
    left = [s.pid, *children(s.pid)] if s.process.poll() is None else []
    for pid in left: os.kill(pid, signal.SIGKILL)
    s.process.wait()

kinds = pytest.mark.parametrize('kind', ['async', 'sync', 'process'])
paths = pytest.mark.parametrize('path', ['own', 'left'])

@kinds
@paths
def test_the_answer_and_the_next_one_on_the_same_connection_come_before_the_task_ends(server, path, kind):
    connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=60)
    assert server.get(f'/{path}/{kind}', connection) == (200, 'answered')
    server.text('task.begun')
    for _ in range(3): assert server.get('/ping', connection) == (200, 'pong')
    assert not server.has('task.done')
    server.go()
    assert server.text('task.done')

@pytest.mark.parametrize('word', ['close', 'end'])
def test_a_websocket_is_closed_before_its_task_ends(server, word):
    with connect(f'ws://127.0.0.1:{server.port}/ws') as ws:
        assert ws.recv(60) == 'hi'
        assert not server.has('task.begun')
        ws.send(word)
        with pytest.raises(ConnectionClosed) as closed: ws.recv(60)
        assert closed.value.rcvd.code == dict(close=4001, end=1000)[word]
    server.text('task.begun')
    assert not server.has('task.done')
    server.go()
    assert server.text('task.done')

def test_a_websocket_that_the_client_leaves(server):
    with connect(f'ws://127.0.0.1:{server.port}/ws') as ws: assert ws.recv(60) == 'hi'
    server.go()
    assert server.text('task.done')

@pytest.mark.parametrize('how', ['returns', 'sends'])
def test_a_websocket_that_the_client_has_left_unnoticed(server, how):
    with connect(f'ws://127.0.0.1:{server.port}/ws/{how}'): server.text('handler.begun')
    server.go() # by now the client has closed
    assert server.text('task.done')

def test_the_500_reaches_the_client_before_its_task_ends(server):
    assert server.get('/broken')[0] == 500
    server.text('task.begun')
    assert not server.has('task.done')
    server.go()
    assert server.text('task.done') and not server.has('never')
    until(lambda: 'a fault of the app' in server.log, 'the log of the failure')

def test_a_client_that_leaves_amid_a_stream(server):
    connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=60)
    connection.request('GET', '/stream')
    assert connection.getresponse().readline() == b'number\n'
    connection.close()
    server.text('own.begun')
    server.go()
    assert server.text('own.done') and server.text('left.done')
    assert server.get('/ping') == (200, 'pong')

@kinds
def test_sigterm_waits_for_a_task_and_leaves_no_process(server, kind):
    server.get(f'/own/{kind}')
    server.get('/own/quick') # so that there is a pool in any case
    server.text('task.begun')
    until(lambda: children(server.pid), 'the start of a process')
    pool = children(server.pid)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: 'Waiting for' in server.log or 'Shutting down' in server.log, 'the begin of the end')
    assert not server.has('task.done')
    server.go()
    assert server.text('task.done')
    assert server.ended() in (0, -signal.SIGTERM)
    until(lambda: not any(map(alive, pool)), 'the end of the pool')

@pytest.mark.parametrize('kind', ['process', 'quick']) # its processes busy, and idle
def test_kill_9_leaves_no_process(server, kind):
    server.get(f'/own/{kind}')
    server.text('task.begun' if kind=='process' else 'quick.done')
    pool = children(server.pid)
    assert pool and all(map(alive, pool))
    os.kill(server.pid, signal.SIGKILL)
    assert server.ended() == -signal.SIGKILL
    until(lambda: not any(map(alive, pool)), 'the end of the pool')
    assert 'Traceback' not in server.log

@pytest.mark.parametrize('kind', ['process', 'quick'])
def test_ctrl_c_ends_all_without_a_traceback(server, kind):
    server.get(f'/own/{kind}')
    server.text('task.begun' if kind=='process' else 'quick.done')
    pool = children(server.pid)
    os.killpg(server.pid, signal.SIGINT) # as a terminal does: to the server and all its children
    if kind=='process':
        until(lambda: 'Shutting down' in server.log, 'the begin of the end')
        server.go()
        assert server.text('task.done') # the task had the time to end
    assert server.ended() in (0, 130, -signal.SIGINT)
    until(lambda: not any(map(alive, pool)), 'the end of the pool')
    assert 'Traceback' not in server.log, server.log

def test_ctrl_c_while_a_process_starts(server):
    server.get('/own/process')
    server.go()
    until(lambda: len(children(server.pid)) > 1, 'the start of a process, beside the tracker of resources')
    os.killpg(server.pid, signal.SIGINT) # it imports the app now
    assert server.text('task.done')
    assert server.ended() in (0, 130, -signal.SIGINT)
    assert 'Traceback' not in server.log, server.log
