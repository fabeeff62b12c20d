"""Schedules: jobs that recur, held against a baseline by a gate, and people who are told.

`spec.py` says what may be asked for, `cron.py` when it fires, `latest.py` what `latest` is at that moment. `ticking.py`
looks what is due, `judging.py` what ended, against what `lines.py` finds, and `webhooks.py` sends. `keeping.py` is what
the command line and the server call, `remote.py` the same over HTTP.
"""
