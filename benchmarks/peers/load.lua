-- For wrk: sends the pictures of a list in turn, each as a form; prints what happened as one line of JSON.
local requests, turn = {}, 0
local head = '--automl-cv\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n' ..
             'Content-Type: image/jpeg\r\n\r\n'

function init(args)
  for name in io.lines(args[1]) do
    local file = io.open(name, "rb")
    local headers = {["Content-Type"] = "multipart/form-data; boundary=automl-cv"}
    local body = head .. file:read("*a") .. "\r\n--automl-cv--\r\n"
    file:close()
    requests[#requests + 1] = wrk.format("POST", nil, headers, body)
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format('\n{"done": %d, "failed": %d, "broken": %d, "seconds": %.6f, "p50_ms": %.3f, "p99_ms": %.3f}\n',
    summary.requests, e.status, e.connect + e.read + e.write + e.timeout, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
