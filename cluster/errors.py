"""What can go wrong in the cluster.

ClusterError
└── FleetError   no worker could be had, or they died one after the other; the job stays as it is
    └── RayLost  Ray is gone, and its workers with it; another one can go on
"""


class ClusterError(Exception):
    """The cluster could not do its work."""


class FleetError(ClusterError):
    """No worker could be had, or workers died one after the other. What is done is kept, and the job can be resumed."""


class RayLost(FleetError):
    """Ray is gone, and its workers with it. What is done is kept, and whoever connects to the next one goes on."""
