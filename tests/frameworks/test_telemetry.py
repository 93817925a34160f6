"Fact 8: who measures tasks sees ours as it sees Starlette's: FastAPI's own spans, OpenTelemetry's and Logfire's."
import os, subprocess, sys
from functools import partial

import logfire, pytest, starlette.background
from fastapi import BackgroundTasks as FastAPITasks, FastAPI
from opentelemetry import trace
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

import bgtasks.fastapi
from bgtasks import BackgroundMiddleware, BackgroundTask, background

ran = []
async def async_task(x): ran.append(x)
def sync_task(x): ran.append(x)
def failing_task(x): raise ValueError(x)
def travelling_task(x): pass
class Callable:
    def __call__(self, x): ran.append(x)
class AsyncCallable:
    async def __call__(self, x): ran.append(x)

funcs = dict(async_task=async_task, sync_task=sync_task, async_partial=partial(async_task),
             sync_partial=partial(sync_task), callable=Callable(), async_callable=AsyncCallable(), method=ran.append,
             function=lambda x: ran.append(x))

options = pytest.mark.parametrize('options', [{}, dict(timeout=30), dict(runner='thread', retries=1)],
                                  ids=['plain', 'timeout', 'thread'])

@pytest.fixture
def spans():
    "A provider and the finished spans it has collected, as `(name, attributes)`; only those of tasks."
    provider,exporter = TracerProvider(),InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    def take():
        found = exporter.get_finished_spans()
        exporter.clear()
        return [o for o in found if 'ackground' in o.name and 'send' not in o.name]
    take.provider,take.exporter = provider,exporter
    ran.clear()
    return take

def visit(app, backend): return TestClient(app, backend=backend, raise_server_exceptions=False).get('/')

# FastAPI's own: one span for each injected task

def own(spans, Tasks, *tasks, **options):
    app = FastAPI(telemetry=dict(tracer_provider=spans.provider, metrics=False, logs=False))
    @app.get('/')
    async def home(tasks_:Tasks):
        for func in tasks:
            task = tasks_.add_task(func, 1)
            if options: task.using(**options)
        return {}
    return app

def facts(span): return span.name, dict(span.attributes), span.status.status_code

@pytest.mark.parametrize('name', funcs)
@options
def test_fastapi_s_spans(spans, backend, name, options):
    visit(own(spans, FastAPITasks, funcs[name]), backend)
    want = [facts(o) for o in spans()]
    visit(own(spans, bgtasks.fastapi.BackgroundTasks, funcs[name], **options), backend)
    assert want and [facts(o) for o in spans()] == want
    assert ran == [1, 1]

def test_fastapi_s_span_of_each_task_and_of_a_failure(spans, backend):
    visit(own(spans, FastAPITasks, async_task, sync_task, failing_task, sync_task), backend)
    want = [facts(o) for o in spans()]
    visit(own(spans, bgtasks.fastapi.BackgroundTasks, async_task, sync_task, failing_task, sync_task), backend)
    assert len(want)==3 and [facts(o) for o in spans()] == want
    assert [o[1].get('error.type') for o in want] == [None, None, 'ValueError']

def test_fastapi_s_span_of_a_process_task(spans, backend):
    visit(own(spans, bgtasks.fastapi.BackgroundTasks, travelling_task, runner='process', timeout=120), backend)
    assert [o.attributes['code.function.name'] for o in spans()] == [f'{__name__}.travelling_task']

# OpenTelemetry's instrumentation and Logfire, which wrap the `__call__` of Starlette's class

@pytest.fixture(params=['opentelemetry', 'logfire'])
def instrument(request, spans):
    "Instrument an app; give the way to undo it."
    if request.param=='logfire':
        logfire.configure(send_to_logfire=False, console=False, inspect_arguments=False,
                          additional_span_processors=[SimpleSpanProcessor(spans.exporter)])
    undo = {}
    def stop(app):
        if app in undo: undo.pop(app)()
    def start(app):
        if request.param=='logfire':
            manager = logfire.instrument_fastapi(app)
            manager.__enter__()
            undo[app] = partial(manager.__exit__, None, None, None)
        else:
            FastAPIInstrumentor.instrument_app(app, tracer_provider=spans.provider)
            undo[app] = partial(FastAPIInstrumentor.uninstrument_app, app)
        return partial(stop, app)
    yield start
    for app in list(undo): stop(app)

