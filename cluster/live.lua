-- Returns the state of the live proxies.
--
-- KEYS[1]  {cluster}:live
-- ARGV     1 prefix   2 "all": also each proxy's own counts
-- returns  {now in ms, {id, lease end, …}, {id, info, …}, {field, n, …} sums, config version,
--           {id, {field, n, …}, …}}
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local prefix = ARGV[1]
local live = redis.call('ZRANGEBYSCORE', KEYS[1], string.format('(%.0f', now), '+inf', 'WITHSCORES')
local own = {}
if ARGV[2] == 'all' then
	for i = 1, #live, 2 do
		own[i], own[i + 1] = live[i], redis.call('HGETALL', prefix .. 'own:' .. live[i])
	end
end
return {now, live, redis.call('HGETALL', prefix .. 'info'), redis.call('HGETALL', prefix .. 'sum'),
	tonumber(redis.call('HGET', prefix .. 'config', 'version') or 0), own}
