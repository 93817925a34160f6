"Schedules under a clock that is set forward and back, over the changes of summer time, in several processes at once."
import random, subprocess, sys, time
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import apsw, pytest

from bgtasks.periodic import Periodic
from bgtasks.queue import TaskQueue
from bgtasks.sqlite import SQLiteStore

ROOT = Path(__file__).parents[1]

class House:
    "Several processes with one file and one clock, that look at it one after the other"
    def __init__(self, path, n=3, **options):
        self.now = 1_800_000_000.0
        self.queues = [TaskQueue(SQLiteStore(path, 'process', clock=lambda: self.now)) for _ in range(n)]
        for q in self.queues: q.task(lambda: None, name='t', **options)
        self.looks = [Periodic(q) for q in self.queues]
        self.dice = random.Random(7)
        self.seen = set()
    def set(self, now):
        "Set the clock; give the ticks that were recorded now, however often and in whatever order all look"
        self.now = now
        for o in self.dice.choices(self.looks, k=5) + self.looks: o.beat()
        new = [j for j in self.queues[0].find(limit=10**6) if j.id not in self.seen]
        self.seen.update(j.id for j in new)
        return [j.run_at for j in new]
    def close(self):
        for q in self.queues: q.close()

@pytest.fixture
def house(tmp_path):
    made = []
    def make(**options):
        made.append(House(tmp_path/'q.db', **options))
        return made[-1]
    yield make
    for o in made: o.close()

STEPS = [0, .5, 7, 59, 60, 61, 899, 900, 3599, 3600, 5000, 90_000, -1, -61, -3600, -90_000]

@pytest.mark.parametrize('missed', ['once', 'skip'])
@pytest.mark.parametrize('period,options', [(60, dict(every=60)), (3600, dict(every='1h')),
                                            (900, dict(cron='*/15 * * * *', tz='Asia/Kathmandu'))])
def test_one_job_per_tick_while_the_clock_is_set(house, period, options, missed):
    h = house(missed=missed, **options)
    last = h.now
    assert h.set(h.now)==[] # it is new: it starts now
    for step in h.dice.choices(STEPS, k=250):
        now = h.now+step
        tick,want = now//period*period,[] # the latest
        if tick > last: want,last = [tick] if missed=='once' or now-tick <= 60 else [],tick
        elif last-now > period or tick+period < last: last = now # set back by more than the schedule can wait for
        assert h.set(now)==want, (step, now, last)

@pytest.mark.parametrize('zone,day,line,runs', [
    ('Europe/Berlin', date(2027, 3, 28), '30 2 * * *', 1),          # there is no half past two
    ('Europe/Berlin', date(2027, 10, 31), '30 2 * * *', 1),         # there are two
    ('Australia/Lord_Howe', date(2027, 4, 4), '45 1 * * *', 1),     # half an hour comes twice
    ('Australia/Lord_Howe', date(2027, 10, 3), '15 2 * * *', 1),    # or not at all
    ('Africa/Cairo', date(2027, 4, 30), '0 0 * * *', 1),            # there is no midnight
    ('America/Sao_Paulo', date(2018, 11, 4), '0 0 * * *', 1),
    ('Pacific/Apia', date(2011, 12, 30), '0 12 * * *', 0), # a day that was left out; its run comes on the next
])
def test_once_a_day_whatever_the_zone_does(house, zone, day, line, runs):
    h,tz = house(cron=line, tz=zone),ZoneInfo(zone)
    start = datetime(day.year, day.month, day.day, 12, tzinfo=UTC)-timedelta(days=4)
    ticks = []
    for n in range(8*48): ticks += h.set(start.timestamp()+1800*n)
    days = Counter(datetime.fromtimestamp(t, tz).date() for t in ticks)
    inner = [day+timedelta(days=n) for n in range(-2, 3)]
    assert [days[d] for d in inner]==[1, 1, runs, 2-runs, 1]

def test_an_hour_forward_and_back_again(house):
    h = house(every=60)
    h.set(h.now)
    t = h.now//60*60+60
    assert h.set(t)==[t]
    assert h.set(t+3600)==[t+3600] # sixty ticks at once: one run
    assert h.set(t)==[]            # no tick comes twice when the clock is set right again
    assert h.set(t+60)==[t+60] and h.set(t+120)==[t+120] # and the schedule does not rest for an hour

def test_a_damaged_tick_stops_no_schedule(house, tmp_path):
    h = house(every=60)
    for q in h.queues: q.task(lambda: None, name='other', every=60)
    h.set(h.now)
    for value in ("'x'", "x'ff'", '9e999', '-9e999'):
        cx = apsw.Connection(str(tmp_path/'q.db'))
        cx.execute(f"UPDATE ticks SET at={value} WHERE name='t'")
        cx.close()
        h.looks = [Periodic(q) for q in h.queues] # all have been started again
        ticks = [o for n in range(3) for o in h.set(h.now//60*60+60)]
        assert 5 <= len(ticks) <= 6 and len(set(ticks))==3, (value, ticks)

def test_processes_that_look_at_once(tmp_path):
    "In real processes, by the real clock"
    code = '''
import asyncio, sys, time
from bgtasks.periodic import Periodic
from bgtasks.queue import TaskQueue
from bgtasks.sqlite import SQLiteStore
queue = TaskQueue(SQLiteStore(sys.argv[1], 'process'))
queue.task(lambda: None, name='t', every='0.05s')
queue.task(lambda: None, name='c', cron='* * * * * *')
async def main():
    async with Periodic(queue): await asyncio.sleep(2.5)
asyncio.run(main())'''
    procs = [subprocess.Popen([sys.executable, '-c', code, tmp_path/'q.db'], cwd=ROOT) for _ in range(4)]
    assert [p.wait(60) for p in procs]==[0]*4
    with TaskQueue(SQLiteStore(tmp_path/'q.db')) as queue:
        for task,step in (('t', .05), ('c', 1)):
            ticks = sorted(j.run_at for j in queue.find(task=task, limit=10_000))
            assert len(set(ticks))==len(ticks) >= 2 and all(abs(t/step-round(t/step)) < 1e-4 for t in ticks)
