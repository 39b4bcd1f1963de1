"""Figures, galleries, report and model card."""
