"""Other systems' parts, given our weights, so that they compute the same thing and can be timed beside ours."""
