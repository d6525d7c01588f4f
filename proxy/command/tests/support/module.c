/* A module whose commands have keys at all kinds of places, for tests/learn.rs and the proxy's tests/modules.rs.
 *
 * It asks the engine for the few functions that it needs, so that it is built without any header. */

typedef struct Context Context;
typedef struct Word Word;
typedef struct Reply Reply;
typedef int (*Command)(Context *, Word **, int);

static int (*get_api)(const char *, void *);
static void (*set_attributes)(Context *, const char *, int, int);
static int (*create)(Context *, const char *, Command, const char *, int, int, int);
static int (*reply_int)(Context *, long long);
static int (*is_asked_for_keys)(Context *);
static void (*key_at)(Context *, int);
static Reply *(*call)(Context *, const char *, const char *, ...);
static void (*free_reply)(Reply *);

static int count(Context *context, Word **words, int len) {
    (void)words;
    return reply_int(context, len);
}

/* SET, so that a test sees where the key is. */
static int set(Context *context, Word **words, int len) {
    if (len == 3)
        free_reply(call(context, "SET", "!ss", words[1], words[2]));
    return reply_int(context, len);
}

/* Its key is the last word: only this function knows. */
static int last(Context *context, Word **words, int len) {
    (void)words;
    if (is_asked_for_keys(context)) {
        key_at(context, len - 1);
        return 0;
    }
    return reply_int(context, len);
}

int RedisModule_OnLoad(Context *context, Word **words, int len) {
    (void)words;
    (void)len;
    get_api = ((void **)context)[0];
    get_api("RedisModule_SetModuleAttribs", &set_attributes);
    get_api("RedisModule_CreateCommand", &create);
    get_api("RedisModule_ReplyWithLongLong", &reply_int);
    get_api("RedisModule_IsKeysPositionRequest", &is_asked_for_keys);
    get_api("RedisModule_KeyAtPos", &key_at);
    get_api("RedisModule_Call", &call);
    get_api("RedisModule_FreeCallReply", &free_reply);
    set_attributes(context, "demo", 1, 1);
    create(context, "Demo.One", count, "readonly", 1, 1, 1);
    create(context, "demo.set", set, "write deny-oom", 1, 1, 1);
    create(context, "demo.second", count, "write", 2, 2, 1);
    create(context, "demo.all", count, "write deny-oom", 1, -1, 1);
    create(context, "demo.pairs", count, "write", 2, -1, 2);
    create(context, "demo.two", count, "write", 1, 2, 1);
    create(context, "demo.none", count, "", 0, 0, 0);
    create(context, "demo.admin", count, "admin", 0, 0, 0);
    create(context, "demo.last", last, "write getkeys-api", 1, 1, 1);
    create(context, "demo.hidden", last, "write getkeys-api", 0, 0, 0);
    return 0;
}
