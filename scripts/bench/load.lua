-- wrk script. Arguments: mode (fill | get | post), number of keys. One thread (-t1).
--   fill  writes every key once, then ends wrk at once and prints `FILLED <errors>`
--   get   reads random keys; post writes random keys; both end with `RESULT <per second> <p50 ms> <p99 ms> <errors>`

local HEADERS = { ["Content-Type"] = "application/json" }

function init(args)
  local mode, keys = args[1], tonumber(args[2])
  for name, value in pairs(wrk.headers) do HEADERS[name] = value end
  math.randomseed(os.time())

  -- Requests are made beforehand: wrk shares the cores with what it measures.
  local requests = {}
  for n = 1, keys do
    local path = "/v1/cache/bench-" .. n
    if mode == "get" then
      requests[n] = wrk.format("GET", path)
    else
      local value = string.rep("v", 94) .. string.format("%06d", n)
      requests[n] = wrk.format("POST", path, HEADERS, '{"value":"' .. value .. '"}')
    end
  end

  if mode ~= "fill" then
    request = function() return requests[math.random(keys)] end
    return
  end

  local sent, answered, errors = 0, 0, 0
  request = function()
    sent = sent + 1
    return requests[(sent - 1) % keys + 1]
  end
  response = function(status)
    answered = answered + 1
    if status >= 300 then errors = errors + 1 end
    -- A little over one round, so that no key is still on its way.
    if answered == keys + 1000 then
      print("FILLED " .. errors)
      io.stdout:flush()
      os.exit(0)
    end
  end
end

function done(summary, latency)
  local failed = summary.errors
  print(string.format("RESULT %.0f %.2f %.2f %d", summary.requests / summary.duration * 1e6,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000,
    failed.status + failed.connect + failed.read + failed.write + failed.timeout))
end
