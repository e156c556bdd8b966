"""The scripts that keep a roster: who holds which rank in a session of a job (`smlt.store.parameter` has the keys)."""

from __future__ import annotations

# KEYS: session pointer, roster prefix, current generation.
# ARGV: rank, world size, worker id, holder (JSON), fresh session name, ttl ms, the worker's generation, its tuning, its nodes.
# The generation is compared here, not before: one opened in between must fence this worker too (invariant 4).
REGISTER = """
local current = redis.call('GET', KEYS[3])
if current and tonumber(current) > tonumber(ARGV[7]) then return {'fenced', current} end
local session = redis.call('GET', KEYS[1])
local roster = session and KEYS[2] .. session
if not session or (tonumber(redis.call('HGET', roster, 'left') or '0') > 0) then
  session = ARGV[5]
  roster = KEYS[2] .. session
end
local size = redis.call('HGET', roster, 'world_size')
if size and size ~= ARGV[2] then return {'size', size} end
local holder = redis.call('HGET', roster, ARGV[1])
if holder and cjson.decode(holder)['worker_id'] ~= ARGV[3] then return {'taken', holder} end
redis.call('HSET', roster, 'world_size', ARGV[2], ARGV[1], ARGV[4])
redis.call('HSETNX', roster, 'tuning', ARGV[8])
redis.call('HSETNX', roster, 'nodes', ARGV[9])
redis.call('PEXPIRE', roster, ARGV[6])
redis.call('SET', KEYS[1], session, 'PX', ARGV[6])
return {'ok', session, redis.call('HGET', roster, 'tuning'), redis.call('HGET', roster, 'nodes')}
"""

# KEYS: session pointer, roster. ARGV: rank, worker id, session. Returns 1 when nobody is left.
LEAVE = """
local holder = redis.call('HGET', KEYS[2], ARGV[1])
if not holder or cjson.decode(holder)['worker_id'] ~= ARGV[2] then return 0 end
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('HINCRBY', KEYS[2], 'left', 1)
if redis.call('HLEN', KEYS[2]) > 4 then return 0 end
redis.call('DEL', KEYS[2])
if redis.call('GET', KEYS[1]) == ARGV[3] then redis.call('DEL', KEYS[1]) end
return 1
"""


# KEYS: session pointer, roster. ARGV: rank, session.
WITHDRAW = """
redis.call('HDEL', KEYS[2], ARGV[1])
if redis.call('HLEN', KEYS[2]) > 3 + redis.call('HEXISTS', KEYS[2], 'left') then return 0 end
redis.call('DEL', KEYS[2])
if redis.call('GET', KEYS[1]) == ARGV[2] then redis.call('DEL', KEYS[1]) end
return 1
"""

# After the store has lost its data: this worker's entry as it was. KEYS: session pointer, roster, current generation.
# ARGV: rank, world size, holder (JSON), session, ttl ms, the worker's generation, tuning, nodes.
# The pointer is never set over another session: who joins there has nothing to do with this one.
RESTORE = """
local current = redis.call('GET', KEYS[3])
if current and tonumber(current) > tonumber(ARGV[6]) then return 0 end
redis.call('HSET', KEYS[2], 'world_size', ARGV[2], ARGV[1], ARGV[3])
redis.call('HSETNX', KEYS[2], 'tuning', ARGV[7])
redis.call('HSETNX', KEYS[2], 'nodes', ARGV[8])
redis.call('PEXPIRE', KEYS[2], ARGV[5])
redis.call('SET', KEYS[1], ARGV[4], 'NX', 'PX', ARGV[5])
return 1
"""
