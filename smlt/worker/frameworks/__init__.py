"""One adapter for each framework, imported when a task of it runs."""
