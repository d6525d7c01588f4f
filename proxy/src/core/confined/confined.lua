-- Runs a script of an account whose rights are limited. What the proxy puts between this file and its
-- end: `local rules, body = {...}, "..."`. Nothing of the body is code until it is compiled below, and
-- then every name by which it could get at the engine's own functions is a local of ours.
local G, R, raw, kind, lower, find, sub, byte = _G, redis, rawget, type, string.lower, string.find, string.sub, string.byte
local each, count, spread, fail, compile, floor = pairs, select, unpack, error, loadstring, math.floor
local seal, shown, meta_of = setmetatable, tostring, getmetatable
local READONLY = 'Attempt to modify a readonly table'
local UNFIT = {err = 'NOPERM slotmesh: calls of a script cannot be checked in this engine, so scripts need an account that may run every command on every key'}

-- Older ones do not tell the keys of a call.
if not raw(R, 'acl_check_cmd') then return UNFIT end
-- Globals that are known to lead nowhere else, or that the body does not get.
local known = {}
for _, name in ipairs({
  'ARGV', 'KEYS', '_G', '_VERSION', '__redis__err__handler', '__server__err__handler', 'assert', 'bit', 'cjson',
  'cmsgpack', 'collectgarbage', 'coroutine', 'error', 'gcinfo', 'getfenv', 'getmetatable', 'ipairs', 'load',
  'loadstring', 'math', 'newproxy', 'next', 'os', 'pairs', 'pcall', 'print', 'rawequal', 'rawget', 'rawset',
  'redis', 'select', 'server', 'setfenv', 'setmetatable', 'string', 'struct', 'table', 'tonumber', 'tostring',
  'type', 'unpack', 'xpcall'}) do known[name] = true end
local function open(value) return pcall(rawset, value, 'slotmesh', nil) end
for name, value in each(G) do
  if not known[name] then return UNFIT end
  if kind(value) == 'table' and name ~= 'KEYS' and name ~= 'ARGV' and open(value) then return UNFIT end
end
local CALL, PCALL = raw(R, 'call'), raw(R, 'pcall')

-- Whether a pattern in Redis's words takes the text.
local function class(pattern, at, char)
  local low = byte(pattern, at) == 94 -- ^
  local negated, found = low, false
  if low then at = at + 1 end
  local function signed(one) return one > 127 and one - 256 or one end
  while true do
    local one = byte(pattern, at)
    if not one then break end
    if one == 92 and byte(pattern, at + 1) then
      found = found or byte(pattern, at + 1) == char
      at = at + 2
    elseif one == 93 then
      at = at + 1
      break
    elseif byte(pattern, at + 1) == 45 and byte(pattern, at + 2) then
      local from, to, own = signed(one), signed(byte(pattern, at + 2)), signed(char)
      if from > to then from, to = to, from end
      found = found or (own >= from and own <= to)
      at = at + 3
    else
      found = found or one == char
      at = at + 1
    end
  end
  if found ~= negated then return at end
end
local function step(pattern, at, char)
  local one = byte(pattern, at)
  if not one then return nil end
  if one == 63 then return at + 1 end
  if one == 91 then return class(pattern, at + 1, char) end
  if one == 92 and byte(pattern, at + 1) then
    return byte(pattern, at + 1) == char and at + 2 or nil
  end
  return one == char and at + 1 or nil
end
local function matches(pattern, text)
  local at, from, star, tried = 1, 1, nil, nil
  while from <= #text do
    if byte(pattern, at) == 42 then
      while byte(pattern, at) == 42 do at = at + 1 end
      if at > #pattern then return true end
      star, tried = at, from
    else
      local next_at = step(pattern, at, byte(text, from))
      if next_at then
        at, from = next_at, from + 1
      elseif star then
        tried = tried + 1
        at, from = star, tried
      else
        return false
      end
    end
  end
  if at > #pattern then return true end
  return #text > 0 and not find(sub(pattern, at), '[^*]')
end

