"""The scripts that write to Redis, each one atomic step of the schema in docs/registry.md. For Redis 6.2 and later.

Every script gets the same head of arguments (`HEAD`), then its own. Keys are made inside the scripts from the
prefix, so that they can't be declared: Redis Cluster is out of scope. Names come percent-encoded: no space, newline,
':' or '@' is left in them. Epochs are decimal *strings* of up to 64 bits: a Lua number would round them.
"""

from __future__ import annotations

HEAD = """
local P = ARGV[1] .. ':'
local TOKEN, FEED_LENGTH = ARGV[2], ARGV[3]
local TTL, LEASE, QUARANTINE, LAST = ARGV[4], ARGV[5], ARGV[6], ARGV[7]  -- milliseconds
local at = 7
local function arg() at = at + 1; return ARGV[at] end

local time = redis.call('TIME')
local now = string.format('%d.%03d', time[1], math.floor(time[2] / 1000))
local dead = tonumber(now) - TTL / 1000

local function older(a, b) return #a < #b or (#a == #b and a < b) end
local function epoch_of(json) return string.match(json, '^{"epoch":"(%d+)"') or '0' end

-- The feed's id is new whenever the feed is: it tells a reader that its cursor is of a registry that was wiped.
local feeding = false
local function ensure_feed()
  if not feeding and redis.call('HSETNX', P .. 'feed', 'id', TOKEN .. '-' .. time[1] .. time[2]) == 1 then
    redis.call('DEL', P .. 'changes')
    redis.call('HSET', P .. 'feed', 'seq', '0')
  end
  feeding = true
end

-- Ids count 1-0, 2-0, ... without a hole, so that a reader sees at once when something was trimmed before it.
local function emit(kind, json)
  ensure_feed()
  local id = redis.call('HINCRBY', P .. 'feed', 'seq', 1) .. '-0'
  redis.call('XADD', P .. 'changes', 'MAXLEN', '~', FEED_LENGTH, id, kind, json)
end

-- Only the newest incarnation of a node may write. A wiped registry believes the first that comes, until a newer does.
local function superseded(node, incarnation)
  local key = P .. 'incarnation:' .. node
  local taken = tonumber(redis.call('GET', key))
  if taken and taken > tonumber(incarnation) then return redis.error_reply('SUPERSEDED by ' .. taken) end
  if not taken or taken < tonumber(incarnation) then redis.call('SET', key, incarnation, 'PX', LAST) end
end

local indexed = {}
local function index(set, member)
  redis.call('SADD', set, member)
  if not indexed[set] then
    redis.call('PEXPIRE', set, LEASE)
    indexed[set] = true
  end
end

-- A lease of a port for an owner. '' as mode: as asked for; 'keep': of a registration; 'back': of a beat.
local function hold(mode, port, owner, last, epoch, node, raw_node)
  local key = P .. 'port:' .. port
  local held = redis.call('HMGET', key, 'owner', 'epoch', 'state', 'node')
  if held[1] then
    local mine = held[1] == owner
    -- An older lease of this very node is history (a registry that came back from an old dump).
    local history = held[4] == raw_node and older(held[2], epoch)
    if mode == '' then
      if not mine then return 0 end
    elseif not history and (not mine or older(epoch, held[2])) then
      return 0
    elseif mode == 'back' and held[3] == 'quarantined' and held[2] == epoch then
      return 0
    end
  end
  redis.call('HSET', key, 'owner', owner, 'epoch', epoch, 'state', 'leased', 'node', raw_node)
  redis.call('PEXPIRE', key, LEASE)
  redis.call('SET', P .. 'last:' .. last, string.match(port, '%d+$'), 'PX', LAST)
  index(P .. 'ports:' .. node, port)
  return 1
end

local function rest(key)
  redis.call('HSET', key, 'state', 'quarantined')
  redis.call('PEXPIRE', key, QUARANTINE)
end

local function drop(target, field, json)
  redis.call('HDEL', P .. 'target:' .. target, field, field .. '@' .. epoch_of(json))
  emit('gone', json)
end

-- Drop the fields whose node died: the key lives on with the agent's other sessions, so that no expiry takes them.
-- Then the live tuple of another agent than `agent` (a piece of JSON with its id), if there is one.
local function taken(target, agent)
  local all = redis.call('HGETALL', P .. 'target:' .. target)
  local found = {}
  for i = 1, #all, 2 do found[all[i]] = all[i + 1] end
  local other
  for beat, last in pairs(found) do
    local field, epoch = string.match(beat, '^(.*)@(%d+)$')
    if field then
      local json = found[field]
      local means = json and epoch_of(json) == epoch
      if (tonumber(last) or 0) >= dead then
        if means and not string.find(json, agent, 1, true) then other = json end
      elseif means then
        drop(target, field, json)
        redis.call('SREM', P .. 'tuples:' .. string.match(field, '^(.*)/%d+$'), target .. ' ' .. field)
      else
        redis.call('HDEL', P .. 'target:' .. target, beat)
      end
    end
  end
  return other
end
"""

