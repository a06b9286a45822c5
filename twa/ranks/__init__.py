"""Many ranks: models that FSDP2 shards, and replicas that sum the gradient of the coefficients."""
