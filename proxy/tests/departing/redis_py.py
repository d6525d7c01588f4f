"""redis-py under load, until its standard input ends: HOST PORT. No call is ever tried twice."""

import json
import sys
import threading

import redis
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

THREADS = 6

client = redis.Redis(
    host=sys.argv[1],
    port=int(sys.argv[2]),
    protocol=3,
    retry=Retry(NoBackoff(), 0),
    maint_notifications_config=MaintNotificationsConfig(enabled=True),
)
stop = threading.Event()
errors = []
counts = [0] * THREADS


def work(number):
    key = f"py:{number}"
    while not stop.is_set():
        try:
            if number % 2:
                got = client.incr(key)
                counts[number] += 1
            else:
                with client.pipeline(transaction=False) as pipe:
                    got = [pipe.incr(key) and None for _ in range(10)] and pipe.execute()[-1]
                counts[number] += 10
            if got != counts[number]:
                errors.append(f"{key} is {got}, not {counts[number]}")
                return
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
            return


def listen():
    pubsub = client.pubsub()
    heard = 0
    try:
        pubsub.subscribe("py:news")
        while not stop.is_set():
            message = pubsub.get_message(timeout=0.05)
            heard += bool(message and message["type"] == "message")
        counts.append(heard)
    except Exception as error:
        errors.append(f"listening: {type(error).__name__}: {error}")


def wait():
    try:
        while not stop.is_set():
            client.blpop("py:none", timeout=0.2)
    except Exception as error:
        errors.append(f"waiting: {type(error).__name__}: {error}")


# Connections that nobody uses leave, too.
idle = [client.connection_pool.get_connection() for _ in range(THREADS + 4)]
for connection in idle:
    client.connection_pool.release(connection)
threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
threads += [threading.Thread(target=listen), threading.Thread(target=wait)]
for thread in threads:
    thread.start()
sys.stdin.read()
stop.set()
for thread in threads:
    thread.join()
at = sorted({c["laddr"] for c in client.client_list()})
print(json.dumps({"errors": errors, "calls": sum(counts), "at": at}))
