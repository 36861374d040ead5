"""Comparisons with what a user would pick instead, and checks that are too long for the tests."""
