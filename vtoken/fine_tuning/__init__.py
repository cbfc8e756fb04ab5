"""Training of strategies that have weights, on conversations about images and videos."""
