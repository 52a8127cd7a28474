"""Judges of answers behind one interface: a list of phrases, a classifier, a causal model, an HTTP endpoint."""
