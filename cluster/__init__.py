"""The cluster: jobs, the fleet of workers, reports and the command line."""
