"""Verbs for images, and the page that shows images found."""
