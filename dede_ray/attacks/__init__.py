"""Attacks: triggers, and what plants them."""
