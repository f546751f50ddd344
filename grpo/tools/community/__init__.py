"""Feedback from people: collect, merge, train, gate."""
