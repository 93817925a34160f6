"Fact 4: Starlette's sync tasks take the threads that serve requests; ours have threads of their own."
import threading
from functools import partial
from urllib.request import urlopen

import anyio, pytest, starlette.background
from anyio import to_thread
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from bgtasks import BackgroundTask, BackgroundTasks

MANY = 45 # more than the 40 threads that serve sync handlers

def get(url): return urlopen(url, timeout=60).read().decode()

def test_sync_handlers_answer_while_our_sync_tasks_block(serve):
    go,begun,done = threading.Event(),threading.Semaphore(0),threading.Semaphore(0)
    def block():
        begun.release()
        go.wait(60)
        done.release()
    def task(request): return PlainTextResponse('later', background=BackgroundTask(block))
    url = serve(Starlette(routes=[Route('/task', task), Route('/page', lambda request: PlainTextResponse('now'))]))
    try:
        for _ in range(MANY): assert get(f'{url}/task') == 'later'
        for _ in range(40): assert begun.acquire(timeout=60) # as many as ever run at once are blocked
        assert get(f'{url}/page') == 'now'
        assert not done.acquire(blocking=False)
    finally: go.set()
    for _ in range(MANY): assert done.acquire(timeout=60) # those that had to wait for a thread have run, too

async def occupied(make):
    "Start many blocked tasks and tell how many threads of those for handlers they took."
    go,begun = threading.Event(),threading.Semaphore(0)
    def block():
        begun.release()
        go.wait(60)
    async with anyio.create_task_group() as group:
        for task in make(block): group.start_soon(task)
        for _ in range(40):
            while not begun.acquire(blocking=False): await anyio.sleep(0.001)
        taken = to_thread.current_default_thread_limiter().borrowed_tokens
        go.set()
    return taken

makers = dict(
    starlette=(lambda f: [starlette.background.BackgroundTask(f) for _ in range(MANY)], 40),
    ours=(lambda f: [BackgroundTask(f) for _ in range(MANY)], 0),
    timeout=(lambda f: [BackgroundTask(f).using(timeout=60) for _ in range(MANY)], 0),
    group=(lambda f: [BackgroundTasks([BackgroundTask(f) for _ in range(MANY)], concurrent=True)], 0),
    partial=(lambda f: [BackgroundTask(partial(f)) for _ in range(MANY)], 0))

@pytest.mark.parametrize('name', makers)
def test_whose_threads_they_take(backend, name):
    make,taken = makers[name]
    async def main():
        with anyio.fail_after(60): return await occupied(make)
    assert anyio.run(main, backend=backend) == taken
