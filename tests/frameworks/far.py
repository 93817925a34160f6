"Functions that test_process.py sends to another process: they must be found there by import."
import ctypes, os, signal, threading, time
from pathlib import Path

def add(a, b=0): return a+b
def pid(): return os.getpid()
def double(data): return data+data
def many(n): return b'x'*n
def size(data): return len(data)
def raise_(e): raise e
def leave(code): raise SystemExit(code)
def interrupt(): raise KeyboardInterrupt

def begin(file):
    "Say by `file` which process this is; then work for ever."
    Path(f'{file}.tmp').write_text(str(os.getpid()))
    Path(f'{file}.tmp').rename(file)
    while True: time.sleep(0.01)

def begin_in_c(file):
    "The same, in one call of C that no Python signal handler interrupts."
    Path(f'{file}.tmp').write_text(str(os.getpid()))
    Path(f'{file}.tmp').rename(file)
    ctypes.PyDLL(None).sleep(600) # holds the interpreter's lock, too

def touch(file): Path(file).touch()

def die(file, code):
    "Say by a line of `file` that this runs; then end, in C, with the exit code or by the signal that `code` gives."
    with open(file, 'a') as f: print(os.getpid(), file=f)
    if code < 0: os.kill(os.getpid(), -code)
    ctypes.CDLL(None)._exit(code)

def after(seconds, value):
    time.sleep(seconds)
    return value

def risky(i):
    "Give `i`, or die one of many deaths."
    if i%20==1: os.kill(os.getpid(), signal.SIGKILL)
    if i%20==2: os._exit(i%200)
    if i%20==3: raise ValueError(i)
    if i%20==4: os.abort()
    time.sleep(0.001*(i%5))
    return i

class NoPickle(Exception):
    "Holds what can't be pickled."
    def __init__(self, what):
        super().__init__(what)
        self.lock = threading.Lock()

class TwoArgs(Exception):
    "Can be pickled, but not made again from its `args`."
    def __init__(self, a, b): super().__init__(f'{a} and {b}')

class Explodes(Exception):
    "Runs code when it is pickled, and that code fails."
    def __reduce__(self): raise RuntimeError('not me')

class Mute(NoPickle):
    def __str__(self): raise RuntimeError('no words')

kinds = dict(NoPickle=lambda: NoPickle('lock'), TwoArgs=lambda: TwoArgs(1, 2), Explodes=lambda: Explodes('x'),
             Mute=lambda: Mute('x'))
def raise_kind(name): raise kinds[name]()
def raise_chain():
    try: raise NoPickle('inner')
    except NoPickle as e: raise ValueError('outer') from e
def raise_group(): raise ExceptionGroup('two', [ValueError(1), OSError(2)])

class Unreadable:
    "Can be pickled here, and fails when it is unpickled."
    def __reduce__(self): return raise_, (ValueError('unreadable'),)
def unreadable(): return Unreadable()
