"Starlette's contract: each test runs with its classes and with ours, which differ in the import only."
import asyncio, inspect, sys, threading
from contextvars import ContextVar
from functools import partial

import anyio, pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

@pytest.fixture
def log(): return []

@pytest.fixture
def visit(backend, log):
    "Ask an app for one page, with what it sends noted in `log` beside what its tasks write there."
    def _visit(app, **kw):
        async def watched(scope, receive, send):
            async def noted(message):
                log.append(message['type'].split('.')[-1])
                await send(message)
            await app(scope, receive, noted)
        return TestClient(watched, backend=backend, follow_redirects=False, **kw).get('/')
    return _visit

def adders(log):
    "The kinds of function that a task may have; each adds its argument to `log`."
    async def async_def(x): log.append(x)
    def sync_def(x): log.append(x)
    class AsyncCall:
        async def __call__(self, x): log.append(x)
        async def method(self, x): log.append(x)
    return dict(async_def=async_def, sync_def=sync_def, async_object=AsyncCall(), async_method=AsyncCall().method,
                builtin=log.append, async_partial=partial(async_def), sync_partial=partial(sync_def),
                nested_partial=partial(partial(async_def)))

@pytest.mark.parametrize('name', adders([]))
def test_every_kind_of_function_runs_after_the_response(kind, visit, log, name):
    response = visit(Response('hello', background=kind.Task(adders(log)[name], 'task')))
    assert (response.text, log) == ('hello', ['start', 'body', 'task'])

@pytest.mark.parametrize('name', adders([]))
def test_the_attributes_of_a_task(kind, name):
    func = adders([])[name]
    task = kind.Task(func, 1, 2, b=3)
    want = 'async' in name or 'nested' in name
    assert (task.func, task.args, task.kwargs, task.is_async) == (func, (1, 2), {'b':3}, want)

def test_any_arguments_reach_the_function(kind, visit, log):
    async def note(*args, **kw): log.append((args, kw))
    def sync_note(*args, **kw): log.append((args, kw))
    kw = dict(args=1, kwargs=2, tasks=3, timeout=4, runner=5, name=6, limiter=7, is_async=8, on_error=9)
    tasks = kind.Tasks([kind.Task(note, None, [], **kw)])
    tasks.add_task(sync_note, None, [], **kw)
    visit(Response(background=tasks))
    assert log[2:] == [((None, []), kw)]*2

@pytest.mark.parametrize('response', [
    lambda task, file: Response(b'x'*3, background=task),
    lambda task, file: JSONResponse({}, 202, background=task),
    lambda task, file: RedirectResponse('/', background=task),
    lambda task, file: StreamingResponse(iter('abc'), background=task),
    lambda task, file: FileResponse(file, background=task),
], ids=['plain', 'json', 'redirect', 'stream', 'file'])
def test_every_response_runs_its_task_last(kind, visit, log, tmp_path, response):
    (file := tmp_path/'a.txt').write_text('abc'*50_000)
    visit(response(kind.Task(log.append, 'task'), file))
    assert log[0]=='start' and log[-1]=='task' and log.count('task')==1

def test_an_async_stream(kind, visit, log):
    async def numbers():
        for i in range(3):
            log.append(i)
            await anyio.sleep(0)
            yield str(i)
    assert visit(StreamingResponse(numbers(), background=kind.Task(log.append, 'task'))).text == '012'
    assert [o for o in log if o!='body'] == ['start', 0, 1, 2, 'task']

def test_a_task_of_a_head_request(kind, backend, log):
    app = Starlette(routes=[Route('/', lambda request: Response('x', background=kind.Task(log.append, 'task')))])
    assert (TestClient(app, backend=backend).head('/').status_code, log) == (200, ['task'])

def test_tasks_run_one_after_the_other(kind, visit, log):
    async def slow(i):
        await anyio.sleep(0.01)
        log.append(i)
    tasks = kind.Tasks([kind.Task(slow, 1), kind.Task(log.append, 2)])
    tasks.add_task(slow, 3)
    tasks.add_task(log.append, 4)
    visit(Response(background=tasks))
    assert log[2:] == [1, 2, 3, 4]

def test_a_group_keeps_its_own_list(kind, visit, log):
    given = [kind.Task(log.append, 1)]
    tasks = kind.Tasks(given)
    tasks.add_task(log.append, 2)
    assert (len(given), len(tasks.tasks)) == (1, 2)
    visit(Response(background=kind.Tasks(tuple(given))))
    assert log[2:] == [1]

def test_an_empty_group(kind, visit, log):
    visit(Response('hello', background=kind.Tasks()))
    visit(Response('hello', background=kind.Tasks([])))
    assert log == ['start', 'body']*2

def test_a_group_in_a_group(kind, visit, log):
    inner = kind.Tasks([kind.Task(log.append, 2), kind.Task(log.append, 3)])
    visit(Response(background=kind.Tasks([kind.Task(log.append, 1), inner, kind.Task(log.append, 4)])))
    assert log[2:] == [1, 2, 3, 4]

@pytest.mark.parametrize('how', ['async', 'sync'])
def test_a_failure_stops_those_after_it_and_reaches_the_server(kind, visit, log, how):
    async def async_bad(): raise ValueError('no ink')
    def sync_bad(): raise ValueError('no ink')
    bad = async_bad if how=='async' else sync_bad
    tasks = kind.Tasks([kind.Task(log.append, 1), kind.Task(bad), kind.Task(log.append, 2)])
    with pytest.raises(ValueError, match='no ink'): visit(Response('hello', background=tasks))
    assert log == ['start', 'body', 1]
    response = visit(Response('hello', background=tasks), raise_server_exceptions=False)
    assert (response.status_code, response.text) == (200, 'hello') # the response had gone out

