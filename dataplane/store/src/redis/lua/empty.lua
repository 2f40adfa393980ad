-- Empties the database, which stays claimed for this run of the server.
-- KEYS[1] the marker
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
redis.call('FLUSHDB', 'ASYNC')
redis.call('SET', KEYS[1], run)
