"""Clients with TLS that count until stdin ends: none is connected anew, none loses or repeats a call.

Usage: tls_counts.py HOST PORT CA_FILE
"""

import sys
import threading

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

CLIENTS = 6
host, port, ca_file = sys.argv[1:4]
stop = threading.Event()
faults = []


def count(number):
    client = redis.Redis(
        host=host,
        port=int(port),
        ssl=True,
        ssl_ca_certs=ca_file,
        ssl_check_hostname=False,
        single_connection_client=True,
        socket_timeout=60,
        retry=Retry(NoBackoff(), 0),
    )
    key, done = f"tls:{port}:{number}", 0
    try:
        own = client.client_id()
        while not stop.is_set():
            if number % 2:
                got = [client.incr(key)]
            else:
                pipe = client.pipeline(transaction=number % 4 == 0)
                for _ in range(8):
                    pipe.incr(key)
                got = pipe.execute()
            want = list(range(done + 1, done + 1 + len(got)))
            if got != want:
                raise AssertionError(f"{got} instead of {want}")
            done += len(got)
        if client.client_id() != own:
            raise AssertionError("it was connected anew")
        if done == 0:
            raise AssertionError("it counted nothing")
    except Exception as error:  # whatever it is, it is told
        faults.append(f"client {number} after {done}: {error!r}")


threads = [threading.Thread(target=count, args=[number]) for number in range(CLIENTS)]
for thread in threads:
    thread.start()
print("counting", flush=True)
sys.stdin.read()
stop.set()
for thread in threads:
    thread.join()
if faults:
    sys.exit("\n".join(faults))
