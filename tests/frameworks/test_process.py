"`runner='process'` under faults: every call ends with its value or an error that says what happened, and none hangs."
import multiprocessing, os, random, signal, subprocess, sys, threading, time
from functools import partial
from pathlib import Path

import anyio, pytest
from anyio import to_thread
from pebble.pool.process import PoolManager

import bgtasks.run, far
from bgtasks import BackgroundTask, TaskTimeout
from bgtasks.errors import NotPicklable, ProcessDied, RemoteError
from bgtasks.run import close_pool, run, set_limits

pytestmark = pytest.mark.skipif(os.name!='posix', reason='signals')
NET = 120 # seconds until a test counts as hanging; nothing here measures time

def ask(func, *args, **kw): return run(func, args, runner='process', **kw)

@pytest.fixture
def call(backend):
    "Run an async function with the safety net around it."
    def _call(main):
        async def guarded():
            with anyio.fail_after(NET): return await main()
        return anyio.run(guarded, backend=backend)
    return _call

@pytest.fixture
def pool_of():
    "Start the test with a pool of that many processes."
    before = dict(bgtasks.run._limits)
    def start(n):
        close_pool()
        set_limits(processes=n)
    yield start
    close_pool()
    bgtasks.run._limits.update(before)

async def appeared(file):
    while not file.exists(): await anyio.sleep(0.01)
    return int(file.read_text() or 0)

def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] not in 'ZX'
    except (FileNotFoundError, ProcessLookupError): return False

async def gone(pid):
    while alive(pid): await anyio.sleep(0.01)

# Deaths

