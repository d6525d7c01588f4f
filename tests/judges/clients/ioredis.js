'use strict';
// ioredis with its default settings: HOST PORT standalone|cluster.

const Redis = require('ioredis');
const { assert, run, until } = require('./checks.js');

const [host, port, kind] = [process.argv[2], Number(process.argv[3]), process.argv[4]];
const cluster = kind === 'cluster';
const tag = '{io}';
const connect = () => (cluster ? new Redis.Cluster([{ host, port }]) : new Redis(port, host));

async function open() {
  const client = connect();
  await new Promise((resolve, reject) => {
    client.once('ready', resolve);
    client.once('error', reject);
  });
  await client.flushall();
  return client;
}

const checks = {
  async strings(c) {
    assert.equal(await c.set('io:s', 'v'), 'OK');
    assert.equal(await c.get('io:s'), 'v');
    assert.equal(await c.set('io:s', 'w', 'NX'), null);
    assert.equal(await c.set('io:e', 'x', 'EX', 100), 'OK');
    assert((await c.ttl('io:e')) > 90);
    assert.equal(await c.incrby('io:n', 5), 5);
    assert.equal(await c.incrbyfloat('io:f', 0.5), '0.5');
    assert.deepEqual(await c.getBuffer('io:s'), Buffer.from('v'));
    assert.equal(await c.del('io:s'), 1);
  },
  async manyKeys(c) {
    if (!cluster) {
      const names = Array.from({ length: 50 }, (_, n) => `io:m:${n}`);
      assert.equal(await c.mset(new Map(names.map((name) => [name, name]))), 'OK');
      assert.deepEqual(await c.mget(names), names);
      assert.equal(await c.del(...names), 50);
    } else {
      assert.equal(await c.mset(`io:a${tag}`, 1, `io:b${tag}`, 2), 'OK');
      assert.deepEqual(await c.mget(`io:a${tag}`, `io:b${tag}`), ['1', '2']);
    }
  },
  async hashes(c) {
    assert.equal(await c.hset('io:h', { a: 1, b: 'two' }), 2);
    assert.deepEqual(await c.hgetall('io:h'), { a: '1', b: 'two' });
    assert.deepEqual(await c.hmget('io:h', 'a', 'none'), ['1', null]);
  },
  async lists(c) {
    assert.equal(await c.rpush('io:l', 'a', 'b', 'c'), 3);
    assert.deepEqual(await c.lrange('io:l', 0, -1), ['a', 'b', 'c']);
    assert.equal(await c.lpop('io:l'), 'a');
  },
  async sets(c) {
    await c.sadd(`io:x${tag}`, 1, 2, 3);
    await c.sadd(`io:y${tag}`, 2, 3, 4);
    assert.deepEqual((await c.sinter(`io:x${tag}`, `io:y${tag}`)).sort(), ['2', '3']);
    assert.equal(await c.sismember(`io:x${tag}`, 1), 1);
  },
  async sortedSets(c) {
    assert.equal(await c.zadd('io:z', 1, 'a', 2.5, 'b'), 2);
    assert.equal(await c.zscore('io:z', 'b'), '2.5');
    assert.deepEqual(await c.zrange('io:z', 0, -1, 'WITHSCORES'), ['a', '1', 'b', '2.5']);
  },
  async streams(c) {
    const id = await c.xadd('io:st', '*', 'k', 'v');
    assert.deepEqual(await c.xrange('io:st', '-', '+'), [[id, ['k', 'v']]]);
    assert.equal(await c.xgroup('CREATE', 'io:st', 'g', '0'), 'OK');
    const read = await c.xreadgroup('GROUP', 'g', 'c', 'COUNT', 1, 'STREAMS', 'io:st', '>');
    assert.deepEqual(read, [['io:st', [[id, ['k', 'v']]]]]);
    assert.equal(await c.xack('io:st', 'g', id), 1);
    assert.equal(await c.xread('BLOCK', 50, 'STREAMS', 'io:st', '$'), null);
  },
  async pipelines(c) {
    const pipe = c.pipeline();
    for (let n = 0; n < 100; n += 1) {
      const key = cluster ? `io:p:${n}${tag}` : `io:p:${n}`;
      pipe.set(key, n).get(key);
    }
    const replies = await pipe.exec();
    assert(replies.every(([error]) => error === null));
    assert.deepEqual(replies.filter((_, n) => n % 2).map(([, value]) => value), Array.from({ length: 100 }, (_, n) => String(n)));
  },
  async autoPipelining() {
    const options = { enableAutoPipelining: true };
    const c = cluster ? new Redis.Cluster([{ host, port }], options) : new Redis(port, host, options);
    await Promise.all(Array.from({ length: 100 }, (_, n) => c.set(`io:ap:${n}`, n)));
    const values = await Promise.all(Array.from({ length: 100 }, (_, n) => c.get(`io:ap:${n}`)));
    assert.deepEqual(values, Array.from({ length: 100 }, (_, n) => String(n)));
    c.disconnect();
  },
  async transactions(c) {
    const replies = await c.multi().set(`io:t1${tag}`, 1).incr(`io:t1${tag}`).set(`io:t2${tag}`, 2).exec();
    assert.deepEqual(replies, [[null, 'OK'], [null, 2], [null, 'OK']]);
    if (!cluster) {
      await c.watch('io:w');
      const other = connect();
      await other.set('io:w', 'changed');
      assert.equal(await c.multi().set('io:w', 'mine').exec(), null);
      other.disconnect();
    }
  },
  async pubsub(c) {
    const listener = connect();
    const heard = [];
    listener.on('message', (channel, message) => heard.push(`${channel}=${message}`));
    listener.on('pmessage', (pattern, channel, message) => heard.push(`${pattern}:${channel}=${message}`));
    assert.equal(await listener.subscribe('io:news'), 1);
    assert.equal(await listener.psubscribe('io:n?ws'), 2);
    await until('both messages', async () => {
      await c.publish('io:news', 'hello');
      return heard.includes('io:news=hello') && heard.includes('io:n?ws:io:news=hello');
    });
    assert.equal(await listener.unsubscribe('io:news'), 1);
    listener.disconnect();
  },
  async blocking(c) {
    const waiter = connect();
    const popped = waiter.blpop('io:q', 5);
    await new Promise((resolve) => setTimeout(resolve, 100));
    await c.rpush('io:q', 'job');
    assert.deepEqual(await popped, ['io:q', 'job']);
    assert.equal(await waiter.blpop('io:none', 0.2), null);
    waiter.disconnect();
  },
  async scripts(c) {
    c.defineCommand('add', { numberOfKeys: 1, lua: "return redis.call('INCRBY', KEYS[1], ARGV[1])" });
    assert.equal(await c.add('io:lua', 3), 3);
    await c.script('FLUSH');
    assert.equal(await c.add('io:lua', 3), 6);
    assert.deepEqual(await c.eval('return {KEYS[1], ARGV[1]}', 1, 'io:k', 'v'), ['io:k', 'v']);
  },
  async scanning(c) {
    await Promise.all(Array.from({ length: 300 }, (_, n) => c.set(`io:scan:${n}`, 'x')));
    const found = new Set();
    for (const node of cluster ? c.nodes('master') : [c]) {
      const stream = node.scanStream({ match: 'io:scan:*', count: 20 });
      for await (const keys of stream) keys.forEach((key) => found.add(key));
    }
    assert.equal(found.size, 300);
  },
  async errors(c) {
    await c.set('io:text', 'x');
    await assert.rejects(c.lpush('io:text', 'y'), /WRONGTYPE/);
  },
  async about(c) {
    assert.match(await c.info(), /redis_version/);
    assert.equal(await c.ping(), 'PONG');
  },
};

run(`ioredis ${require('ioredis/package.json').version} ${kind}`, open, checks);
