-- For the broker's scripts (producer/latentline/scripts): Lua 5.1 in a sandbox.
std = "lua51"
max_line_length = 130
read_globals = {
  "redis", "cjson", "ARGV",
  "const", "keys", -- written by scripts/names.py
}
local LIBRARIES = {"clock", "events", "fleet", "jobs", "memory_bound", "outbox", "signals", "view", "wakeups"} -- each declared by its own file in lib/
for _, name in ipairs(LIBRARIES) do read_globals[#read_globals + 1] = name end
files["**/scripts/lib/*.lua"].ignore = {"241"} -- the library's table is read by the scripts behind it
