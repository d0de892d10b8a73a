"""Checks of what a build is given and of what it makes."""
