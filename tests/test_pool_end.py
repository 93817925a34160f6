"The process pool ends with the process that started it, however that process was started."
import multiprocessing, operator

import anyio, pytest

from bgtasks import BackgroundTask


async def add(): await BackgroundTask(operator.add, 1, 2).using(runner='process')()

def use_pool(): anyio.run(add)

@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_a_worker_process_of_a_server_ends(method):
    "Servers start their workers by multiprocessing, which skips `atexit` and waits for every child"
    worker = multiprocessing.get_context(method).Process(target=use_pool)
    worker.start()
    worker.join(60)
    try: assert worker.exitcode==0
    finally: worker.kill()