-- An argument as the engine writes it; nil where that is not certain.
local function word(value)
  if kind(value) == 'string' then return value end
  if floor(value) == value and value > -1e15 and value < 1e15 then return shown(value) end
end
local DENIED = {
  "ERR The user executing the script can't run this command or subcommand",
  "ERR The user executing the script can't access at least one of the keys mentioned in the command arguments",
  "ERR The user executing the script can't publish to the channel mentioned in the command"}
local UNKNOWN = 'ERR Unknown Redis command called from script'
-- The keys of a call with what each needs, as the engine finds them. A text: the call cannot be run.
local function keys_of(argv, n)
  if n == 1 then return {} end -- a name alone
  local got = PCALL('COMMAND', 'GETKEYSANDFLAGS', spread(argv, 1, n))
  if kind(got) ~= 'table' then return DENIED[1] end
  if got.err then
    if got.err == 'ERR The command has no key arguments' then return {} end
    if find(got.err, 'Invalid number of arg', 1, true) then
      return 'ERR Wrong number of args calling Redis command from script'
    end
    return got.err
  end
  local keys = {}
  for i = 1, #got do
    local key, flags = got[i][1], got[i][2]
    local read, write = false, false
    local function flag(one)
      if kind(one) == 'table' then one = one.ok end
      if one == 'access' then read = true end
      if one == 'insert' or one == 'update' or one == 'delete' then write = true end
    end
    if kind(flags.set) == 'table' then
      for one in each(flags.set) do flag(one) end
    else
      for j = 1, #flags do flag(flags[j]) end
    end
    keys[i] = {key, read, write}
  end
  return keys
end
local function gives(patterns, key, read, write)
  for i = 1, #patterns do
    local one = patterns[i]
    if (one[2] or not read) and (one[3] or not write) and matches(one[1], key) then return true end
  end
  return false
end
local function reads_all(rule)
  if rule.keys == true then return true end
  for i = 1, #rule.keys do
    if rule.keys[i][1] == '*' and rule.keys[i][2] then return true end
  end
  return false
end
-- SORT's patterns name other keys.
local function sort_denied(argv, n)
  for i = 3, n do
    local option = lower(word(argv[i]) or '')
    if option == 'get' then return 'ERR GET option of SORT denied due to insufficient ACL permissions.' end
    local by = option == 'by' and word(argv[i + 1] or '')
    if by and find(by, '*', 1, true) then return 'ERR BY option of SORT denied due to insufficient ACL permissions.' end
  end
end
-- nil: the account may do this.
local function judge(argv, n)
  local worst, keys, name = 1, nil, kind(argv[1]) == 'string' and lower(argv[1]) or ''
  local part = n > 1 and word(argv[2])
  part = part and name .. '|' .. lower(part)
  if find(name, '[%s|]') or (part and find(part, '%s')) then part = nil end
  if find(name, '[%s|]') or name == '' then return UNKNOWN end
  for i = 1, #rules do
    local rule, reached = rules[i], nil
    if find(rule.commands, ' ' .. name .. ' ', 1, true) or (part and find(rule.commands, ' ' .. part .. ' ', 1, true)) then
      if rule.keys ~= true then
        keys = keys or keys_of(argv, n)
        if kind(keys) == 'string' then return keys end
        for k = 1, #keys do
          if not gives(rule.keys, keys[k][1], keys[k][2], keys[k][3]) then reached = 2 end
        end
      end
      if not reached and rule.channels ~= true and (name == 'publish' or name == 'spublish') then
        local channel, fits = word(argv[2] or ''), false
        for k = 1, #rule.channels do fits = fits or (channel and matches(rule.channels[k], channel)) end
        if not fits then reached = 3 end
      end
      if not reached then
        local sorted = (name == 'sort' or name == 'sort_ro') and not reads_all(rule) and sort_denied(argv, n)
        return sorted or nil
      end
      if reached > worst then worst = reached end
    end
  end
  if worst == 1 then
    local info = PCALL('COMMAND', 'INFO', name)
    if kind(info) == 'table' and not info.err and not info[1] then return UNKNOWN end
  end
  return DENIED[worst]
