"""The Lua scripts that read and write Redis (6.2 or later); each one is an atomic step.

docs/registry.md specifies the schema. Every script gets the same first arguments (`HEAD`), then its
own. The scripts make the keys from the prefix, so that callers cannot declare them: Redis Cluster
is out of scope. Names arrive percent-encoded, without space, newline, ':' or '@'. Epochs are
decimal
*strings* of up to 64 bits, because a Lua number would round them.

Three rules hold for all scripts; tests/unit/test_registry_model.py checks them with a real Redis:

- A reply may be lost, and a call may run twice. So no script infers from one key or field what
  another one holds.
- A call does nothing after its caller has given up (NOT_AFTER).
- A key that has another type or holds nonsense costs its own row only. The script continues, and
  returns the key's name.

Each script returns `{answer, {key, ...}}`: its answer, and the keys that it ignored.
"""

from __future__ import annotations

from rtunnel.registry.base import SHOWN_SECONDS

HEAD = """
local P = ARGV[1] .. ':'
local TOKEN, FEED_LENGTH, FEED_BYTES = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local TTL, LEASE, QUARANTINE, LAST = ARGV[5], ARGV[6], ARGV[7], ARGV[8]  -- milliseconds
local NOT_AFTER = ARGV[9]  -- seconds by this server's clock; '' for no limit
local SHOWN = $SHOWN  -- seconds for which a dead node is shown
local at = 9
local function arg() at = at + 1; return ARGV[at] end

local time = redis.call('TIME')
local now = string.format('%d.%03d', time[1], math.floor(time[2] / 1000))
if NOT_AFTER ~= '' and tonumber(now) > tonumber(NOT_AFTER) then return redis.error_reply('LATE call') end

-- A heartbeat is from the future when the clock has stepped back. It counts as a sign of life up to
-- `ttl` ahead (otherwise each small step would make every node look dead), and not beyond.
local oldest, newest = tonumber(now) - TTL / 1000, tonumber(now) + TTL / 1000
local function alive(beat)
  local seconds = tonumber(beat or '')
  return seconds ~= nil and seconds > oldest and seconds <= newest
end

local MOST_TOLD = 16  -- keys to name in one answer: examples for the log
local faulty, told = {}, {}
local function tell(key)
  if not faulty[key] and #told < MOST_TOLD then told[#told + 1] = key end
  faulty[key] = true
end
local function answered(answer) return {answer, told} end

-- Run a command on one key. When that key has another type, or holds no number where a number is
-- needed, note the key and return false. Any other error (out of memory, read only) ends the
-- script, because all other calls fail too.
local KEY_FAULTS = {'WRONGTYPE', 'not an integer', 'ID specified in XADD'}
local function call(command, key, ...)
  local reply = redis.pcall(command, key, ...)
  if type(reply) ~= 'table' or not reply.err then return reply end
  for _, fault in ipairs(KEY_FAULTS) do
    if string.find(reply.err, fault, 1, true) then
      tell(key)
      return false
    end
  end
  error(reply.err, 0)
end

-- Epochs and revisions are digits; anything else counts as '0'.
local function digits(text) return text and string.match(text, '^%d+$') or '0' end
local function older(a, b) return #a < #b or (#a == #b and a < b) end
local function epoch_of(json) return string.match(json, '^{"epoch":"(%d+)"') or '0' end

-- A new feed gets a new id, which tells a reader that its cursor belongs to a registry that was
-- wiped. The script looks for the id before it writes one, so that a server that refuses writes can
-- still be read.
local FEED, CHANGES = P .. 'feed', P .. 'changes'
local feeding = false
local function ensure_feed()
  if not feeding and call('HEXISTS', FEED, 'id') == 0 then
    call('DEL', FEED)
    call('DEL', CHANGES)
    call('HSET', FEED, 'id', TOKEN .. '-' .. time[1] .. time[2], 'seq', '0')
  end
  feeding = true
end

-- Once in MARK entries the feed notes in `at:SEQ` the number of bytes written so far; `first` is
-- the oldest such note. They tell which of the oldest entries to trim when the bytes after them are
-- over the limit.
local MARK = 1024
local function bound_bytes(seq, total)
  local first = tonumber(call('HGET', FEED, 'first') or '')
  local kept = first and first % MARK == 0 and first < seq and seq - first <= FEED_LENGTH + 2 * MARK
  if not kept then first = seq end
  call('HSET', FEED, 'at:' .. seq, total)
  local from = first
  while first < seq do
    local before = tonumber(call('HGET', FEED, 'at:' .. first) or '') or 0
    if total - before <= FEED_BYTES and seq - first <= FEED_LENGTH + MARK then break end
    call('HDEL', FEED, 'at:' .. first)
    first = first + MARK
  end
  call('HSET', FEED, 'first', first)
  if first ~= from then call('XTRIM', CHANGES, 'MINID', first) end
end

-- Entries are numbered 1-0, 2-0, ... without a gap, so that a reader notices at once that entries
-- were trimmed.
local function emit(kind, json)
  ensure_feed()
  local seq = call('HINCRBY', FEED, 'seq', 1)
  if not seq then return end
  call('XADD', CHANGES, 'MAXLEN', '~', FEED_LENGTH, seq .. '-0', kind, json)
  local total = call('HINCRBY', FEED, 'bytes', #json)
  if total and seq % MARK == 0 then bound_bytes(seq, total) end
end

-- Only the newest incarnation of a node may write. A wiped registry accepts the first that comes,
-- until a newer one comes. A value that is no incarnation (another type, more than 32 bits) counts
-- as wiped.
local MOST_INCARNATION = 4294967295
local function incarnation_in(text)
  local number = tonumber(text or '')
  if number and number >= 0 and number <= MOST_INCARNATION and number == math.floor(number) then return number end
end
local function superseded(node, incarnation)
  local key = P .. 'incarnation:' .. node
  local taken = incarnation_in(call('GET', key))
  if taken and taken > tonumber(incarnation) then
    return redis.error_reply(string.format('SUPERSEDED by %d', taken))
  end
  if not taken or taken < tonumber(incarnation) then redis.call('SET', key, incarnation, 'PX', LAST) end
end

local indexed = {}
local function index(set, member)
  call('SADD', set, member)
  if not indexed[set] then
    call('PEXPIRE', set, LEASE)
    indexed[set] = true
  end
end

-- Lease a port for an owner. Modes: '' for LEASE, 'keep' for a registration, 'back' for a beat. The
-- last two also pass what the session exposes, if this is its guarded port; the newer of two
-- revisions is kept.
local function hold(mode, node, raw_node, port, owner, last, epoch, exposes, revision)
  local key = P .. 'port:' .. port
  local held = call('HMGET', key, 'owner', 'epoch', 'state', 'node', 'revision')
  if not held then return 0 end
  local same = held[1] and digits(held[2]) == epoch
  if held[1] then
    local mine = held[1] == owner
    -- An older lease of this same node is outdated: the registry was restored from an old dump.
    local history = held[4] == raw_node and older(digits(held[2]), epoch)
    if mode == '' then
      if not mine then return 0 end
    elseif not history and (not mine or older(epoch, digits(held[2]))) then
      return 0
    elseif mode == 'back' and held[3] == 'quarantined' and same then
      return 0
    end
  end
  redis.call('HSET', key, 'owner', owner, 'epoch', epoch, 'state', 'leased', 'node', raw_node)
  if mode == '' then
    redis.call('HDEL', key, 'exposes', 'revision')
  elseif not (same and older(revision, digits(held[5]))) then
    redis.call('HSET', key, 'exposes', exposes, 'revision', revision)
  end
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
  call('HDEL', P .. 'target:' .. target, field, field .. '@' .. epoch_of(json))
  emit('gone', json)
end

-- Drop the fields whose node is dead: the key lives on with the agent's other sessions, so that
-- they would not expire. Then return a live tuple of another agent than `agent` (a piece of JSON
-- with its id), or of the same agent on another node than that of `own` (a field) and from another
-- host than `own_json` says, if there is one that can be read.
local function host_of(json) return string.match(json, '"host_id":"(%x+)"') end
local function are_two_hosts(own_json, json)
  local own, host = host_of(own_json), host_of(json)
  return own and host and own ~= host
end
local function node_of(field) return string.match(field, '^[^/]*') end
local function taken(target, agent, own, own_json)
  local all = call('HGETALL', P .. 'target:' .. target) or {}
  local found = {}
  for i = 1, #all, 2 do found[all[i]] = all[i + 1] end
  local other
  for beat, last in pairs(found) do
    local field, node, epoch = string.match(beat, '^(([^/@]*)/%d+)@(%d+)$')
    if field then
      local json = found[field]
      local means = json and epoch_of(json) == epoch
      if alive(last) then
        local elsewhere = means and node_of(field) ~= node_of(own)
        if means and not string.find(json, agent, 1, true) or elsewhere and are_two_hosts(own_json, json) then
          local read, row = pcall(cjson.decode, json)
          row = read and type(row) == 'table' and row or {}
          if type(row.agent_id) == 'string' and type(row.node) == 'string' then other = row end
        end
      elseif means then
        drop(target, field, json)
        call('SREM', P .. 'tuples:' .. node, target .. ' ' .. field)
      else
        redis.call('HDEL', P .. 'target:' .. target, beat)
      end
    end
  end
  return other
end
local function in_the_way(row)
  return row.agent_id, row.node, type(row.agent_host) == 'string' and row.agent_host or ''
end
""".replace("$SHOWN", str(SHOWN_SECONDS))

