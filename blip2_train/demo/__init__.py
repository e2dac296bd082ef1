"""The whole recipe on a laptop, offline, with proof that it learned: `blip2-demo`."""
