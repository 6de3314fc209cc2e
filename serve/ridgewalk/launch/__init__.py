"""Starting and ending a service from the command line: a Ray of its own, or a cluster that is there."""