# Write leases, then tuples, of one node's sessions, except tuples whose address another agent has.
# A registration ('keep') is then refused as a whole, a beat ('back') for that tuple only. Returns
# the number of tuples that were not stored in exactly this form, then for each refused tuple its
# index and the agent, node and host that have the address.
PUT = (
    HEAD
    + """
local mode, node, raw_node, incarnation = arg(), arg(), arg(), arg()
local refused = superseded(node, incarnation)
if refused then return refused end
call('ZADD', P .. 'nodes', now, node)

local tuples, answer = {}, {0}
for n = 1, tonumber(arg()) do
  local target, agent, field, port, epoch, json = arg(), arg(), arg(), arg(), arg(), arg()
  local other = mode == 'keep' and taken(target, agent, field, json)
  if other then return answered({0, n - 1, in_the_way(other)}) end
  tuples[n] = {target, agent, field, port, epoch, json}
end

for _ = 1, tonumber(arg()) do
  local port, owner, last, epoch, exposes, revision = arg(), arg(), arg(), arg(), arg(), arg()
  hold(mode, node, raw_node, port, owner, last, epoch, exposes, revision)
end

for n, tuple in ipairs(tuples) do
  local target, agent, field, port, epoch, json = unpack(tuple)
  local key = P .. 'target:' .. target
  local other = mode == 'back' and taken(target, agent, field, json)
  local present = call('HGET', key, field)
  local wanted = not other
  if faulty[key] then
    wanted = false
  elseif other then
    for _, word in ipairs({n - 1, in_the_way(other)}) do answer[#answer + 1] = word end
  elseif present then
    wanted = not older(epoch, epoch_of(present))
  elseif mode == 'back' then
    -- Since the beat was prepared the session may have ended, and its port may have been leased
    -- again.
    local held = call('HMGET', P .. 'port:' .. port, 'epoch', 'state')
    wanted = held and (not held[1] or (held[1] == epoch and held[2] == 'leased'))
  end
  if wanted then
    if present and epoch_of(present) ~= epoch then
      redis.call('HDEL', key, field .. '@' .. epoch_of(present))
    end
    redis.call('HSET', key, field, json, field .. '@' .. epoch, now)
    redis.call('PEXPIRE', key, TTL)
    index(P .. 'tuples:' .. node, target .. ' ' .. field)
    if present ~= json then
      answer[1] = answer[1] + 1
      emit('put', '{"beat":' .. now .. ',' .. string.sub(json, 2))
    end
  end
end
return answered(answer)
"""
)

