-- One job as a reader sees it; it changes nothing.
--
-- Returns {now, the record, its queue position or nil}. The record is empty where there is none.
-- uses: view

local id = unpack(ARGV)

return view.of(id)