def page(make):
    "An app whose page leaves the task that `make` makes."
    app = FastAPI()
    @app.get('/')
    async def home(): return PlainTextResponse('', background=make())
    return app

def names(spans): return [o.name for o in spans()]

@pytest.mark.parametrize('name', funcs)
@options
def test_span_names(instrument, spans, backend, name, options):
    apps = [page(lambda: starlette.background.BackgroundTask(funcs[name], 1)),
            page(lambda: BackgroundTask(funcs[name], 1).using(**options))]
    for app in apps: instrument(app)
    visit(apps[0], backend)
    want = names(spans)
    visit(apps[1], backend)
    assert len(want)==1 and want[0].startswith('BackgroundTask ') and names(spans)==want
    assert ran == [1, 1]

def test_the_span_is_a_child_of_the_request_and_current_in_the_task(instrument, spans, backend):
    seen = []
    def sync(): seen.append(trace.get_current_span().get_span_context())
    async def asyn(): seen.append(trace.get_current_span().get_span_context())
    for make in (starlette.background.BackgroundTask, BackgroundTask):
        for func in (sync, asyn):
            app = page(lambda: make(func))
            instrument(app)
            visit(app, backend)
            [span] = spans()
            assert seen.pop().span_id==span.context.span_id and span.parent is not None

def test_injected_tasks_and_those_of_the_middleware(instrument, spans, backend):
    app = FastAPI()
    @app.get('/')
    async def home(tasks:bgtasks.fastapi.BackgroundTasks):
        tasks.add_task(sync_task, 1)
        tasks.add_task(async_task, 2)
        background(sync_task, 3)
        return {}
    app.add_middleware(BackgroundMiddleware)
    instrument(app)
    visit(app, backend)
    assert names(spans) == ['BackgroundTask sync_task', 'BackgroundTask async_task', 'BackgroundTask sync_task']
    assert ran == [1, 2, 3]

def test_nothing_is_left_when_the_instrumentation_is_undone(instrument, spans, backend):
    before = starlette.background.BackgroundTask.__call__
    early = BackgroundTask(sync_task, 1) # made before, run during and after
    app = page(lambda: early)
    for _ in range(2): # a second time, too
        stop = instrument(app)
        visit(app, backend)
        assert names(spans) == ['BackgroundTask sync_task']
        stop()
        assert starlette.background.BackgroundTask.__call__ is before
        visit(app, backend)
        assert names(spans) == []
    assert ran == [1]*4

@pytest.mark.parametrize('first', [0, 1])
def test_two_apps_undone_in_either_order(instrument, spans, backend, first):
    before = starlette.background.BackgroundTask.__call__
    apps = [page(lambda: BackgroundTask(async_task, 1)) for _ in range(2)]
    stops = [instrument(app) for app in apps]
    for app in apps: visit(app, backend)
    assert names(spans) == ['BackgroundTask async_task']*2
    stops[first]()
    stops[1-first]()
    for app in apps: visit(app, backend)
    assert names(spans)==[] and ran==[1]*4
    assert starlette.background.BackgroundTask.__call__ is before

EARLY = '''
import anyio, functools
from starlette.background import BackgroundTask as Theirs
call = Theirs.__call__
@functools.wraps(call)
async def watched(self):
    print('span', self.func.__name__)
    await call(self)
Theirs.__call__ = watched
from bgtasks import BackgroundTask
async def asyn(): print('async ran')
def sync(): print('sync ran')
for wrapper in watched, call, watched:
    Theirs.__call__ = wrapper
    anyio.run(BackgroundTask(asyn))
    anyio.run(BackgroundTask(sync))
'''

def test_a_wrapper_that_is_older_than_bgtasks():
    env = {**os.environ, 'PYTHONPATH':os.pathsep.join(filter(None, sys.path))}
    out = subprocess.check_output([sys.executable, '-c', EARLY], env=env, text=True, timeout=120).split('\n')[:-1]
    seen = ['span asyn', 'async ran', 'span sync', 'sync ran']
    assert out == seen + seen[1::2] + seen
