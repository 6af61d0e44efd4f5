"""A demonstration of topiarist on a small real model, runnable on a laptop CPU."""
