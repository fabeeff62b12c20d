"""What can go wrong in the cluster.

ClusterError
└── FleetError   no worker could be had, or they died one after the other; the job stays as it is
"""


class ClusterError(Exception):
    """The cluster could not do its work."""


class FleetError(ClusterError):
    """No worker could be had, or workers died one after the other. What is done is kept, and the job can be resumed."""
