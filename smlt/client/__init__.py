"""What runs beside the user: scheduler, resource manager, executors, command line."""
