"What FastHTML and FastAPI do with tasks: which they take, which they drop, and that `background()` works in each case."
import anyio, pytest, starlette.background
from fastapi import BackgroundTasks as FastAPITasks, Depends, FastAPI, HTTPException, WebSocket
from fasthtml.common import FastHTML, JSONResponse, P, RedirectResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

import bgtasks, bgtasks.fastapi
from bgtasks import BackgroundMiddleware, BackgroundTask, BackgroundTasks, background

@pytest.fixture
def log(): return []

@pytest.fixture(params=['async', 'sync'])
def add(request, log):
    "A task function of either kind."
    async def async_add(x): log.append(x)
    def sync_add(x): log.append(x)
    return async_add if request.param=='async' else sync_add

def fast_html(**kw): return FastHTML(secret_key='not a secret', **kw)

# Fact 1: FastHTML picks tasks out of a tuple by their class and runs them in a group of Starlette's

def test_fasthtml_runs_ours_from_a_tuple(kind, backend, log, add):
    app = fast_html()
    @app.get('/')
    def home(): return P('hello'), kind.Task(add, 1), kind.Tasks([kind.Task(add, 2), kind.Task(add, 3)])
    assert '<p>hello</p>' in TestClient(app, backend=backend).get('/').text
    assert log == [1, 2, 3]

def test_fasthtml_puts_ours_in_starlette_s_group(monkeypatch, backend, log, add):
    groups,call = [],starlette.background.BackgroundTasks.__call__
    async def watched(self):
        groups.append(self)
        await call(self)
    monkeypatch.setattr(starlette.background.BackgroundTasks, '__call__', watched)
    task,app = BackgroundTask(add, 1).using(timeout=30),fast_html()
    @app.get('/')
    async def home(): return P('hello'), task
    TestClient(app, backend=backend).get('/')
    assert [type(g) for g in groups]==[starlette.background.BackgroundTasks] and groups[0].tasks==[task] and log==[1]

def test_fasthtml_runs_a_task_of_a_response_of_its_own(kind, backend, log, add):
    app = fast_html()
    @app.get('/')
    def home(): return JSONResponse({}, background=kind.Task(add, 1))
    TestClient(app, backend=backend).get('/')
    assert log == [1]

# Fact 1: FastAPI reads `.func` of every task in its group, nested groups included

def test_fastapi_runs_ours_added_to_its_own_group(backend, log, add):
    app = FastAPI()
    @app.get('/')
    async def home(tasks:FastAPITasks):
        tasks.add_task(add, 1)
        tasks.tasks += [BackgroundTask(add, 2), BackgroundTasks([BackgroundTask(add, 3)])]
        tasks.tasks.append(BackgroundTask(add, 4).using(retries=1))
        tasks.add_task(add, 5)
        return {}
    TestClient(app, backend=backend).get('/')
    assert log == [1, 2, 3, 4, 5]

def test_fastapi_s_group_breaks_on_starlette_s_nested_group(log):
    async def main():
        with pytest.raises(AttributeError, match='func'):
            await FastAPITasks([starlette.background.BackgroundTasks([BackgroundTask(log.append, 1)])])()
        await FastAPITasks([BackgroundTasks([BackgroundTask(log.append, 2)])])()
    anyio.run(main)
    assert log == [2]

def test_our_tasks_always_have_what_starlette_s_have():
    task = BackgroundTask(print)
    for task in (task, BackgroundTasks(), bgtasks.fastapi.BackgroundTasks(), BackgroundTasks([task]).using(timeout=1)):
        assert callable(task.func) and task.args==() and task.kwargs=={} and isinstance(task.is_async, bool)
        assert isinstance(task, starlette.background.BackgroundTask)

# Fact 2: FastAPI ignores a subclass in a signature

class Mine(FastAPITasks): pass

@pytest.mark.parametrize('Tasks', [Mine, BackgroundTasks, bgtasks.fastapi.InjectedTasks])
def test_fastapi_ignores_a_subclass_in_a_signature(Tasks):
    app,seen = FastAPI(),[]
    @app.get('/')
    async def home(tasks:Tasks):
        seen.append(type(tasks))
        return {}
    TestClient(app).get('/')
    assert seen == [FastAPITasks]

def test_ours_is_injected_at_every_level(backend, log, add):
    app,seen = FastAPI(),[]
    def sub(tasks:bgtasks.fastapi.BackgroundTasks): tasks.add_task(add, 'sub'); seen.append(tasks)
    def dep(tasks:FastAPITasks, _=Depends(sub)): tasks.add_task(add, 'dep'); seen.append(tasks)
    @app.get('/', dependencies=[Depends(dep)])
    async def home(tasks:bgtasks.fastapi.BackgroundTasks):
        tasks.add_task(add, 'path').using(timeout=30)
        seen.append(tasks)
        return {}
    TestClient(app, backend=backend).get('/')
    assert log == ['sub', 'dep', 'path']
    assert len({id(o) for o in seen}) == 1
    assert isinstance(seen[0], BackgroundTasks) and isinstance(seen[0], FastAPITasks)
    assert 'parameters' not in app.openapi()['paths']['/']['get']

# Fact 3: the drops. Each handler loses `add('lost')`; under the middleware, `background(add, 'kept')` runs all the same

def lossy_fasthtml(add, response):
    app = fast_html()
    @app.get('/')
    def home():
        background(add, 'kept')
        return response(), BackgroundTask(add, 'lost')
    return app

