"The app that test_server.py starts in a process of its own. Its tasks wait for a file, so no test has to be quick."
import os, time
from pathlib import Path

import anyio
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute

from bgtasks import BackgroundMiddleware, BackgroundTask, background

def spot(name): return Path(os.environ['SPOTS'])/name
def mark(name, text='x'): # written elsewhere and renamed, so that whoever sees the file sees all of it
    spot(f'{name}.tmp').write_text(str(text))
    spot(f'{name}.tmp').rename(spot(name))

def wait_sync(name):
    mark(f'{name}.begun', os.getpid())
    while not spot('go').exists(): time.sleep(0.01)
    mark(f'{name}.done')

async def wait_async(name):
    mark(f'{name}.begun', os.getpid())
    while not spot('go').exists(): await anyio.sleep(0.01)
    mark(f'{name}.done')

def compute(name):
    mark(f'{name}.begun', os.getpid())
    while not spot('go').exists(): pass
    mark(f'{name}.done')

tasks = {'sync':lambda: BackgroundTask(wait_sync, 'task'), 'async':lambda: BackgroundTask(wait_async, 'task'),
         'process':lambda: BackgroundTask(compute, 'task').using(runner='process'),
         'quick':lambda: BackgroundTask(mark, 'quick.done').using(runner='process')}

def own(request): return PlainTextResponse('answered', background=tasks[request.path_params['kind']]())

def left(request):
    task = tasks[request.path_params['kind']]()
    background(task.func, *task.args).using(runner=task.options.runner)
    return PlainTextResponse('answered')

def ping(request): return PlainTextResponse('pong')

def broken(request):
    background(wait_async, 'task', always=True)
    background(mark, 'never')
    raise RuntimeError('a fault of the app')

async def stream(request):
    background(wait_async, 'left')
    async def numbers():
        while True:
            yield 'number\n'
            await anyio.sleep(0.01)
    return StreamingResponse(numbers(), background=BackgroundTask(wait_async, 'own'))

async def ws(ws):
    await ws.accept()
    background(wait_async, 'task')
    await ws.send_text('hi')
    if await ws.receive_text()=='close': await ws.close(4001)

async def ws_unaware(ws):
    "Notice nothing of the client, who has gone meanwhile."
    await ws.accept()
    background(mark, 'task.done')
    await wait_async('handler')
    if ws.path_params['how']=='sends': await ws.send_text('hi')

app = Starlette(routes=[Route('/own/{kind}', own), Route('/left/{kind}', left), Route('/ping', ping),
                        Route('/broken', broken), Route('/stream', stream), WebSocketRoute('/ws', ws),
                        WebSocketRoute('/ws/{how}', ws_unaware)])
app.add_middleware(BackgroundMiddleware)
