-- Makes sure that what this database holds was put there by birb-nest during this run of the server.
-- KEYS[1] the marker   ARGV[1] what every key of ours begins with
-- Returns {what was done, seconds, microseconds}; see claim() in session.rs.
local info = redis.call('INFO')
local run = string.match(info, 'run_id:(%x+)')
local time = redis.call('TIME')
if string.match(info, 'role:slave') then
    return {'replica', time[1], time[2]}
end
local marker = redis.call('GET', KEYS[1])
if marker == run then
    return {'kept', time[1], time[2]}
end
local done = 'flushed'
if not marker then
    if redis.call('DBSIZE') == 0 then
        done = 'claimed'
    else
        -- No marker: evicted, or flushed away and filled again; or this is somebody else's database.
        for _ = 1, 16 do
            local key = redis.call('RANDOMKEY')
            if string.sub(key, 1, #ARGV[1]) ~= ARGV[1] then
                return {'foreign', time[1], time[2]}
            end
        end
    end
end
redis.call('FLUSHDB')
redis.call('SET', KEYS[1], run)
return {done, time[1], time[2]}