@pytest.mark.parametrize('how', [far.begin, far.begin_in_c])
@pytest.mark.parametrize('sig', [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_signal_amid_the_task_is_named(call, tmp_path, how, sig):
    async def main():
        out = []
        async with anyio.create_task_group() as group:
            async def victim(): out.append(await ask(how, tmp_path/'begun'))
            group.start_soon(victim)
            os.kill(await appeared(tmp_path/'begun'), sig)
        assert type(out[0].error) is ProcessDied and out[0].error.exitcode==-sig
        assert signal.Signals(sig).name in str(out[0].error) and how.__name__ in str(out[0].error)
        assert (await ask(far.add, 1, 2)).value == 3
    call(main)

def test_a_death_costs_only_its_own_task(call, pool_of, tmp_path):
    pool_of(3)
    async def main():
        outs = {}
        async with anyio.create_task_group() as group:
            async def one(name, *args): outs[name] = await ask(*args)
            group.start_soon(one, 'victim', far.begin, tmp_path/'victim')
            group.start_soon(one, 'neighbour', far.after, 0.5, 'alive')
            pid = await appeared(tmp_path/'victim')
            os.kill(pid, signal.SIGKILL)
        assert isinstance(outs['victim'].error, ProcessDied) and outs['neighbour'].value=='alive'
    call(main)

@pytest.mark.parametrize('code', [1, 3, 255])
def test_os_exit_tells_the_code(call, code):
    out = call(lambda: ask(os._exit, code))
    assert type(out.error) is ProcessDied and out.error.exitcode==code and f'exit code {code}' in str(out.error)

@pytest.mark.parametrize('end', ['python', 'c'])
def test_an_end_with_0_is_no_success(call, tmp_path, end):
    out = call(lambda: ask(os._exit, 0) if end=='python' else ask(far.die, tmp_path/'ran', 0))
    assert type(out.error) is ProcessDied and out.error.exitcode==0 and 'exit code 0' in str(out.error)

@pytest.fixture
def deafen(monkeypatch):
    "Make pebble deaf, as on a busy machine: it sees a process die before it has heard of the call that began there."
    listen,deaf,sure = PoolManager.process_next_message,threading.Event(),threading.Event()
    def hear(self, timeout):
        if not deaf.is_set(): return listen(self, timeout)
        sure.set()
        time.sleep(timeout)
    monkeypatch.setattr(PoolManager, 'process_next_message', hear)
    def _deafen(wait):
        deaf.set()
        if wait: sure.wait(NET) # else it is still about to hear the next message
    return _deafen

@pytest.mark.parametrize('used', [False, True])
@pytest.mark.parametrize('code', [-signal.SIGKILL, 3, 0])
def test_a_call_that_has_begun_runs_once_and_is_told_how_it_ended_though_pebble_has_not_heard_of_it(
    call, pool_of, deafen, tmp_path, used, code
):
    pool_of(1)
    async def main():
        if used: assert (await ask(far.add, 1)).value==1
        deafen(wait=used)
        out = await ask(far.die, tmp_path/'ran', code)
        assert type(out.error) is ProcessDied and out.error.exitcode==code and 'far.die' in str(out.error), out
    call(main)
    assert len((tmp_path/'ran').read_text().splitlines())==1

def test_errors_that_are_kept_hold_no_files(call, pool_of):
    pool_of(1)
    def files(): return len(os.listdir('/proc/self/fd'))
    async def main():
        await ask(far.add, 1)
        before,kept = files(),[await ask(os._exit, 1) for _ in range(10)]
        await ask(far.add, 1)
        while files() > before: await anyio.sleep(0.01)
        assert all(out.error for out in kept)
    call(main)

@pytest.mark.parametrize('func, args', [(far.leave, [3]), (far.interrupt, [])])
def test_what_is_no_exception_is_an_error_of_the_task_and_not_of_the_server(call, func, args):
    out = call(lambda: ask(func, *args))
    assert isinstance(out.error, Exception), out
    assert call(lambda: ask(far.add, 1)).value == 1

@pytest.mark.parametrize('processes', [1, 2])
def test_killed_while_idle(call, pool_of, processes):
    pool_of(processes)
    async def main():
        for _ in range(3):
            pid = (await ask(far.pid)).value
            os.kill(pid, signal.SIGKILL)
            assert (await ask(far.add, 2, 3)).value == 5 # at once, and …
            await gone(pid)
            assert (await ask(far.add, 2, 4)).value == 6 # … when the death has been seen
    call(main)

def test_many_calls_with_deaths_among_them(call, pool_of):
    pool_of(2)
    n,outs = 200,{}
    async def main():
        async with anyio.create_task_group() as group:
            async def one(i): outs[i] = await ask(far.risky, i)
            for i in range(n): group.start_soon(one, i)
    call(main)
    for i in range(n):
        e = outs[i].error
        if i%20 in (1, 2, 4):
            assert type(e) is ProcessDied, (i, outs[i])
            assert e.exitcode == {1:-signal.SIGKILL, 2:i%200, 4:-signal.SIGABRT}[i%20]
        elif i%20==3: assert type(e) is ValueError and e.args==(i,)
        else: assert outs[i].value==i and e is None

@pytest.mark.parametrize('size', [10, 3_000_000]) # small, and so large that many are killed amid a message
def test_processes_killed_at_random_moments(call, pool_of, size):
    pool_of(3)
    n,outs,dice,over = 60,{},random.Random(7),threading.Event()
    def killer():
        while not over.wait(dice.uniform(0.05, 0.25)):
            for child in [p.pid for p in multiprocessing.active_children()]:
                if dice.random() < 0.5:
                    try: os.kill(child, signal.SIGKILL)
                    except ProcessLookupError: pass
    async def main():
        async with anyio.create_task_group() as group:
            async def one(i): outs[i] = await ask(far.double, b'x'*size)
            for i in range(n): group.start_soon(one, i)
    thread = threading.Thread(target=killer)
    thread.start()
    try: call(main)
    finally:
        over.set()
        thread.join()
    assert len(outs) == n
    for out in outs.values(): assert isinstance(out.error, ProcessDied) if out.error else len(out.value)==2*size
    assert call(lambda: ask(far.add, 1)).value == 1

# What travels

def test_50_megabytes_there_and_back(call):
    data = os.urandom(1_000_000)*50
    assert call(lambda: ask(far.size, data)).value == len(data)
    assert call(lambda: ask(far.many, len(data))).value == b'x'*len(data)
    assert call(lambda: ask(far.double, data[:25_000_000])).value == data

def test_the_event_loop_is_free_while_much_is_sent(call, pool_of):
    pool_of(1)
    async def main():
        ticks = []
        async with anyio.create_task_group() as group:
            async def tick():
                while True:
                    ticks.append(1)
                    await anyio.sleep(0)
            async def big():
                await ask(far.after, 0.2, b'x'*50_000_000)
                group.cancel_scope.cancel()
            group.start_soon(tick)
            group.start_soon(big)
        assert len(ticks) > 10
    call(main)

@pytest.mark.parametrize('name', far.kinds)
def test_an_exception_that_can_t_travel_comes_as_text(call, name):
    e = call(lambda: ask(far.raise_kind, name)).error
    assert type(e) is RemoteError and name in str(e) and 'raise_kind' in str(e) and 'Traceback' in str(e)

def test_exceptions_that_can_travel_keep_their_type_and_tell_where_they_were_raised(call):
    e = call(lambda: ask(far.raise_, KeyError('k'))).error
    assert type(e) is KeyError and e.args==('k',) and 'in raise_' in e.__notes__[0]
    e = call(lambda: ask(far.raise_chain)).error
    assert type(e) is ValueError and 'NoPickle' in e.__notes__[0]
    e = call(lambda: ask(far.raise_group)).error
    assert type(e) is ExceptionGroup and [type(o) for o in e.exceptions]==[ValueError, OSError]

def test_a_result_that_is_unreadable_here(call):
    out = call(lambda: ask(far.unreadable))
    assert type(out.error) is NotPicklable and 'unreadable' in str(out.error)
    assert call(lambda: ask(far.unreadable, result=False)).error is None

def test_an_argument_that_is_unreadable_there(call):
    out = call(lambda: ask(far.size, far.Unreadable()))
    assert type(out.error) is NotPicklable and 'unreadable' in str(out.error)

@pytest.mark.parametrize('func, args', [(lambda: 0, ()), (print, (threading.Lock(),)), (threading.Lock().acquire, ()),
                                        (partial(print, lambda: 0), ()), (print, ((i for i in 'abc'),))])
def test_what_can_t_travel_is_told_by_using(func, args):
    task = BackgroundTask(func, *args)
    with pytest.raises(NotPicklable, match="runner='process' can't send"): task.using(runner='process')

# A function of the program's main module

MAIN = '''
import sys, anyio
from bgtasks import BackgroundTask
def work(): print('worked', flush=True)
async def main():
    with anyio.fail_after(100): await BackgroundTask(work).using(runner='process')()
{guard}anyio.run(main)
'''

def script(tmp_path, text, *args, **kw):
    (file := tmp_path/'program.py').write_text(text)
    env = {**os.environ, 'PYTHONPATH':os.pathsep.join(filter(None, sys.path))}
    return subprocess.run([sys.executable, file, *args], env=env, capture_output=True, text=True, timeout=NET, **kw)

def test_a_function_of_a_guarded_main_module(tmp_path):
    done = script(tmp_path, MAIN.format(guard="if __name__=='__main__': "))
    assert (done.returncode, done.stdout, done.stderr) == (0, 'worked\n', '')

def test_a_main_module_without_guard_gets_an_error_that_names_it(tmp_path):
    done = script(tmp_path, MAIN.format(guard=''))
    assert done.returncode==1 and 'ProcessDied' in done.stderr and "if __name__ == '__main__'" in done.stderr
    assert 'TimeoutError' not in done.stderr

def test_a_main_module_that_ends_the_processes_with_0_gets_the_same_error(tmp_path):
    done = script(tmp_path, "import sys\nif __name__!='__main__': sys.exit()\n" + MAIN.format(guard=''))
    assert done.returncode==1 and 'ProcessDied' in done.stderr and "if __name__ == '__main__'" in done.stderr

# Timeouts and cancels

def test_a_timeout_does_not_count_the_queue(call, pool_of):
    pool_of(1)
    async def main():
        outs = []
        async with anyio.create_task_group() as group:
            async def one(i): outs.append(await ask(far.after, 0.6, i, timeout=5))
            for i in range(12): group.start_soon(one, i) # the last begins after seven seconds
        assert sorted(out.value for out in outs) == list(range(12))
    call(main)

def test_timeouts_in_a_queue_end_each_its_own_call(call, pool_of):
    pool_of(2)
    async def main():
        outs = {}
        async with anyio.create_task_group() as group:
            async def one(i): outs[i] = await ask(far.after, 600 if i%2 else 0, i, timeout=1 if i%2 else None)
            for i in range(10): group.start_soon(one, i)
        for i,out in outs.items(): assert type(out.error) is TaskTimeout if i%2 else out.value==i
    call(main)

@pytest.mark.parametrize('how', [far.begin, far.begin_in_c])
def test_a_timeout_kills(call, tmp_path, how):
    async def main():
        pids = []
        async with anyio.create_task_group() as group:
            async def note(): pids.append(await appeared(tmp_path/'begun'))
            group.start_soon(note)
            out = await ask(how, tmp_path/'begun', timeout=3)
        assert type(out.error) is TaskTimeout
        await gone(pids[0])
    call(main)

def test_a_cancel_kills(call, tmp_path):
    async def main():
        async with anyio.create_task_group() as group:
            group.start_soon(ask, far.begin, tmp_path/'begun')
            pid = await appeared(tmp_path/'begun')
            group.cancel_scope.cancel()
        await gone(pid)
    call(main)

def test_cancelled_in_the_queue_never_runs(call, pool_of, tmp_path):
    pool_of(1)
    async def main():
        async with anyio.create_task_group() as group:
            group.start_soon(ask, far.begin, tmp_path/'begun') # takes the only process
            await appeared(tmp_path/'begun')
            async with anyio.create_task_group() as waiting:
                for i in range(5): waiting.start_soon(ask, far.touch, tmp_path/f'ran{i}')
                await anyio.sleep(0.05)
                waiting.cancel_scope.cancel()
            group.cancel_scope.cancel()
        assert (await ask(far.add, 1)).value == 1
        assert not list(tmp_path.glob('ran*'))
    call(main)

# Several owners, and the end

def test_two_event_loops_use_the_pool_at_once(pool_of):
    pool_of(2)
    found,errors = {},[]
    def loop(name):
        async def main():
            async with anyio.create_task_group() as group:
                async def one(i): found[name, i] = (await ask(far.add, i, 1000)).value
                for i in range(25): group.start_soon(one, i)
        async def guarded():
            with anyio.fail_after(NET): await main()
        try: anyio.run(guarded, backend=name.rstrip('2'))
        except BaseException as e: errors.append(e)
    threads = [threading.Thread(target=loop, args=[name]) for name in ('asyncio', 'trio', 'asyncio2')]
    for t in threads: t.start()
    for t in threads: t.join(NET)
    assert not errors and len(found)==75 and all(v==i+1000 for (_,i),v in found.items())

def test_close_pool_while_busy_tells_the_running_call_and_the_waiting_ones_go_to_a_new_process(call, pool_of, tmp_path):
    pool_of(1)
    async def main():
        outs = []
        async with anyio.create_task_group() as group:
            async def one(*args): outs.append(await ask(*args))
            group.start_soon(one, far.begin, tmp_path/'begun')
            pid = await appeared(tmp_path/'begun')
            for _ in range(3): group.start_soon(one, far.add, 1)
            await anyio.sleep(0.05)
            await to_thread.run_sync(close_pool)
        told = [o.error for o in outs if o.error]
        assert len(told)==1 and type(told[0]) is ProcessDied and 'close_pool()' in str(told[0])
        assert [o.value for o in outs if not o.error]==[1, 1, 1]
        assert not alive(pid)
        assert (await ask(far.add, 1)).value == 1
    call(main)

def test_an_event_loop_that_ends_before_the_answer(pool_of):
    pool_of(1)
    for _ in range(3):
        async def main():
            with anyio.move_on_after(0.01): await ask(far.after, 0.05, 1)
        anyio.run(main)
    time.sleep(0.2)
    assert anyio.run(ask, far.add, 1).value == 1

FORK = '''
import os, sys, anyio, far
from bgtasks.run import run
async def ask(func, *args):
    with anyio.fail_after(100): return (await run(func, args, runner='process')).unwrap()
if __name__=='__main__':
    first = anyio.run(ask, far.pid)
    if (child := os.fork())==0:
        mine = anyio.run(ask, far.pid)
        print('child', anyio.run(ask, far.add, 1, 2), mine!=first, flush=True)
        sys.exit(0)
    print('parent', anyio.run(ask, far.add, 3, 4), flush=True)
    print('exit', os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    print('parent', anyio.run(ask, far.add, 5, 6), flush=True)
'''

def test_a_forked_child_has_a_pool_of_its_own(tmp_path):
    done = script(tmp_path, FORK)
    assert done.returncode==0 and done.stderr=='', done.stderr
    assert sorted(done.stdout.splitlines()) == ['child 3 True', 'exit 0', 'parent 11', 'parent 7']

END = '''
import sys, threading, anyio, far
from bgtasks import BackgroundTask
from bgtasks.run import run
async def main():
    async with anyio.create_task_group() as group:
        group.start_soon(BackgroundTask(far.begin, sys.argv[2]).using(runner=sys.argv[1], timeout=600))
        while not __import__('os').path.exists(sys.argv[2]): await anyio.sleep(0.01)
        {then}
if __name__=='__main__':
    anyio.run(main)
    print('over', flush=True)
'''

@pytest.mark.parametrize('then', ["raise SystemExit(5)", "raise KeyboardInterrupt"])
def test_a_program_ends_though_a_process_task_runs(tmp_path, then):
    done = script(tmp_path, END.format(then=then), 'process', tmp_path/'begun')
    assert not alive(int((tmp_path/'begun').read_text()))
    assert done.returncode in ((5, 1) if 'Exit' in then else (1, 130, -signal.SIGINT))

THREAD = '''
import threading, time, anyio
from bgtasks import TaskTimeout, cancelled
from bgtasks import BackgroundTask
def stubborn():
    while not cancelled(): time.sleep(0.01)
    print('noticed', flush=True)
async def main():
    try: await BackgroundTask(stubborn).using(timeout=0.2)()
    except TaskTimeout: print('timeout', flush=True)
if __name__=='__main__': anyio.run(main)
'''

def test_a_program_ends_after_a_thread_task_was_given_up(tmp_path):
    done = script(tmp_path, THREAD)
    assert done.returncode==0 # two threads print: their lines may run into each other
    assert sorted(done.stdout.replace('noticed', ' noticed ').split())==['noticed', 'timeout']
    assert 'Exception ignored' not in done.stderr

IDLE = '''
import anyio, far
from bgtasks.run import run
if __name__=='__main__':
    print(anyio.run(lambda: run(far.pid, runner='process')).value, flush=True)
    {then}
'''

@pytest.mark.parametrize('then', ['pass', 'raise SystemExit(0)', 'import sys; sys.exit()'])
def test_a_program_with_an_idle_pool_ends_and_leaves_none(tmp_path, then):
    done = script(tmp_path, IDLE.format(then=then))
    assert (done.returncode, done.stderr) == (0, '')
    assert not alive(int(done.stdout))
