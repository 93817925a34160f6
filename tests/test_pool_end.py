"The process pool ends with the process that started it, however that process was started."
import multiprocessing, operator, os, subprocess, sys
from pathlib import Path

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

SCRIPT = '''
import asyncio, math
from bgtasks import BackgroundTask
asyncio.run(BackgroundTask(math.factorial, 5).using(runner='process')())
'''

def test_a_program_without_a_guard_is_told_briefly(tmp_path):
    "Its processes import it, and so start it again: what they say is ours, not a page of multiprocessing's"
    (tmp_path/'app.py').write_text(SCRIPT)
    root = str(Path(__file__).parents[1])
    env = os.environ | {'PYTHONPATH': os.pathsep.join([root, os.environ.get('PYTHONPATH', '')])}
    p = subprocess.run([sys.executable, tmp_path/'app.py'], env=env, capture_output=True, text=True, timeout=60)
    assert p.returncode and 'freeze_support' not in p.stderr
    assert p.stderr.count('This process was started to run a task, and runs the main module') and \
        p.stderr.strip().endswith("put that under `if __name__ == '__main__':`.")
