"""redis-py with its default settings: HOST PORT standalone|cluster.

Every check is ordinary work of an application; all are tried, and those that fail are named.
"""

import sys
import threading
import time
import traceback
import warnings

import redis
from redis.cache import CacheConfig

# A tag keeps the keys of one transaction or script together, as applications do it.
TAG = "{py}"


def strings(client):
    assert client.set("py:s", "v") is True
    assert client.get("py:s") == b"v"
    assert client.set("py:s", "w", nx=True) is None
    assert client.set("py:s", "w", xx=True, get=True) == b"v"
    assert client.setex("py:e", 100, "x") is True
    assert 90 < client.ttl("py:e") <= 100
    assert client.incrby("py:n", 5) == 5
    assert client.incrbyfloat("py:f", 0.5) == 0.5
    assert client.append("py:s", "xyz") == 4
    assert client.getrange("py:s", 1, 2) == b"xy"
    assert client.delete("py:s") == 1
    assert client.get("py:s") is None


def many_keys(client):
    names = [f"py:m:{n}" for n in range(50)]
    for name in names:
        client.set(name, name)
    if isinstance(client, redis.RedisCluster):
        values = client.mget_nonatomic(names)
        assert client.mset_nonatomic({name: "x" for name in names})
    else:
        values = client.mget(names)
        assert client.mset({name: "x" for name in names}) is True
    assert values == [name.encode() for name in names]
    assert client.exists(*names) == 50
    assert client.delete(*names) == 50


def hashes(client):
    assert client.hset("py:h", mapping={"a": 1, "b": "two"}) == 2
    assert client.hgetall("py:h") == {b"a": b"1", b"b": b"two"}
    assert client.hmget("py:h", "a", "none") == [b"1", None]
    assert client.hincrby("py:h", "a", 4) == 5
    assert dict(client.hscan_iter("py:h")) == {b"a": b"5", b"b": b"two"}


def lists(client):
    assert client.rpush("py:l", *"abc") == 3
    assert client.lrange("py:l", 0, -1) == [b"a", b"b", b"c"]
    assert client.lpop("py:l") == b"a"
    assert client.lpos("py:l", "c") == 1
    assert list(client.blpop("py:l", timeout=1)) == [b"py:l", b"b"]


def sets(client):
    assert client.sadd(f"py:x{TAG}", 1, 2, 3) == 3
    assert client.sadd(f"py:y{TAG}", 2, 3, 4) == 3
    assert client.sinter(f"py:x{TAG}", f"py:y{TAG}") == {b"2", b"3"}
    assert client.smembers(f"py:x{TAG}") == {b"1", b"2", b"3"}
    assert client.sismember(f"py:x{TAG}", 1) == 1


def sorted_sets(client):
    assert client.zadd("py:z", {"a": 1, "b": 2.5}) == 2
    assert client.zscore("py:z", "b") == 2.5
    assert [list(pair) for pair in client.zrange("py:z", 0, -1, withscores=True)] == [[b"a", 1], [b"b", 2.5]]
    assert client.zincrby("py:z", 2, "a") == 3
    assert client.zrank("py:z", "a") == 1


def streams(client):
    first = client.xadd("py:st", {"k": "v"})
    client.xadd("py:st", {"k": "w"})
    assert client.xlen("py:st") == 2
    assert client.xrange("py:st")[0][0] == first
    client.xgroup_create("py:st", "g", "0")
    read = client.xreadgroup("g", "c", {"py:st": ">"}, count=1)
    assert read, read
    assert client.xack("py:st", "g", first) == 1
    assert client.xread({"py:st": "0"}, block=50)
    assert not client.xread({"py:st": "$"}, block=50)


def pipelines(client):
    pipe = client.pipeline(transaction=False)
    for n in range(100):
        pipe.set(f"py:p:{n}", n)
        pipe.get(f"py:p:{n}")
    replies = pipe.execute()
    assert replies[1::2] == [str(n).encode() for n in range(100)], replies[:6]


def transactions(client):
    a, b = f"py:t1{TAG}", f"py:t2{TAG}"
    with client.pipeline(transaction=True) as pipe:
        pipe.set(a, 1)
        pipe.incr(a)
        pipe.get(a)
        pipe.set(b, 2)
        replies = pipe.execute()
        assert len(replies) == 4 and replies[1:3] == [2, b"2"], replies
    with client.pipeline(transaction=True) as pipe:
        pipe.watch(a)
        held = int(pipe.get(a))
        client.set(a, 50)
        pipe.multi()
        pipe.set(a, held + 1)
        try:
            pipe.execute()
        except redis.WatchError:
            pass
        else:
            raise AssertionError("a watched key was changed, and EXEC went on")
    assert client.get(a) == b"50"


