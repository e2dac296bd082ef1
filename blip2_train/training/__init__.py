"""Lightning modules and callbacks: the only place that knows the trainer."""
