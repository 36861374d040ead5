"""The revisions in order. One that has been published is never changed."""
