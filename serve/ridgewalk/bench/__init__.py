"""`ridgewalk bench`: a load test that joins what clients saw (`aiperf`) with what the service measured meanwhile.

Lengths and prompts are ours (`profiles`, `trace_file`, `prompts`), sending and timing is aiperf's (`environment`,
`aiperf`), the service's side is read from `/metrics` (`service_window`). `report` holds all of it as data; `figures`,
`findings`, `plots` and `page` show it.
"""
