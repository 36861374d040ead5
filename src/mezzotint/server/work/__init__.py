"""Requests and endpoints from admission to result, without HTTP and without SQL text."""
