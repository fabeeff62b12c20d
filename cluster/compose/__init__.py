"""`docker-compose.yml` without a container engine: the same processes with the same environment, on this machine.

`python -m cluster.compose up` is for a laptop or a CI machine that has no Docker; see docs/deploy.md.
"""
