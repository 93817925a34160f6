__version__ = "0.1.0"

from bgtasks.background import BackgroundMiddleware, BackgroundTask, BackgroundTasks, background
from bgtasks.errors import BgTasksError, Cancel, Retry, TaskTimeout
from bgtasks.job import Job
from bgtasks.retry import Backoff
from bgtasks.run import cancelled, current_job

__all__ = ['BackgroundMiddleware', 'BackgroundTask', 'BackgroundTasks', 'background', 'BgTasksError', 'Cancel', 'Retry',
           'TaskTimeout', 'Job', 'Backoff', 'cancelled', 'current_job']
