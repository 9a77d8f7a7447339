-- One proxy's heartbeat: it renews the lease, stores the changed counts of the proxy, removes dead
-- proxies, and returns the state of the cluster. Repeating a beat changes nothing. Time is the
-- store's, in milliseconds.
--
-- KEYS[1]  {cluster}:live; the others are found by its prefix, so they are on the same node
-- ARGV     1 prefix   2 id   3 lease, 0 to leave   4 the proxy's description in JSON
--          5 time of the sums it has   6 how old sums may be   7 config version in force
--          8 a number that rises with each call of the proxy
--          9… field, n: the proxy's open connections to an upstream
-- returns  {1 if the proxy was not known, and must send all its counts; its index; the number of
--           proxies; config version; time of the sums; the sums if newer}
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local prefix, id, lease = ARGV[1], ARGV[2], tonumber(ARGV[3])
local live, rank, info, sum = KEYS[1], prefix .. 'rank', prefix .. 'info', prefix .. 'sum'
local turn = prefix .. 'turn'
local function place(of) return redis.sha1hex(of) .. of end
local function text(n) return string.format('%.0f', n) end

local function count(of, field, n)
	local own = prefix .. 'own:' .. of
	local change = n - tonumber(redis.call('HGET', own, field) or 0)
	if n == 0 then
		redis.call('HDEL', own, field)
	else
		redis.call('HSET', own, field, text(n))
	end
	if change ~= 0 and redis.call('HINCRBY', sum, field, text(change)) <= 0 then
		redis.call('HDEL', sum, field)
	end
end

local function bury(who)
	for _, field in ipairs(redis.call('HKEYS', prefix .. 'own:' .. who)) do
		count(who, field, 0)
	end
	redis.call('ZREM', live, who)
	redis.call('ZREM', rank, place(who))
	redis.call('HDEL', info, who)
	redis.call('HDEL', turn, who)
end

for _, dead in ipairs(redis.call('ZRANGEBYSCORE', live, '-inf', text(now), 'LIMIT', 0, 8)) do
	bury(dead)
end
if lease == 0 then
	bury(id)
	return {0, 0, redis.call('ZCARD', rank), 0, '0', ''}
end

-- A call that timed out may arrive after the next one, on another connection. It is out of date.
if tonumber(redis.call('HGET', turn, id) or 0) > tonumber(ARGV[8]) then
	return redis.error_reply('LATE a newer beat of this proxy is here')
end
redis.call('HSET', turn, id, ARGV[8])

local joined = 0
if not redis.call('ZSCORE', live, id) then
	joined = 1
	redis.call('ZADD', rank, 0, place(id))
end
redis.call('ZADD', live, text(now + lease), id)
redis.call('HSET', info, id, ARGV[4])
for i = 9, #ARGV, 2 do
	count(id, ARGV[i], tonumber(ARGV[i + 1]))
end

local config = prefix .. 'config'
if tonumber(redis.call('HGET', config, 'seen') or 0) < tonumber(ARGV[7]) then
	redis.call('HSET', config, 'seen', ARGV[7])
end

-- The sums as one text, which is made at most once per interval for all proxies.
local snap = prefix .. 'snap'
local at, sums = redis.call('HGET', snap, 't') or '0', ''
if now - at >= tonumber(ARGV[6]) or tonumber(at) > now then
	at, sums = text(now), cjson.encode(redis.call('HGETALL', sum))
	redis.call('HSET', snap, 't', at, 's', sums)
elseif at ~= ARGV[5] then
	sums = redis.call('HGET', snap, 's')
end
if at == ARGV[5] then sums = '' end

return {joined, redis.call('ZRANK', rank, place(id)), redis.call('ZCARD', rank),
	tonumber(redis.call('HGET', config, 'version') or 0), at, sums}
