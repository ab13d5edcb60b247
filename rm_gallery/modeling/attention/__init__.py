"""Attention over packed groups: one rule, and a kernel for each kind of device."""