# One batch of the quiet beat, with five calls for each session. It keeps alive whatever is stored
# in exactly the form that the node expects, and returns the indexes of the other lines, which PUT
# then writes. It creates nothing: a heartbeat without its tuple would look alive to the next beat.
REFRESH = (
    HEAD
    + """
local node, incarnation, record, tuples, ports = arg(), arg(), arg(), arg(), arg()
local refused = superseded(node, incarnation)
if refused then return refused end
redis.call('SET', P .. 'node:' .. node, '{"beat":' .. now .. ',' .. string.sub(record, 2), 'PX', TTL)
call('ZADD', P .. 'nodes', now, node)

-- The sets can have been lost as well: add all members, in pieces that fit Lua's stack.
local PIECE = 1000
local function index_all(set, members)
  for first = 1, #members, PIECE do
    call('SADD', set, unpack(members, first, math.min(first + PIECE - 1, #members)))
  end
  call('PEXPIRE', set, LEASE)
end

local targets, there, n = {}, {}, 0
for target, field, epoch in string.gmatch(tuples, '(%S+) (%S+) (%d+)\\n') do
  local key = P .. 'target:' .. target
  local json = call('HGET', key, field)
  if json and epoch_of(json) == epoch then
    redis.call('HSET', key, field .. '@' .. epoch, now)
    redis.call('PEXPIRE', key, TTL)
    there[#there + 1] = target .. ' ' .. field
  elseif not faulty[key] then
    targets[#targets + 1] = n
  end
  n = n + 1
end
index_all(P .. 'tuples:' .. node, there)

local leases, held
leases, there, n = {}, {}, 0
for port, epoch, revision in string.gmatch(ports, '(%S+) (%d+) (%d+)\\n') do
  local key = P .. 'port:' .. port
  held = call('HMGET', key, 'epoch', 'revision')
  if held and held[1] == epoch and held[2] == revision then
    redis.call('PEXPIRE', key, LEASE)
    there[#there + 1] = port
  elseif held then
    leases[#leases + 1] = n
  end
  n = n + 1
end
index_all(P .. 'ports:' .. node, there)
return answered({targets, leases})
"""
)

