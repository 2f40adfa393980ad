-- A lookup that ended without an answer: takes its own token away.
-- KEYS[1] the key   ARGV[1] the token
if redis.call('GETRANGE', KEYS[1], 0, 32) == ARGV[1] then
    return redis.call('DEL', KEYS[1])
end
return 0
