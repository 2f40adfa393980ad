-- What a lookup found: only in place of its own token.
-- KEYS[1] the key   ARGV[1] the token   ARGV[2] the value   ARGV[3] milliseconds
if redis.call('GETRANGE', KEYS[1], 0, 32) == ARGV[1] then
    redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
    return 1
end
return 0
