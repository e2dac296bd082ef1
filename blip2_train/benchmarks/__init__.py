"""What `blip2-benchmark` measures, one module per subject."""