def lossy_fastapi(add, Tasks):
    app = FastAPI()
    @app.get('/')
    async def home(tasks:Tasks):
        background(add, 'kept')
        tasks.add_task(add, 'lost')
        return PlainTextResponse('', background=BackgroundTask(add, 'own'))
    return app

def failing_fastapi(add, Tasks):
    app = FastAPI()
    @app.get('/')
    async def home(tasks:Tasks):
        background(add, 'kept')
        tasks.add_task(add, 'lost')
        raise HTTPException(404)
    return app

def failing_starlette(add):
    def home(request):
        background(add, 'kept')
        raise StarletteHTTPException(404)
    return Starlette(routes=[Route('/', home)])

drops = {
    'FastHTML beside a JSONResponse': (lambda add: lossy_fasthtml(add, lambda: JSONResponse({})), ['kept']),
    'FastHTML beside a RedirectResponse': (lambda add: lossy_fasthtml(add, lambda: RedirectResponse('/x')), ['kept']),
    'FastAPI, response with its own': (lambda add: lossy_fastapi(add, FastAPITasks), ['own', 'kept']),
    'FastAPI with ours, response with its own':
        (lambda add: lossy_fastapi(add, bgtasks.fastapi.BackgroundTasks), ['own', 'kept']),
    'FastAPI, HTTPException': (lambda add: failing_fastapi(add, FastAPITasks), ['kept']),
    'FastAPI with ours, HTTPException': (lambda add: failing_fastapi(add, bgtasks.fastapi.BackgroundTasks), ['kept']),
    'Starlette, HTTPException': (failing_starlette, ['kept'])}

@pytest.mark.parametrize('name', drops)
def test_a_dropped_task_and_one_that_is_kept(backend, log, add, name):
    make,ran = drops[name]
    app = make(add)
    app.add_middleware(BackgroundMiddleware)
    TestClient(app, backend=backend, follow_redirects=False).get('/')
    assert log == ran

def test_fasthtml_keeps_both_beside_a_page(backend, log, add):
    app = lossy_fasthtml(add, lambda: P('hello'))
    app.add_middleware(BackgroundMiddleware)
    TestClient(app, backend=backend).get('/')
    assert log == ['lost', 'kept'] # this once not lost

@pytest.mark.parametrize('Tasks', [FastAPITasks, bgtasks.fastapi.BackgroundTasks], ids=['theirs', 'ours'])
def test_fastapi_websocket(backend, log, add, Tasks):
    app = FastAPI()
    @app.websocket('/ws')
    async def ws(ws:WebSocket, tasks:Tasks):
        await ws.accept()
        tasks.add_task(add, 'lost')
        background(add, 'kept')
        await ws.send_text('hi')
        await ws.receive_text()
        log.append('handler ends')
    app.add_middleware(BackgroundMiddleware)
    with TestClient(app, backend=backend).websocket_connect('/ws') as client:
        assert client.receive_text() == 'hi'
        client.send_text('bye')
        with pytest.raises(WebSocketDisconnect): client.receive_text()
    assert log == ['handler ends', 'kept']

def test_fasthtml_websocket(backend, log, add):
    app = fast_html(exts='ws')
    @app.ws('/ws')
    async def ws(msg:str, send):
        background(add, msg)
        await send(P(f'got {msg}'))
        log.append('handler')
    app.add_middleware(BackgroundMiddleware)
    with TestClient(app, backend=backend).websocket_connect('/ws') as client:
        client.send_json({'msg':'kept'})
        assert 'got kept' in client.receive_text()
    assert log == ['handler', 'kept']

# Fact 5: one failure stops those after it, or, if asked to, doesn't

@pytest.mark.parametrize('Tasks', [BackgroundTasks, bgtasks.fastapi.BackgroundTasks], ids=['plain', 'fastapi'])
@pytest.mark.parametrize('concurrent', [False, True], ids=['in order', 'concurrent'])
def test_stop_or_continue(backend, log, Tasks, concurrent):
    async def bad(): raise ValueError('no ink')
    def worse(): raise OSError('no paper')
    async def late():
        await anyio.sleep(0.02)
        log.append('late')
    def group(**kw):
        tasks = Tasks([BackgroundTask(bad)], concurrent=concurrent, **kw)
        tasks.tasks += [starlette.background.BackgroundTask(worse)] if kw else []
        tasks.add_task(late)
        return tasks
    def visit(background): TestClient(PlainTextResponse('', background=background), backend=backend).get('/')
    with pytest.raises(ValueError): visit(group())
    assert log == []
    with pytest.raises(ExceptionGroup) as e: visit(group(on_error='continue'))
    assert log == ['late'] and {type(o) for o in e.value.exceptions}=={ValueError, OSError}

def test_a_failure_is_logged_once_with_its_traceback(backend, caplog):
    def print_label(): raise ValueError('no ink')
    app = FastAPI()
    @app.get('/')
    async def home(tasks:bgtasks.fastapi.BackgroundTasks):
        tasks.add_task(print_label)
        return {}
    with pytest.raises(ValueError): TestClient(app, backend=backend).get('/')
    [record] = [r for r in caplog.records if r.name=='bgtasks']
    assert 'print_label' in record.getMessage() and 'no ink' in record.exc_text and 'Traceback' in record.exc_text
