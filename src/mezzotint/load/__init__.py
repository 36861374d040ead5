"""Load that does not wait for answers: what arrives when, how it is sent, what came of it."""