# Take the node_id: return an incarnation greater than any before, also after a wipe. PURGE follows.
# A stored value that cannot be an incarnation is an error, because no greater number can be
# derived.
START = (
    HEAD
    + """
local node, record = arg(), arg()
local key = P .. 'incarnation:' .. node
local stored = call('GET', key)
local before = incarnation_in(stored or '0')
if faulty[key] or not before or before == MOST_INCARNATION then return redis.error_reply('POISONED ' .. key) end
local incarnation = string.format('%d', math.max(before + 1, tonumber(time[1])))
redis.call('SET', key, incarnation, 'PX', LAST)
record = '{"beat":' .. now .. ',"incarnation":' .. incarnation .. ',' .. string.sub(record, 2)
redis.call('SET', P .. 'node:' .. node, record, 'PX', TTL)
call('ZREMRANGEBYSCORE', P .. 'nodes', '-inf', now - SHOWN)
call('ZREMRANGEBYSCORE', P .. 'nodes', now + LEASE / 1000, '+inf')
call('ZADD', P .. 'nodes', now, node)
ensure_feed()
return answered(incarnation)
"""
)

STOP = (
    HEAD
    + """
local node, incarnation = arg(), arg()
if superseded(node, incarnation) then return answered(0) end
redis.call('DEL', P .. 'node:' .. node, P .. 'facts:' .. node)
call('ZREM', P .. 'nodes', node)
return answered(1)
"""
)

