'use strict';
// What the checks of the JavaScript clients share: all are tried, those that fail are named.

const assert = require('node:assert');

// A client that retries for ever would never end by itself.
const CHECK_LIMIT_MS = 20000;

function limited(promise, what) {
  let timer;
  const limit = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what} took more than ${CHECK_LIMIT_MS} ms`)), CHECK_LIMIT_MS);
  });
  return Promise.race([promise, limit]).finally(() => clearTimeout(timer));
}

// A promise that fails while a check awaits another is that check's failure, not the end of all.
process.on('unhandledRejection', () => {});

async function run(title, open, checks) {
  let failed = 0;
  let client;
  try {
    client = await limited(open(), 'connecting');
  } catch (error) {
    console.log(`FAILED connect: ${error.message}`);
    process.exit(1);
  }
  for (const [name, check] of Object.entries(checks)) {
    try {
      await limited(check(client), name);
    } catch (error) {
      failed += 1;
      const place = (error.stack.match(/\((\S+?:\d+):\d+\)/g) || []).find((at) => !at.includes('node:'));
      console.log(`FAILED ${name}: ${error.message.split('\n').slice(0, 12).join(' ')} ${place || ''}`);
    }
  }
  const count = Object.keys(checks).length;
  console.log(`${title}: ${count - failed} of ${count} checks passed`);
  process.exit(failed ? 1 : 0);
}

/** Asks until it is so. */
async function until(what, is) {
  const deadline = Date.now() + 5000;
  while (!(await is())) {
    assert(Date.now() < deadline, `waited for ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

module.exports = { assert, run, until };
