"What the tests of this folder share. They need the package, the frameworks and pytest, and not nbdev."
import socket, threading
from types import SimpleNamespace

import pytest, starlette.background, uvicorn

import bgtasks
from bgtasks.run import close_pool

@pytest.fixture(params=['asyncio', 'trio'])
def backend(request): return request.param

@pytest.fixture(params=[starlette.background, bgtasks], ids=['starlette', 'bgtasks'])
def kind(request):
    "The classes that only differ in where they are imported from."
    return SimpleNamespace(Task=request.param.BackgroundTask, Tasks=request.param.BackgroundTasks)

@pytest.fixture(scope='session', autouse=True)
def pool():
    yield
    close_pool()

@pytest.fixture
def serve():
    "Serve apps by uvicorn, each in a thread of this process on a free port, until the test is over."
    running = []
    def start(app):
        sock = socket.create_server(('127.0.0.1', 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level='critical'))
        thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
        thread.start()
        running.append((server, thread))
        return f'http://127.0.0.1:{sock.getsockname()[1]}'
    yield start
    for server,thread in running:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