# One batch of removing a node's tuples, and quarantining its leases, of epochs below `floor`. The
# first call moves the node's sets to purge-*, where the next start finds them if this one stops
# half-way. Members not below `floor` go back into the live sets. Returns the number of members
# seen; 0 is the end.
PURGE = (
    HEAD
    + """
local node, raw_node, floor, count, first = arg(), arg(), arg(), arg(), arg()

local function take(kind)
  local live, aside = P .. kind .. ':' .. node, P .. 'purge-' .. kind .. ':' .. node
  local there = first == '1' and call('SCARD', live)
  if there and there > 0 and call('SUNIONSTORE', aside, aside, live) then
    redis.call('DEL', live)
    redis.call('PEXPIRE', aside, LEASE)
  end
  return call('SPOP', aside, count) or {}, live
end

local tuples, live = take('tuples')
for _, member in ipairs(tuples) do
  local target, field = string.match(member, '^(%S+) (%S+)$')
  local json = target and call('HGET', P .. 'target:' .. target, field)
  if json then
    if older(epoch_of(json), floor) then drop(target, field, json) else index(live, member) end
  end
end
local ports, leased = take('ports')
for _, port in ipairs(ports) do
  local key = P .. 'port:' .. port
  local held = call('HMGET', key, 'node', 'epoch', 'state')
  if held and held[1] == raw_node and held[3] == 'leased' then
    if older(digits(held[2]), floor) then rest(key) else index(leased, port) end
  end
end
return answered(#tuples + #ports)
"""
)

LEASE = (
    HEAD
    + """
local node, raw_node, incarnation = arg(), arg(), arg()
local refused = superseded(node, incarnation)
if refused then return refused end
local port, owner, last, epoch = arg(), arg(), arg(), arg()
return answered(hold('', node, raw_node, port, owner, last, epoch))
"""
)

# Remove exactly these tuples, and quarantine exactly these leases.
REMOVE = (
    HEAD
    + """
local node, raw_node = arg(), arg()
for _ = 1, tonumber(arg()) do
  local port, owner, epoch = arg(), arg(), arg()
  local key = P .. 'port:' .. port
  local held = call('HMGET', key, 'owner', 'epoch', 'state', 'node')
  if held then
    if not held[1] then redis.call('HSET', key, 'owner', owner, 'epoch', epoch, 'node', raw_node) end
    -- Compare the node too: nodes of one PS IP may issue equal epochs, and the owner may have moved
    -- to another node.
    local ours = held[4] == raw_node and digits(held[2]) == epoch
    if not held[1] or (ours and held[1] == owner and held[3] == 'leased') then rest(key) end
    if ours or held[4] ~= raw_node then call('SREM', P .. 'ports:' .. node, port) end
  end
end
for _ = 1, tonumber(arg()) do
  local target, field, epoch, json = arg(), arg(), arg(), arg()
  local present = call('HGET', P .. 'target:' .. target, field)
  if not present or epoch_of(present) == epoch then
    drop(target, field, present or json)
    call('SREM', P .. 'tuples:' .. node, target .. ' ' .. field)
  end
end
return answered(1)
"""
)

# Return the position of the feed. Creates the feed when there is none.
CURSOR = (
    HEAD
    + """
ensure_feed()
local feed = call('HMGET', FEED, 'id', 'seq') or {}
local nodes = call('ZRANGEBYSCORE', P .. 'nodes', oldest - TTL / 1000, '+inf') or {}
return answered({feed[1], feed[2], now, nodes})
"""
)

# Return the nodes whose own record has a heartbeat. The sorted set only serves to find their names.
NODES = (
    HEAD
    + """
local found = {}
for _, node in ipairs(call('ZRANGEBYSCORE', P .. 'nodes', oldest - TTL / 1000, '+inf') or {}) do
  local record = call('GET', P .. 'node:' .. node)
  if record and alive(string.match(record, '^{"beat":([%d.]+)[,}]')) then found[#found + 1] = record end
end
return answered(table.concat(found, '\\n'))
"""
)

