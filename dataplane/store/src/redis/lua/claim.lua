-- Makes sure that what this database holds was put there by birb-nest during this run of the server.
-- KEYS[1] the marker   ARGV[1] what every key of ours begins with
-- Returns {what was done, seconds, microseconds}; see claim() in session.rs.
local info = redis.call('INFO', 'server') .. redis.call('INFO', 'replication')
local run = string.match(info, 'run_id:(%x+)')
local time = redis.call('TIME')
if tonumber(string.match(info, 'redis_version:(%d+)')) < 7 then
    return {'old', time[1], time[2]}
end
if string.match(info, 'role:slave') then
    return {'replica', time[1], time[2]}
end
local marker = redis.call('GET', KEYS[1])
if marker == run then
    -- Changes nothing, and fails when the server takes no writes (NOREPLICAS, MISCONF): what is older could not be
    -- deleted. A server without memory takes it: there it can be.
    redis.call('PERSIST', KEYS[1])
    return {'kept', time[1], time[2]}
end
local done = 'flushed'
if not marker then
    if redis.call('DBSIZE') == 0 then
        done = 'claimed'
    else
        -- No marker: evicted, or flushed away and filled again; or this is somebody else's database.
        -- All keys are looked at: it takes a moment, and happens once in a blue moon.
        local cursor = '0'
        repeat
            local page = redis.call('SCAN', cursor, 'COUNT', 1000)
            cursor = page[1]
            for _, key in ipairs(page[2]) do
                if string.sub(key, 1, #ARGV[1]) ~= ARGV[1] then
                    return {'foreign', time[1], time[2]}
                end
            end
        until cursor == '0'
    end
end
redis.call('FLUSHDB', 'ASYNC')
redis.call('SET', KEYS[1], run)
return {done, time[1], time[2]}
