"""The Lua behind :mod:`latentline.records`. Each script is one transition; time is the server's own.

Keys are derived inside of the scripts from the ids they are given: one Redis (with replicas), no cluster.
The state machine is drawn in ``docs/job-states.md``.
"""
