"""The HTTP API: `/v1` over a record, for clients, browsers and probes.

`app.py` puts the rooms together; `problems.py` says what went wrong, `access.py` who may, `limits.py` how much. Then
one room a noun: `jobs`, `comparing`, `rows` (completions and tokens), `questions`, `watching` (events), `uploads`,
`sessions`, `known`, `health`.
"""
