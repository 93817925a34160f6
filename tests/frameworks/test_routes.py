"`bgtasks.web` in each framework, in whatever version is installed: a worker in the app, a 202, a stream, an element."
import re

import httpx2, pytest
from fastapi import FastAPI, Request
from fasthtml.common import Titled, fast_app
from starlette.applications import Starlette
from starlette.routing import Route

from bgtasks import TaskQueue, track
from bgtasks.web import accepted, job_status, lifespan, routes, status_head

@pytest.fixture
def queue(tmp_path):
    with TaskQueue(tmp_path/'tasks.db') as queue:
        @queue.task(name='count')
        async def count(n:int):
            for _ in track(range(n)): pass
            return n
        yield queue

def parts(queue, said):
    async def own(app):
        said.append('open')
        yield
        said.append('closed')
    async def start(request:Request): return accepted(await queue.tasks['count'].aenqueue(3), request)
    return lifespan(queue, own, grace=0),start

def starlette(queue, life, start):
    return Starlette(routes=[Route('/start', start, methods=['POST']), *routes(queue)], lifespan=life)

def fastapi(queue, life, start):
    app = FastAPI(lifespan=life)
    app.post('/start')(start)
    app.routes.extend(routes(queue))
    return app

def fasthtml(queue, life, start):
    app,rt = fast_app(lifespan=life, routes=routes(queue), hdrs=status_head(), default_hdrs=False, secret_key='-')
    @rt('/start', methods='post')
    async def begin(request): return await start(request)
    @rt('/page/{id}')
    def page(id:str): return Titled('A job', job_status(queue.get(id), title='<b>'))
    return app

@pytest.mark.parametrize('make', [starlette, fastapi, fasthtml])
def test_from_start_to_end(make, queue, request):
    said = []
    serve = request.getfixturevalue('serve')
    url = serve(make(queue, *parts(queue, said)))
    answer = httpx2.post(f'{url}/start')
    assert answer.status_code==202
    place = url+answer.headers['location']
    with httpx2.stream('GET', f'{place}/events?after=0', timeout=30) as stream:
        kinds = [l[7:] for l in stream.iter_lines() if l.startswith('event: ')]
    assert kinds[:2]==['queued', 'running'] and kinds[-2:]==['progress', 'succeeded'] and said==['open']
    assert httpx2.get(place).json()['result']==3
    html = httpx2.get(place, headers={'Accept': 'text/html'}).text
    assert html.startswith('<job-status') and 'value="1"' in html
    if make is fasthtml:
        page = httpx2.get(place.replace('/jobs/', '/page/')).text
        assert re.search('<job-status .*&lt;b&gt;', page, re.S) and '/jobs/script' in page
