// ioredis or node-redis under load, until the standard input ends: LIBRARY HOST PORT.
'use strict';

const [library, host, port] = process.argv.slice(2);
const keys = ['js:0', 'js:1', 'js:2', 'js:3'];
const errors = [];
let calls = 0;
let stop = false;

async function open() {
  if (library === 'ioredis') {
    return new (require('ioredis'))({ host, port: Number(port), retryStrategy: () => 20 });
  }
  const client = require('redis').createClient({
    RESP: 3,
    socket: { host, port: Number(port) },
    maintNotifications: 'enabled',
  });
  client.on('error', () => {});
  await client.connect();
  return client;
}

async function work(client, key) {
  for (let count = 1; !stop; count++) {
    try {
      const got = await client.incr(key);
      if (got !== count) {
        errors.push(`${key} is ${got}, not ${count}`);
        return;
      }
      calls++;
    } catch (error) {
      errors.push(String(error));
      return;
    }
  }
}

(async () => {
  const client = await open();
  process.stdin.on('end', () => (stop = true)).resume();
  await Promise.all(keys.map((key) => work(client, key)));
  console.log(JSON.stringify({ errors, calls }));
  process.exit(0);
})();
