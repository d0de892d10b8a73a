"""Texts, pictures and scored pairs for calibration and checks."""
