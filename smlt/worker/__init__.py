"""What runs on a worker: data, minibatches, the trainer, checkpoints."""