# Return one page of a node's live tuples as lines of JSON. This takes one reply and one call of the
# decoder, and a row that another program wrote damages no other row.
PAGE = (
    HEAD
    + """
local node, cursor, count = arg(), arg(), arg()
local page = call('SSCAN', P .. 'tuples:' .. node, cursor, 'COUNT', count) or {'0', {}}
local found = {}
for _, member in ipairs(page[2]) do
  local target, field = string.match(member, '^(%S+) (%S+)$')
  local key = P .. 'target:' .. (target or '')
  local json = target and call('HGET', key, field)
  if json then
    local beat = redis.call('HGET', key, field .. '@' .. epoch_of(json))
    if alive(beat) then found[#found + 1] = '{"beat":' .. beat .. ',' .. string.sub(json, 2) end
  end
end
return answered({page[1], table.concat(found, '\\n')})
"""
)

# Write a node's facts, and notes of departures and refusals. The note with the newest time stays
# under each key, so that a call may run late or twice. A note of a departure says on which node the
# agent has another session: this is for people, and no script concludes anything from it. Returns
# the time.
REPORT = (
    HEAD
    + """
local node, facts = arg(), arg()
redis.call('SET', P .. 'facts:' .. node, '{"at":' .. now .. ',' .. string.sub(facts, 2), 'EX', SHOWN)

local function session_beside(target, agent, node, epoch)
  local all = call('HGETALL', P .. 'target:' .. target) or {}
  local found = {}
  for i = 1, #all, 2 do found[all[i]] = all[i + 1] end
  for beat, last in pairs(found) do
    local field, at, of = string.match(beat, '^(([^/@]*)/%d+)@(%d+)$')
    local json = field and found[field]
    local means = json and epoch_of(json) == of and not (at == node and of == epoch)
    if means and alive(last) and string.find(json, agent, 1, true) then
      local read, row = pcall(cjson.decode, json)
      if read and type(row) == 'table' and type(row.node) == 'string' then return row.node end
    end
  end
end

-- A time from the future (the clock has stepped back) must not keep newer notes away.
local function time_of(json)
  local seconds = tonumber(string.match(json or '', '^{"at":([%d.]+)') or '') or 0
  return seconds <= newest and seconds or 0
end

for _ = 1, tonumber(arg()) do
  local at, life, target, agent, epoch, json = arg(), arg(), arg(), arg(), arg(), arg()
  local other = target ~= '' and session_beside(target, agent, node, epoch)
  local head = '{"at":' .. at .. (other and ',"other_node":' .. cjson.encode(other) or '')
  json = head .. ',' .. string.sub(json, 2)
  for _ = 1, tonumber(arg()) do
    local key = P .. arg()
    local stored = call('GET', key)
    if not faulty[key] and time_of(stored or '') <= tonumber(at) then redis.call('SET', key, json, 'EX', life) end
  end
end
return answered(now)
"""
)

# Write a gateway's record.
GATEWAY = (
    HEAD
    + """
local name, record = arg(), arg()
redis.call('SET', P .. 'gateway:' .. name, '{"at":' .. now .. ',' .. string.sub(record, 2), 'PX', TTL)
call('ZREMRANGEBYSCORE', P .. 'gateways', '-inf', now - TTL / 1000)
call('ZREMRANGEBYSCORE', P .. 'gateways', now + TTL / 1000, '+inf')
call('ZADD', P .. 'gateways', now, name)
return answered(1)
"""
)

# Return the rows KIND:NAME for the names of a sorted set that had a sign of life in so many
# seconds. A row tells its own time; the set only serves to find its name.
ROWS = (
    HEAD
    + """
local set, kind, seconds = arg(), arg(), arg()
local found = {}
for _, name in ipairs(call('ZRANGEBYSCORE', P .. set, now - seconds, '+inf') or {}) do
  local row = call('GET', P .. kind .. ':' .. name)
  if row then found[#found + 1] = row end
end
return answered(table.concat(found, '\\n'))
"""
)
