"""dede_ray: which samples of an image(-text) corpus are poisoned, how sure we are, and why."""

__version__ = "0.2.0"
