// Jedis with its default settings: HOST PORT standalone|cluster.
//
// Every check is ordinary work of an application; all are tried, and those that fail are named.

import java.time.Duration;
import java.util.Arrays;
import java.util.HashMap;
import java.util.HashSet;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.Set;
import java.util.TreeMap;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import redis.clients.jedis.AbstractPipeline;
import redis.clients.jedis.HostAndPort;
import redis.clients.jedis.JedisCluster;
import redis.clients.jedis.JedisPooled;
import redis.clients.jedis.JedisPubSub;
import redis.clients.jedis.Response;
import redis.clients.jedis.StreamEntryID;
import redis.clients.jedis.Transaction;
import redis.clients.jedis.UnifiedJedis;
import redis.clients.jedis.exceptions.JedisDataException;
import redis.clients.jedis.params.ScanParams;
import redis.clients.jedis.params.SetParams;
import redis.clients.jedis.resps.ScanResult;

public final class Jedis {
  /** A tag keeps the keys of one transaction or script together, as applications do it. */
  private static final String TAG = "{java}";

  private interface Check {
    void run(UnifiedJedis client) throws Exception;
  }

  private static void same(Object want, Object got) {
    if (!Objects.equals(want, got)) {
      throw new AssertionError("wanted " + want + ", got " + got);
    }
  }

  private static void strings(UnifiedJedis client) {
    same("OK", client.set("java:s", "v"));
    same("v", client.get("java:s"));
    same(null, client.set("java:s", "w", SetParams.setParams().nx()));
    same("v", client.setGet("java:s", "w", SetParams.setParams().xx()));
    same("OK", client.setex("java:e", 100, "x"));
    long ttl = client.ttl("java:e");
    same(true, ttl > 90 && ttl <= 100);
    same(5L, client.incrBy("java:n", 5));
    same(0.5, client.incrByFloat("java:f", 0.5));
    same(4L, client.append("java:s", "xyz"));
    same(1L, client.del("java:s"));
    same(null, client.get("java:s"));
  }

  private static void collections(UnifiedJedis client) {
    Map<String, String> fields = new HashMap<>(Map.of("a", "1", "b", "two"));
    same(2L, client.hset("java:h", fields));
    same(fields, client.hgetAll("java:h"));
    same(Arrays.asList("1", null), client.hmget("java:h", "a", "none"));
    same(3L, client.rpush("java:l", "a", "b", "c"));
    same(List.of("a", "b", "c"), client.lrange("java:l", 0, -1));
    same(List.of("java:l", "a"), client.blpop(1, "java:l"));
    same(3L, client.sadd("java:x" + TAG, "1", "2", "3"));
    same(3L, client.sadd("java:y" + TAG, "2", "3", "4"));
    same(Set.of("2", "3"), client.sinter("java:x" + TAG, "java:y" + TAG));
    same(2L, client.zadd("java:z", Map.of("a", 1.0, "b", 2.5)));
    same(2.5, client.zscore("java:z", "b"));
    same(3.0, client.zincrby("java:z", 2, "a"));
    same(1L, client.zrank("java:z", "a"));
    StreamEntryID id = client.xadd("java:st", StreamEntryID.NEW_ENTRY, Map.of("k", "v"));
    same(id, client.xrange("java:st", "-", "+").get(0).getID());
  }

  private static void scripts(UnifiedJedis client) {
    String script = "return redis.call('INCRBY', KEYS[1], ARGV[1])";
    List<String> keys = List.of("java:lua" + TAG);
    same(3L, client.eval(script, keys, List.of("3")));
    String sha = client.scriptLoad(script, "java:lua" + TAG);
    same(5L, client.evalsha(sha, keys, List.of("2")));
  }

  private static void errors(UnifiedJedis client) {
    client.set("java:text", "x");
    try {
      client.lpush("java:text", "y");
      throw new AssertionError("a list was made of a string");
    } catch (JedisDataException error) {
      same(true, error.getMessage().startsWith("WRONGTYPE"));
    }
  }

