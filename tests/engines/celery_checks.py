"The suite's tasks on Celery; the environment says where the servers are."
import json, os

from celery import Celery
from bgtasks import TaskQueue
from bgtasks.backends.celery import CeleryBackend
from bgtasks.checks import declare_checks, declare_wrapped
from bgtasks.records import Records

def records():
    if not os.environ['CHECK_RECORDS']: return
    res = Records(os.environ['CHECK_RECORDS'], os.environ['CHECK_PREFIX'])
    res.lease = float(os.environ.get('CHECK_LEASE', 10))
    res.late = float(os.environ.get('CHECK_LATE', 60))
    return res

app = Celery('checks', broker=os.environ['CHECK_BROKER'])
app.conf.update(task_default_queue=os.environ['CHECK_PREFIX']+'celery', worker_hijack_root_logger=False)
if 'CHECK_VISIBLE' in os.environ:
    app.conf.broker_transport_options = dict(visibility_timeout=float(os.environ['CHECK_VISIBLE']),
                                             unacked_restore_interval=1)

where = os.environ['CHECK_PREFIX']+'default'
if 'CHECK_SWEEPS' in os.environ: CeleryBackend.sweeps = float(os.environ['CHECK_SWEEPS'])
app.conf.update(json.loads(os.environ.get('CHECK_CONF', '{}')))
def backend():
    if os.environ['CHECK_RECORDS']=='app': return CeleryBackend(app) # where the app has its results
    return CeleryBackend(app, records=records())

queue = declare_checks(TaskQueue(backend()), where, every=.5)
wrapped = declare_wrapped(TaskQueue(backend()), where)
