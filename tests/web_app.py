"Apps for `test_web.py` and `test_status.py`: tasks that take a step when they are told to, and pages that show them."
import asyncio
from types import SimpleNamespace

from fastapi import FastAPI, Request
from fasthtml.common import H1, Button, Div, Meta, NotStr, P, Script, Titled, fast_app
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from bgtasks import TaskQueue, progress
from bgtasks.status import job_status, status_head
from bgtasks.web import accepted, lifespan, routes
from fastcore.xml import to_xml

POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"

def queue_at(path):
    "A queue with the task `steps`, and the semaphore that its jobs take a step by"
    queue,gate = TaskQueue(path),asyncio.Semaphore(0)
    @queue.task(name='steps', timeout=60)
    async def steps(n:int, who:str='ada', fail:str='', text:str='step'):
        for i in range(n):
            await gate.acquire()
            progress(i+1, n, f'{text} {i+1}')
        if fail: raise ValueError(fail)
        return f'{n} steps'
    return queue,gate

def allowed(request, job):
    "Each visitor sees the jobs that carry the name in `x-user`; `broken` is told why it may not"
    who = request.headers.get('x-user')
    if who=='broken': raise HTTPException(401, 'log in first')
    return job.kwargs.get('who', 'ada')==who

async def allowed_async(request, job): return allowed(request, job)

def page(*inside, head=status_head()):
    return HTMLResponse(f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Jobs</title>'
                        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
                        f'<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">{to_xml(head)}'
                        f'</head><body><main>{"".join(map(to_xml, inside))}</main></body></html>',
                        headers={'Content-Security-Policy': POLICY})

def handlers(o):
    "What the tests ask of an app"
    async def start(request):
        q = request.query_params
        given = {k: q[k] for k in ('who', 'fail', 'text') if k in q}
        return accepted(await o.queue.tasks['steps'].aenqueue(int(q.get('n', 3)), **given), request)
    async def go(request):
        for _ in range(int(request.query_params.get('n', 1))): o.gate.release()
        return Response()
    async def stats(request):
        live = o.live
        follows = sorted(id for f in live.readers for id in f.jobs or ())
        return JSONResponse(dict(readers=len(live.readers), dropped=live.dropped, shown=o.shown[-1:], follows=follows,
                                 feeds=[r.task is not None for r in o.queue.feed._readers.values()]))
    async def show(request):
        jobs = [o.queue.get(i) for i in request.query_params.getlist('job')]
        return page(*(job_status(j, title=f'Job {n}', cancel=True, notify=True) for n,j in enumerate(jobs, 1)))
    return [Route('/start', start, methods=['POST']), Route('/go', go, methods=['POST']), Route('/stats', stats),
            Route('/page', show)]

def htmx_app(path, script):
    "Jobs that come and go by way of HTMX, whose file is `script`"
    head = (*status_head(), Meta(name='htmx-config', content='{"includeIndicatorStyles": false}'),
            Script(src='/htmx.js', defer=True))
    ask = Button('Ask', type='button', hx_get='/asked', hx_target='#asked')
    def shown(job, **kw): return job_status(job, ask, title=job.id, **kw)
    o = settings(path, card=shown)
    def fragment(job): return HTMLResponse(to_xml(shown(job)))
    async def begin(request): return fragment(await o.queue.tasks['steps'].aenqueue(1))
    async def one(request): return fragment(o.queue.get(request.query_params['job']))
    async def asked(request): return HTMLResponse('asked')
    async def start(request):
        "Whatever is to be done with the jobs, the page says in `do`, which is put around those in `job`"
        q = request.query_params
        jobs = [shown(o.queue.get(i)) for i in q.getlist('job')]
        return page(Div(NotStr(q.get('do', ''))), Div(*jobs, id='jobs'), P(id='asked'), head=head)
    async def elsewhere(request): return page(H1('Elsewhere'), head=head)
    async def file(request): return FileResponse(script)
    routes = [Route('/begin', begin, methods=['POST']), Route('/one', one), Route('/asked', asked),
              Route('/htmx', start), Route('/elsewhere', elsewhere), Route('/htmx.js', file)]
    app = Starlette(routes=[*routes, *handlers(o), *o.routes], lifespan=lifespan(o.queue, grace=0))
    app.state.o = o
    return app

def settings(path, auth=None, card=job_status, **kw):
    queue,gate = queue_at(path)
    auth = dict(sync=allowed, later=allowed_async).get(auth, auth)
    res = SimpleNamespace(queue=queue, gate=gate, shown=[])
    def noted(job, **kw):
        res.shown.append(job.state)
        return card(job, **kw)
    res.routes = routes(queue, auth=auth, card=noted, **kw)
    cells = [c.cell_contents for c in res.routes[2].endpoint.__closure__]
    res.live = next(o.live for o in cells if hasattr(o, 'live')) # for what it counts
    return res

def starlette(path, wrap=False, deaf=False, **kw):
    o = settings(path, **kw)
    if deaf: o.routes.insert(0, Route('/jobs/events', lambda request: Response(status_code=503)))
    async def passing(request, call_next): return await call_next(request)
    middleware = [Middleware(GZipMiddleware), Middleware(BaseHTTPMiddleware, dispatch=passing)] if wrap else []
    app = Starlette(routes=[*handlers(o), *o.routes], lifespan=lifespan(o.queue, grace=0), middleware=middleware)
    app.state.o = o
    return app

def fastapi(path, **kw):
    o = settings(path, **kw)
    app = FastAPI(lifespan=lifespan(o.queue, grace=0))
    @app.post('/start', status_code=202)
    async def start(request:Request, n:int=3): return accepted(await o.queue.tasks['steps'].aenqueue(n), request)
    app.routes.extend([*handlers(o)[1:], *o.routes])
    app.state.o = o
    return app

def fasthtml(path, **kw):
    o = settings(path, **kw)
    app,rt = fast_app(lifespan=lifespan(o.queue, grace=0), secret_key='-', hdrs=status_head(), default_hdrs=False)
    @rt('/start', methods='post')
    async def start(request, n:int=3): return accepted(await o.queue.tasks['steps'].aenqueue(n), request)
    @rt('/mine')
    def mine(job:str): return Titled('Mine', job_status(o.queue.get(job)))
    app.routes.extend([*handlers(o)[1:], *o.routes])
    app.state.o = o
    return app
