-- Replaces the configuration, unless it has changed since the new one was made from it.
--
-- KEYS[1]  {cluster}:config
-- ARGV     1 version it was made from   2 text   3 by whom
-- returns  {1, the new version}, or {0, the version there is}
local t = redis.call('TIME')
local version = tonumber(redis.call('HGET', KEYS[1], 'version') or 0)
if version ~= tonumber(ARGV[1]) then
	return {0, version}
end
-- Proxies do not go back to a lower version, so a store that has lost its data counts on from the
-- highest one that a proxy runs.
local seen = tonumber(redis.call('HGET', KEYS[1], 'seen') or 0)
version = math.max(version, seen) + 1
redis.call('HSET', KEYS[1], 'version', version, 'text', ARGV[2], 'by', ARGV[3],
	'at', string.format('%.0f', t[1] * 1000 + math.floor(t[2] / 1000)))
return {1, version}
