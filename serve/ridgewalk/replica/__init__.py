"""The Ray side: engine replicas, rank actors, executors and the token channel."""