end
local function checked(n, ...)
  if n == 0 then return 'ERR Please specify at least one argument for this redis lib call' end
  local argv = {...}
  for i = 1, n do
    local one = kind(argv[i])
    if one ~= 'string' and one ~= 'number' then return 'ERR Lua redis lib command arguments must be strings or integers' end
  end
  return judge(argv, n)
end

-- What the body gets for `redis`, `_G` and the names that load code.
local own = {}
for _, name in ipairs({
  'LOG_DEBUG', 'LOG_NOTICE', 'LOG_VERBOSE', 'LOG_WARNING', 'REDIS_VERSION', 'REDIS_VERSION_NUM', 'REPL_ALL',
  'REPL_AOF', 'REPL_NONE', 'REPL_REPLICA', 'REPL_SLAVE', 'SERVER_NAME', 'SERVER_VERSION', 'SERVER_VERSION_NUM',
  'breakpoint', 'debug', 'error_reply', 'log', 'replicate_commands', 'set_repl', 'setresp', 'sha1hex',
  'status_reply'}) do own[name] = raw(R, name) end
function own.call(...)
  local denied = checked(count('#', ...), ...)
  if denied then fail({err = denied}) end
  return CALL(...)
end
function own.pcall(...)
  local denied = checked(count('#', ...), ...)
  if denied then return {err = denied} end
  return PCALL(...)
end
function own.acl_check_cmd(...)
  local denied = checked(count('#', ...), ...)
  if denied == UNKNOWN then fail({err = 'ERR Invalid command passed to redis.acl_check_cmd()'}) end
  return not denied
end
local function frozen() fail(READONLY, 2) end
local function sealed(index)
  local cover = seal({}, {__newindex = frozen, __metatable = false})
  return seal({}, {__index = index, __newindex = frozen, __metatable = cover})
end
local names = {}
local api, globals = sealed(own), nil
local server = raw(G, 'server') and api or nil
globals = sealed(function(_, name)
  if names[name] ~= nil then return names[name] end
  local value = known[name] and name ~= 'server' and raw(G, name)
  if value == nil or value == false or name == 'getfenv' or name == 'setfenv' or name == 'newproxy' then
    fail("Script attempted to access nonexistent global variable '" .. shown(name) .. "'", 2)
  end
  return value
end)
local HEAD = 'local redis,_G,loadstring,load,setmetatable,getmetatable,server,getfenv,setfenv,newproxy=...;'
local function begin(run)
  return run(api, globals, names.loadstring, names.load, names.setmetatable, names.getmetatable, server)
end
local function load_text(text, name)
  if kind(text) ~= 'string' then fail('bad argument to loadstring (string expected)', 2) end
  if byte(text, 1) == 27 then return nil, 'bad binary format' end
  local run, problem = compile(HEAD .. text, kind(name) == 'string' and name or '=loaded')
  if not run then return nil, problem end
  return function() return begin(run) end
end
names.redis, names._G, names.loadstring, names.server = api, globals, load_text, server
function names.load(pieces, name)
  local text = ''
  while true do
    local piece = pieces()
    if piece == nil or piece == '' then break end
    if kind(piece) ~= 'string' then return nil, 'reader function must return a string' end
    text = text .. piece
  end
  return load_text(text, name)
end
function names.setmetatable(value, meta)
  if rawequal(value, api) or rawequal(value, globals) then fail(READONLY, 2) end
  return seal(value, meta)
end
-- That of strings is everybody's, and not every engine guards it.
local strings = sealed(string)
function names.getmetatable(value)
  if kind(value) == 'string' then return strings end
  return meta_of(value)
end
local run, problem = compile(HEAD .. body, '@user_script')
if not run then return {err = 'ERR Error compiling script (new function): ' .. problem} end
return begin(run)
