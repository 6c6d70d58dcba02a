"""Federations of real machines, on Flower (extra `flower`).

`messages` is what both sides say, `node` answers it with a client's data, `federation` asks; none of these
knows Flower. `runtime` carries messages through it, `gateway` shields it, `certs` makes keys, and `serve` and
`join` are the two commands.
"""