def pubsub(client):
    listener = client.pubsub(ignore_subscribe_messages=True)
    listener.subscribe("py:news")
    listener.psubscribe("py:n?ws")
    heard = []
    deadline = time.monotonic() + 5
    # Subscribed when the first message arrives; each try publishes once more.
    while len({kind for kind, _ in heard}) < 2 and time.monotonic() < deadline:
        client.publish("py:news", "hello")
        for _ in range(4):
            message = listener.get_message(timeout=0.2)
            if message is not None:
                heard.append((message["type"], message["data"]))
    listener.close()
    assert {("message", b"hello"), ("pmessage", b"hello")} <= set(heard), heard


def blocking(client):
    began = time.monotonic()
    assert not client.blpop("py:none", timeout=0.2)
    assert 0.15 < time.monotonic() - began < 2
    results = []
    waiter = threading.Thread(target=lambda: results.append(client.blpop("py:q", timeout=5)))
    waiter.start()
    time.sleep(0.1)
    client.rpush("py:q", "job")
    waiter.join(6)
    assert [list(r) for r in results] == [[b"py:q", b"job"]], results


def scripts(client):
    script = client.register_script("return redis.call('INCRBY', KEYS[1], ARGV[1])")
    if isinstance(client, redis.RedisCluster):
        sha = client.script_load(script.script)
        assert client.evalsha(sha, 1, "py:lua", 3) == 3
    else:
        assert script(keys=["py:lua"], args=[3]) == 3
        client.script_flush()
        assert script(keys=["py:lua"], args=[3]) == 6
    assert client.eval("return {KEYS[1], ARGV[1]}", 1, "py:k", "v") == [b"py:k", b"v"]


def scanning(client):
    names = {f"py:scan:{n}" for n in range(300)}
    pipe = client.pipeline(transaction=False)
    for name in names:
        pipe.set(name, "x")
    pipe.execute()
    found = {key.decode() for key in client.scan_iter(match="py:scan:*", count=20)}
    assert found == names, f"{len(found)} of {len(names)}"


def caching(client):
    host, port, kind = ADDRESS
    connect = redis.RedisCluster if kind == "cluster" else redis.Redis
    cached = connect(host=host, port=port, protocol=3, cache_config=CacheConfig())
    client.set("py:cached", "old")
    assert cached.get("py:cached") == b"old"
    assert cached.get("py:cached") == b"old"
    client.set("py:cached", "new")
    deadline = time.monotonic() + 5
    while cached.get("py:cached") != b"new":
        assert time.monotonic() < deadline, "the invalidation did not arrive"
        time.sleep(0.01)
    cached.close()


def about(client):
    assert client.ping() is True
    assert client.dbsize() >= 0
    info = client.info()
    assert "redis_version" in info or all("redis_version" in i for i in info.values()), info
    assert client.type("py:none") == b"none"
    assert client.object("encoding", "py:n") in (b"int", b"embstr", b"raw")


def errors(client):
    client.set("py:text", "x")
    try:
        client.lpush("py:text", "y")
    except redis.ResponseError as error:
        assert str(error).startswith("WRONGTYPE"), error
    else:
        raise AssertionError("no WRONGTYPE")


CHECKS = [
    strings, many_keys, hashes, lists, sets, sorted_sets, streams, pipelines, transactions,
    pubsub, blocking, scripts, scanning, caching, about, errors,
]
ADDRESS = None
# What an application would read once, and we would in every run.
warnings.simplefilter("ignore", DeprecationWarning)


def main():
    global ADDRESS
    host, port, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    ADDRESS = host, port, kind
    connect = redis.RedisCluster if kind == "cluster" else redis.Redis
    client = connect(host=host, port=port)
    client.flushall()
    failed = 0
    for check in CHECKS:
        try:
            check(client)
        except Exception as error:
            failed += 1
            line = traceback.extract_tb(error.__traceback__)[-1]
            here = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == __file__][-1]
            print(f"FAILED {check.__name__}: {type(error).__name__}: {error} at `{here.line}`"
                  f" ({line.name}:{line.lineno})")
    print(f"redis-py {redis.__version__} {kind}: {len(CHECKS) - failed} of {len(CHECKS)} checks passed")
    sys.exit(1 if failed else 0)


main()