# Write leases, then tuples, of sessions of one node, but none whose address another agent has: a registration ('keep')
# is then refused as a whole, of a beat ('back') just that tuple. Returns how many tuples were not there in just this
# form, then the number of each refused one and the tuple that stood in its way.
PUT = (
    HEAD
    + """
local mode, node, raw_node, incarnation = arg(), arg(), arg(), arg()
local refused = superseded(node, incarnation)
if refused then return refused end
redis.call('ZADD', P .. 'nodes', now, node)

local tuples, answer = {}, {0}
for n = 1, tonumber(arg()) do
  local target, agent, field, port, epoch, json = arg(), arg(), arg(), arg(), arg(), arg()
  local other = mode == 'keep' and taken(target, agent)
  if other then return {0, n - 1, other} end
  tuples[n] = {target, agent, field, port, epoch, json}
end

for _ = 1, tonumber(arg()) do
  local port, owner, last, epoch = arg(), arg(), arg(), arg()
  hold(mode, port, owner, last, epoch, node, raw_node)
end

for n, tuple in ipairs(tuples) do
  local target, agent, field, port, epoch, json = unpack(tuple)
  local key = P .. 'target:' .. target
  local other = mode == 'back' and taken(target, agent)
  local present = redis.call('HGET', key, field)
  local wanted = not other
  if other then
    answer[#answer + 1] = n - 1
    answer[#answer + 1] = other
  elseif present then
    wanted = not older(epoch, epoch_of(present))
  elseif mode == 'back' then
    -- The session may have ended, and its port may serve another, since the beat was put together.
    local held = redis.call('HMGET', P .. 'port:' .. port, 'epoch', 'state')
    wanted = not held[1] or (held[1] == epoch and held[2] == 'leased')
  end
  if wanted then
    if present and epoch_of(present) ~= epoch then redis.call('HDEL', key, field .. '@' .. epoch_of(present)) end
    redis.call('HSET', key, field, json, field .. '@' .. epoch, now)
    redis.call('PEXPIRE', key, TTL)
    index(P .. 'tuples:' .. node, target .. ' ' .. field)
    if present ~= json then
      answer[1] = answer[1] + 1
      emit('put', '{"beat":' .. now .. ',' .. string.sub(json, 2))
    end
  else
    redis.call('HDEL', key, field .. '@' .. epoch)  -- what REFRESH may have left
  end
end
return answer
"""
)

# The quiet beat, one batch of it: three calls a session, so that a million tuples cost half a core at 5 s. It writes
# blindly and tells which lines were not there; PUT sees to those.
REFRESH = (
    HEAD
    + """
local node, incarnation, record, tuples, ports = arg(), arg(), arg(), arg(), arg()
local refused = superseded(node, incarnation)
if refused then return refused end
redis.call('SET', P .. 'node:' .. node, '{"beat":' .. now .. ',' .. string.sub(record, 2), 'PX', TTL)
redis.call('ZADD', P .. 'nodes', now, node)
redis.call('PEXPIRE', P .. 'tuples:' .. node, LEASE)
redis.call('PEXPIRE', P .. 'ports:' .. node, LEASE)

local targets, leases, n = {}, {}, 0
for target, beat in string.gmatch(tuples, '(%S+) (%S+)\\n') do
  local key = P .. 'target:' .. target
  if redis.call('HSET', key, beat, now) == 1 then targets[#targets + 1] = n end
  redis.call('PEXPIRE', key, TTL)
  n = n + 1
end
n = 0
for port in string.gmatch(ports, '(%S+)\\n') do
  if redis.call('PEXPIRE', P .. 'port:' .. port, LEASE) == 0 then leases[#leases + 1] = n end
  n = n + 1
end
return {targets, leases}
"""
)

# Take the node_id: an incarnation greater than any before, also after a wipe. PURGE follows.
START = (
    HEAD
    + """
local node, record = arg(), arg()
local key = P .. 'incarnation:' .. node
local incarnation = math.max(tonumber(redis.call('GET', key) or '0') + 1, tonumber(time[1]))
redis.call('SET', key, string.format('%d', incarnation), 'PX', LAST)
record = '{"beat":' .. now .. ',"incarnation":' .. string.format('%d', incarnation) .. ',' .. string.sub(record, 2)
redis.call('SET', P .. 'node:' .. node, record, 'PX', TTL)
redis.call('ZREMRANGEBYSCORE', P .. 'nodes', '-inf', now - LEASE / 1000)
redis.call('ZADD', P .. 'nodes', now, node)
ensure_feed()
return incarnation
"""
)