def test_a_sync_task_leaves_the_event_loop_free(kind, visit, log):
    threads,go = [],threading.Event()
    def in_thread():
        threads.append(threading.get_ident())
        log.append(go.wait(30))
    class App:
        async def __call__(self, scope, receive, send):
            threads.append(threading.get_ident())
            async with anyio.create_task_group() as group: # `go` comes from the loop, so the loop must be free
                group.start_soon(self.release)
                await Response(background=kind.Task(in_thread))(scope, receive, send)
        async def release(self):
            while len(threads) < 2: await anyio.sleep(0.001)
            go.set()
    visit(App())
    assert threads[0] != threads[1] and log[-1] is True

request_id = ContextVar('request_id')

def test_context_variables_are_carried_over(kind, visit, log):
    async def note(): log.append(request_id.get())
    def sync_note(): log.append(request_id.get())
    async def app(scope, receive, send):
        request_id.set('r-17')
        await Response(background=kind.Tasks([kind.Task(note), kind.Task(sync_note)]))(scope, receive, send)
    visit(app)
    assert log[2:] == ['r-17', 'r-17']

def test_an_async_task_may_set_a_context_variable_for_the_next(kind, visit, log):
    async def put(): request_id.set('from the first')
    async def note(): log.append(request_id.get())
    visit(Response(background=kind.Tasks([kind.Task(put), kind.Task(note)])))
    assert log[2:] == ['from the first']

def test_a_task_can_be_called_by_hand_and_again(kind, backend, log):
    task = kind.Task(log.append, 1)
    async def main():
        assert await task() is None
        await task()
        await kind.Tasks([task, task])()
    anyio.run(main, backend=backend)
    assert log == [1]*4

def test_a_subclass_with_a_call_of_its_own(kind, visit, log):
    class Loud(kind.Task):
        async def __call__(self):
            log.append('before')
            await super().__call__()
            log.append('after')
    visit(Response(background=kind.Tasks([Loud(log.append, 'task')])))
    assert log[2:] == ['before', 'task', 'after']

def test_a_subclass_with_a_group_call_of_its_own(kind, visit, log):
    class Backwards(kind.Tasks):
        async def __call__(self):
            for task in reversed(self.tasks): await task()
    tasks = Backwards()
    for i in range(3): tasks.add_task(log.append, i)
    visit(Response(background=tasks))
    assert log[2:] == [2, 1, 0]

def test_the_other_library_s_tasks_in_a_group(kind, visit, log):
    import bgtasks, starlette.background
    tasks = kind.Tasks([starlette.background.BackgroundTask(log.append, 1), bgtasks.BackgroundTask(log.append, 2)])
    visit(Response(background=tasks))
    assert log[2:] == [1, 2]

def test_cancelling_the_request_cancels_an_async_task(kind, backend, log):
    async def forever():
        log.append('begun')
        try: await anyio.sleep_forever()
        finally: log.append('ended')
    async def main():
        async with anyio.create_task_group() as group:
            group.start_soon(kind.Task(forever))
            while not log: await anyio.sleep(0)
            group.cancel_scope.cancel()
    anyio.run(main, backend=backend)
    assert log == ['begun', 'ended']

# Fact 6: what BaseHTTPMiddleware once did to background tasks (block the response, cancel the task) is gone

class Passing(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next): return await call_next(request)

@pytest.mark.parametrize('layers', [1, 3])
@pytest.mark.parametrize('how', ['async', 'sync'])
def test_base_http_middleware_neither_blocks_nor_cancels(kind, visit, log, layers, how):
    async def task():
        for _ in range(5): await anyio.sleep(0.002) # each is a place where it could be cancelled
        log.append('task')
    def sync_task(): log.append('task')
    async def page(request): return Response('hello', background=kind.Task(task if how=='async' else sync_task))
    app = Starlette(routes=[Route('/', page)], middleware=[Middleware(Passing)]*layers)
    assert visit(app).text == 'hello'
    assert log[-1]=='task' and log.count('task')==1 and 'body' in log

def test_base_http_middleware_when_the_client_has_gone(kind, backend, log):
    async def task():
        await anyio.sleep(0.01)
        log.append('task')
    async def page(request): return Response('hello', background=kind.Task(task))
    app = Starlette(routes=[Route('/', page)], middleware=[Middleware(Passing)])
    scope = dict(type='http', http_version='1.1', method='GET', path='/', headers=[], query_string=b'', scheme='http')
    async def main():
        gone,messages = anyio.Event(),iter([{'type':'http.request', 'body':b''}])
        async def receive():
            if message := next(messages, None): return message
            await gone.wait()
            return {'type':'http.disconnect'}
        async def send(message):
            log.append(message['type'].split('.')[-1])
            if log[-1]=='body' and not message.get('more_body'): gone.set()
        with anyio.fail_after(30): await app(scope, receive, send)
    anyio.run(main, backend=backend)
    assert log[-1]=='task' and 'body' in log

def test_a_function_marked_as_async(kind, backend, log):
    async def add(x): log.append(x)
    def marked(x): return add(x)
    if sys.version_info >= (3, 12): inspect.markcoroutinefunction(marked)
    else: marked._is_coroutine = asyncio.coroutines._is_coroutine
    task = kind.Task(marked, 'task')
    assert task.is_async
    anyio.run(task, backend=backend)
    assert log == ['task']
