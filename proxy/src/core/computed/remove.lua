-- KEYS: the key, and a hidden name. ARGV: its value as DUMP gave it, and when it expires ('': not known).
-- Answers 1: removed, 0: it is not the same any more, -1: it is gone.

-- Larger values are only compared as they are: what follows keeps the node busy, and everybody waits.
local COMPARED_BYTES_MAX = 32 * 1024 * 1024
-- Lua can hand so many arguments to a call.
local FIELDS_MAX = 1000

local key, hidden, dump, expiry = KEYS[1], KEYS[2], ARGV[1], ARGV[2]

local function has_same_fields()
  local flat, others = redis.call('HGETALL', key), redis.call('HGETALL', hidden)
  if #flat ~= #others then return false end
  local values = {}
  for i = 1, #others, 2 do values[others[i]] = others[i + 1] end
  local names = {}
  for i = 1, #flat, 2 do
    if values[flat[i]] ~= flat[i + 1] then return false end
    names[#names + 1] = flat[i]
  end
  for first = 1, #names, FIELDS_MAX do
    local last = math.min(first + FIELDS_MAX - 1, #names)
    local ours, copied
    for _, name in ipairs({ key, hidden }) do
      local times = redis.pcall('HPEXPIRETIME', name, 'FIELDS', last - first + 1, unpack(names, first, last))
      if times.err then return true end -- an engine whose fields never expire
      ours, copied = copied, times
    end
    for i = 1, #ours do
      if ours[i] ~= copied[i] then return false end
    end
  end
  return true
end

-- A node moves large sets and hashes to larger tables while they are read, which changes the order of
-- their members and with it the dump, but not the value.
local function has_same_members()
  local kind = redis.call('TYPE', key).ok
  if kind ~= 'set' and kind ~= 'hash' or #dump > COMPARED_BYTES_MAX then return false end
  if redis.pcall('RESTORE', hidden, '0', dump).err then return false end
  local same = redis.call('TYPE', hidden).ok == kind
  if same and kind == 'set' then
    same = redis.call('SCARD', key) == redis.call('SCARD', hidden) and #redis.call('SDIFF', key, hidden) == 0
  elseif same then
    same = has_same_fields()
  end
  redis.call('DEL', hidden)
  return same
end

local now = redis.call('DUMP', key)
if not now then return -1 end
if expiry ~= '' and redis.call('PEXPIRETIME', key) ~= tonumber(expiry) then return 0 end
if now ~= dump and not has_same_members() then return 0 end
return redis.call('UNLINK', key)
