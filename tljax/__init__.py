"""Transfer learning in JAX: parameters are data, transfer is tree surgery, training is one step."""
