"""Ranks: process group, launchers, heartbeat, signals."""
