"""Carries out a plan and yields events."""
