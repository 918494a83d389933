"""Attribution patching: estimates of all patches of a sweep, or of all edges of a model, from gradients."""