  private static void pipelines(UnifiedJedis client) {
    Map<String, Response<String>> replies = new TreeMap<>();
    try (AbstractPipeline pipeline = client.pipelined()) {
      for (int n = 0; n < 300; n++) {
        pipeline.set("java:p:" + n, "v" + n);
        replies.put("v" + n, pipeline.get("java:p:" + n));
      }
      pipeline.sync();
    }
    replies.forEach((want, reply) -> same(want, reply.get()));
  }

  private static void transactions(UnifiedJedis client) {
    if (client instanceof JedisCluster) {
      return; // this client has none for a cluster
    }
    try (Transaction block = (Transaction) ((JedisPooled) client).multi()) {
      block.set("java:t" + TAG, "1");
      block.incr("java:t" + TAG);
      same(Arrays.asList("OK", 2L), block.exec());
    }
  }

  private static void walk(UnifiedJedis client) {
    Set<String> found = new HashSet<>();
    // A cluster's walk needs a pattern with a tag: it stays in one slot.
    boolean cluster = client instanceof JedisCluster;
    String prefix = cluster ? "java:w" + TAG : "java:w:";
    for (int n = 0; n < 100; n++) {
      client.set(prefix + n, "x");
    }
    ScanParams pattern = new ScanParams().match(prefix + "*").count(10);
    String cursor = ScanParams.SCAN_POINTER_START;
    do {
      ScanResult<String> step = client.scan(cursor, pattern);
      found.addAll(step.getResult());
      cursor = step.getCursor();
    } while (!cursor.equals(ScanParams.SCAN_POINTER_START));
    same(100, found.size());
  }

  private static void messages(UnifiedJedis client) throws Exception {
    CountDownLatch subscribed = new CountDownLatch(1);
    CountDownLatch heard = new CountDownLatch(1);
    JedisPubSub listener =
        new JedisPubSub() {
          @Override
          public void onSubscribe(String channel, int count) {
            subscribed.countDown();
          }

          @Override
          public void onMessage(String channel, String message) {
            if (message.equals("hello")) {
              heard.countDown();
              unsubscribe();
            }
          }
        };
    Thread thread = new Thread(() -> client.subscribe(listener, "java:news"));
    thread.setDaemon(true);
    thread.start();
    same(true, subscribed.await(10, TimeUnit.SECONDS));
    client.publish("java:news", "hello");
    same(true, heard.await(10, TimeUnit.SECONDS));
    thread.join(Duration.ofSeconds(10).toMillis());
    same(false, thread.isAlive());
  }

  public static void main(String[] args) {
    HostAndPort address = new HostAndPort(args[0], Integer.parseInt(args[1]));
    Map<String, Check> checks = new TreeMap<>();
    checks.put("strings", Jedis::strings);
    checks.put("collections", Jedis::collections);
    checks.put("scripts", Jedis::scripts);
    checks.put("errors", Jedis::errors);
    checks.put("pipelines", Jedis::pipelines);
    checks.put("transactions", Jedis::transactions);
    checks.put("walk", Jedis::walk);
    checks.put("messages", Jedis::messages);
    int failed = 0;
    boolean cluster = args[2].equals("cluster");
    try (UnifiedJedis client =
        cluster ? new JedisCluster(Set.of(address)) : new JedisPooled(address.getHost(), address.getPort())) {
      for (String key : List.of("java:n", "java:f", "java:h", "java:l", "java:z", "java:st", "java:lua" + TAG,
          "java:x" + TAG, "java:y" + TAG, "java:s")) {
        client.del(key);
      }
      for (Map.Entry<String, Check> check : checks.entrySet()) {
        try {
          check.getValue().run(client);
        } catch (Throwable problem) {
          failed++;
          System.err.println(check.getKey() + ": " + problem);
          problem.printStackTrace();
        }
      }
    }
    System.out.println(failed == 0 ? checks.size() + " checks passed" : failed + " checks failed");
    System.exit(failed == 0 ? 0 : 1);
  }
}
