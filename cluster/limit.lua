-- One call of one proxy for one limit. Time is the store's, in microseconds.
--
-- KEYS[1]  the limit's hash: tat   when all tokens will have been refilled
--                            o:ID  "n until": open connections of a proxy, and when to forget them
--                            b:ID  "n until": bytes a second a proxy could use, -1: no bound
-- ARGV     1 the proxy   2 burst (0: no bound)   3 every   4 max open (0: no limit)
--          5 bytes a second (0: no limit)
--          6 tokens wanted   7 returned   8 admitted while the store was away
--          9 open connections of the proxy: "+n" or "-n" is the change, "=n" the number
--         10 1: a connection asks to be admitted
--         11 bytes a second that it could use, -1 for no bound, 0 if it moves none
-- returns  {tokens granted, "" or why none: "rate", "open", µs until asking again is useful,
--           bytes a second that the proxy may move}
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local key, mine = KEYS[1], 'o:' .. ARGV[1]
local burst, every = tonumber(ARGV[2]), tonumber(ARGV[3])
local max, rate = tonumber(ARGV[4]), tonumber(ARGV[5])
local wanted, given, owed = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local function text(n) return string.format('%.0f', n) end

local tat, own, others, bytes = now, 0, 0, {}
local h = redis.call('HGETALL', key)
for i = 1, #h, 2 do
	local field, value = h[i], h[i + 1]
	if field == 'tat' then
		tat = math.max(tonumber(value), now)
	else
		local n, till = string.match(value, '^(%S+) (%d+)$')
		if tonumber(till) <= now then
			redis.call('HDEL', key, field)
		elseif string.sub(field, 1, 2) == 'b:' then
			if field ~= 'b:' .. ARGV[1] then
				bytes[#bytes + 1] = tonumber(n)
			end
		elseif field == mine then
			own = tonumber(n)
		else
			others = others + n
		end
	end
end

if string.sub(ARGV[9], 1, 1) == '=' then
	own = tonumber(string.sub(ARGV[9], 2))
else
	own = math.max(own + tonumber(ARGV[9]), 0)
end
if burst > 0 then
	tat = math.max(tat - given * every, now)
	tat = math.max(tat, math.min(tat + owed * every, now + burst * every))
end

local granted, why, wait = 0, '', 0
if ARGV[10] == '1' and max > 0 and own + others >= max then
	why, wait = 'open', 100000
elseif burst > 0 and wanted > 0 then
	granted = math.min(wanted, math.floor((now + burst * every - tat) / every))
	if granted <= 0 then
		granted, why, wait = 0, 'rate', tat + every - now - burst * every
	end
	tat = tat + granted * every
end
if ARGV[10] == '1' and why == '' then
	own = own + 1
end

local worth = 0 -- how long to keep the key
if tat > now then
	redis.call('HSET', key, 'tat', text(tat))
	worth = tat - now
end
if max > 0 then
	if own > 0 then
		redis.call('HSET', key, mine, text(own) .. ' ' .. text(now + 6000000))
	else
		redis.call('HDEL', key, mine)
	end
	if own + others > 0 then
		worth = math.max(worth, 6000000)
	end
end
-- A proxy that could use less than an even part of the bytes leaves the rest to the others. The
-- result is the part that this proxy would get without such a bound, so that it can grow.
local part = rate
if rate > 0 then
	local could = tonumber(ARGV[11])
	if could ~= 0 then
		redis.call('HSET', key, 'b:' .. ARGV[1], text(could) .. ' ' .. text(now + 300000))
		worth = math.max(worth, 300000)
	end
	table.sort(bytes, function(a, b) return a >= 0 and (b < 0 or a < b) end)
	local left, sharing = rate, #bytes + 1
	for _, n in ipairs(bytes) do
		if n < 0 or n >= left / sharing then
			break
		end
		left, sharing = left - n, sharing - 1
	end
	part = math.max(math.floor(left / sharing), 1)
end

if worth > 0 then
	redis.call('PEXPIRE', key, text(math.ceil(worth / 1000) + 1000))
else
	redis.call('DEL', key)
end
return {granted, why, math.ceil(wait), part}
