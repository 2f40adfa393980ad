-- A written version: replaces an older one and its writer's own token; breaks any other token; creates nothing.
-- KEYS[1] the key   ARGV[1] the writer's token   ARGV[2] the version   ARGV[3] the value   ARGV[4] milliseconds
local head = redis.call('GETRANGE', KEYS[1], 0, 32)
local kind = string.sub(head, 1, 1)
if kind == '' then
    return 0
end
if kind == 'E' or kind == 'D' then
    if tonumber(string.sub(head, 2, 17)) >= tonumber(ARGV[2]) then
        return 0
    end
elseif head ~= ARGV[1] then
    redis.call('DEL', KEYS[1])
    return 0
end
redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4])
return 1
