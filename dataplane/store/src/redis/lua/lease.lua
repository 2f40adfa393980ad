-- A writer's token, before it publishes: only onto a place that is empty, or known to have no value.
-- KEYS[1] the key   ARGV[1] the token   ARGV[2] its life in milliseconds
local kind = redis.call('GETRANGE', KEYS[1], 0, 0)
if kind == '' or kind == 'N' then
    redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
    return 1
end
return 0
