'use strict';
// node-redis with its default settings: HOST PORT standalone|cluster.

const { createClient, createCluster, WatchError } = require('redis');
const { assert, run, until } = require('./checks.js');

const [host, port, kind] = [process.argv[2], Number(process.argv[3]), process.argv[4]];
const cluster = kind === 'cluster';
const tag = '{nr}';
const url = `redis://${host}:${port}`;

async function connect(options = {}) {
  const client = cluster
    ? createCluster({ rootNodes: [{ url }], ...options })
    : createClient({ url, ...options });
  client.on('error', (error) => console.log(`client: ${error.message}`));
  await client.connect();
  return client;
}

async function open() {
  const client = await connect();
  const admin = await createClient({ url }).connect();
  await admin.flushAll();
  await admin.close();
  return client;
}

const checks = {
  async strings(c) {
    assert.equal(await c.set('nr:s', 'v'), 'OK');
    assert.equal(await c.get('nr:s'), 'v');
    assert.equal(await c.set('nr:s', 'w', { condition: 'NX' }), null);
    assert.equal(await c.setEx('nr:e', 100, 'x'), 'OK');
    assert((await c.ttl('nr:e')) > 90);
    assert.equal(await c.incrBy('nr:n', 5), 5);
    assert.equal(await c.del('nr:s'), 1);
  },
  async manyKeys(c) {
    const suffix = cluster ? tag : '';
    const names = Array.from({ length: 50 }, (_, n) => `nr:m:${n}${suffix}`);
    assert.equal(await c.mSet(names.map((name) => [name, name])), 'OK');
    assert.deepEqual(await c.mGet(names), names);
    assert.equal(await c.del(names), 50);
  },
  async hashes(c) {
    assert.equal(await c.hSet('nr:h', { a: 1, b: 'two' }), 2);
    assert.deepEqual({ ...(await c.hGetAll('nr:h')) }, { a: '1', b: 'two' });
  },
  async lists(c) {
    assert.equal(await c.rPush('nr:l', ['a', 'b', 'c']), 3);
    assert.deepEqual(await c.lRange('nr:l', 0, -1), ['a', 'b', 'c']);
    assert.equal(await c.lPop('nr:l'), 'a');
  },
  async sets(c) {
    await c.sAdd(`nr:x${tag}`, ['1', '2', '3']);
    await c.sAdd(`nr:y${tag}`, ['2', '3', '4']);
    assert.deepEqual([...(await c.sInter([`nr:x${tag}`, `nr:y${tag}`]))].sort(), ['2', '3']);
  },
  async sortedSets(c) {
    assert.equal(await c.zAdd('nr:z', [{ score: 1, value: 'a' }, { score: 2.5, value: 'b' }]), 2);
    assert.equal(await c.zScore('nr:z', 'b'), 2.5);
    assert.deepEqual(
      (await c.zRangeWithScores('nr:z', 0, -1)).map((m) => ({ ...m })),
      [{ value: 'a', score: 1 }, { value: 'b', score: 2.5 }],
    );
  },
  async streams(c) {
    const id = await c.xAdd('nr:st', '*', { k: 'v' });
    assert.equal((await c.xRange('nr:st', '-', '+'))[0].id, id);
    assert.equal(await c.xGroupCreate('nr:st', 'g', '0'), 'OK');
    const read = await c.xReadGroup('g', 'c', { key: 'nr:st', id: '>' }, { COUNT: 1 });
    assert(JSON.stringify(read).includes(id), JSON.stringify(read));
    assert.equal(await c.xAck('nr:st', 'g', id), 1);
    assert.equal(await c.xRead({ key: 'nr:st', id: '$' }, { BLOCK: 50 }), null);
  },
  async pipelines(c) {
    // Commands of one turn are sent as one pipeline.
    const replies = await Promise.all(
      Array.from({ length: 100 }, async (_, n) => {
        const [, value] = await Promise.all([c.set(`nr:p:${n}`, n.toString()), c.get(`nr:p:${n}`)]);
        return value;
      }),
    );
    assert.deepEqual(replies, Array.from({ length: 100 }, (_, n) => String(n)));
  },
  async transactions(c) {
    const replies = await c.multi().set(`nr:t1${tag}`, '1').incr(`nr:t1${tag}`).set(`nr:t2${tag}`, '2').exec();
    assert.deepEqual([...replies], ['OK', 2, 'OK']);
    if (!cluster) {
      const other = await connect();
      await other.watch('nr:w');
      await c.set('nr:w', 'changed');
      await assert.rejects(other.multi().set('nr:w', 'mine').exec(), WatchError);
      await other.close();
    }
  },
  async pubsub(c) {
    const listener = cluster ? c : await c.duplicate().connect();
    const heard = [];
    await listener.subscribe('nr:news', (message, channel) => heard.push(`${channel}=${message}`));
    await listener.pSubscribe('nr:n?ws', (message, channel) => heard.push(`p:${channel}=${message}`));
    await until('both messages', async () => {
      await c.publish('nr:news', 'hello');
      return heard.includes('nr:news=hello') && heard.includes('p:nr:news=hello');
    });
    await listener.unsubscribe('nr:news');
    await listener.pUnsubscribe('nr:n?ws');
    if (!cluster) await listener.close();
  },
  async shardedPubsub(c) {
    const listener = cluster ? c : await c.duplicate().connect();
    const heard = [];
    await listener.sSubscribe('nr:shard', (message) => heard.push(message));
    await until('the message', async () => {
      await c.sPublish('nr:shard', 'hello');
      return heard.includes('hello');
    });
    await listener.sUnsubscribe('nr:shard');
    if (!cluster) await listener.close();
  },
  async blocking(c) {
    const waiter = await connect();
    const popped = waiter.blPop('nr:q', 5);
    await new Promise((resolve) => setTimeout(resolve, 100));
    await c.rPush('nr:q', 'job');
    assert.deepEqual({ ...(await popped) }, { key: 'nr:q', element: 'job' });
    assert.equal(await waiter.blPop('nr:none', 0.2), null);
    await waiter.close();
  },
  async scripts(c) {
    assert.deepEqual(await c.eval('return {KEYS[1], ARGV[1]}', { keys: ['nr:k'], arguments: ['v'] }), ['nr:k', 'v']);
    const admin = await createClient({ url }).connect();
    const sha = await admin.scriptLoad("return redis.call('INCRBY', KEYS[1], ARGV[1])");
    await admin.close();
    assert.equal(await c.evalSha(sha, { keys: ['nr:lua'], arguments: ['3'] }), 3);
  },
  async scanning(c) {
    await Promise.all(Array.from({ length: 300 }, (_, n) => c.set(`nr:scan:${n}`, 'x')));
    const found = new Set();
    const nodes = cluster ? await Promise.all(c.masters.map((node) => c.nodeClient(node))) : [c];
    for (const node of nodes) {
      for await (const keys of node.scanIterator({ MATCH: 'nr:scan:*', COUNT: 20 })) {
        [keys].flat().forEach((key) => found.add(key));
      }
    }
    assert.equal(found.size, 300);
  },
  async caching(c) {
    const cached = await connect({ RESP: 3, clientSideCache: { ttl: 0, maxEntries: 0, evictPolicy: 'LRU' } });
    await c.set('nr:cached', 'old');
    assert.equal(await cached.get('nr:cached'), 'old');
    assert.equal(await cached.get('nr:cached'), 'old');
    await c.set('nr:cached', 'new');
    await until('the invalidation', async () => (await cached.get('nr:cached')) === 'new');
    await cached.close();
  },
  async errors(c) {
    await c.set('nr:text', 'x');
    await assert.rejects(c.lPush('nr:text', 'y'), /WRONGTYPE/);
  },
};

run(`node-redis ${require('redis/package.json').version} ${kind}`, open, checks);
