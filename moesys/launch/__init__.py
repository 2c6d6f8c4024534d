"""From a configuration to a job in the queue of a cluster, and what becomes of it."""
