"""Federations of real machines, on Flower (extra `flower`).

`messages` is what both sides say, `node` answers it with a client's data, `federation` asks, `ledger` runs
the rounds; none of these knows Flower. `records` and `post` carry messages in Flower's; `runtime` carries
them through a SuperLink of one's own, `gateway` shields it, `certs` makes keys, and `serve` and `join` are
the two commands.

For those who run Flower's own tools `app` is what these start, with `plain` on the server and on each node
a `worker` that keeps the model, found by `warm` and spoken to as `local` says; `app_folder` is what `flwr
run` is given.
"""