STOP = (
    HEAD
    + """
local node, incarnation = arg(), arg()
if superseded(node, incarnation) then return 0 end
redis.call('DEL', P .. 'node:' .. node)
redis.call('ZREM', P .. 'nodes', node)
return 1
"""
)

# One batch of removing a node's tuples, and quarantining its leases, of epochs below `floor`. The first call sets the
# node's sets aside under purge-*, where the next start finds them should this one die half-way. What is newer than
# `floor` goes back into the live sets. Returns how many members were looked at; 0 is the end.
PURGE = (
    HEAD
    + """
local node, raw_node, floor, count, first = arg(), arg(), arg(), arg(), arg()

local function take(kind)
  local live, aside = P .. kind .. ':' .. node, P .. 'purge-' .. kind .. ':' .. node
  if first == '1' and redis.call('EXISTS', live) == 1 then
    if redis.call('EXISTS', aside) == 0 then
      redis.call('RENAME', live, aside)
    else
      redis.call('SUNIONSTORE', aside, aside, live)
      redis.call('DEL', live)
    end
    redis.call('PEXPIRE', aside, LEASE)
  end
  return redis.call('SPOP', aside, count), live
end

local tuples, live = take('tuples')
for _, member in ipairs(tuples) do
  local target, field = string.match(member, '^(%S+) (%S+)$')
  local json = redis.call('HGET', P .. 'target:' .. target, field)
  if json then
    if older(epoch_of(json), floor) then drop(target, field, json) else index(live, member) end
  end
end
local ports, leased = take('ports')
for _, port in ipairs(ports) do
  local key = P .. 'port:' .. port
  local held = redis.call('HMGET', key, 'node', 'epoch', 'state')
  if held[1] == raw_node and held[3] == 'leased' then
    if older(held[2], floor) then rest(key) else index(leased, port) end
  end
end
return #tuples + #ports
"""
)

LEASE = (
    HEAD
    + """
local node, raw_node, incarnation = arg(), arg(), arg()
local refused = superseded(node, incarnation)
if refused then return refused end
local port, owner, last, epoch = arg(), arg(), arg(), arg()
return hold('', port, owner, last, epoch, node, raw_node)
"""
)

# Remove exactly these tuples, quarantine exactly these leases.
REMOVE = (
    HEAD
    + """
local node, raw_node = arg(), arg()
for _ = 1, tonumber(arg()) do
  local port, owner, epoch = arg(), arg(), arg()
  local key = P .. 'port:' .. port
  local held = redis.call('HMGET', key, 'owner', 'epoch', 'state', 'node')
  if not held[1] then redis.call('HSET', key, 'owner', owner, 'epoch', epoch, 'node', raw_node) end
  -- The node too: those of one PS IP may give out equal epochs, and the owner may have moved to another.
  if not held[1] or (held[1] == owner and held[2] == epoch and held[3] == 'leased' and held[4] == raw_node) then
    rest(key)
    redis.call('SREM', P .. 'ports:' .. node, port)
  end
end
for _ = 1, tonumber(arg()) do
  local target, field, epoch, json = arg(), arg(), arg(), arg()
  local present = redis.call('HGET', P .. 'target:' .. target, field)
  if not present or epoch_of(present) == epoch then
    drop(target, field, present or json)
    redis.call('SREM', P .. 'tuples:' .. node, target .. ' ' .. field)
  end
end
return 1
"""
)

# Where the feed is now; makes it when there is none.
CURSOR = (
    HEAD
    + """
ensure_feed()
local feed = redis.call('HMGET', P .. 'feed', 'id', 'seq')
return {feed[1], feed[2], now, redis.call('ZRANGEBYSCORE', P .. 'nodes', dead - TTL / 1000, '+inf')}
"""
)

NODES = (
    HEAD
    + """
local found = {}
for _, node in ipairs(redis.call('ZRANGEBYSCORE', P .. 'nodes', dead, '+inf')) do
  local record = redis.call('GET', P .. 'node:' .. node)
  if record then found[#found + 1] = record end
end
return table.concat(found, '\\n')
"""
)

# One page of a node's live tuples as lines of JSON: one reply to parse, one call of the decoder, and a row that was
# written by somebody else damages no other.
PAGE = (
    HEAD
    + """
local node, cursor, count = arg(), arg(), arg()
local page = redis.call('SSCAN', P .. 'tuples:' .. node, cursor, 'COUNT', count)
local found = {}
for _, member in ipairs(page[2]) do
  local target, field = string.match(member, '^(%S+) (%S+)$')
  local key = P .. 'target:' .. (target or '')
  local json = target and redis.call('HGET', key, field)
  if json then
    local beat = redis.call('HGET', key, field .. '@' .. epoch_of(json))
    if (tonumber(beat or 0) or 0) > dead then
      found[#found + 1] = '{"beat":' .. beat .. ',' .. string.sub(json, 2)
    end
  end
end
return {page[1], table.concat(found, '\\n')}
"""
)
