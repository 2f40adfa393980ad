-- Empties the database, which stays claimed for this run of the server. One that is not, or not any more, is left alone: it may be
-- somebody else's, and else the next claim empties it.
-- KEYS[1] the marker
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
if redis.call('GET', KEYS[1]) ~= run then
    return redis.error_reply('UNCLAIMED the database has not been claimed for this run of the server')
end
redis.call('FLUSHDB', 'ASYNC')
redis.call('SET', KEYS[1], run)
