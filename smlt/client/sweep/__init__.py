"""`smlt sweep`: many runs of one task with other hyper-parameters, on one store, of which the best go on (docs/sweep.md)."""
