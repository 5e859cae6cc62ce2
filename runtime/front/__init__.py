"""The parts of the front: what a request may say, who may ask, how many at once, how bytes flow; runtime/serve.py puts them together."""
