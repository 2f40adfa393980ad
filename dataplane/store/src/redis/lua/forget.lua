-- Deletes what is older than a version that is known to exist: older values, all tokens, all negative entries.
-- KEYS[i] the keys   ARGV[i] their versions
local n = 0
for i, key in ipairs(KEYS) do
    local head = redis.call('GETRANGE', key, 0, 16)
    local kind = string.sub(head, 1, 1)
    local versioned = kind == 'E' or kind == 'D'
    if kind ~= '' and not (versioned and tonumber(string.sub(head, 2, 17)) >= tonumber(ARGV[i])) then
        n = n + redis.call('DEL', key)
    end
end
return n
