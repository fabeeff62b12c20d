"""The fleet: Ray gives workers their places; who does what is decided in the database. The only room that knows Ray.

    keeper      a process that keeps the supervisor's alive, whatever becomes of Ray, and lets no second fleet in
    process     the supervisor's process
    supervisor  the rounds: look at the demand, hire, assign, listen, replace, release
    demand      what jobs need, and how many workers each of them gets
    members     what the supervisor knows of its workers, and of the nodes that are bad for them
    placement   Ray itself: connecting, nodes, what they have, what is asked of an autoscaler
    actor       a worker as Ray runs it

A Ray cluster is disposable. A worker that dies is replaced, its lease taken back, and nothing else remembers it.
`cluster.ray_environment.set_up_ray` is to be called before `supervisor` is imported for the first time.
"""
