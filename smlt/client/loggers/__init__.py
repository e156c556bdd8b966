"""Where a run is told of beside its own folder: TensorBoard, MLflow, Prometheus."""
