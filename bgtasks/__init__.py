__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

from bgtasks.background import BackgroundMiddleware, BackgroundTask, BackgroundTasks, background
from bgtasks.errors import BgTasksError, Cancel, Retry, TaskTimeout
from bgtasks.job import Job
from bgtasks.retry import Backoff
from bgtasks.run import cancelled, current_job

if TYPE_CHECKING:
    from bgtasks.queue import TaskQueue
    from bgtasks.report import progress, track
    from bgtasks.worker import Worker

__all__ = ['BackgroundMiddleware', 'BackgroundTask', 'BackgroundTasks', 'background', 'BgTasksError', 'Cancel', 'Retry',
           'TaskTimeout', 'Job', 'Backoff', 'cancelled', 'current_job', 'TaskQueue', 'Worker', 'progress', 'track']

_later = dict(TaskQueue='queue', Worker='worker', progress='report', track='report') # imported when first asked for

def __getattr__(name):
    if name not in _later: raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = globals()[name] = getattr(import_module(f'bgtasks.{_later[name]}'), name)
    return value

def __dir__(): return sorted({*globals(), *__all__})
