"""Results as pages that open in a browser without a network."""
